"""DM-SR's own networks: timestep estimator T, time-aware encoder E, and the ControlNet-style discriminator D.

B batch, C latent channels, H W image and h w latent sides, N tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import AutoencoderKL, ControlNetModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.autoencoder import LatentScaling, check_sides, no_autocast
from common.loading import drawing_weights, is_architecture_only, network_device
from common.losses.vgg import IMAGENET_MEAN, IMAGENET_STD, build_features, load_features, stage_channels

CONDITIONING_CHANNELS = (16, 32, 96, 256)
"""Widths of ControlNet's image embedding (arXiv:2302.05543, as in diffusers); each but the first halves the sides."""


class TimestepEstimator(nn.Module):
    """T (appendix A.1): VGG19's five blocks, the mean over positions, a linear layer to `bins`, eq. 10; all trains.

    T computes in the dtype of its weights (fp32) under any autocast. The mean over positions is our reading.

    Args:
        weights: Weights of the blocks: `pretrained` (torchvision's IMAGENET1K_V1, downloaded once), `random` (He
            initialisation, for tests and demos) or the path of a .pth or .safetensors state dict in torchvision's
            layout; `empty` for weights that a checkpoint will fill. The linear layer is always random.
        width: Factor on VGG's number of channels, above 0; other than 1 only with `random` weights.
        bins: K, the number of timesteps that eq. 10 weighs.
        seed: Random seed of random weights; the global generator is not used.

    Raises:
        ValueError: `width` does not fit, or a file does not hold this network.
        FileNotFoundError: The weights are not there and cannot be fetched.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str = "pretrained", width: float = 1.0, bins: int = 500, seed: int = 0) -> None:
        super().__init__()
        channels = stage_channels(width)
        self.features = build_features("vgg19", channels, "max")
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        if not is_architecture_only():
            load_features(self, "vgg19", weights, width, seed)
        with drawing_weights(seed):
            self.head = nn.Linear(channels[-1], bins)
        self.to(memory_format=torch.channels_last).to(network_device())

    def forward(self, x_01: Tensor) -> Tensor:
        """Estimate the timestep.

        Args:
            x_01: Low-quality images, up-sampled, (B,3,H,W) in [0,1], sides of at least 32.

        Returns:
            t_hat, (B,), real numbers in [0, bins - 1]: small for little degradation.
        """
        with no_autocast(x_01.device):
            x = (x_01.to(self.mean.dtype) - self.mean) / self.std
            features = self.features(x.contiguous(memory_format=torch.channels_last))
            return soft_argmax(self.head(features.mean((2, 3))))


def soft_argmax(logits: Tensor) -> Tensor:
    """Eq. 10: t_hat = sum_k k softmax(F)_k, k = 0 .. K - 1; (B,K) in, (B,) in [0, K - 1] out, in fp32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    bins = torch.arange(logits.shape[1], dtype=dtype, device=logits.device)
    # the rounded softmax may sum to more than one
    return (logits.softmax(1, dtype=dtype) * bins).sum(1).clamp(0, logits.shape[1] - 1)


class TimeAwareEncoder(nn.Module):
    """E_theta (appendix A.1): the VAE's encoder with a linear layer of the timestep at each level; x_lq, t_hat -> X_SR.

    Level i's embedding of t_hat is added to every pixel of down block i's output. The linear layers start at zero,
    where E is the VAE's own encoder (our reading of "following the ControlNet design"). E computes in the dtype of its
    weights under any autocast. `quant_conv`, which is not part of the paper's 34.16 M, is frozen.

    Args:
        vae: A pretrained autoencoder; its decoder is freed.
        embedding: `scalar`: linear layers of t_hat / `num_timesteps`, with which E has the paper's 34.16 M parameters;
            `sinusoidal`: linear layers of the U-Net's sinusoids of t_hat, 34.62 M.
        num_timesteps: Divisor of t_hat.
        sinusoids: Number of sinusoids.
        gradient_checkpointing: Recompute the activations in the backward pass: less memory, more time.

    Raises:
        ValueError: The VAE's config does not scale its latents, see `LatentScaling`.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        embedding: Literal["scalar", "sinusoidal"] = "scalar",
        num_timesteps: int = 500,
        sinusoids: int = 320,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        channels = vae.config.block_out_channels
        self.embedding, self.num_timesteps, self.sinusoids = embedding, num_timesteps, sinusoids
        self.gradient_checkpointing = gradient_checkpointing
        self.downscale: int = 2 ** (len(channels) - 1)
        self.scaling = LatentScaling(vae)
        self.encoder = vae.encoder.requires_grad_(True)
        self.quant_conv = nn.Identity() if vae.quant_conv is None else vae.quant_conv.requires_grad_(False)
        self.time = nn.ModuleList()
        for width in channels:
            linear = nn.utils.skip_init(  # draws no random numbers
                nn.Linear, 1 if embedding == "scalar" else sinusoids, width, device=vae.device, dtype=vae.dtype
            )
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.time.append(linear)
        for part in ("decoder", "post_quant_conv"):
            setattr(vae, part, None)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, in which E computes."""
        return self.encoder.conv_in.weight.dtype

    def forward(self, x_pm1: Tensor, t: Tensor) -> Tensor:
        """Encode to the noisy latent: the mean of the posterior, scaled as the VAE's latents are; nothing is drawn.

        Args:
            x_pm1: Low-quality images, up-sampled, (B,3,H,W) in [-1,1]; H and W multiples of `downscale`.
            t: Their timesteps t_hat, real numbers (B,).

        Returns:
            X_SR, (B,C,H/downscale,W/downscale), in the dtype of the weights.

        Raises:
            ValueError: The size is not a multiple of `downscale`.
        """
        check_sides(x_pm1, self.downscale)
        encoder = self.encoder
        with no_autocast(x_pm1.device):
            time = self._describe(t)
            x = encoder.conv_in(x_pm1.to(self.dtype))
            for block, linear in zip(encoder.down_blocks, self.time, strict=True):
                x = self._run(block, x) + linear(time)[:, :, None, None]
            x = self._run(encoder.mid_block, x)
            x = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(x)))
            mean, _ = self.quant_conv(x).chunk(2, 1)
            return self.scaling.scale(mean)

    def _describe(self, t: Tensor) -> Tensor:
        """Input of the linear layers for timesteps (B,): (B,1) or (B,sinusoids)."""
        if self.embedding == "scalar":
            return (t / self.num_timesteps).to(self.dtype)[:, None]
        # sine and cosine in the order of Stable Diffusion's U-Net
        return get_timestep_embedding(t, self.sinusoids, flip_sin_to_cos=True, downscale_freq_shift=0).to(self.dtype)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


