"""The tiny foundation's VAE: f4, 8 latent channels, trained on the embedded training photos only.

Recipe and its traps: README.md beside this file. Reached by `make foundation`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from common.foundation.guarded import GuardedModule
from common.foundation.muon import muon_or_adamw
from common.foundation.schedule import anneal
from common.loading import load_vae


def reconstruction_loss(x_hat: Tensor, x: Tensor, pooled_weight: float) -> Tensor:
    """L1 + 0.5 MSE, plus the same error after 4x average pooling.

    Colour is learnt last because it is a small part of the pixel error; the pooled term, free of texture, is where a
    wrong hue shows.

    Args:
        x_hat: Reconstruction, (B,3,H,W), [-1,1].
        x: Target, same shape.
        pooled_weight: Weight of the pooled term.

    Returns:
        Scalar.
    """
    difference = x_hat - x
    pooled = F.avg_pool2d(difference, 4)
    fine = difference.abs().mean() + 0.5 * difference.square().mean()
    return fine + pooled_weight * (2 * pooled.abs().mean() + 4 * pooled.square().mean())


class TinyAutoencoder(GuardedModule):
    """Train a small `AutoencoderKL` and save it as a diffusers folder.

    Args:
        channels: Widths of its levels; two down-samplings for three of them.
        latent_channels: Channels of the latent.
        lr: Peak learning rate.
        kl_weight: Weight of the mean KL divergence of the posterior.
        pooled_weight: Weight of the colour term, see `reconstruction_loss`.
        ema_decay: Decay of the averaged weights, which are the ones validated and saved.
        clip: Gradient norm limit.
        tail: Share of the steps, the last ones, over which the learning rate is annealed.
        optimizer: `muon` learns in a third of `adamw`'s steps, see README.
        start: Diffusers folder whose `vae` subfolder to start from; its architecture replaces `channels`.
        decoder_only: Freeze the encoder, so that what was trained in its latent space stays valid.
        latent_noise: Up to how much Gaussian noise each sample's latent gets in training, in standard deviations of its
            channels (uniform from 0). It teaches encoder and decoder a code in which a denoiser's errors stay small.
    """

    def __init__(
        self,
        channels: tuple[int, ...] = (16, 32, 64),
        latent_channels: int = 8,
        lr: float = 2e-3,
        kl_weight: float = 3e-5,
        pooled_weight: float = 1.0,
        ema_decay: float = 0.998,
        clip: float = 1.0,
        tail: float = 0.3,
        optimizer: Literal["adamw", "muon"] = "adamw",
        start: str | None = None,
        decoder_only: bool = False,
        latent_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.kl_weight, self.pooled_weight, self.clip = lr, kl_weight, pooled_weight, clip
        self.decoder_only, self.tail, self.optimizer, self.latent_noise = decoder_only, tail, optimizer, latent_noise
        vae = load_vae(start, trainable=True) if start else self._new_vae(channels, latent_channels)
        self.vae: AutoencoderKL = vae.to(memory_format=torch.channels_last)
        for part in (vae.encoder, vae.quant_conv) if decoder_only else ():
            part.requires_grad_(False)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
        self.ema: Any = torch.optim.swa_utils.AveragedModel(self.vae, multi_avg_fn=average)

    @staticmethod
    def _new_vae(channels: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
        levels = len(channels)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=channels,
            latent_channels=latent_channels,
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_add_attention=False,
            sample_size=64,
            scaling_factor=1.0,
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Reconstruct a sample of the posterior, with `latent_noise` upon it."""
        x = (batch["hq"] * 2 - 1).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(x).latent_dist
        z = posterior.sample()
        strength = self.latent_noise * torch.rand(len(z), 1, 1, 1, device=z.device)
        z = z + strength * z.detach().std((0, 2, 3), keepdim=True) * torch.randn_like(z)
        x_hat = self.vae.decode(z).sample
        reconstruction = reconstruction_loss(x_hat, x, self.pooled_weight)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log_dict({"train/reconstruction": reconstruction, "train/kl": kl}, prog_bar=True)
        return reconstruction + self.kl_weight * kl

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average the weights."""
        self.ema.update_parameters(self.vae)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """PSNR of the averaged autoencoder's reconstruction, in RGB and Y, per crop; also under 10 % latent noise."""
        x = batch["hq"]
        z = self.ema.module.encode(x * 2 - 1).latent_dist.mean
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(batch_idx), device="cpu").to(z)
        for name, latent in {"": z, "_noisy": z + 0.1 * z.std((0, 2, 3), keepdim=True) * noise}.items():
            x_hat = (self.ema.module.decode(latent).sample / 2 + 0.5).clamp(0, 1)
            luma = torch.tensor([65.481, 128.553, 24.966], device=x.device).view(1, 3, 1, 1) / 255
            rgb = -10 * (x_hat - x).square().mean((1, 2, 3)).log10()
            y = -10 * ((x_hat - x) * luma).sum(1).square().mean((1, 2)).log10()
            values = {f"val/psnr_rgb{name}": rgb.mean(), f"val/psnr_y{name}": y.mean()}
            self.log_dict(values, prog_bar=True, batch_size=len(x))

    def configure_optimizers(self) -> Any:
        """Constant, then annealed."""
        parameters = [p for p in self.vae.parameters() if p.requires_grad]
        optimizer = muon_or_adamw(self.optimizer, parameters, self.lr)
        return anneal(optimizer, int(self.trainer.estimated_stepping_batches), tail=self.tail)

    @torch.no_grad()
    def save_foundation(self, folder: str, batches: Any) -> None:
        """Write the averaged VAE with the latent statistics of some training batches, in fp16.

        Args:
            folder: Folder to write into; gets config.json and diffusion_pytorch_model.safetensors.
            batches: Batches with `hq`, whose latents give `latents_mean` and `latents_std`.
        """
        vae = self.ema.module.eval()
        latents = torch.cat([vae.encode(batch["hq"].to(self.device) * 2 - 1).latent_dist.mean for batch in batches])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        if not self.decoder_only:
            vae.register_to_config(scaling_factor=1.0, latents_mean=mean.tolist(), latents_std=std.tolist())
        vae.half().save_pretrained(folder)
        vae.float()
