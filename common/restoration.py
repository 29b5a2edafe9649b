"""Validation, test and prediction of every method.

A method derives from `RestorationModule` and writes `configure_networks`, `prepare`, `restore`, `training_step` and
`configure_optimizers`; it names what it trains in `trainable`. This file and `common.training` are the same for all,
so that a comparison is fair by construction.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from common.color import color_fix
from common.evaluation import Score, Scores, means, refuse_without_numbers, side_by_side, write_scores
from common.files import inside
from common.images import bicubic_upsample
from common.loading import is_architecture_only
from common.losses import IMAGE_LOSSES
from common.losses.added import AddedLosses
from common.made import refuse_alike, refuse_foreign
from common.parameters import Row, count
from common.precision import FrozenDtype, TestPrecision, in_test_precision
from common.tiling import pad_to_multiple, tiled
from common.training import Batch, TrainingModule
from common.upscaler import upscale_to_file, write_images

log = logging.getLogger(__name__)


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


class Upscaled(NamedTuple):
    """An upscaled batch before and after the colour fix, both (B,3,s*h,s*w), clamped to [0,1]."""

    sr: Tensor
    raw: Tensor


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
        self.loss_weights, self.losses_weights = losses or {}, losses_weights
        self.added_losses: AddedLosses | None = None
        self._check_losses()
        self.scale, self.inference = scale, inference or Inference()
        self.test_precision = self.inference.test_precision
        tile, overlap = self.inference.tile, self.inference.overlap
        if tile is not None and (tile % scale or overlap % scale or not 0 <= overlap < tile):
            raise ValueError(
                f"inference.tile={tile} and overlap={overlap} must be multiples of {scale}, overlap < tile"
            )
        self.results_file: Path | None = None  # file of the only predicted image, instead of `results_dir`
        self.skip_existing, self.skipped = False, 0  # predicted images whose file is there
        self.scores = Scores()
        self._previews: dict[str, list[Tensor]] = defaultdict(list)

    def _check_losses(self) -> None:
        if self.loss_weights and not self.takes_losses:
            raise ValueError(
                f"losses={self.loss_weights}: {type(self).__name__} trains without a restored image; leave losses out"
            )
        for name in self.loss_weights:
            if name not in IMAGE_LOSSES:
                raise ValueError(f"losses: {name} is not an image loss; use {', '.join(IMAGE_LOSSES)}")

    def configure_model(self) -> None:
        """Build the networks, and those of the added losses where the method is trained."""
        super().configure_model()
        if self.loss_weights and self._has_training and self.added_losses is None:
            self.added_losses = AddedLosses(
                self.loss_weights, "random" if is_architecture_only() else self.losses_weights
            )

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
        rows = super().parameter_rows()
        if self.added_losses is not None and (total := count(self.added_losses).total):
            rows.append(Row("networks of the added losses", "base", total, 0))
        return rows

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

    def output_folder(self, stage: str) -> Path:
        """That of `results_file`, where it is set."""
        return self.results_file.parent if self.results_file is not None else super().output_folder(stage)

    def check_output(self, stage: str) -> None:
        """Refuse to overwrite files that no prediction has made, before anything is loaded.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            FileExistsError: A file that would be written is there, was not made by a prediction, and is not to be kept.
            ValueError: The output lies in an input, or one file is named for several images.
        """
        if stage != "predict" or self.results_file is None:
            super().check_output(stage)
            return
        names = self.data_info.names_to_predict()
        if len(names) != 1:
            raise ValueError(
                f"output={self.results_file} is one file, and predict has {len(names)} images; give a folder"
            )
        self.data_info.check_apart(stage, self.results_file, within=True)
        self.check_predicted(self.output_folder(stage))

    def check_predicted(self, folder: Path) -> None:
        """As for all stages; with `skip_existing` files that are there are left alone."""
        targets = self.predicted_files(folder)
        refuse_alike(folder, targets)
        if not self.skip_existing:
            refuse_foreign(targets, "give another output, or --skip_existing true to leave them as they are")

    def predicted_files(self, folder: Path) -> list[Path]:
        """One file an image."""
        return [self._target(folder, name) for name in self.data_info.names_to_predict()]

    def _target(self, folder: Path, name: str) -> Path:
        """The file that an image is predicted to."""
        return self.results_file or inside(folder, f"{name}.{self.inference.file_type}")

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
        inference, scale = self.inference, self.scale
        conditions = self.prepare(x_lq, prompts) if conditions is None else conditions
        padded, (height, width) = pad_to_multiple(x_lq, self.size_multiple)

        def restore(tile: Tensor) -> Tensor:
            return self.restore(tile, conditions)

        if inference.tile is None:
            raw = restore(padded)
        else:
            self._check_tile()
            tile, overlap = inference.tile // scale, inference.overlap // scale
            raw = tiled(restore, padded, tile, overlap, scale, inference.blend)
        raw = raw[..., : scale * height, : scale * width].float()
        return Upscaled(self.fix_colors(raw, x_lq), raw.clamp(0, 1))

    def fix_colors(self, raw: Tensor, x_lq: Tensor) -> Tensor:
        """Output images (B,3,scale*h,scale*w): restorations after `inference.color_fix`, clamped to [0,1]."""
        return color_fix(self.inference.color_fix, raw, bicubic_upsample(x_lq, self.scale)).clamp(0, 1)

    def _check_tile(self) -> None:
        tile, multiple = self.inference.tile, self.scale * self.size_multiple
        if tile is not None and tile % multiple:
            raise ValueError(
                f"inference.tile={tile} must be a multiple of {multiple} px for this network; set "
                f"model.inference.tile={max(1, tile // multiple) * multiple}, or null for no tiles"
            )

    def on_fit_start(self) -> None:
        """Report before the fit which metrics validation cannot compute."""
        super().on_fit_start()
        self._check_tile()

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
        dataset = self._dataset_name("val", dataloader_idx)
        sr, _ = self.upscale(batch["lq"], batch["prompt"])
        self.scores.add(self.inference.metrics, self.run_name, dataset, batch, sr)
        if len(self._previews.get(dataset, ())) < self.inference.preview:
            self._previews[dataset].append(side_by_side(batch, sr, self.scale).cpu())

    @in_test_precision
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Score a batch with and without the colour fix, save its images and return them, (B,3,s*h,s*w)."""
        dataset = self._dataset_name("test", dataloader_idx)
        conditions = self.prepare(batch["lq"], batch["prompt"])
        sr, raw = self.upscale(batch["lq"], batch["prompt"], conditions)
        self.scores.add(self.inference.metrics, self.run_name, dataset, batch, sr)
        if self.inference.color_fix != "none":
            self.scores.add(self.inference.metrics, f"{self.run_name} (raw)", dataset, batch, raw)
        folder = inside(self._results() / "test", dataset)
        write_images([inside(folder, f"{name}.png") for name in batch["name"]], sr)
        self.tested(batch, conditions, sr, batch_idx, dataloader_idx)
        return sr

    def tested(self, batch: Batch, conditions: Any, sr: Tensor, batch_idx: int, dataloader_idx: int) -> None:
        """Further work of a method on a tested batch; default: nothing."""

    @in_test_precision
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Upscale a batch to files named after the inputs; nothing is kept in memory."""
        folder = self.output_folder("predict")
        targets = [self._target(folder, name) for name in batch["name"]]
        if self.skip_existing and all(target.is_file() for target in targets):
            self.skipped += len(targets)
            return
        refuse_foreign(targets)
        if not self.is_large(batch["lq"]):
            write_images(targets, self.upscale(batch["lq"], batch["prompt"]).sr)
            return
        self._check_tile()
        for x_lq, prompt, target in zip(batch["lq"].split(1), batch["prompt"], targets, strict=True):
            upscale_to_file(self, target, x_lq, prompt)

    def on_predict_epoch_end(self) -> None:
        """Log the number of skipped images, then take the averages out."""
        if self.skipped:
            log.warning("%d images were there already and are left as they are", self.skipped)
        self.skipped = 0
        super().on_predict_epoch_end()

    def is_large(self, x_lq: Tensor) -> bool:
        """True if a prediction makes images (B,3,h,w) of this size tile by tile on disk."""
        inference, (height, width) = self.inference, x_lq.shape[-2:]
        return (
            inference.large is not None
            and inference.tile is not None
            and self.scale**2 * height * width > inference.large * 1e6
        )

    def keep_scores(self, path: Path) -> int:
        """Write this process's scores of a test that stopped early.

        Args:
            path: A csv file, written if there are scores.

        Returns:
            The number of images with a score.
        """
        if self.scores.rows:
            write_scores(path, self.scores.rows)
        return len({(score.dataset, score.image) for score in self.scores.rows})

    def _log_means(self, stage: str) -> list[Score]:
        """Log each metric's mean over the images of all processes that have a number, and return their scores."""
        scores = self.scores.take(self.gathered)
        if self.trainer.is_global_zero:
            self.scores.warn(stage, scores)
        for (method, dataset, metric), mean in means(scores).items():
            suffix = "_raw" if method.endswith("(raw)") else ""
            self.log(f"{stage}/{dataset}/{metric}{suffix}", mean, rank_zero_only=True, prog_bar=not suffix)
        return scores

    def on_validation_epoch_end(self) -> None:
        """Log means and previews.

        Raises:
            MetricUnavailableError: Validation is the command, and no image has a number.
        """
        scores = self._log_means("val")
        for dataset, rows in self._previews.items():
            width = min(row.shape[-1] for row in rows)
            grid = torch.cat([row[..., :width] for row in rows], dim=-2)
            self.show_image(f"val/{dataset}: lq | bicubic | sr | hq", grid)
        self._previews.clear()
        super().on_validation_epoch_end()
        if self.trainer.state.fn == "validate":
            refuse_without_numbers(self.inference.metrics, scores)

    def on_test_epoch_end(self) -> None:
        """Log means and write every image's scores to metrics.csv.

        Raises:
            MetricUnavailableError: No image has a number.
        """
        scores = self._log_means("test")
        path = self._results() / "test" / "metrics.csv"  # all processes read it: trainer.log_dir is a broadcast
        if self.trainer.is_global_zero and scores:
            write_scores(path, scores)
        super().on_test_epoch_end()
        refuse_without_numbers(self.inference.metrics, scores)
