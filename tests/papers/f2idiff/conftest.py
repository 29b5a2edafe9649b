"""A small base, a DINOv2 of its width, an architecture of its U-Net to train from scratch, and a batch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from common.loading import architectures


@pytest.fixture(scope="session")
def sd(make_sd: Callable[..., str]) -> str:
    return make_sd(noise=4)  # so that it hears of its condition


@pytest.fixture(scope="session")
def make_dino(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Makes a DINOv2 of a width, whose tokens differ from image to image, and says in which folder."""

    def make(width: int) -> str:
        folder = tmp_path_factory.mktemp("dino")
        config = Dinov2Config(
            hidden_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=42,
            layerscale_value=0.5,
            initializer_range=0.2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Dinov2Model(config).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def dino(make_dino: Callable[[int], str]) -> str:
    return make_dino(16)


@pytest.fixture(scope="module")
def nano(sd: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name of an architecture, beside the real ones: the base's U-Net without its weights."""
    root = tmp_path_factory.mktemp("architectures")
    for path in architectures.ARCHITECTURES.iterdir():
        (root / path.name).symlink_to(path)
    (root / "nano" / "unet").mkdir(parents=True)
    (root / "nano" / "unet" / "config.json").write_text((Path(sd) / "unet" / "config.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "ARCHITECTURES", root)
        yield "nano"


@pytest.fixture(scope="session")
def batch() -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    hq = F.interpolate(torch.rand(2, 3, 8, 8, generator=g), scale_factor=4, mode="bilinear")
    hq = (hq + 0.2 * torch.rand(2, 3, 32, 32, generator=g)).clamp(0, 1)
    return {
        "lq": (F.avg_pool2d(hq, 4) * 255).round().to(torch.uint8),
        "hq": (hq * 255).round().to(torch.uint8),
        "prompt": ["a house", "two dogs"],
        "name": ["a", "b"],
        "index": torch.tensor([0, 1]),
    }
