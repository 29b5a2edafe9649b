"""Test sets: a folder of pairs or of low-quality images alone, by its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.datasets import LQImages
from data.pairing import Pairs
from data.test_sets import load_test_set


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


class TestBenchmark:
    def test_stablesr_layout_gives_pairs_and_the_folders_name(self, tmp_path: Path) -> None:
        save(tmp_path / "RealSR" / "test_LR" / "a.png", noise(4, 4))
        save(tmp_path / "RealSR" / "test_HR" / "a.png", noise(16, 16))
        benchmark = load_test_set(f"{tmp_path}/RealSR/", 4)
        assert benchmark.name == "RealSR"
        assert isinstance(benchmark.images, Pairs)

    def test_folder_of_images_gives_lq_only(self, tmp_path: Path) -> None:
        save(tmp_path / "RealSet80" / "a.JPG", noise(4, 4))
        benchmark = load_test_set(tmp_path / "RealSet80", 4)
        assert benchmark.name == "RealSet80"
        assert isinstance(benchmark.images, LQImages)

    def test_half_a_benchmark_a_folder_of_them_and_no_folder_are_refused(self, tmp_path: Path) -> None:
        save(tmp_path / "half" / "test_LR" / "a.png", noise(4, 4))
        with pytest.raises(
            FileNotFoundError, match=r"test=.*half has test_LR but no test_HR; add it, or give .*test_LR"
        ):
            load_test_set(tmp_path / "half", 4)
        for name in ("half", "other"):
            save(tmp_path / name / "test_LR" / "a.png", noise(4, 4))
            save(tmp_path / name / "test_HR" / "a.png", noise(16, 16))
        with pytest.raises(ValueError, match=r"test=.* holds 2 sets of pairs: half/test_LR with half/test_HR, other/"):
            load_test_set(tmp_path, 4)
        with pytest.raises(FileNotFoundError, match=r"test=.*gone is not a folder; give one with test_LR and test_HR"):
            load_test_set(tmp_path / "gone", 4)
