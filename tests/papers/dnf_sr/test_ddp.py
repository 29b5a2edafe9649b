"""Two processes on the CPU are one with twice the batch, in both stages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.cli import main

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "papers/dnf_sr/configs/demo"
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]


def fit(stage: str, runs: Path, batch_size: int) -> list[str]:
    optimizers = ("optimizer", "disc_optimizer") if stage == "01_sft" else ("optimizer",)
    return [
        *("fit", "-c", str(DEMO / f"{stage}.yaml"), "--runs", str(runs), *QUIET),
        f"--data.batch_size={batch_size}",
        "--data.crop_size=40",  # the discriminator's least
        "--trainer.max_steps=2",
        "--trainer.log_every_n_steps=1",
        "--checkpoint.every_n_train_steps=2",
        # Plain descent is linear in the gradient; Adam would blow rounding up where a gradient is next to nothing.
        *(f"--model.{name}=torch.optim.SGD" for name in optimizers),
        *(f"--model.{name}.init_args.lr=0.1" for name in optimizers),
    ]


def in_two(*arguments: str) -> None:
    command = [sys.executable, "-m", "launch.cli", *arguments, *TWO]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def curves(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    assert main([*fit("01_sft", folder, 1), "--trainer.max_steps=1"]) == 0
    return next(folder.rglob("last.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("01_sft", []),
        ("02_nf2t", ["--model.updates_per_rollout=1"]),
        ("02_nf2t", ["--model.updates_per_rollout=K", "--model.eta_schedule=type1"]),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(
    stage: str, options: list[str], stage_one: Path, tmp_path: Path
) -> None:
    if stage == "02_nf2t":
        options = [*options, "--model.group_size=2", f"--model.sft={stage_one}"]
    in_two(*fit(stage, tmp_path / "two", 1), *options)
    assert main([*fit(stage, tmp_path / "one", 2), *options]) == 0
    (two,), (one,) = ((tmp_path / name).glob("*/*/version_*") for name in ("two", "one"))
    expected, got = curves(one), curves(two)
    assert set(got) == set(expected)
    for tag, values in expected.items():
        assert got[tag] == pytest.approx(values, rel=5e-3, abs=1e-5), tag
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=2e-3, atol=1e-5)
