"""A steady training step reads nothing from the device: a GPU computes what is queued while the host goes on."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from common.guard import Later
from launch.runs import config_run_name

from ..second_device import counted_waits, device, second_device
from . import test_contract
from .test_contract import DEMOS, SMALL, isr, label

QUICK = "dm_sr/configs/demo/01_estimator.yaml"
_, FIRST = inspect.getsourcelines(Later.exchange)
LATER = {f"common/guard.py:{FIRST + line}" for line in range(len(inspect.getsourcelines(Later.exchange)[0]))}
"""On a CUDA device its copies wait for nothing; others have no such copies."""
SAMPLER = "diffusers/utils/torch_utils.py"
"""RFSR's rollout: diffusers' sampler copies each step's noise to the device."""


@pytest.fixture
def fused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's fused optimisers take the second device, which its list of devices lacks."""
    module: Any = sys.modules[torch.optim.Optimizer.__module__]  # torch.optim deletes its name
    devices = [*module._get_fused_kernels_supported_devices(), device().type]
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: devices)


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Make an Adam as `fused=true` does, which the configurations at paper scale set."""
    assert isinstance(optimizer, torch.optim.Adam)  # or AdamW, which derives from it
    fused = type(optimizer)([torch.zeros(1)], fused=True)
    vars(optimizer).update({name: value for name, value in vars(fused).items() if "fused" in name or "amp" in name})
    for group in optimizer.param_groups:
        group |= {"fused": True, "foreach": False}


def waits(config: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """Waits of the second and third step of a fit, in which the texts are known and nothing is logged."""
    seen: list[Counter[str]] = []
    with second_device() as settings, counted_waits() as counts:

        class Counting(test_contract.Recorder):
            def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
                for optimizer in trainer.optimizers:
                    fuse(optimizer)

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                batch["prompt"] = ["a photo"] * len(batch["prompt"])  # each text is encoded once, then remembered

            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                seen.append(Counter(counts))

        monkeypatch.setattr(test_contract, "Recorder", Counting)
        small = [*SMALL[:3], "--trainer.log_every_n_steps=100", "--trainer.max_steps=3"]
        isr("fit", "-c", config, "--runs", runs, *small, **settings)
    return [after - before for before, after in pairwise(seen)]


@pytest.mark.parametrize(
    "config",
    [pytest.param(demo, marks=() if label(demo) == QUICK else pytest.mark.long) for demo in DEMOS],
    ids=label,
)
@pytest.mark.usefixtures("fused_there")
def test_a_steady_step_makes_the_host_wait_for_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for before in DEMOS:
        if f"runs/{before.parents[2].name}/{config_run_name(before)}" in config.read_text():
            isr("fit", "-c", before, "--runs", tmp_path, *SMALL, "--trainer.max_steps=1")
    found = waits(config, tmp_path, monkeypatch)
    assert len(found) == 2
    for step in found:
        assert {place for place in step if place not in LATER and SAMPLER not in place} == set()


@pytest.mark.usefixtures("fused_there")
def test_a_planted_read_is_found_by_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from papers.dm_sr import TimestepEstimation

    step = TimestepEstimation.training_step

    def reads(self: Any, batch: Any, batch_idx: int) -> None:
        step(self, batch, batch_idx)
        batch["hq"].mean().item()

    line = inspect.getsourcelines(reads)[1] + 2
    monkeypatch.setattr(TimestepEstimation, "training_step", reads)
    (config,) = [demo for demo in DEMOS if label(demo) == QUICK]
    planted = {f"tests/papers/{Path(__file__).name}:{line}": 1}
    for found in waits(config, tmp_path, monkeypatch):
        assert {place: n for place, n in found.items() if place not in LATER} == planted
