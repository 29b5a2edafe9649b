"""DM-SR: the encoder that moves low-quality images onto the noisy latents a frozen one-step denoiser knows (stage 2).

`configs/sd_turbo.yaml` is the paper's run, `README.md` the card; `estimation.py` is stage 1.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from common.autoencoder import ImageCodec
from common.conditioning.captions import Captioner
from common.conditioning.text import encode_prompts, text_encoder_row
from common.denoisers.unet import Prediction, UNetDenoiser
from common.diffusion import NoiseSchedule
from common.draws import Draws, generator
from common.figures import figure_to_tensor, noise_distribution, save_figure
from common.images import bicubic_upsample, to_01, to_pm1
from common.loading import (
    is_architecture_only,
    load_schedule_config,
    load_unet,
    load_vae,
)
from common.losses import (
    LatentLPIPS,
    distribution_matching_gradient,
    noise_gradient,
    score_surrogate,
)
from common.parameters import Row
from common.precision import FrozenDtype, hold
from common.restoration import Inference, RestorationModule
from common.stages import Stage
from common.tiling import plan_tiles
from common.training import Batch
from papers.dm_sr.losses import GANLoss, adversarial_loss, discriminator_objective
from papers.dm_sr.networks import ControlNetDiscriminator, TimeAwareEncoder, TimestepEstimator
from papers.dm_sr.sampling import MultistepNoise, denoise
from papers.dm_sr.stage1 import build_estimator, read_estimator

PROMPT = "High-quality, high-contrast, photo-realistic, clean, sharp, highly-detailed, perfect, 8k, ultra HD"
"""The paper's fixed prompt (its footnote 1)."""

NOISE_SAMPLE = 1024
"""Values that the plot of a test takes of a tile's noise at most."""
NOISE_KEPT = 2**18
"""Values that it takes of all tiles at most: 2 MB with their keys, whatever the number of images and their size."""


class DMSRConditions(NamedTuple):
    """Conditions of whole images: the noise level they are moved to, and their text."""

    t_hat: Tensor
    """Predicted (or given) timesteps, (B,), float. The encoder takes them unchanged, the denoiser rounded."""
    prompt_embeds: Tensor
    """(1,N,D) or (B,N,D)."""


