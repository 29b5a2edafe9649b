"""A PNG is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.images import write_png
from data.decoding import read_image


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


class TestWritePng:
    def test_round_trip_into_a_new_folder_leaves_nothing_else(self, tmp_path: Path, pixels: np.ndarray) -> None:
        target = tmp_path / "sub" / "a.b.png"
        write_png(target, pixels)
        np.testing.assert_array_equal(read_image(target), pixels)
        assert os.listdir(target.parent) == ["a.b.png"]

    def test_failure_keeps_the_old_file(
        self, tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "a.png"
        write_png(target, pixels)

        def half(_image: Image.Image, path: Path, **_: object) -> None:
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(Image.Image, "save", half)
        with pytest.raises(OSError, match="disk full"):
            write_png(target, 255 - pixels)
        monkeypatch.undo()
        np.testing.assert_array_equal(read_image(target), pixels)
        assert os.listdir(tmp_path) == ["a.png"]

    def test_refuses_floats(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"array: got float64 \(4, 4, 3\).*uint8"):
            write_png(tmp_path / "a.png", np.zeros((4, 4, 3)))  # type: ignore[arg-type]  # the mistake under test
