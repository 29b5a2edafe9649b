"""A base model and its own training. RFSR starts from it and is compared with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from common.adapters import adapter_names, merge
from common.draws import Draws, generator
from common.images import to_01, to_pm1
from common.parameters import Row
from common.precision import hold
from common.restoration import RestorationModule
from common.training import Batch
from papers.rfsr.base_models import Base, Description, TileConditions
from papers.rfsr.sampling import advance


class BaseSR(RestorationModule):
    """A multi-step model as its authors have it; `isr fit` trains its ControlNet to denoise.

    Args:
        base: The model.
        prompt_dropout: Share of training samples whose text is empty.
        weight_limit: Largest weight (1 - abar) / abar of a training sample, by which errors count as they do in z_0;
            null gives all samples the weight 1.
        optimizer: Optimiser of the trained parameters.
        lr_scheduler: Learning-rate scheduler, stepped once an update.
        **kwargs: As for every method: `scale`, `inference`, `seed` (at test time every image is given the same noise),
            `ema_decay`, `clip`, `accumulate`, `losses`, `losses_weights`, `frozen_dtype`.
    """

    trainable: ClassVar = {"generator": ("base.controlnet.*",)}
    without_prompts = ", or set model.prompt_dropout=1"
    takes_losses = False

    def __init__(
        self,
        base: Base,
        prompt_dropout: float = 0.5,
        weight_limit: float | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        with warnings.catch_warnings():  # the command line saves the base's settings, not the base
            warnings.filterwarnings("ignore", ".*is an instance of `nn.Module`.*")
            self.save_hyperparameters()
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout={prompt_dropout} is out of range; set a share, 0 .. 1")
        self.base, self.prompt_dropout, self.weight_limit = base, prompt_dropout, weight_limit
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    # Networks

    def configure_networks(self) -> None:
        """Load the base and mark the trained parameters."""
        self.base.configure(self.seed)
        self.adapt()
        levels = len(self.base.unet.config.block_out_channels)
        self.size_multiple = max(1, self.base.codec.downscale * 2 ** (levels - 1) // self.scale)
        for parameter in self.all_trainable().values():
            parameter.requires_grad_(True)
        for network in (self.base.unet, self.base.controlnet):
            hold(network, self.frozen_dtype)

    def adapt(self) -> None:
        """Change the networks before the trained parameters are chosen; a plain base changes nothing."""

    def networks(self) -> dict[str, nn.Module]:
        """The base's networks."""
        return {"U-Net": self.base.unet, "ControlNet": self.base.controlnet, "VAE": self.base.codec}

    def parameter_rows(self) -> list[Row]:
        """Rows of the networks and of the text encoder."""
        return [*super().parameter_rows(), *self.base.rows()]

    def wants_prompts(self) -> str | None:
        """Name the option by which samples keep their text."""
        wanted = self.base.text_source == "data" and self.prompt_dropout < 1
        return f"prompt_dropout={self.prompt_dropout}" if wanted else None

    def configure_optimizers(self) -> Any:
        """One optimiser for all trained parameters."""
        optimizer = self.optimizer(self.trainable_parameters("generator"))
        schedulers = [self.lr_scheduler(optimizer)] if self.lr_scheduler is not None else []
        return [optimizer], schedulers

    def export(self, folder: str | Path) -> None:
        """Write the current U-Net and ControlNet in diffusers' layout; adapters are merged."""
        for name, network in (("unet", self.base.unet), ("controlnet", self.base.controlnet)):
            if adapter_names(network):
                merge(network)
            network.save_pretrained(Path(folder) / name)

    def save_foundation(self, folder: str | Path) -> None:
        """Write the averaged ControlNet in fp16, for the embedded foundation."""
        if self.ema is not None:
            self.ema.swap(self.all_trainable())
        self.base.controlnet.half().save_pretrained(folder)

    # Inference

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> Description:
        """Embeddings of the texts, and the image tokens, of whole images."""
        texts, e_img = self.base.look(x_lq, prompts)
        suffix = self.base.prompt_suffix
        return self.base.describe([", ".join(filter(None, (text, suffix))) for text in texts], e_img, x_lq.device)

    def restore(self, x_lq: Tensor, conditions: Description) -> Tensor:
        """Run all steps of the base's sampler; the noise is the same for every image and tile."""
        c = self.base.see(x_lq, self.scale, conditions)
        size = c.z_lq.shape[1:]
        noise = torch.randn(size, generator=generator(self.seed, "test/start", 0), device="cpu")
        noise = noise.to(c.z_lq).expand_as(c.z_lq)
        generators = [generator(self.seed, "test/steps", 0) for _ in c.z_lq]
        z = self.base.start(c, noise)
        sampler = self.base.sampler()
        for t in self.base.timesteps:
            z = advance(sampler, self.base.predict(z, t, c, self.base.cfg_scale), t, z, generators)
        return to_01(self.base.codec.decode(z))

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Denoise, w |n - eps(z_t, t, c)|^2 at a random timestep, by the ControlNet."""
        draws = self.draws(batch)
        with torch.no_grad():
            texts, e_img = self.base.look(batch["lq"], batch["prompt"])
            c = self.see(batch["lq"], self.dropped(texts, draws), e_img)
            z = self.base.codec.encode(to_pm1(batch["hq"]))
        t = draws.integers("t", 0, self.base.schedule.num_timesteps - 1)
        noise = draws.normal("noise", z.shape[1:])
        z_t = self.base.schedule.add_noise(z, noise, t)
        with self.optimizer_turn("generator") as update:
            eps = self.base.denoise(z_t, t, c, self.base.residuals(z_t, t, c))
            loss = (self.weight(t, z) * (eps - noise).square()).mean()
            update(loss)
        self.log("train/loss", loss.detach(), prog_bar=True)

    def weight(self, t: Tensor, z: Tensor) -> Tensor:
        """Weights w of samples, (B,1,1,1): 1, or (1 - abar) / abar up to `weight_limit`."""
        if self.weight_limit is None:
            return z.new_ones(len(z), 1, 1, 1)
        signal, sigma = self.base.schedule.coefficients(t, z)
        return (sigma / signal).square().clamp(max=self.weight_limit)

    def see(self, x_lq: Tensor, texts: list[str], e_img: Tensor | None = None) -> TileConditions:
        """Conditions of training crops, each of which counts as a whole image."""
        return self.base.see(x_lq, self.scale, self.base.describe(texts, e_img, x_lq.device))

    def dropped(self, texts: list[str], draws: Draws) -> list[str]:
        """The texts, of which a share `prompt_dropout` is made empty."""
        drop = draws.on_host.uniform("condition") < self.prompt_dropout
        return ["" if gone else text for gone, text in zip(drop, texts, strict=True)]
