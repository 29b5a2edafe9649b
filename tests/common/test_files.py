"""A file is replaced by a whole one or not at all."""

import os
from pathlib import Path

import pytest

from common.files import distinct_names, folder_name, replacing


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
