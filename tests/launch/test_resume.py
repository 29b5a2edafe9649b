"""A fit that is killed and resumed is the uninterrupted one, bit for bit: curves, weights, averages, optimisers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.cli import main

ROOT = Path(__file__).resolve().parents[2]
DEMO = sorted((ROOT / "papers").glob("*/configs/demo/*.yaml"))[0]
STEPS, EVERY = 9, 2
KILLED = """
import os, signal, sys
from common.training import TrainingModule
from launch.cli import main

before = TrainingModule.on_before_optimizer_step

def killed(self, optimizer):
    if int(self.train_step) == int(sys.argv[1]) and optimizer is self.optimizers(False)[-1]:
        os.kill(os.getpid(), signal.SIGKILL)  # after one optimiser of two has stepped
    before(self, optimizer)

TrainingModule.on_before_optimizer_step = killed
sys.exit(main(sys.argv[2:]))
"""


def arguments(runs: Path) -> list[str]:
    return [
        *("fit", "-c", str(DEMO), "--runs", str(runs)),
        "--data.batch_size=2",
        "--data.crop_size=32",
        "--data.batches_per_epoch=5",  # so that the run crosses the end of an epoch
        "--data.val_crops=1",
        f"--trainer.max_steps={STEPS}",
        "--trainer.val_check_interval=3",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false",
        f"--checkpoint.every_n_train_steps={EVERY}",
    ]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a run, as TensorBoard shows it: what a resume purged is gone."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two checkpoints' parts differ."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {one.keys() ^ other.keys()}"]
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [where]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{where}/{i}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [where]


@pytest.mark.slow
def test_a_killed_fit_resumes_as_if_nothing_had_happened(tmp_path: Path) -> None:
    step = random.Random(20).randint(EVERY + 2, STEPS - 1)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, str(step), *arguments(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert main(arguments(tmp_path / "whole")) == 0  # meanwhile
    _, err = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, err.decode()[-2000:]
    (killed,) = (tmp_path / "killed").glob("*/*/version_0")
    (whole,) = (tmp_path / "whole").glob("*/*/version_0")
    last = killed / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == (step - 1) // EVERY * EVERY
    assert max(s for s, _ in curves(killed)["train/loss"]) == step - 2, "it got further than its checkpoint"

    assert main([*arguments(tmp_path / "killed"), "--ckpt_path", str(last)]) == 0
    expected, got = curves(whole), curves(killed)
    assert [s for s, _ in expected["train/loss"]] == list(range(STEPS))
    assert any(tag.startswith("val/") for tag in expected)
    assert got == expected
    checkpoints = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, killed)]
    one, other = (
        {key: c[key] for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step")}
        for c in checkpoints
    )
    assert one["global_step"] == STEPS
    assert len(one["optimizer_states"]) == 2
    assert differences(one, other) == []


def test_a_difference_in_one_bit_is_seen() -> None:
    one = {"a": [torch.zeros(2), {"b": 1}]}
    other = {"a": [torch.tensor([0.0, 1e-45]), {"b": 1}]}
    assert differences(one, other) == ["/a/0"]
    assert differences(one, one) == []
