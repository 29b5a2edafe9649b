"""A file is replaced by a whole one or not at all; a folder has one holder; a name stays in its folder."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import (
    InUseError,
    check_free,
    csv_text,
    distinct_names,
    folder_name,
    held,
    inside,
    plain_name,
    printable,
    replacing,
)


@pytest.mark.parametrize("shared", [True, False])
def test_the_target_changes_only_at_the_end(tmp_path: Path, shared: bool) -> None:
    target = tmp_path / "new" / "a.txt"
    with replacing(target, shared) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == target.parent
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a.txt").write_text("before")

    def fail() -> None:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "before"}


def test_what_the_system_refuses_is_said_with_the_target(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    message = r"cannot write .*folder/a\.txt \(.*\); what was"
    with pytest.raises(OSError, match=message) as caught, replacing(tmp_path / "folder" / "a.txt"):
        pytest.fail("there is no folder to write to")
    assert "\n" not in str(caught.value)


def test_only_a_shared_target_has_a_temporary_of_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        for shared in (True, False):
            with replacing(tmp_path / "a.txt", shared) as temporary:
                temporary.touch()
                names.append(temporary.name)
    assert names == [".a.txt.1.tmp", ".a.txt.tmp", ".a.txt.2.tmp", ".a.txt.tmp"]


def test_names_share_no_folder() -> None:
    names = ["my set", "my_set", "a/b", "a-b", "a_b", "..", "__", ".a", "_a", "Set5"]
    folders = [folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    assert all("/" not in folder and not folder.startswith(".") for folder in folders)
    assert folder_name("Set5_x4.v1-b") == "Set5_x4.v1-b"


def test_alike_names_get_the_folder_above_then_a_number_and_others_stay() -> None:
    assert distinct_names(["A", "B"], ["x/A", "x/B"]) == ["A", "B"]
    assert distinct_names(["A", "A", "B"], ["x/A", "y/A", "y/B"]) == ["x_A", "y_A", "B"]
    assert distinct_names(["A", "A", "a"], ["x/A.txt", "x/A", "x/a"]) == ["x_A", "x_A-2", "x_a-3"]
    assert distinct_names(["my set", "my_set", "my_set-2", "my set"]) == ["my set", "my_set-3", "my_set-2", "my set-4"]


HOLDER = """
import sys, time
from common.files import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_an_output_folder_is_empty_or_of_the_same_command(tmp_path: Path) -> None:
    check_free(tmp_path / "new")
    (tmp_path / ".lock").touch()
    check_free(tmp_path)
    (tmp_path / "mine.txt").touch()
    for own in (None, "cache"):
        with pytest.raises(FileExistsError, match="mine"):
            check_free(tmp_path, own)
    with pytest.raises(FileExistsError, match="mine"):
        check_free(tmp_path / "mine.txt")
    (tmp_path / "cache").mkdir()
    check_free(tmp_path, "cache")


class TestHeld:
    def test_a_folder_is_one_process_s_until_it_lets_go_or_dies(self, tmp_path: Path) -> None:
        words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(InUseError, match=rf"run is in use by process {process.pid} on {socket.gethostname()}; wait"),
            held(tmp_path / "run"),
        ):
            pass
        process.kill()
        process.wait()
        with held(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").exists(), "the dead one's file is taken over"
        assert not list((tmp_path / "run").iterdir())
        with held(tmp_path / "run"):
            pass

    def test_a_forked_process_neither_keeps_nor_removes_it(self, tmp_path: Path) -> None:
        go_on, end = os.pipe()
        with held(tmp_path):
            child = os.fork()
            if not child:
                os.close(end)
                os.read(go_on, 1)  # until the parent has let go
                os._exit(0)
        with held(tmp_path):
            os.close(end)
            os.waitpid(child, 0)
            assert (tmp_path / ".lock").exists()
        os.close(go_on)

    def test_a_file_system_without_locks_is_named_and_the_work_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        with held(tmp_path / "run"):
            assert "this file system has no locks (No locks available)" in caplog.text

    def test_a_link_in_the_lock_s_place_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
        with pytest.raises(OSError, match=r"\.lock"), held(tmp_path / "run"):
            pass
        assert not (tmp_path / "mine").exists()


class TestInside:
    @pytest.mark.parametrize(
        "name",
        ["../a", "a/../../b", "/etc/a", "..", ".", "", "a/..", "C:\\a", "C:/a", "..\\a", "\\\\server\\a", "a\0b"],
    )
    def test_a_name_that_leads_out_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match="is not a name of a file inside"):
            inside(tmp_path, name)

    @pytest.mark.parametrize("name", ["a", "a/b.png", "a..b", "...", "a: b", "~", "-x", "a b\n"])
    def test_any_other_name_is_taken(self, tmp_path: Path, name: str) -> None:
        assert inside(tmp_path / "out", name) == tmp_path / "out" / name

    @pytest.mark.parametrize("name", ["link/a.png", "link", "link/b/c.png"])
    def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_taken(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "out" / "real").mkdir(parents=True)
        (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=r"leads out of .*out by a link"):
            inside(tmp_path / "out", name)
        (tmp_path / "out" / "link").unlink()
        (tmp_path / "out" / "link").symlink_to(tmp_path / "out" / "real")
        assert inside(tmp_path / "out", name) == tmp_path / "out" / name

    def test_an_output_folder_that_is_a_link_itself_is_the_user_s_choice(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "disk")
        assert inside(tmp_path / "out", "a/b") == tmp_path / "out" / "a" / "b"


def test_a_link_in_the_temporary_file_s_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.txt.tmp").symlink_to(tmp_path / "mine")
    with replacing(tmp_path / "a.txt", shared=False) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-a.png", "@x", "\tx", "\rx"])
def test_a_cell_that_a_spreadsheet_would_compute_becomes_text(text: str) -> None:
    assert csv_text(text) == f"'{text}"
    assert csv_text(f"a{text}") == f"a{text}"


def test_a_plain_name_can_be_printed_and_is_no_other_names() -> None:
    for name in ("a/b c.v1", "\u7167\u7247", "it's", "-a.", "x" * 200):
        assert plain_name(name) == name
    odd = ["a\nb", "a\\nb", "a\tb", "b\udce9", "b\\xe9", "x" * 201, "x" * 202, "\xe9" * 101, "a/\u2028/c"]
    plain = [plain_name(name) for name in odd]
    assert len(set(plain)) == len(odd)
    assert plain[0].startswith("a\\nb~")
    assert plain[3].startswith("b\\xe9~")
    for name in plain:
        assert name.isprintable()
        assert max(len(part.encode("utf-8")) for part in name.split("/")) <= 200
    assert printable("a\nb\udce9 \xe9") == "a\\nb\\xe9 \xe9"


@pytest.mark.parametrize("text", ["-1.5", "+3", "-1e-05", "", "a", "cat_r0c0_s1"])
def test_a_number_and_any_other_text_stay_as_they_are(text: str) -> None:
    assert csv_text(text) == text
