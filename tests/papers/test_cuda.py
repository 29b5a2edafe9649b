"""Every demo row on CUDA against the CPU: `make gpu` runs these tests, `make test` leaves them out.

float32 without TF32, so that differences are those of summation order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from launch.cli import main
from launch.runs import config_run_name

from .test_contract import DEMOS, METHODS, SMALL, Run, isr, label

pytestmark = pytest.mark.gpu
CUDA = ["--trainer.accelerator=gpu", "--trainer.devices=1"]


@pytest.fixture(autouse=True, scope="module")
def exact() -> Iterator[None]:
    """Full float32 in convolutions too, and kernels that repeat."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        patch.setattr(torch.backends.cudnn, "deterministic", True)
        yield


@dataclass
class Pair:
    """One step of a row on the CPU and on CUDA, from the same stages before it."""

    config: Path
    common: list[object]
    cpu: Run
    cuda: Run


@pytest.fixture(scope="module", params=DEMOS, ids=label)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config, runs = request.param, tmp_path_factory.mktemp("runs")
    for before in DEMOS:
        if f"runs/{before.parents[2].name}/{config_run_name(before)}" in config.read_text():
            isr("fit", "-c", before, "--runs", runs, *SMALL, "--trainer.max_steps=1")
    common = ["fit", "-c", config, "--runs", runs, *SMALL]
    cpu = isr(*common, "--trainer.max_steps=1")
    return Pair(config, common, cpu, isr(*common, *CUDA, "--trainer.max_steps=1"))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights."""
    return (
        sum(float((value.cpu().double() - other[name].cpu().double()).square().sum()) for name, value in one.items())
        ** 0.5
    )


def test_a_step_starts_from_the_same_weights_and_logs_the_same_losses(pair: Pair) -> None:
    assert pair.cuda.initial.keys() == pair.cpu.initial.keys()
    for name, value in pair.cuda.initial.items():
        assert value.is_cuda
        assert torch.equal(value.cpu(), pair.cpu.initial[name]), name
    for name, value in pair.cpu.metrics[0].items():
        # NF2T's sum of 2r - 1 is a difference of numbers near 1
        tolerance = 5e-4 if name == "train/sum_2r-1" else 1e-5
        assert pair.cuda.metrics[0][name] == pytest.approx(value, rel=1e-3, abs=tolerance), name


def test_the_restoration_after_it_is_the_same(pair: Pair) -> None:
    if pair.config not in METHODS:
        return
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sr = pair.cuda.module.cuda().upscale(x.cuda(), ["a photo"]).sr
    assert sr.is_cuda
    assert_close(sr.cpu(), pair.cpu.module.upscale(x, ["a photo"]).sr, atol=0.02, rtol=0)


def test_resuming_equals_going_on(pair: Pair) -> None:
    """The distance that is left is a small part of the way that the second step goes."""
    whole = isr(*pair.common, *CUDA, "--trainer.max_steps=2")
    resumed = isr(*pair.common, *CUDA, "--trainer.max_steps=2", "--ckpt_path", pair.cuda.last)
    assert resumed.trainer.global_step == 2
    assert resumed.metrics[-1]
    for name, value in resumed.metrics[-1].items():  # RFSR's whole run also holds the first step's band
        assert value == pytest.approx(whole.metrics[-1][name], rel=1e-2, abs=1e-4), name
    step = distance(whole.final, pair.cuda.final)
    assert step > 0
    assert distance(resumed.final, whole.final) < 0.1 * step


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_stays_finite_and_near(pair: Pair, precision: str) -> None:
    """In 16-mixed the scaler leaves out a step whose scaled gradients overflow; its norm is not finite."""
    run = isr(*pair.common, *CUDA, "--trainer.max_steps=2", f"--trainer.precision={precision}")
    assert all(bool(value.isfinite().all()) for value in run.final.values())
    norms = [value for metrics in run.metrics for name, value in metrics.items() if name.startswith("grad_norm/")]
    assert distance(run.final, run.initial) > 0 or not np.isfinite(norms).any()
    for name, value in pair.cpu.metrics[0].items():
        found = run.metrics[0][name]
        if name.startswith("train/") or np.isfinite(found):
            assert found == pytest.approx(value, rel=0.3, abs=0.02), name


def test_prediction_and_comparison_on_cuda_are_the_cpus(pair: Pair, tmp_path: Path) -> None:
    if pair.config not in METHODS:
        return
    y, x = np.mgrid[:24, :17]
    (tmp_path / "in").mkdir()
    Image.fromarray(np.stack([x * 7, y * 7, x + y], -1).astype(np.uint8)).save(tmp_path / "in" / "a.png")
    images = []
    for device, flags in (("cpu", ["--trainer.accelerator=cpu"]), ("cuda", CUDA)):
        files = ["--ckpt_path", pair.cuda.last, "--data.predict", tmp_path / "in", "--output", tmp_path / device]
        isr("predict", "-c", pair.config, *pair.common[3:5], "--trainer.enable_progress_bar=false", *flags, *files)
        images.append(np.asarray(Image.open(tmp_path / device / "a.png")).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 2
    for name, side in (("test_LR", 16), ("test_HR", 64)):
        (tmp_path / "set" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / name / "a.png")
    out = tmp_path / "compared"
    arguments = [
        "--runs",
        pair.cuda.last,
        "--pairs",
        tmp_path / "set",
        "-o",
        out,
        "--metrics",
        "psnr_y",
        "--device",
        "cuda",
    ]
    assert main([str(argument) for argument in ("compare", *arguments, "--debug")]) == 0
    assert (out / "metrics.csv").read_text().count("psnr_y") >= 2