class ControlNetDiscriminator(nn.Module):
    """D_phi (appendix A.1): a narrow ControlNet from scratch, conditioned on x_lq; its mid block, pooled, to one logit.

    ControlNet's zero convolutions would hide the layers below them from the head. Those of its outputs are dropped, and
    the image's embedding, which ends in one, is He-initialised. So D uses x_lq from the first step (our reading). The
    layers' default initialisation, which shrinks the signal at each, would leave it about 1/300 of z's amplitude.

    Args:
        in_channels: Channels of the latents.
        channels: Width of each level, multiples of `norm_num_groups`; each but the first halves the sides. The last
            level has no attention.
        heads: Attention heads of each level; the last entry is the mid block's.
        cross_attention_dim: D, the width of the text embeddings.
        downscale: Image pixels of a latent pixel along a side: 2, 4 or 8.
        layers_per_block: ResNet blocks of each level.
        norm_num_groups: Groups of the group norms.
        gradient_checkpointing: Recompute the activations in the backward pass: less memory, more time.
        seed: Random seed of the weights; the global generator is not used.

    Raises:
        ValueError: `downscale` is not 2, 4 or 8, or `heads` has another length than `channels`.
    """

    def __init__(
        self,
        in_channels: int = 4,
        channels: Sequence[int] = (64, 128, 256, 256),
        heads: Sequence[int] = (1, 2, 4, 4),
        cross_attention_dim: int = 1024,
        downscale: int = 8,
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if downscale not in (2, 4, 8):
            raise ValueError(f"downscale={downscale} must be 2, 4 or 8, that of the VAE.")
        if len(heads) != len(channels):
            raise ValueError(f"heads={list(heads)} must have one number for each of channels={list(channels)}.")
        self.downscale = downscale
        with drawing_weights(seed):
            self.trunk = ControlNetModel(
                in_channels=in_channels,
                block_out_channels=tuple(channels),
                down_block_types=(*["CrossAttnDownBlock2D"] * (len(channels) - 1), "DownBlock2D"),
                layers_per_block=layers_per_block,
                norm_num_groups=norm_num_groups,
                attention_head_dim=tuple(heads),  # diffusers' name for the number of heads
                cross_attention_dim=cross_attention_dim,
                use_linear_projection=True,
                conditioning_embedding_out_channels=CONDITIONING_CHANNELS[: downscale.bit_length()],
            )
            self.trunk.controlnet_down_blocks = nn.ModuleList()
            self.trunk.controlnet_mid_block = nn.Identity()  # forward returns the mid block's own output
            for layer in self.trunk.controlnet_cond_embedding.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            self.head = nn.Linear(channels[-1], 1)
        self.to(network_device())
        if gradient_checkpointing:
            self.trunk.enable_gradient_checkpointing()

    def forward(self, z: Tensor, x_lq_pm1: Tensor, t: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Judge whether latents are an encoded high-quality image's.

        Args:
            z: Scaled latents, (B,C,h,w).
            x_lq_pm1: Low-quality images, up-sampled, (B,3,h*downscale,w*downscale) in [-1,1].
            t: Timesteps, int64 (B,).
            prompt_embeds: (1,N,D) or (B,N,D).

        Returns:
            Logits, (B,1); D(x) = sigmoid(logit).

        Raises:
            ValueError: The image's size is not that of the latents.
        """
        size, expected = tuple(x_lq_pm1.shape[-2:]), tuple(side * self.downscale for side in z.shape[-2:])
        if size != expected:
            raise ValueError(f"x_lq_pm1 is {size}, and these latents need {expected}; up-sample it first.")
        context = prompt_embeds.expand(len(z), -1, -1)
        return self.head(self.trunk(z, t, context, x_lq_pm1).mid_block_res_sample.mean((2, 3)))
