"""Small networks that several tests build."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel


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
