"""DFOSD's own networks: the noise-aware discriminator (NAD) and the discriminators of the ablation.

B batch, C latent channels, h w latent sides, N tokens, D token width. All return logits; D(x) = sigmoid(logit).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from common.adapters import OSEDIFF_TARGETS, add_lora
from common.denoisers.unet import sdxl_conditions


class UNetTrunk(nn.Module):
    """`conv_in`, time embedding, down blocks and mid block of a diffusion U-Net; the rest is dropped.

    Args:
        unet: A pretrained U-Net; its up blocks are freed.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        for part in ("up_blocks", "conv_norm_out", "conv_act", "conv_out"):
            setattr(unet, part, None)
        self.unet = unet
        self.channels: int = unet.config.block_out_channels[-1]
        self.is_sdxl: bool = unet.config.addition_embed_type == "text_time"

    def forward(self, z_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Mid-block features.

        Args:
            z_t: Noisy latents, (B,C,h,w).
            t: Timesteps, (B,).
            prompt_embeds: (1,N,D) or (B,N,D).

        Returns:
            (B, channels, h/8, w/8) for Stable Diffusion.
        """
        unet = self.unet
        context = prompt_embeds.expand(len(z_t), -1, -1)
        emb = unet.time_embedding(unet.time_proj(t).to(z_t.dtype))
        if self.is_sdxl:  # SDXL also takes pooled text and sizes: zeros and "512 px, not cropped"
            added = sdxl_conditions(len(z_t), device=z_t.device)
            emb = emb + unet.get_aug_embed(emb=emb, encoder_hidden_states=context, added_cond_kwargs=added)
        x = unet.conv_in(z_t)
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                x, _ = block(hidden_states=x, temb=emb, encoder_hidden_states=context)
            else:
                x, _ = block(hidden_states=x, temb=emb)
        if getattr(unet.mid_block, "has_cross_attention", False):
            return unet.mid_block(x, emb, encoder_hidden_states=context)
        return unet.mid_block(x, emb)


class NoiseAwareDiscriminator(nn.Module):
    """The paper's discriminator: a frozen U-Net trunk with LoRA, and a two-layer MLP at every location.

    The trunk's timestep is that of the noise on the latents, which makes the discriminator noise-aware.

    Args:
        unet: Pretrained U-Net.
        rank: LoRA rank; the adapted layers are the generator's.
        alpha: LoRA alpha.
        hidden: Width of the head.
        seed: Random seed of the LoRA; the head is drawn from the global generator.
    """

    def __init__(self, unet: UNet2DConditionModel, rank: int, alpha: float, hidden: int = 512, seed: int = 1) -> None:
        super().__init__()
        self.trunk = UNetTrunk(unet)
        add_lora(self.trunk, rank, alpha, OSEDIFF_TARGETS, seed=seed)
        self.head = nn.Sequential(nn.Conv2d(self.trunk.channels, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, 1, 1))

    def forward(self, z_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Logits at every location, (B,1,h/8,w/8); 8x8 for 512 px."""
        return self.head(self.trunk(z_t, t, prompt_embeds))


class LatentDiscriminator(nn.Module):
    """The ablation's Diffusion-GAN: a small convolutional net from scratch on noisy latents and their timestep.

    Args:
        in_channels: Channels of the latents.
        channels: Width of each level; each but the first halves the sides.
        num_timesteps: T, to which timesteps are normalised.
    """

    def __init__(self, in_channels: int = 4, channels: Sequence[int] = (128, 256, 512, 512), num_timesteps: int = 1000):
        super().__init__()
        self.num_timesteps = num_timesteps
        self.time = nn.Sequential(nn.Linear(1, channels[0]), nn.SiLU(), nn.Linear(channels[0], channels[0]))
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        levels: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            levels += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.levels = nn.Sequential(*levels)
        self.conv_out = nn.Conv2d(channels[-1], 1, 1)

    def forward(self, z_t: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Logits at every location, (B,1,h/8,w/8); the text is ignored."""
        time = self.time(t[:, None].to(z_t.dtype) / self.num_timesteps)
        return self.conv_out(self.levels(nn.functional.leaky_relu(self.conv_in(z_t) + time[:, :, None, None], 0.2)))


class PixelDiscriminator(nn.Module):
    """The ablation's CNN: a patch discriminator on images, with spectral normalisation.

    Args:
        channels: Width of each level; each halves the sides.
    """

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512)) -> None:
        super().__init__()
        levels: list[nn.Module] = []
        for before, after in zip((3, *channels[:-1]), channels, strict=True):
            conv = nn.Conv2d(before, after, 4, stride=2, padding=1)
            levels += [torch.nn.utils.parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2)]
        self.levels = nn.Sequential(*levels, nn.Conv2d(channels[-1], 1, 1))

    def forward(self, x_pm1: Tensor) -> Tensor:
        """Logits at every location, (B,1,H/16,W/16), of images (B,3,H,W) in [-1,1]."""
        return self.levels(x_pm1)
