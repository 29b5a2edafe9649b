"""Small networks that several tests build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel


def small_unet(**config: Any) -> UNet2DConditionModel:
    """A U-Net of two levels with cross-attention in one; further settings of diffusers' class override these."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        **config,
    )


def write_text_encoder(root: Path, layers: int = 2, length: int | None = 32, **config: Any) -> None:
    """Write a small random CLIP text model of 32 positions with a byte-level tokenizer, in the hub's layout.

    Args:
        root: Folder of the model.
        layers: Number of layers.
        length: Largest number of tokens that the tokenizer knows of; None for none, so that the encoder's must cap it.
        **config: Further settings of `CLIPTextConfig`.
    """
    text = CLIPTextConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        **config,
    )
    CLIPTextModel(text).save_pretrained(root / "text_encoder")
    tokenizer = ByT5Tokenizer() if length is None else ByT5Tokenizer(model_max_length=length)
    tokenizer.save_pretrained(root / "tokenizer")
