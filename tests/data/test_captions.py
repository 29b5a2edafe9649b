"""The patch plan of `isr caption`; the command itself is tested in tests/launch/test_caption.py."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.captions import Journal, Key, Patches, windows
from data.sources import Window


class TestWindows:
    @pytest.mark.parametrize("size", [(16, 16), (17, 16), (31, 48), (33, 100)])
    @pytest.mark.parametrize("stride", [1, 5, 15, 16])
    def test_cover_every_pixel_stay_inside_and_are_distinct(self, size: tuple[int, int], stride: int) -> None:
        seen = np.zeros(size, bool)
        found = windows(*size, 16, stride)
        for top, left, side in found:
            assert 0 <= top <= size[0] - side
            assert 0 <= left <= size[1] - side
            seen[top : top + side, left : left + side] = True
        assert seen.all()
        assert len(set(found)) == len(found)

    def test_a_photo_of_12_megapixels_has_48_patches(self) -> None:
        found = windows(3000, 4000, 512, 512)
        assert len(found) == 6 * 8
        assert found[7] == Window(0, 3488, 512)  # moved inside from 3584
        assert found[-1] == Window(2488, 3488, 512)

    def test_what_is_smaller_than_a_patch_has_none(self) -> None:
        assert windows(16, 15, 16, 16) == windows(15, 16, 16, 16) == []
        assert windows(16, 16, 16, 4) == [Window(0, 0, 16)]


def test_photos_without_work_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    read: list[str] = []
    monkeypatch.setattr("data.captions.read_image", lambda path: read.append(path.name) or np.zeros((16, 16, 3), "u1"))
    patches = Patches([tmp_path / "a.png", tmp_path / "b.png"], tmp_path, 16, 16)
    done = {Key("a.png", Window(0, 0, 16)): "x"}
    assert [keys for keys, _ in patches.batches(done, 4)] == [[Key("b.png", Window(0, 0, 16))]]
    assert read == ["b.png"]


def test_a_name_that_no_manifest_can_hold_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.png")
    Image.new("RGB", (16, 16)).save(path)
    patches = Patches([path], tmp_path, 16, 16)
    assert patches.all_keys() == []
    assert "xff.png' is not a UTF-8 name" in patches.skipped[0]


def test_a_batch_is_on_the_disk_before_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j", {})
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    for name in ("a", "b"):
        journal.add([Key(name, None)], ["x"])
        assert synced[-1] == (tmp_path / "j").stat().st_size
    assert synced[0] < synced[1]
    journal.close()


def test_a_journal_that_lost_its_first_line_is_not_believed(tmp_path: Path) -> None:
    Path(tmp_path / "j").write_text('{"isr caption": {"mod\n["a.png", null, null, null, "x"]\n')
    with pytest.raises(ValueError, match="j no longer holds the settings it was begun with; delete it to begin anew"):
        Journal(tmp_path / "j", {})


def test_a_batch_with_a_caption_too_few_is_not_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {})
    with pytest.raises(ValueError, match="shorter"):
        journal.add([Key("a", None), Key("b", None)], ["x"])
    journal.close()
    assert Journal(tmp_path / "j", {}).done == {}
