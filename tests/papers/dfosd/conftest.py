"""A small random U-Net in the hub's layout, shaped as SDXL's, and a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=1280 + 6 * 8,
    )


@pytest.fixture(scope="session")
def sd(make_sd: Callable[..., str]) -> str:
    return make_sd()


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Only a U-Net: nothing else of it may be asked for."""
    root: Path = tmp_path_factory.mktemp("sdxl")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sdxl_unet().save_pretrained(root / "unet")
    return str(root)


@pytest.fixture(scope="session")
def batch() -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    hq = F.interpolate(torch.rand(2, 3, 8, 8, generator=g), scale_factor=4, mode="bilinear")
    hq = (hq + 0.2 * torch.rand(2, 3, 32, 32, generator=g)).clamp(0, 1)
    lq = F.avg_pool2d(hq, 4)
    return {
        "lq": (lq * 255).round().to(torch.uint8),
        "hq": (hq * 255).round().to(torch.uint8),
        "prompt": ["a house", "two dogs"],
        "name": ["a", "b"],
        "index": torch.tensor([0, 1]),
    }
