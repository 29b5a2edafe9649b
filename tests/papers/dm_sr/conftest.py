"""A small random base in the hub's layout, shaped as SD is, a stage-1 checkpoint as Lightning writes it, a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch.nn import functional as F
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel

from papers.dm_sr import TimestepEstimation

TEXT_WIDTH = 16
T_WIDTH = 0.05


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("sd")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
            use_linear_projection=True,
        )
        with torch.no_grad():  # a noise of some size, and one that hears of text and time
            unet.conv_out.weight *= 4
        unet.save_pretrained(root / "unet")
        AutoencoderKL(
            block_out_channels=(8, 12, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
        ).save_pretrained(root / "vae")
        text = CLIPTextConfig(
            vocab_size=384,
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
        )
        CLIPTextModel(text).save_pretrained(root / "text_encoder")
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule.save_pretrained(root / "scheduler")
    ByT5Tokenizer(model_max_length=77).save_pretrained(root / "tokenizer")
    return str(root)


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
