"""A small random model in the layout of the hub."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel

from ..networks import small_unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in the hub's layout, its U-Net in float16 as the embedded foundation's is."""
    root = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small_unet(sample_size=8).half().save_pretrained(root / "unet")
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16).save_pretrained(root / "vae")
    DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(root / "scheduler")
    text = CLIPTextConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    CLIPTextModel(text).save_pretrained(root / "text_encoder")
    ByT5Tokenizer(model_max_length=32).save_pretrained(root / "tokenizer")
    return root
