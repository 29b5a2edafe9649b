"""Inputs of the comparison tests: pairs of photos, results of another program, and a small trained run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data.decoding import Pixels
from launch.cli import main

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["cat", "dog", "hat"]
QUICK: dict[str, Any] = {
    "metrics": ["psnr", "ssim", "sharpness"],
    "efficiency": False,
    "progress": False,
    "device": "cpu",
}


def photo(seed: int, side: int = 64) -> Pixels:
    """Blobs and edges, (side, side, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).copy()
    smooth[side // 3 : side // 2, side // 4 :] = rng.integers(0, 256, 3)
    return smooth


def save(path: Path, image: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "shots"
    for seed, name in enumerate(NAMES):
        hq = photo(seed)
        save(folder / "test_HR" / f"{name}.png", hq)
        save(folder / "test_LR" / f"{name}.png", hq[::4, ::4])
    return folder


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A program's results: the references, a little brighter."""
    folder = tmp_path / "foreign"
    for seed, name in enumerate(NAMES):
        save(folder / f"{name}.png", np.minimum(photo(seed), 250) + 5)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def luma(image: Pixels) -> NDArray[np.float64]:
    r, g, b = np.moveaxis(image.astype(np.float64), -1, 0)
    return 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    runs = tmp_path_factory.mktemp("fit") / "runs"
    options = ["data.batch_size=1", "data.crop_size=32", "model.perceptual=none", "trainer.max_steps=1"]
    options += ["trainer.limit_val_batches=0", "trainer.enable_progress_bar=false"]
    config = ROOT / "papers/dfosd/configs/demo/01_dfosd.yaml"
    arguments = ["-c", str(config), "--runs", str(runs), "--name=demo-dfosd", *(f"--{option}" for option in options)]
    assert main(["fit", *arguments, "--debug"]) == 0
    return runs / "dfosd" / "demo-dfosd"
