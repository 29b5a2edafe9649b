"""No file is replaced that was not made here as it is now."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.files import replacing
from common.made import RECORD, begin, is_made, refuse_alike, refuse_foreign


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_what_was_made_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    begin(tmp_path)
    ours, foreign = tmp_path / "sub" / "ours.txt", tmp_path / "sub" / "foreign.txt"
    write(ours, "one")
    write(ours, "two")
    foreign.write_text("somebody's")
    with pytest.raises(FileExistsError, match=r"foreign\.txt; move it away, or give another output"):
        write(foreign, "three")
    assert (ours.read_text(), foreign.read_text()) == ("two", "somebody's")
    assert sorted(os.listdir(tmp_path / "sub")) == ["foreign.txt", "ours.txt"]


def test_what_somebody_changed_or_swapped_is_theirs(tmp_path: Path) -> None:
    begin(tmp_path)
    for name in "abc":
        write(tmp_path / name, name)
    (tmp_path / "a").write_text("changed")
    (tmp_path / "b").unlink()
    (tmp_path / "b").symlink_to(tmp_path / "c")
    (tmp_path / "d").symlink_to(tmp_path / "nowhere")
    (tmp_path / "e").write_text("c")  # the content of another file that was made
    for name in "abde":
        with pytest.raises(FileExistsError):
            write(tmp_path / name, "new")
    write(tmp_path / "c", "new")
    assert (tmp_path / "a").read_text() == "changed"


def test_a_record_outlives_its_process_a_move_and_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "x")
    write(tmp_path / "x" / "a", "one")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)  # after the record, before the file
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "x" / "a", "two")
    assert (tmp_path / "x" / "a").read_text() == "one"
    with (tmp_path / "x" / RECORD).open("a") as file:
        file.write('{"file": "b", "dig')  # half a line
    (tmp_path / "x").rename(tmp_path / "y")
    write(tmp_path / "y" / "b", "b")
    assert is_made(tmp_path / "y" / "a")
    assert is_made(tmp_path / "y" / "b")
    write(tmp_path / "y" / "a", "three")
    assert (tmp_path / "y" / "a").read_text() == "three"


def test_without_a_record_files_are_replaced_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    write(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "after"
    assert not is_made(tmp_path / "a")


def test_an_older_folder_can_be_adopted_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("a")
    begin(tmp_path, adopt=True)
    (tmp_path / "b").write_text("b")
    begin(tmp_path, adopt=True)
    assert is_made(tmp_path / "sub" / "a")
    assert not is_made(tmp_path / "b")


def test_all_are_checked_before_the_first_is_written(tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / f"{i}.png").write_text("x")
    with pytest.raises(FileExistsError, match=r"/0\.png, .*/4\.png and 2 more; hint"):
        refuse_foreign([tmp_path / f"{i}.png" for i in range(9)], "hint")


def test_names_that_differ_in_case_alone(tmp_path: Path) -> None:
    begin(tmp_path)
    names = [tmp_path / "A.png", tmp_path / "b.png", tmp_path / "a.png"]
    refuse_alike(tmp_path, names)
    (tmp_path / RECORD.upper()).touch()  # as a file system without case shows it
    with pytest.raises(ValueError, match=r"A\.png and .*a\.png are one file on this file system"):
        refuse_alike(tmp_path, names)
