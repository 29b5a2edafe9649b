"""DM-SR, stage 1: learn an image's degree of degradation, as the timestep for the denoiser (section 3.1)."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from common.checkpoints import check_keys, read_stage, resolved, trained_state, without
from common.figures import agreement, figure_to_tensor, predicted_against_target, save_figure
from common.files import csv_text, replacing
from common.images import bicubic_upsample, to_pm1
from common.loading import is_architecture_only
from common.losses import build_image_loss, l1
from common.precision import in_test_precision
from common.stages import Stage, digest
from common.training import Batch, TrainingModule
from papers.dm_sr.module import DMSR
from papers.dm_sr.networks import TimestepEstimator
from papers.dm_sr.stage1 import LAST

log = logging.getLogger(__name__)

COLLAPSED = 0.01
"""Smallest ratio of the predictions' spread to their targets'; below it T has collapsed to a constant."""

Target = Literal["lpips", "l1", "ssim", "min"]


class TimestepEstimation(TrainingModule):
    """Stage 1: train the timestep estimator T on the distance between low- and high-quality image.

    The target is t = 499 clip((d - lo) / (hi - lo), 0, 1), the loss the mean square of (t_hat - t) / 500.

    Args:
        target: The distance d (Table 5): `lpips`, `l1`, `ssim` (1 - SSIM), or `min`: of t_hat - 1, t_hat and
            t_hat + 1 the one at which a trained stage 2 comes nearest to the high-quality latent.
        lo: Distance that becomes t = 0; null takes the smallest of the calibration set.
        hi: Distance that becomes t = 499; null takes the largest of the calibration set.
        calibration: Number of training batches from which lo and hi are taken, if they are null.
        weights: Initial weights of T's VGG19: `pretrained` (ImageNet), `random` or a file.
        width: Factor on VGG19's channels, for `random` only.
        lpips_weights: Weights of LPIPS's AlexNet: `pretrained`, `random` or a file; for the target `lpips` only.
        restorer: Stage 2's checkpoint, for the target `min` only.
        optimizer: Optimiser of T.
        lr_scheduler: Learning-rate scheduler, stepped once an update.
        scale: Super-resolution factor.
        seed: Random seed of new weights and of all draws made in training; null takes `--seed_everything`, 0 in Python.
        ema_decay: Decay of the average of the trained weights; null for none.
        clip: Limit of the gradient norm; null for none.
        accumulate: Batches whose gradients make one update.
    """

    trainable: ClassVar = {"estimator": ("estimator.*",)}

    lo: Tensor
    hi: Tensor

    def __init__(
        self,
        target: Target = "lpips",
        lo: float | None = 0.0,
        hi: float | None = 1.0,
        calibration: int = 16,
        weights: str = "pretrained",
        width: float = 1.0,
        lpips_weights: str = "pretrained",
        restorer: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        scale: int = 4,
        seed: int | None = None,
        ema_decay: float | None = None,
        clip: float | None = None,
        accumulate: int = 1,
    ) -> None:
        super().__init__(seed, ema_decay, clip, accumulate)
        self.save_hyperparameters()
        if lo is not None and hi is not None and lo >= hi:
            raise ValueError(f"lo={lo} is not below hi={hi}; set the distances that become t = 0 and t = 499")
        if target == "min" and restorer is None:
            raise ValueError("target=min needs a trained stage 2; set restorer to its checkpoint")
        self.target, self.calibration, self.scale = target, calibration, scale
        self.weights, self.width, self.lpips_weights, self.restorer_path = weights, width, lpips_weights, restorer
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        for name, value in {"lo": lo, "hi": hi}.items():  # in the checkpoint: NaN until the calibration
            self.register_buffer(name, torch.tensor(float("nan") if value is None else value, dtype=torch.float32))
        self.estimator: TimestepEstimator | None = None
        self._rows: list[tuple[str, str, float, float]] = []  # data set, image, target, predicted
        self._stds: Tensor | None = None  # of the last batch's predictions and targets
        self._warned = False

    # Networks

    def configure_networks(self) -> None:
        """Build T and the network of its target."""
        self.distance: Callable[[Tensor, Tensor], Tensor] | None = None
        if self.target == "lpips":
            self.distance = build_image_loss("lpips_alex", self.lpips_weights)
        elif self.target != "min":
            self.distance = {"l1": l1, "ssim": _one_minus_ssim}[self.target]
        self.restorer = None
        if self.target == "min" and not is_architecture_only():
            self.restorer, self.stages["restorer"] = read_restorer(str(self.restorer_path))
        self.estimator = TimestepEstimator(self.weights, self.width, LAST + 1, self.seed)

    def networks(self) -> dict[str, nn.Module]:
        """T in its two parts, and the distance's network."""
        assert self.estimator is not None
        networks: dict[str, Any] = {
            "timestep estimator, VGG19": self.estimator.features,
            "timestep estimator, linear": self.estimator.head,
            "LPIPS (AlexNet)": self.distance if isinstance(self.distance, nn.Module) else None,
            "stage 2": self.restorer,
        }
        return {name: network for name, network in networks.items() if network is not None}

    def configure_optimizers(self) -> Any:
        """One optimiser for T."""
        optimizer = self.optimizer(self.trainable_parameters("estimator"))
        return [optimizer], [self.lr_scheduler(optimizer)] if self.lr_scheduler is not None else []

    def restore_stage(self, argument: str, stage: Stage) -> None:
        """Do nothing: T's checkpoint is complete. New targets come from the current stage 2, as a warning reports."""

    # Targets

    @torch.no_grad()
    def distances(self, batch: Batch) -> Tensor:
        """Distance d of each image of a batch, (B,), fp32."""
        assert self.distance is not None
        with torch.autocast(batch["hq"].device.type, enabled=False):
            return self.distance(bicubic_upsample(batch["lq"], self.scale), batch["hq"]).float()

    @torch.no_grad()
    def targets(self, batch: Batch, t_hat: Tensor) -> Tensor:
        """Target timesteps of T, (B,), float in [0, 499]; `t_hat` is used for the target `min` only."""
        if self.target == "min":
            return self._nearest(batch, t_hat)
        return LAST * ((self.distances(batch) - self.lo) / (self.hi - self.lo)).clamp(0, 1)

    def _nearest(self, batch: Batch, t_hat: Tensor) -> Tensor:
        """The timestep among t - 1, t, t + 1 whose Z_SR is nearest to the high-quality latent in L1."""
        assert self.restorer is not None
        i_lr, c = to_pm1(bicubic_upsample(batch["lq"], self.scale)), self.restorer.text_condition(batch["prompt"])
        h = self.restorer.codec.encode(to_pm1(batch["hq"]))
        candidates = torch.stack([(t_hat.round() + step).clamp(0, LAST) for step in (-1, 0, 1)])  # (3, B)
        errors = torch.stack([(self.restorer.split(i_lr, t, c).x0 - h).abs().mean((1, 2, 3)) for t in candidates])
        return candidates.gather(0, errors.argmin(0, keepdim=True))[0]

    def on_fit_start(self) -> None:
        """Take lo and hi from training images, if neither a setting nor a checkpoint gives them."""
        super().on_fit_start()
        missing = [name for name in ("lo", "hi") if bool(self.get_buffer(name).isnan())]
        if not missing or self.target == "min":
            return
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ValueError(f"{' and '.join(missing)}=null need a data module to be calibrated on; give numbers")
        batches: Iterable[Batch] = islice(data.train_dataloader(), self.calibration)
        moved = (self.on_after_batch_transfer(self.transfer_batch_to_device(b, self.device, 0), 0) for b in batches)
        distances = torch.as_tensor(self.all_gather(torch.cat([self.distances(batch) for batch in moved])))
        for name, value in {"lo": distances.min(), "hi": distances.max()}.items():
            if name in missing:
                self.get_buffer(name).copy_(value)
        if self.lo >= self.hi:
            raise ValueError(f"lo={float(self.lo)} is not below hi={float(self.hi)} after calibration; give both")

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Mean square of (t_hat - t) / 500."""
        assert self.estimator is not None
        with self.optimizer_turn("estimator") as update:
            t_hat = self.estimator(bicubic_upsample(batch["lq"], self.scale)).float()
            t = self.targets(batch, t_hat.detach())
            loss = ((t_hat - t) / (LAST + 1)).square().mean()
            update(loss)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self._stds = self._spread(t_hat.detach(), t)
        self.log_dict({"train/t": t.mean(), "train/t_hat": t_hat.detach().mean(), "train/t_hat_std": self._stds[0]})

    def _spread(self, *values: Tensor) -> Tensor:
        """Standard deviation of each of the values over the batches of all processes."""
        moments = torch.stack([torch.stack([x.double().mean(), x.double().square().mean()]) for x in values])
        means, squares = self.trainer.strategy.reduce(moments, reduce_op="mean").unbind(1)
        return (squares - means.square()).clamp(min=0).sqrt().float()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Warn of a collapse, at a point at which the host waits for the device anyway."""
        super().on_save_checkpoint(checkpoint)
        if self._stds is not None:
            predicted, target = self._stds.tolist()
            self._warn_of_collapse(predicted, target, "the last training batch")

    def _warn_of_collapse(self, predicted: float, target: float, where: str) -> None:
        """Warn once of predictions that hardly differ although their targets do."""
        if predicted < COLLAPSED * target and not self._warned:
            self._warned = True
            log.warning(
                "t_hat hardly differs between images: its standard deviation is %.3g where the target's is %.3g (%s). "
                "If it stays so, T has collapsed to a constant: lower the learning rate, or lengthen its warm-up",
                predicted,
                target,
                where,
            )

    # Validation, test, prediction

    @torch.no_grad()
    def estimate(self, x_lq: Tensor) -> Tensor:
        """t_hat of low-quality images (B,3,h,w) in [0,1], (B,), float."""
        assert self.estimator is not None
        return self.estimator(bicubic_upsample(x_lq, self.scale)).float()

    def _note(self, stage: str, batch: Batch, dataloader_idx: int) -> None:
        t_hat = self.estimate(batch["lq"])
        t = self.targets(batch, t_hat) if "hq" in batch else torch.full_like(t_hat, float("nan"))
        dataset = self.data_info.dataset_name(stage, dataloader_idx)
        self._rows += zip([dataset] * len(t), batch["name"], t.tolist(), t_hat.tolist(), strict=True)

    @in_test_precision
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compare prediction and target."""
        self._note("val", batch, dataloader_idx)

    @in_test_precision
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compare prediction and target."""
        self._note("test", batch, dataloader_idx)

    @in_test_precision
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Predict."""
        self._note("predict", batch, dataloader_idx)

    def _gathered_rows(self) -> list[tuple[str, str, float, float]]:
        """Rows of all processes; an image that two processes had is there once."""
        rows, self._rows = self._rows, []
        return sorted({row[:2]: row for row in self.gathered(rows)}.values())

    def _report(self, stage: str) -> None:
        """Log RMSE, R^2 and both spreads for each data set, warn of a collapse, and draw the paper's Figure 7."""
        rows, folder = self._gathered_rows(), self.output_folder(stage)
        known = [row for row in rows if row[2] == row[2]]  # real photos have no target
        for dataset in dict.fromkeys(row[0] for row in known):
            t, t_hat = (torch.tensor([row[i] for row in known if row[0] == dataset]).numpy() for i in (2, 3))
            fit = agreement(t, t_hat)
            values = {"rmse": fit.rmse, "target_std": fit.std, "t_hat_std": float(t_hat.std())}
            values |= {} if fit.r2 is None else {"r2": fit.r2}
            for name, value in values.items():
                self.log(f"{stage}/{dataset}/{name}", float(value), rank_zero_only=True, prog_bar=name == "rmse")
            if not self.trainer.is_global_zero or self.trainer.sanity_checking:
                continue
            self._warn_of_collapse(values["t_hat_std"], fit.std, dataset)
            figure = predicted_against_target(t, t_hat, LAST, "timestep")
            self.show_image(f"{stage}/{dataset}: timestep", figure_to_tensor(figure))
            if stage == "test":
                caption = (
                    f"Predicted against target timestep ({self.target}) of {len(t)} test images of {dataset} "
                    "(the paper's Figure 7)."
                )
                save_figure(folder / "figures" / f"timestep_{dataset}.png", figure, caption)
        if stage == "test" and self.trainer.is_global_zero and rows:
            write_rows(folder / "timesteps.csv", rows)

    def on_validation_epoch_end(self) -> None:
        """Report, then take the averages out."""
        self._report("val")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """Report, then take the averages out."""
        self._report("test")
        super().on_test_epoch_end()

    def on_predict_epoch_end(self) -> None:
        """Write timesteps.csv, then take the averages out."""
        rows, (path,) = self._gathered_rows(), self.predicted_files(self.output_folder("predict"))
        if self.trainer.is_global_zero:
            write_rows(path, rows)
        super().on_predict_epoch_end()

    def predicted_files(self, folder: Path) -> list[Path]:
        """The table of all images."""
        return [folder / "timesteps.csv"]


