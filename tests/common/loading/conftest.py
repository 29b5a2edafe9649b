"""A small random model in the layout of the hub."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler

from ..networks import small_unet, write_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in the hub's layout, its U-Net in float16 as the embedded foundation's is."""
    root = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small_unet(sample_size=8).half().save_pretrained(root / "unet")
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16).save_pretrained(root / "vae")
    DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(root / "scheduler")
    write_text_encoder(root, layers=1)
    return root
