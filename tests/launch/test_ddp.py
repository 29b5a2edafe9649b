"""Two processes on the CPU are one process with twice the batch, in training, test and prediction."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.cli import main

ROOT = Path(__file__).resolve().parents[2]
DFOSD, ESTIMATOR, DM_SR = (
    ROOT / "papers" / path for path in (
        "dfosd/configs/demo/01_dfosd.yaml", "dm_sr/configs/demo/01_estimator.yaml", "dm_sr/configs/demo/02_dm_sr.yaml"
    )
)  # fmt: skip
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false"]


def fit(demo: Path, runs: Path, batch_size: int) -> list[str]:
    optimizers = ("optimizer",) if demo == ESTIMATOR else ("optimizer", "disc_optimizer")
    return [
        *("fit", "-c", str(demo), "--runs", str(runs), *QUIET),
        f"--data.batch_size={batch_size}",
        "--data.crop_size=32",
        "--data.batches_per_epoch=3",
        "--data.val_crops=3",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=3",
        "--trainer.log_every_n_steps=1",
        "--checkpoint.every_n_train_steps=3",
        # Plain descent is linear in the gradient; Adam would blow rounding up where a gradient is next to nothing.
        *(f"--model.{name}=torch.optim.SGD" for name in optimizers),
        *(f"--model.{name}.init_args.lr=0.1" for name in optimizers),
    ]


def in_two(*arguments: str) -> None:
    command = [sys.executable, "-m", "launch.cli", *arguments, *TWO]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def curves(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rows(folder: Path) -> dict[tuple[str, ...], float]:
    with (folder / "test" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    found = {(row["method"], row["image"], row["metric"]): float(row["value"]) for row in table}
    assert len(found) == len(table), "an image has two rows"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("demo", [DFOSD, ESTIMATOR, DM_SR], ids=lambda path: path.stem)
def test_two_processes_are_one_with_twice_the_batch(demo: Path, tmp_path: Path) -> None:
    before = []
    if demo == DM_SR:  # it builds on stage 1
        assert main([*fit(ESTIMATOR, tmp_path / "before", 4), "--trainer.max_steps=1"]) == 0
        before = [f"--model.estimator={next((tmp_path / 'before').rglob('last.ckpt'))}"]
    in_two(*fit(demo, tmp_path / "two", 2), *before)
    assert main([*fit(demo, tmp_path / "one", 4), *before]) == 0
    (two,), (one,) = ((tmp_path / name).glob("*/*/version_*") for name in ("two", "one"))
    assert (two / "run.json").is_file()
    expected, got = curves(one), curves(two)
    assert set(got) == set(expected)
    for tag, values in expected.items():
        assert got[tag] == pytest.approx(values, rel=2e-3, abs=1e-5), tag
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, two)]
    assert [int(state["state_dict"]["train_step"]) for state in states] == [3, 3]
    for name, value in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], value, rtol=1e-3, atol=1e-6)
    if demo == DFOSD:
        a_test_scores_every_image_once(two, tmp_path)


def a_test_scores_every_image_once(run: Path, tmp_path: Path) -> None:
    # An odd number of images: the last is seen twice and counts once.
    rng = np.random.default_rng(0)
    for name, size in (("test_LR", 12), ("test_HR", 48)):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    common = ["test", "-c", str(DFOSD), f"--data.test={tmp_path / 'set'}", *QUIET, "--ckpt_path"]
    in_two(*common, str(run / "checkpoints" / "last.ckpt"))
    scores = rows(run)
    assert {image for _, image, _ in scores} == {"0", "1", "2"}
    (run / "test" / "metrics.csv").unlink()
    assert main([*common, str(run / "checkpoints" / "last.ckpt")]) == 0
    alone = rows(run)
    assert scores.keys() == alone.keys()
    assert [scores[key] for key in alone] == pytest.approx(list(alone.values()), abs=1e-3)
