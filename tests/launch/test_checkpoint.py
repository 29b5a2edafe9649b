"""What a fit leaves: last.ckpt is its last step, and the others are as many as were asked for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.training import Batch, TrainingModule
from launch.checkpoint import Checkpoint


class Toy(TrainingModule):
    """Learns something, and gets worse and worse in validation."""

    trainable: ClassVar = {"net": ("net.*",)}

    def configure_networks(self) -> None:
        self.net = nn.Linear(2, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.01)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        with self.optimizer_turn("net") as update:
            update(self.net(batch["lq"]).square().mean())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/score", -float(self.train_step))


class Do(Callback):
    """Does something after a step or before it."""

    def __init__(self, step: int, what: Callable[[], Any], when: str) -> None:
        def hook(trainer: Trainer, module: Any, *args: Any) -> None:
            if int(module.train_step) == step:
                what()

        setattr(self, when, hook)


def data(count: int) -> DataLoader[Any]:
    return DataLoader([{"lq": torch.ones(2)}] * count)  # type: ignore[arg-type]


def fit(folder: Path, saving: Checkpoint, *callbacks: Callback, steps: int = 10, **kwargs: Any) -> Toy:
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "max_steps": steps,
        "limit_val_batches": 0,
    }
    toy = Toy()
    Trainer(**{**settings, **kwargs}, callbacks=[*callbacks, saving]).fit(toy, data(20), data(1))
    return toy


def checkpoint(folder: Path, **kwargs: Any) -> Checkpoint:
    """As the command line makes it."""
    return Checkpoint(**{"dirpath": folder, "save_last": True, "enable_version_counter": False, **kwargs})


def step_of(path: Path) -> int:
    found: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return int(found["train_step"])


@pytest.mark.parametrize("saving", [{}, {"every_n_train_steps": 4}, {"train_time_interval": timedelta(hours=1)}])
def test_the_end_of_a_fit_is_saved_between_two_saving_points(saving: dict[str, Any], tmp_path: Path) -> None:
    fit(tmp_path, checkpoint(tmp_path, keep=0, **saving))
    assert step_of(tmp_path / "last.ckpt") == 10
    assert len(list(tmp_path.glob("*.ckpt"))) == 1


def test_last_is_the_last_step_where_the_best_one_is_another(tmp_path: Path) -> None:
    saving = checkpoint(tmp_path, monitor="val/score", mode="max", save_top_k=1)
    fit(tmp_path, saving, limit_val_batches=1, val_check_interval=2)
    assert step_of(Path(saving.best_model_path)) == 2
    assert step_of(tmp_path / "last.ckpt") == 10
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


def test_last_follows_its_saving_points_where_a_monitor_waits_for_validation(tmp_path: Path) -> None:
    seen: list[int] = []
    look = Do(7, lambda: seen.append(step_of(tmp_path / "last.ckpt")), "on_train_batch_start")
    saving = checkpoint(tmp_path, monitor="val/score", mode="max", save_top_k=1, every_n_train_steps=3)
    fit(tmp_path, saving, look, limit_val_batches=1, val_check_interval=10)
    assert seen == [6]


def test_time_is_a_saving_point(tmp_path: Path) -> None:
    seen: list[int] = []
    look = Do(6, lambda: seen.append(step_of(tmp_path / "last.ckpt")), "on_train_batch_start")
    fit(tmp_path, checkpoint(tmp_path, keep=0, train_time_interval=timedelta(0)), look)
    assert seen == [6]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [20, 40, 60, 80]),
        ({"keep": 1}, [50]),
        ({"keep": 0}, []),
        ({"save_top_k": -1}, list(range(10, 101, 10))),
    ],
)
def test_kept_checkpoints_are_spread_over_the_run_and_said(
    options: dict[str, Any], kept: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, checkpoint(tmp_path, every_n_train_steps=10, **options), steps=100)
    others = [path for path in tmp_path.glob("*.ckpt") if path.name != "last.ckpt"]
    assert sorted(map(step_of, others)) == kept
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "isr: a checkpoint has" in line]
    assert ("every saving point" in said) if "save_top_k" in options else (f"last.ckpt and {len(kept)} on the" in said)


@pytest.mark.parametrize(
    ("when", "saved"),
    [("on_train_batch_start", 6), ("on_before_optimizer_step", 4)],
    ids=["after the step", "in the step"],
)
def test_an_error_saves_whole_steps_only(when: str, saved: int, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        fit(tmp_path, checkpoint(tmp_path, every_n_train_steps=4), Do(6, fail, when))
    assert step_of(tmp_path / "last.ckpt") == saved


def test_the_command_line_offers_lightnings_options_and_keep() -> None:
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Checkpoint, "checkpoint")
    found = parser.parse_args(["--checkpoint.keep=2", "--checkpoint.monitor=x", "--checkpoint.save_top_k=3"]).checkpoint
    assert (found.keep, found.monitor, found.save_top_k) == (2, "x", 3)
    with pytest.raises(ValueError, match=r"checkpoint\.keep=-1 is out of range"):
        Checkpoint(keep=-1)
