"""The tiny foundation's text-conditioned U-Net (eps prediction), trained on the embedded training photos only.

Its text encoder is a two-layer CLIP text model on bytes. It is a toy, but it loads and runs exactly as Stable
Diffusion's does. Recipe: README.md beside this file. Reached by `make foundation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel

from common.autoencoder import ImageCodec
from common.diffusion import NoiseSchedule
from common.draws import Draws
from common.foundation.guarded import GuardedModule
from common.foundation.muon import muon_or_adamw
from common.foundation.schedule import anneal
from common.images import to_pm1
from common.loading import load_vae

SCHEDULE: dict[str, Any] = {  # Stable Diffusion's
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}


class TinyDenoiser(GuardedModule):
    """Train a small `UNet2DConditionModel` with its text encoder in the latent space of the tiny VAE.

    Args:
        vae: Diffusers folder whose `vae` subfolder is used, or `tiny`.
        channels: Widths of the U-Net's levels; all but the first have attention.
        text_width: Width of the text encoder and of cross-attention.
        text_tokens: Length of a prompt in bytes.
        condition_dropout: Share of samples that see the empty prompt.
        lr: Peak learning rate.
        ema_decay: Decay of the averaged weights, which are the ones validated and saved.
        clip: Gradient norm limit.
        tail: Share of the steps, the last ones, over which the learning rate is annealed.
        optimizer: `muon` or `adamw`.
        seed: Random seed of timesteps, noise and dropout; null takes `--seed_everything`, 0 in Python.
    """

    def __init__(
        self,
        vae: str = "tiny",
        channels: tuple[int, ...] = (32, 64, 96),
        text_width: int = 32,
        text_tokens: int = 32,
        condition_dropout: float = 0.1,
        lr: float = 1e-3,
        ema_decay: float = 0.998,
        clip: float = 1.0,
        tail: float = 0.3,
        optimizer: Literal["adamw", "muon"] = "adamw",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.condition_dropout, self.lr, self.clip, self.seed = condition_dropout, lr, clip, seed or 0
        self.tail, self.optimizer = tail, optimizer
        self.codec = ImageCodec(load_vae(vae))
        self.schedule = NoiseSchedule(SCHEDULE)
        self.tokenizer = ByT5Tokenizer(model_max_length=text_tokens, extra_ids=0)
        levels = len(channels)
        self.networks = nn.ModuleDict(
            {
                "unet": UNet2DConditionModel(
                    sample_size=32,
                    in_channels=self.codec.latent_channels,
                    out_channels=self.codec.latent_channels,
                    block_out_channels=channels,
                    down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
                    up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
                    layers_per_block=1,
                    cross_attention_dim=text_width,
                    attention_head_dim=2,
                    norm_num_groups=8,
                ),
                "text_encoder": CLIPTextModel(
                    CLIPTextConfig(
                        vocab_size=len(self.tokenizer),
                        hidden_size=text_width,
                        intermediate_size=2 * text_width,
                        num_hidden_layers=2,
                        num_attention_heads=2,
                        max_position_embeddings=text_tokens,
                        projection_dim=text_width,
                        pad_token_id=self.tokenizer.pad_token_id,
                        bos_token_id=self.tokenizer.pad_token_id,
                        eos_token_id=self.tokenizer.eos_token_id,
                    )
                ),
            }
        )
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
        self.ema: Any = torch.optim.swa_utils.AveragedModel(self.networks, multi_avg_fn=average)

    def loss(self, networks: Any, batch: dict[str, Any], prompts: list[str], t: Tensor, noise: Tensor) -> Tensor:
        """|eps - eps_hat|^2 per sample, (B,)."""
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        condition = networks["text_encoder"](ids.to(self.device)).last_hidden_state
        with torch.no_grad():
            z = self.codec.encode(to_pm1(batch["hq"]))
        eps_hat = networks["unet"](self.schedule.add_noise(z, noise, t), t, condition).sample
        return (eps_hat - noise).square().mean((1, 2, 3))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Denoise at a random timestep."""
        draws = Draws(self.seed, batch["index"], self.device)
        shape = (self.codec.latent_channels, *(side // self.codec.downscale for side in batch["hq"].shape[-2:]))
        dropped = draws.uniform("condition") < self.condition_dropout
        prompts = ["" if drop else text for drop, text in zip(dropped, batch["prompt"], strict=True)]
        t = draws.integers("t", 0, self.schedule.num_timesteps - 1)
        loss = self.loss(self.networks, batch, prompts, t, draws.normal("noise", shape)).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average the weights."""
        self.ema.update_parameters(self.networks)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Denoising loss of the averaged weights at four noise levels, with fixed noise."""
        draws = Draws(self.seed, batch["index"], self.device)
        shape = (self.codec.latent_channels, *(side // self.codec.downscale for side in batch["hq"].shape[-2:]))
        noise = draws.normal("val", shape)
        for level in (100, 250, 500, 800):
            t = torch.full((len(noise),), level, device=self.device)
            value = self.loss(self.ema.module, batch, batch["prompt"], t, noise).mean()
            self.log(f"val/loss_t{level}", value, prog_bar=True, batch_size=len(noise))

    def configure_optimizers(self) -> Any:
        """Constant, then annealed."""
        optimizer = muon_or_adamw(self.optimizer, self.networks.parameters(), self.lr)
        return anneal(optimizer, int(self.trainer.estimated_stepping_batches), tail=self.tail)

    def save_foundation(self, folder: str | Path) -> None:
        """Write U-Net, text encoder, tokenizer and scheduler in diffusers' layout, in fp16."""
        folder = Path(folder)
        for name, network in self.ema.module.items():
            network.half().save_pretrained(folder / name)
            network.float()
        self.tokenizer.save_pretrained(folder / "tokenizer")
        DDPMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
