"""Images reach every logger that takes images, in any order, or else the run's folder."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from common.training import Batch, TrainingModule

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10
NAME = "val/photos: lq | sr"


class Shows(TrainingModule):
    """Shows one image in validation."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.show_image(NAME, torch.tensor(PIXELS).permute(2, 0, 1) / 255)


class Wandb(CSVLogger):
    """Takes images as W&B's logger does."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.got = (key, images, step)


class Mlflow(Logger):
    """Takes images as MLflow's client does."""

    name = version = run_id = "r1"

    def __init__(self, save_dir: Path) -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log_image=self._log_image)

    def _log_image(self, run_id: str, image: Any, artifact_file: str) -> None:
        self.got = (run_id, artifact_file), [image], 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        return

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        return


class Broken(CSVLogger):
    """Is asked for images, and fails."""

    def log_image(self, **kwargs: Any) -> None:
        raise OSError("the server is down")


def validate(loggers: list[Any], folder: Path) -> None:
    settings: Any = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    data: Any = DataLoader([{"lq": torch.ones(2)}])  # type: ignore[arg-type]
    Trainer(logger=loggers, default_root_dir=folder, **settings).validate(Shows(), data, verbose=False)


def shown(logger: Any) -> list[np.ndarray]:
    """What a logger has."""
    if isinstance(logger, TensorBoardLogger):
        events = EventAccumulator(logger.log_dir)
        events.Reload()
        (image,) = events.Images(NAME)
        (Path(logger.log_dir) / "shown.png").write_bytes(image.encoded_image_string)
        return [np.asarray(Image.open(Path(logger.log_dir) / "shown.png"))]
    return list(logger.got[1])


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_every_logger_has_the_image_in_any_order(order: tuple[int, ...], tmp_path: Path) -> None:
    made = [TensorBoardLogger(tmp_path / "a"), Wandb(tmp_path / "b"), Mlflow(tmp_path / "c")]
    validate([made[i] for i in order], tmp_path)
    for logger in made:
        (found,) = shown(logger)
        assert np.abs(found.astype(int) - PIXELS).max() <= 1  # TensorBoard's own rounds down
    assert made[1].got[0] == NAME
    assert made[2].got[0] == ("r1", "val_photos_lq_sr_step0.png")
    assert not list(tmp_path.rglob("images"))


@pytest.mark.parametrize("kind", [CSVLogger, Broken])
def test_without_a_logger_that_takes_them_they_are_in_the_runs_folder(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = kind(tmp_path)
    validate([logger], tmp_path)
    path = Path(logger.log_dir) / "images" / "val_photos_lq_sr_step0.png"
    assert np.array_equal(np.asarray(Image.open(path)), PIXELS)
    assert (f"Broken does not take the image {NAME}: the server is down" in caplog.text) == (kind is Broken)


def test_a_logger_that_fails_takes_nothing_from_the_others(tmp_path: Path) -> None:
    tensorboard = TensorBoardLogger(tmp_path / "a")
    validate([Broken(tmp_path / "b"), tensorboard], tmp_path)
    assert len(shown(tensorboard)) == 1
