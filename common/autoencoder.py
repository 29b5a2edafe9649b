"""The VAE as a codec between images in [-1, 1] and scaled latents."""

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


class LatentScaling:
    """The scaling of a VAE's latents (B, C, h, w), by its config.

    If the config has per-channel `latents_mean` and `latents_std`, z = (raw - mean) / std, with unit variance in each
    channel, and `scaling_factor`, which diffusers writes into every config, is ignored. Otherwise
    z = (raw - shift_factor) * scaling_factor, 0.18215 for SD.

    Args:
        vae: The autoencoder; only its config is read.

    Raises:
        ValueError: The config holds one of `latents_mean` and `latents_std`, or another number of them than channels.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        config = vae.config
        mean: list[float] | None = getattr(config, "latents_mean", None)
        std: list[float] | None = getattr(config, "latents_std", None)
        if (mean is None) != (std is None):
            raise ValueError("the VAE's config must hold both of latents_mean and latents_std, or neither.")
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            if values is not None and len(values) != config.latent_channels:
                raise ValueError(f"the VAE's {name} has {len(values)} values for {config.latent_channels} channels.")
        # Plain numbers and no buffers: they survive .to(bfloat16), the meta device and to_empty().
        self._mean: list[float] = [getattr(config, "shift_factor", None) or 0.0] if mean is None else list(mean)
        self._std: list[float] = [1.0 / config.scaling_factor] if std is None else list(std)

    def scale(self, raw: Tensor) -> Tensor:
        """Convert raw latents of the VAE to z; same shape and dtype."""
        return (raw - self._row(self._mean, raw)) / self._row(self._std, raw)

    def unscale(self, z: Tensor) -> Tensor:
        """Convert z to raw latents, which the VAE decodes; same shape and dtype."""
        return z * self._row(self._std, z) + self._row(self._mean, z)

    @staticmethod
    def _row(values: list[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


class ImageCodec(nn.Module):
    """A frozen `AutoencoderKL` between images (B, 3, H, W) in [-1, 1] and latents (B, C, h, w) by `LatentScaling`.

    The codec computes in the dtype of its weights and ignores autocast, so a VAE in float32 decodes in float32 within
    a bf16 step. Its parameters take no gradient, but gradients pass through to z (and to x).

    Args:
        vae: The autoencoder; it is frozen and put in eval mode.
        gradient_checkpointing: Recompute the activations in the backward pass: less memory, more time.
    """

    def __init__(self, vae: AutoencoderKL, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False).eval()
        if gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        config = self.vae.config
        self.latent_channels: int = config.latent_channels
        self.downscale: int = 2 ** (len(config.block_out_channels) - 1)
        self.scaling = LatentScaling(self.vae)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, in which the codec computes."""
        return next(self.vae.parameters()).dtype

    def encode(self, x_pm1: Tensor, sample: bool = False, noise: Tensor | None = None) -> Tensor:
        """Encode images to scaled latents.

        Args:
            x_pm1: Images, (B, 3, H, W) in [-1, 1]; H and W multiples of `downscale`.
            sample: Draw from the posterior; by default its mode is taken, which is deterministic.
            noise: Standard normal (B, C, h, w) to draw with; only with `sample`, else a fresh draw.

        Returns:
            Scaled latents, (B, C, H / downscale, W / downscale), in the dtype of the weights.

        Raises:
            ValueError: The size is not a multiple of `downscale`, or `noise` is given without `sample`.
        """
        check_sides(x_pm1, self.downscale)
        if noise is not None and not sample:
            raise ValueError("noise is given but sample=False takes the posterior's mode; set sample=True to use it.")
        with no_autocast(x_pm1.device):
            posterior = self.vae.encode(x_pm1.to(self.dtype)).latent_dist
            raw = posterior.mode()
            if sample:
                noise = torch.randn_like(raw) if noise is None else noise.to(raw)
                raw = raw + posterior.std * noise
            return self.scaling.scale(raw)

    def decode(self, z: Tensor) -> Tensor:
        """Decode scaled latents to images.

        Args:
            z: Scaled latents, (B, C, h, w).

        Returns:
            Images, (B, 3, downscale * h, downscale * w), near [-1, 1] and not clamped: clamping in a loss kills
            gradients.
        """
        with no_autocast(z.device):
            return self.vae.decode(self.scaling.unscale(z.to(self.dtype))).sample


def check_sides(x_pm1: Tensor, downscale: int) -> None:
    """Raise a ValueError for images (B, 3, H, W) whose H or W is not a multiple of `downscale`."""
    height, width = x_pm1.shape[-2:]
    if height % downscale or width % downscale:
        raise ValueError(
            f"x_pm1 is {height}x{width}, and its sides must be multiples of {downscale}; pad or crop it first."
        )


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off on a device; the meta device has none to switch."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