class DMSR(RestorationModule):
    """Stage 2: train the time-aware encoder (and a discriminator) around a frozen denoiser.

    Args:
        pretrained: Base (VAE, U-Net, schedule, text encoder): hub id, diffusers folder, `tiny` or
            `random:<architecture>`.
        timestep: `predicted` by stage 1's estimator for each image, or one number for all (Table 3; 500 is index 499).
        estimator: Stage 1's checkpoint, or its run, e.g. `runs/dm_sr/estimator`, whose newest checkpoint is taken.
        prompt: The denoiser's text for every image; null takes each image's own, from the data's prompt files.
        captioner: Image-to-text model (hub id or folder) that writes each low-quality image's text at test time in the
            place of `prompt` (Table 7).
        num_steps: Denoising steps at test time (Table 4).
        multistep_noise: Noise that further steps put back: the `first` step's (the paper) or the `latest` (DDIM).
        embedding: Input of the encoder's time embeddings: the `scalar` t / 500 or a `sinusoidal` embedding of t.
        lambda_l1: Weight of the L1 loss on latents.
        lambda_per: Weight of the perceptual loss on latents; 0 for none.
        lambda_adv: Weight of the adversarial loss; 0 for no discriminator.
        lambda_dm: Weight of the distribution matching loss (equation 7).
        lambda_eps: Weight of the noise loss (equation 8).
        perceptual_weights: Weights of the latent LPIPS: InvSR's file, or `random`.
        perceptual_width: Factor on the latent LPIPS's channels, for `random` only.
        dm_path: Place of equation 7's gradient: the `encoder`'s output, as printed, or the image `latent`.
        dm_timestep: Timestep of equation 7: `uniform` over 1 .. 499, or the image's `predicted` one.
        noise_sign: Sign of equation 8: `corrected`, or as `printed`, which drives the noise away from its goal.
        noise_path: Where its gradient enters: at the `encoder`'s output, as printed, or at the `noise`. Logged:
            `train/z_error`, the mean of |Z_SR - X_HR^0|, and `train/eps_residual`, that of |r|.
        gan_loss: Equation 4: `bce` (both terms with a minus), InvSR's `hinge`, or as `printed`.
        disc_start: Updates after which the adversarial loss counts; the discriminator trains from the first on.
        disc_timestep: Timestep input of the discriminator: the image's `predicted` one or `zero`.
        disc_channels: Widths of the discriminator's levels.
        disc_heads: Attention heads of the discriminator's levels.
        disc_groups: Groups of the discriminator's group norms.
        optimizer: Optimiser of the encoder.
        disc_optimizer: Optimiser of the discriminator.
        lr_scheduler: Learning-rate scheduler of the encoder, stepped once an update.
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

    prompt_embeds: Tensor

    trainable: ClassVar = {
        "encoder": ("encoder.encoder.*", "encoder.time.*"),
        "discriminator": ("discriminator.*",),
    }
    training_only = ("discriminator",)
    without_prompts = ", or set model.prompt to one text for all"

    def __init__(
        self,
        pretrained: str = "stabilityai/sd-turbo",
        timestep: int | Literal["predicted"] = "predicted",
        estimator: str | None = None,
        prompt: str | None = PROMPT,
        captioner: str | None = None,
        num_steps: int = 1,
        multistep_noise: MultistepNoise = "first",
        embedding: Literal["scalar", "sinusoidal"] = "scalar",
        lambda_l1: float = 1.0,
        lambda_per: float = 2.0,
        lambda_adv: float = 0.1,
        lambda_dm: float = 0.5,
        lambda_eps: float = 1.0,
        perceptual_weights: str = "random",
        perceptual_width: float = 1.0,
        dm_path: Literal["encoder", "latent"] = "encoder",
        dm_timestep: Literal["uniform", "predicted"] = "uniform",
        noise_sign: Literal["corrected", "printed"] = "corrected",
        noise_path: Literal["encoder", "noise"] = "encoder",
        gan_loss: GANLoss = "bce",
        disc_start: int = 0,
        disc_timestep: Literal["predicted", "zero"] = "predicted",
        disc_channels: tuple[int, ...] = (64, 128, 256, 256),
        disc_heads: tuple[int, ...] = (1, 2, 4, 4),
        disc_groups: int = 32,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        disc_optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        scale: int = 4,
        inference: Inference | None = None,
        seed: int | None = None,
        ema_decay: float | None = 0.999,
        clip: float | None = None,
        accumulate: int = 1,
        losses: dict[str, float] | None = None,
        losses_weights: str = "pretrained",
        frozen_dtype: FrozenDtype = "float32",
    ) -> None:
        super().__init__(scale, inference, seed, ema_decay, clip, accumulate, losses, losses_weights, frozen_dtype)
        self.save_hyperparameters()
        self.pretrained, self.timestep, self.estimator_path = pretrained, timestep, estimator
        self.prompt, self.captioner_id, self.num_steps = prompt, captioner, num_steps
        self.multistep_noise, self.embedding_kind = multistep_noise, embedding
        self.lambda_l1, self.lambda_per, self.lambda_adv = lambda_l1, lambda_per, lambda_adv
        self.lambda_dm, self.lambda_eps = lambda_dm, lambda_eps
        self.perceptual_weights, self.perceptual_width = perceptual_weights, perceptual_width
        self.dm_path, self.dm_timestep = dm_path, dm_timestep
        self.noise_sign, self.noise_path = noise_sign, noise_path
        self.gan_loss, self.disc_start, self.disc_timestep = gan_loss, disc_start, disc_timestep
        self.disc_channels, self.disc_heads, self.disc_groups = disc_channels, disc_heads, disc_groups
        self.optimizer, self.disc_optimizer, self.lr_scheduler = optimizer, disc_optimizer, lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.encoder: TimeAwareEncoder | None = None
        self.perceptual: LatentLPIPS | None = None
        self.discriminator: ControlNetDiscriminator | None = None
        self._noise = NoiseSample()  # of test images, for the plot
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} is out of range; set 1 or more")
        if timestep == "predicted" and estimator is None:
            raise ValueError(
                "timestep=predicted needs stage 1: set estimator to its checkpoint or run (isr fit -c "
                "papers/dm_sr/configs/estimator.yaml makes one), or timestep to a number"
            )

    # Networks

    def configure_networks(self) -> None:
        """Estimator, encoder and denoiser."""
        schedule = NoiseSchedule(load_schedule_config(self.pretrained, expect="epsilon"))
        if isinstance(self.timestep, int) and not 0 <= self.timestep < schedule.num_timesteps:
            raise ValueError(f"timestep={self.timestep} is out of range; set 0 .. {schedule.num_timesteps - 1}")
        self.codec = ImageCodec(load_vae(self.pretrained), self.gradient_checkpointing)
        unet = load_unet(self.pretrained)
        hold(unet, self.frozen_dtype)
        self.denoiser = UNetDenoiser(unet, schedule, self.gradient_checkpointing)
        levels = len(unet.config.block_out_channels) - 1
        self.size_multiple = max(1, self.codec.downscale * 2**levels // self.scale)
        self.estimator = self._open_estimator() if self.timestep == "predicted" else None
        if self.prompt is not None:
            self.fixed_texts.add(self, "prompt_embeds", self.pretrained, self.prompt, awaited=self.may_await_checkpoint)
        self.captioner = Captioner(self.captioner_id) if self.captioner_id is not None else None
        self.encoder = TimeAwareEncoder(
            load_vae(self.pretrained, trainable=True),
            self.embedding_kind,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def _open_estimator(self) -> TimestepEstimator | None:
        """Stage 1's T; None where its file is missing and a checkpoint that holds T is to come.

        Within `architecture_only()` the file need not exist: the paper's architecture is built then.
        """
        if is_architecture_only() and not (self.estimator_path and Path(self.estimator_path).exists()):
            return TimestepEstimator("random").requires_grad_(False)
        try:
            stage = read_estimator(str(self.estimator_path))
        except FileNotFoundError as error:
            self.stages.miss("estimator", error, awaited=self.may_await_checkpoint)
            return None
        self.stages["estimator"] = stage
        return build_estimator(stage)

    def restore_stage(self, argument: str, stage: Stage) -> None:
        """Take T from the checkpoint."""
        self.estimator = build_estimator(stage).to(self.device)

    def configure_training(self) -> None:
        """Losses and discriminator."""
        if self.lambda_per:
            self.perceptual = LatentLPIPS(self.perceptual_weights, self.codec.latent_channels, self.perceptual_width)
        if self.lambda_adv:
            self.discriminator = ControlNetDiscriminator(
                self.codec.latent_channels,
                self.disc_channels,
                self.disc_heads,
                self.denoiser.unet.config.cross_attention_dim,
                self.codec.downscale,
                norm_num_groups=self.disc_groups,
                gradient_checkpointing=self.gradient_checkpointing,
                seed=self.seed,
            )

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the names of the paper's tables; quant_conv, which is frozen, apart from the encoder."""
        assert self.encoder is not None
        networks: dict[str, nn.Module | None] = {
            "encoder": self.encoder.encoder,
            "encoder's quant_conv": self.encoder.quant_conv,
            "encoder's time embeddings": self.encoder.time,
            "timestep estimator, VGG19": self.estimator and self.estimator.features,
            "timestep estimator, linear": self.estimator and self.estimator.head,
            "U-Net": self.denoiser.unet,
            "VAE": self.codec,
            "discriminator": self.discriminator,
            "latent LPIPS": self.perceptual,
        }
        return {name: network for name, network in networks.items() if network is not None}

    def parameter_rows(self) -> list[Row]:
        """Rows of the networks and of the text encoder that makes the prompt's embedding."""
        return [*super().parameter_rows(), text_encoder_row(self.pretrained)]

    def parameter_sums(self) -> dict[str, int]:
        """Trained parameters by Table 2's count: the encoder with its embeddings, 34.16 M."""
        rows = {row.name: row.trainable for row in RestorationModule.parameter_rows(self)}
        return {"Table 2 (encoder, time embeddings)": rows["encoder"] + rows["encoder's time embeddings"]}

    def trainable_patterns(self) -> dict[str, tuple[str, ...]]:
        """Name patterns of the trained parameters; without an adversarial loss there is no discriminator."""
        return {name: patterns for name, patterns in self.trainable.items() if name == "encoder" or self.lambda_adv}

    def wants_prompts(self) -> str | None:
        """Name the option if there is no one text for all images."""
        return "prompt=null" if self.prompt is None else None

    def configure_optimizers(self) -> Any:
        """One optimiser for the encoder, one for the discriminator."""
        optimizers = [self.optimizer(self.trainable_parameters("encoder"))]
        if self.lambda_adv:
            optimizers.append(self.disc_optimizer(self.trainable_parameters("discriminator")))
        schedulers = [self.lr_scheduler(optimizers[0])] if self.lr_scheduler is not None else []
        return optimizers, schedulers

    # Inference, sections 3.1 to 3.3

    @torch.no_grad()
    def timesteps(self, i_lr: Tensor) -> Tensor:
        """t_hat, (B,), float, of up-sampled low-quality images (B,3,H,W) in [0,1]; never with a gradient."""
        if self.estimator is None:
            return torch.full((len(i_lr),), float(self.timestep), device=i_lr.device)
        return self.estimator(i_lr)

    def text_condition(self, prompts: list[str]) -> Tensor:
        """The denoiser's text, (1,N,D) where all images share it, else (B,N,D)."""
        if self.prompt is not None:
            return self.prompt_embeds
        return encode_prompts(self.pretrained, prompts, self.device, keep=True)

    def split(self, i_lr_pm1: Tensor, t_hat: Tensor, c: Tensor) -> Prediction:
        """Encode up-sampled low-quality images (B,3,H,W) in [-1,1] and split them: eps_SR and Z_SR of equation 2."""
        assert self.encoder is not None
        return self.denoiser(self.encoder(i_lr_pm1, t_hat), t_hat.round().long(), c)

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> DMSRConditions:
        """Timestep and text belong to the whole image, not to the tile.

        The estimator also takes large images tile by tile. The mean of its timesteps is used: T itself is a mean over
        positions.
        """
        parts, (height, width), tile = [x_lq], x_lq.shape[-2:], (self.inference.tile or 0) // self.scale
        if self.is_large(x_lq):
            places = itertools.product(plan_tiles(height, tile, 0), plan_tiles(width, tile, 0))
            parts = [x_lq[..., top : top + tile, left : left + tile] for top, left in places]
        t_hat = torch.stack([self.timesteps(bicubic_upsample(part, self.scale)) for part in parts]).mean(0)
        if self.captioner is not None:
            texts = self.captioner.to(self.device)(x_lq)
            return DMSRConditions(t_hat, encode_prompts(self.pretrained, texts, self.device, keep=True))
        return DMSRConditions(t_hat, self.text_condition(prompts))

    def restore(self, x_lq: Tensor, conditions: DMSRConditions) -> Tensor:
        """Encode, split into noise and image (in one step or several), decode the image."""
        assert self.encoder is not None
        t_hat, c = conditions
        x_sr = self.encoder(to_pm1(bicubic_upsample(x_lq, self.scale)), t_hat)
        schedule = self.denoiser.schedule
        eps_sr, z_sr = denoise(partial(self._predict, c=c), x_sr, t_hat, schedule, self.num_steps, self.multistep_noise)
        if self.trainer_is_testing:
            self._noise.add(eps_sr)
        return to_01(self.codec.decode(z_sr).clamp(-1, 1))

    def _predict(self, z_t: Tensor, t: Tensor, c: Tensor) -> Prediction:
        return self.denoiser(z_t, t, c)

    @property
    def trainer_is_testing(self) -> bool:
        """True while Lightning's test loop is running."""
        return self._trainer is not None and bool(self.trainer.testing)

    def on_test_epoch_end(self) -> None:
        """Draw Figure 4b: the distribution of the predicted noise over all test images of this process."""
        super().on_test_epoch_end()
        noise, self._noise = self._noise, NoiseSample()
        folder = self.output_folder("test")
        if len(noise) and self.trainer.is_global_zero:
            figure = noise_distribution(noise.values.numpy())
            caption = (
                "Noise eps_SR that the denoiser splits off the encoder's output, over the test images (at most "
                f"{NOISE_SAMPLE:,} values a tile, evenly spaced, and {NOISE_KEPT:,} of all, drawn at random): "
                "histogram with the standard normal density, and Q-Q plot (the paper's Figure 4b)."
            )
            save_figure(folder / "figures" / "predicted_noise.png", figure, caption)
            self.show_image("test/predicted noise", figure_to_tensor(figure))

    # Training, sections 3.4 and 3.5

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update of the encoder by equation 9, then one of the discriminator by equation 4."""
        assert self.encoder is not None
        i_lr, i_hr = bicubic_upsample(batch["lq"], self.scale), batch["hq"]
        draws, t_hat, c = self.draws(batch), self.timesteps(i_lr), self.text_condition(batch["prompt"])
        t = t_hat.round().long()  # the denoiser takes integers
        with torch.no_grad():
            h = self.codec.encode(to_pm1(i_hr))  # X_HR^0
        with self.optimizer_turn("encoder") as update:
            # X_SR = E(I_LR, t_hat); equation 2 splits it, with a graph through the frozen denoiser's input
            x_sr = self.encoder(to_pm1(i_lr), t_hat)
            eps_sr, z_sr = self.denoiser(x_sr, t, c)
            # Equation 9: L_Z + L_eps
            loss = self.image_part(x_sr, z_sr, h, i_lr, i_hr, t, c, draws) + self.noise_part(x_sr, eps_sr, h, t, c)
            update(loss)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({"train/t_hat": t_hat.mean(), "train/z_error": (z_sr.detach() - h).abs().mean()})
        if self.discriminator is not None:
            self.discriminator_step(z_sr.detach(), h, i_lr, t, c)

    def image_part(
        self, x_sr: Tensor, z_sr: Tensor, h: Tensor, i_lr: Tensor, i_hr: Tensor, t: Tensor, c: Tensor, draws: Draws
    ) -> Tensor:
        """L_Z (equation 3): L1, latent LPIPS, adversarial and distribution matching, each mean over elements."""
        terms = {"l1": self.lambda_l1 * (z_sr - h).abs().mean()}
        if self.perceptual is not None:
            terms["per"] = self.lambda_per * self.perceptual(z_sr, h).mean()
        if self.discriminator is not None and self.update_step > self.disc_start:
            # Equation 5: D is frozen, its gradient goes on to Z_SR
            logits = self.discriminate(z_sr, i_lr, t, c)
            terms["adv"] = self.lambda_adv * adversarial_loss(self.gan_loss, logits).mean()
        if self.lambda_dm:
            # Equations 6 and 7: a gradient without a loss, placed at X_SR (as printed) or at Z_SR
            t_dm = draws.integers("dm/t", 1, 499) if self.dm_timestep == "uniform" else t
            noise = draws.normal("dm/noise", z_sr.shape[1:])
            predict = partial(self._predict_eps, c=c)
            g = distribution_matching_gradient(predict, z_sr, h, noise, t_dm, self.denoiser.schedule)
            place = x_sr if self.dm_path == "encoder" else z_sr
            terms["dm"] = self.lambda_dm * score_surrogate(g, place).mean()
            self.log("train/dm_gradient", g.abs().mean())
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        added = self.added_terms(to_01(self.codec.decode(z_sr)), i_hr) if self.loss_weights else []
        return torch.stack([*terms.values(), *added]).sum()

    def noise_part(self, x_sr: Tensor, eps_sr: Tensor, h: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """L_eps (equation 8): a gradient, placed at X_SR (as printed) or at eps_SR; zero where it is switched off."""
        if not self.lambda_eps:
            return x_sr.new_zeros(())
        predict = partial(self._predict_eps, c=c)
        g = noise_gradient(predict, h, eps_sr, t, self.denoiser.schedule, self.noise_sign)
        self.log("train/eps_residual", g.abs().mean())
        return self.lambda_eps * score_surrogate(g, x_sr if self.noise_path == "encoder" else eps_sr).mean()

    def _predict_eps(self, z_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.denoiser(z_t, t, c).eps

    def discriminator_step(self, z_sr: Tensor, h: Tensor, i_lr: Tensor, t: Tensor, c: Tensor) -> None:
        """Equation 4: real latents up, restored ones down."""
        with self.optimizer_turn("discriminator") as update:
            real, fake = self.discriminate(h, i_lr, t, c), self.discriminate(z_sr, i_lr, t, c)
            loss = discriminator_objective(self.gan_loss, real, fake).mean()
            update(loss)
        means = {"train/d_real": real.detach().mean(), "train/d_fake": fake.detach().mean()}
        self.log_dict({"train/discriminator": loss.detach(), **means})

    def discriminate(self, z: Tensor, i_lr: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Logits of D(z, I_LR), (B,1)."""
        assert self.discriminator is not None
        return self.discriminator(z, to_pm1(i_lr), t if self.disc_timestep == "predicted" else torch.zeros_like(t), c)


class NoiseSample:
    """Values of many noises in bounded memory: all in their order while they fit, then a random sample of them.

    Each value draws a key, and those with the `NOISE_KEPT` largest keys stay: all are equally likely to.
    """

    def __init__(self) -> None:
        self.values, self._keys = torch.empty(0, device="cpu"), torch.empty(0, device="cpu")
        self._generator = generator(0, "test/noise", 0)

    def __len__(self) -> int:
        return len(self.values)

    def add(self, eps: Tensor) -> None:
        """Take the `noise_sample` of a noise (B,C,h,w)."""
        values = torch.cat([self.values, noise_sample(eps).float()])
        new = torch.rand(len(values) - len(self), generator=self._generator, device="cpu")
        keys = torch.cat([self._keys, new])
        if len(values) > NOISE_KEPT:
            keys, places = keys.topk(NOISE_KEPT, sorted=False)
            values = values[places]
        self.values, self._keys = values, keys


def noise_sample(eps: Tensor) -> Tensor:
    """At most `NOISE_SAMPLE` values of a noise (B,C,h,w), on the CPU; the odd stride visits all rows and columns."""
    return eps.flatten()[:: -(-eps.numel() // NOISE_SAMPLE) | 1].cpu()