def _one_minus_ssim(x_01: Tensor, y_01: Tensor) -> Tensor:
    """1 - SSIM of RGB images, (B,); torchmetrics' SSIM, Gaussian window, sigma 1.5."""
    return 1 - torch.as_tensor(ssim(x_01, y_01, data_range=1.0, reduction="none")).reshape(len(x_01))


def write_rows(path: Path, rows: Iterable[tuple[str, str, float, float]]) -> None:
    """Write data set, image, target (empty where there is none) and predicted timestep as CSV."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "image", "target", "predicted"])
        writer.writerows((csv_text(d), csv_text(i), "" if t != t else f"{t:.3f}", f"{p:.3f}") for d, i, t, p in rows)


def read_restorer(path: str) -> tuple[Any, Stage]:
    """Frozen stage 2 of a checkpoint, with averaged weights if it has them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another stage's, or does not fit.
    """
    checkpoint = read_stage(path, "restorer", "papers.dm_sr.DMSR")
    names = ("pretrained", "prompt", "embedding", "scale", "seed", "frozen_dtype")
    given = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in names}
    restorer = DMSR(**given, timestep=0, ema_decay=None)  # the estimator is not used
    restorer.inference_only = restorer.awaits_checkpoint = True
    restorer.configure_model()
    restorer.fixed_texts.take(restorer, checkpoint)
    restorer.fixed_texts.encode(restorer)
    state = trained_state(without(checkpoint, restorer.left_out))
    check_keys(restorer.checkpoint_keys(), set(state), f"restorer={path}")
    restorer.load_state_dict(state, strict=False)
    return restorer.requires_grad_(False).eval(), Stage(resolved(path), digest(state), {}, {})
