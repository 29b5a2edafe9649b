"""Validation, test and prediction of every method.

A method derives from `RestorationModule` and writes `configure_networks`, `prepare`, `restore`, `training_step` and
`configure_optimizers`; it names what it trains in `trainable`. This file and `common.training` are the same for all,
so that a comparison is fair by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from common.color import color_fix
from common.evaluation import Previews, Score, Scores, named_means, refuse_without_numbers, write_scores
from common.files import inside
from common.images import bicubic_upsample
from common.losses.added import AddedLosses, check_names
from common.parameters import Row
from common.precision import FrozenDtype, TestPrecision, in_test_precision
from common.training import Batch, TrainingModule
from common.upscaler import Upscaled, upscale, upscale_to_files, write_images


@dataclass
class Inference:
    """Settings for restoring and scoring images.

    Args:
        color_fix: Give the output the low-quality image's colours: `adain`, `wavelet` or `none`.
        tile: Side of a tile in output pixels; null restores every image whole.
        overlap: Pixels that neighbouring tiles share in the output.
        blend: Weights of overlapping tiles: plain `average`, `feather` or `gaussian`.
        metrics: Ids of the metrics for validation and test images, see `common.metrics`.
        preview: Images of a data set that validation shows in the run's loggers.
        large: Predicted images of more output megapixels are made tile by tile on disk: memory does not grow with the
            image, and a killed run continues with the finished tiles. Needs `tile`; null keeps every image in memory.
        file_type: File type of predicted images: `png` or `tif`.
        test_precision: Precision of validation, test and prediction: `float32`, or `float16` or `bfloat16` by autocast.
            `trainer.precision` is that of training steps alone. In float32, weights that `frozen_dtype` holds in
            bfloat16 are cast up, layer by layer.
    """

    color_fix: Literal["adain", "wavelet", "none"] = "adain"
    tile: int | None = 512
    overlap: int = 64
    blend: Literal["average", "feather", "gaussian"] = "average"
    metrics: list[str] = field(default_factory=lambda: ["psnr_y", "ssim_y", "psnr_rgb"])
    preview: int = 4
    large: float | None = 2.0
    file_type: Literal["png", "tif"] = "png"
    test_precision: TestPrecision = "float32"

    def check(self, scale: int) -> None:
        """Refuse tiles that do not fit a super-resolution factor.

        Raises:
            ValueError: They do not.
        """
        tile, overlap = self.tile, self.overlap
        if tile is not None and (tile % scale or overlap % scale or not 0 <= overlap < tile):
            raise ValueError(
                f"inference.tile={tile} and overlap={overlap} must be multiples of {scale}, overlap < tile"
            )

    def check_tile(self, multiple: int) -> None:
        """Refuse tiles that do not fit a network.

        Args:
            multiple: Output pixels that a tile's side must be a multiple of.

        Raises:
            ValueError: They do not.
        """
        if self.tile is not None and self.tile % multiple:
            raise ValueError(
                f"inference.tile={self.tile} must be a multiple of {multiple} px for this network; set "
                f"model.inference.tile={max(1, self.tile // multiple) * multiple}, or null for no tiles"
            )

    def is_large(self, x_lq: Tensor, scale: int) -> bool:
        """True if a prediction makes images (B,3,h,w) of this size tile by tile on disk."""
        height, width = x_lq.shape[-2:]
        if self.large is None or self.tile is None:
            return False
        return scale**2 * height * width > self.large * 1e6


class RestorationModule(TrainingModule):
    """Base of all methods; see the file's head.

    Args:
        scale: Super-resolution factor.
        inference: Settings for restoring and scoring images.
        seed: Random seed of new weights and of all draws made in training; null takes `--seed_everything`, 0 in Python.
        ema_decay: Decay of the average of the trained weights, which then is what gets validated and tested.
        clip: Limit of each optimiser's gradient norm; null for none.
        accumulate: Batches whose gradients make one update.
        losses: Image losses added to the method's own, by name and weight, e.g. `{ea_dists: 0.5}`.
        losses_weights: Weights of the added losses' networks: `pretrained`, `random` or a path.
        frozen_dtype: Dtype of frozen denoisers and of DINOv2; VAE, text encoders and networks of losses are float32.

    Raises:
        ValueError: A loss is unknown, or the method trains without a restored image.
    """

    size_multiple: int = 1
    """Low-quality images are padded to multiples of this before `restore`; set in `configure_networks`."""
    takes_losses: ClassVar[bool] = True
    """True for a method whose training step restores an image, which `losses` can compare."""

    def __init__(
        self,
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
        super().__init__(seed, ema_decay, clip, accumulate, frozen_dtype)
        if losses and not self.takes_losses:
            raise ValueError(
                f"losses={losses}: {type(self).__name__} trains without a restored image; leave losses out"
            )
        check_names(losses or {})
        self.loss_weights, self.losses_weights = losses or {}, losses_weights
        self.added_losses: AddedLosses | None = None
        self.scale, self.inference = scale, inference or Inference()
        self.inference.check(scale)
        self.test_precision = self.inference.test_precision
        self.output.can_skip = True
        self.scores, self.previews = Scores(), Previews()

    def configure_model(self) -> None:
        """Build the networks, and those of the added losses where the method is trained."""
        super().configure_model()
        if self.loss_weights and self._has_training and self.added_losses is None:
            self.added_losses = AddedLosses(self.loss_weights, self.losses_weights)

    def added_terms(self, x_01: Tensor, x_h_01: Tensor) -> list[Tensor]:
        """The losses that the configuration adds, on restored images and their targets, (B,3,H,W), [0,1].

        Returns:
            Each loss's mean times its weight; empty where `losses` is. Each is logged without its weight.
        """
        if self.added_losses is None:
            return []
        values = self.added_losses(x_01, x_h_01)
        self.log_dict({f"train/losses/{name}": value.detach() for name, value in values.items()})
        return [self.loss_weights[name] * value for name, value in values.items()]

    def parameter_rows(self) -> list[Row]:
        """The networks, and those of the added losses."""
        return super().parameter_rows() + ([] if self.added_losses is None else self.added_losses.rows())

    # Methods that a paper writes

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> Any:
        """Make what is decided once for a whole image: an embedding, a timestep.

        Args:
            x_lq: The whole low-quality images, (B,3,h,w), [0,1].
            prompts: One text an image, empty where there is none.

        Returns:
            The conditions that `restore` takes with each tile.
        """
        raise NotImplementedError(f"{type(self).__name__} has no prepare(x_lq, prompts); write it (CONTRIBUTING.md)")

    def restore(self, x_lq: Tensor, conditions: Any) -> Tensor:
        """Restore tiles: (B,3,h,w) in [0,1] to (B,3,scale*h,scale*w) near [0,1], not clamped, without colour fix."""
        raise NotImplementedError(f"{type(self).__name__} has no restore(x_lq, conditions); write it (CONTRIBUTING.md)")

    # Inference

    def predicted_files(self, folder: Path) -> list[Path]:
        """One file an image."""
        return self.targets(folder, self.data_info.names_to_predict())

    def targets(self, folder: Path, names: list[str]) -> list[Path]:
        """The files that images of these names are predicted to."""
        return [self.output.target(folder, name, self.inference.file_type) for name in names]

    @torch.no_grad()
    @in_test_precision
    def upscale(self, x_lq: Tensor, prompts: list[str], conditions: Any = None) -> Upscaled:
        """Restore whole images of any size, tile by tile, and fix their colours.

        Args:
            x_lq: (B,3,h,w), [0,1].
            prompts: One text an image.
            conditions: Conditions to use instead of those that `prepare` makes.

        Returns:
            Outputs of exactly scale times the size.
        """
        return upscale(self, x_lq, prompts, conditions)

    def fix_colors(self, raw: Tensor, x_lq: Tensor) -> Tensor:
        """Output images (B,3,scale*h,scale*w): restorations after `inference.color_fix`, clamped to [0,1]."""
        return color_fix(self.inference.color_fix, raw, bicubic_upsample(x_lq, self.scale)).clamp(0, 1)

    def is_large(self, x_lq: Tensor) -> bool:
        """True if a prediction makes images (B,3,h,w) of this size tile by tile on disk."""
        return self.inference.is_large(x_lq, self.scale)

    def check_tile(self) -> None:
        """Refuse tiles that do not fit the networks.

        Raises:
            ValueError: They do not.
        """
        self.inference.check_tile(self.scale * self.size_multiple)

    def on_fit_start(self) -> None:
        """Check the tiles before the fit, whose validation restores tiles."""
        super().on_fit_start()
        self.check_tile()

    def on_validation_start(self) -> None:
        """Refuse a validation, as a command, of which no metric can be computed."""
        if self._trainer is not None and self.trainer.state.fn == "validate":
            self.scores.check(self.inference.metrics, self.device)
        super().on_validation_start()

    def on_test_start(self) -> None:
        """Refuse a test of which no metric can be computed."""
        if self._trainer is not None:
            self.scores.check(self.inference.metrics, self.device)
        super().on_test_start()

    @in_test_precision
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score and preview a batch."""
        dataset = self.data_info.dataset_name("val", dataloader_idx)
        sr, _ = self.upscale(batch["lq"], batch["prompt"])
        self.scores.add(self.inference.metrics, self.run_name, dataset, batch, sr)
        self.previews.add(dataset, batch, sr, self.scale, self.inference.preview)

    @in_test_precision
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Score a batch with and without the colour fix, save its images and return them, (B,3,s*h,s*w)."""
        dataset = self.data_info.dataset_name("test", dataloader_idx)
        conditions = self.prepare(batch["lq"], batch["prompt"])
        sr, raw = self.upscale(batch["lq"], batch["prompt"], conditions)
        self.scores.add(self.inference.metrics, self.run_name, dataset, batch, sr)
        if self.inference.color_fix != "none":
            self.scores.add(self.inference.metrics, f"{self.run_name} (raw)", dataset, batch, raw)
        folder = inside(self.output_folder("test"), dataset)
        write_images([inside(folder, f"{name}.png") for name in batch["name"]], sr)
        self.tested(batch, conditions, sr, batch_idx, dataloader_idx)
        return sr

    def tested(self, batch: Batch, conditions: Any, sr: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        """Further work of a method on a tested batch; default: nothing."""

    @in_test_precision
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Upscale a batch to files named after the inputs; nothing is kept in memory."""
        targets = self.targets(self.output_folder("predict"), batch["name"])
        if not self.output.skips(targets):
            upscale_to_files(self, batch, targets)

    def on_predict_epoch_end(self) -> None:
        """Log the number of skipped images, then take the averages out."""
        self.output.log_skipped()
        super().on_predict_epoch_end()

    def _log_means(self, stage: str) -> list[Score]:
        """Log each metric's mean over the images of all processes that have a number, and return their scores."""
        scores = self.scores.collect(stage, self.gathered, self.trainer.is_global_zero)
        for name, mean in named_means(stage, scores).items():
            self.log(name, mean, rank_zero_only=True, prog_bar=not name.endswith("_raw"))
        return scores

    def on_validation_epoch_end(self) -> None:
        """Log means and previews.

        Raises:
            MetricUnavailableError: Validation is the command, and no image has a number.
        """
        scores = self._log_means("val")
        for name, picture in self.previews.take().items():
            self.show_image(name, picture)
        super().on_validation_epoch_end()
        if self.trainer.state.fn == "validate":
            refuse_without_numbers(self.inference.metrics, scores)

    def on_test_epoch_end(self) -> None:
        """Log means and write every image's scores to metrics.csv.

        Raises:
            MetricUnavailableError: No image has a number.
        """
        scores = self._log_means("test")
        path = self.output_folder("test") / "metrics.csv"  # all processes read it: it is a broadcast
        if self.trainer.is_global_zero and scores:
            write_scores(path, scores)
        super().on_test_epoch_end()
        refuse_without_numbers(self.inference.metrics, scores)
