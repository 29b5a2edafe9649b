"""A stage-1 checkpoint as Lightning writes it, and batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from papers.dm_sr import TimestepEstimation

T_WIDTH = 0.05


@pytest.fixture(scope="session")
def sd(make_sd: Callable[..., str]) -> str:
    return make_sd(noise=4)  # so that it hears of text and time


@pytest.fixture(scope="session")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A timestep estimator whose answers differ from image to image."""
    model = TimestepEstimation(weights="random", width=T_WIDTH, target="l1", seed=4)
    model.configure_model()
    assert model.estimator is not None
    with torch.no_grad():
        model.estimator.head.weight *= 20
    keys = model.checkpoint_keys()
    state = {name: value for name, value in model.state_dict().items() if name in keys}
    given = {"_class_path": "papers.dm_sr.TimestepEstimation", "_instantiator": "lightning", "width": T_WIDTH}
    path: Path = tmp_path_factory.mktemp("stage1") / "last.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": given, "epoch": 0, "global_step": 1}, path)
    return str(path)


def pair(seed: int, side: int = 32) -> dict[str, Any]:
    """Two images and what they are of."""
    g = torch.Generator().manual_seed(seed)
    hq = F.interpolate(torch.rand(2, 3, side // 4, side // 4, generator=g), scale_factor=4, mode="bilinear")
    hq = (hq + torch.tensor([0.05, 0.4]).view(2, 1, 1, 1) * torch.rand(2, 3, side, side, generator=g)).clamp(0, 1)
    lq = F.avg_pool2d(hq, 4)
    return {
        "lq": (lq * 255).round().to(torch.uint8),
        "hq": (hq * 255).round().to(torch.uint8),
        "prompt": ["a house", "two dogs"],
        "name": [f"{seed}a", f"{seed}b"],
        "index": torch.tensor([2 * seed, 2 * seed + 1]),
    }


@pytest.fixture(scope="session")
def batch() -> dict[str, Any]:
    return pair(3)


@pytest.fixture(scope="session")
def batches() -> list[dict[str, Any]]:
    return [pair(seed) for seed in range(3)]
