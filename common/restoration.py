"""What every method does at training, validation, test and predict time, written once.

A method derives from `RestorationModule` and writes `configure_model`, `prepare`, `restore`, `training_step` and
`configure_optimizers`; it names what it trains in `trainable`. The rest of this file is the same for all, so that a
comparison is fair by construction.
"""

from __future__ import annotations

import csv
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from common.checkpoints import check_keys, check_shapes, kept_keys, matching
from common.color import color_fix
from common.draws import Draws
from common.ema import EMA
from common.images import bicubic_upsample, write_png
from common.metrics import MetricProtocol, MetricUnavailableError, build_metric, to_uint8
from common.parameters import Row, is_lora
from common.tiling import pad_to_multiple, tiled

log = logging.getLogger(__name__)

Batch = dict[str, Any]
"""`lq` (B,3,h,w) and `hq` (B,3,s*h,s*w), uint8 or float in [0,1]; `prompt`, `name`: list[str]; `index`: (B,) int64."""


@dataclass
class Inference:
    """How images are restored and scored.

    Args:
        color_fix: Give the output the low-quality image's colours: `adain`, `wavelet` or `none`.
        tile: Side of a tile in output pixels; null restores every image whole.
        overlap: Pixels that neighbouring tiles share in the output.
        blend: How overlaps are joined: plain `average` or `feather`.
        metrics: Ids of the metrics computed on validation and test images, see `common.metrics`.
        preview: Images a data set that validation shows in TensorBoard.
    """

    color_fix: Literal["adain", "wavelet", "none"] = "adain"
    tile: int | None = 512
    overlap: int = 64
    blend: Literal["average", "feather"] = "average"
    metrics: list[str] = field(default_factory=lambda: ["psnr_y", "ssim_y", "psnr_rgb"])
    preview: int = 4


class Upscaled(NamedTuple):
    """An upscaled batch before and after the colour fix, both (B,3,s*h,s*w), clamped to [0,1]."""

    sr: Tensor
    raw: Tensor


@dataclass(frozen=True)
class Score:
    """One number about one image, with the protocol it was measured by."""

    method: str
    dataset: str
    image: str
    metric: str
    value: float | None
    protocol: str


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the batch was saved, no weight was changed by it."""


class RestorationModule(LightningModule):
    """Base of all methods; see the file's head.

    Args:
        scale: Super-resolution factor.
        inference: How images are restored and scored.
        seed: Of every random draw in training.
        ema_decay: Decay of the average of the trained weights, which then is what gets validated and tested.
        clip: Limit of each optimiser's gradient norm; null for none.
        accumulate: Batches whose gradients make one update.
    """

    trainable: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Optimiser -> name patterns of the parameters it trains, in the optimisers' order; the first one sets the pace."""

    size_multiple: int = 1
    """Low-quality images are padded to multiples of this before `restore`; set in `configure_model`."""

    def __init__(
        self,
        scale: int = 4,
        inference: Inference | None = None,
        seed: int = 0,
        ema_decay: float | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # the frozen base is not in checkpoints; on_load_checkpoint checks the rest
        self.scale, self.inference, self.seed = scale, inference or Inference(), seed
        self.clip, self.accumulate = clip, accumulate
        self.ema = EMA(ema_decay) if ema_decay is not None else None
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} is out of range; set 1 or more batches an update")
        tile, overlap = self.inference.tile, self.inference.overlap
        if tile is not None and (tile % scale or overlap % scale or not 0 <= overlap < tile):
            raise ValueError(
                f"inference.tile={tile} and overlap={overlap} must be multiples of {scale}, overlap < tile"
            )
        self.register_buffer("train_step", torch.zeros((), dtype=torch.long))
        self.train_step: Tensor  # calls of training_step begun, micro-batches included
        self.results_dir: Path | None = None  # where test and predict write; default: in the run's folder
        self._run_dir = Path(".")
        self._grad_norm = torch.zeros(())
        self._batch: Batch = {}
        self._scores: list[Score] = []
        self._previews: dict[str, list[Tensor]] = defaultdict(list)
        self._metrics: dict[str, MetricProtocol | str] = {}

    # What a method must offer

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> Any:
        """Make what is decided once for a whole image: an embedding, a timestep.

        Args:
            x_lq: The whole low-quality images, (B,3,h,w), [0,1].
            prompts: One text an image, empty where there is none.

        Returns:
            Whatever `restore` needs besides the tile.
        """
        raise NotImplementedError

    def restore(self, x_lq: Tensor, conditions: Any) -> Tensor:
        """Restore tiles: (B,3,h,w) in [0,1] to (B,3,scale*h,scale*w) near [0,1], not clamped, without colour fix."""
        raise NotImplementedError

    def color_reference(self, x_lq: Tensor) -> Tensor:
        """The image whose colours the output takes, (B,3,scale*h,scale*w) in [0,1]."""
        return bicubic_upsample(x_lq, self.scale)

    def networks(self) -> dict[str, nn.Module]:
        """The method's networks by the name that `isr parameters` prints; default: its direct children."""
        return dict(self.named_children())

    def parameter_rows(self) -> list[Row]:
        """What `isr parameters` prints: for each of `networks` its own weights and its adapters, each parameter once.

        Override to add what is no network of the method, such as text encoders (kind `text`).
        """
        trained = {id(parameter) for parameter in self.all_trainable().values()}
        seen: set[int] = set()
        rows = []
        for network, module in self.networks().items():
            named = {name: p for name, p in module.named_parameters() if id(p) not in seen}
            seen.update(map(id, named.values()))
            for lora in (False, True):
                part = [p for name, p in named.items() if is_lora(name) is lora]
                learnt = sum(p.numel() for p in part if id(p) in trained)
                if part and lora:
                    rows.append(Row(f"{network} LoRA", "adapter", sum(p.numel() for p in part), learnt))
                elif part:
                    rows.append(Row(network, "module" if learnt else "base", sum(p.numel() for p in part), learnt))
        if self.ema is not None:
            rows.append(Row("EMA of what is trained", "copy", sum(row.trainable for row in rows), 0))
        return rows

    def parameter_sums(self) -> dict[str, int]:
        """Sums over rows that the paper publishes, by what they sum; default: none."""
        return {}

    # Training

    def trainable_parameters(self, optimizer: str) -> list[nn.Parameter]:
        """The parameters of one of the optimisers that `trainable` names."""
        return list(matching(self, self.trainable_patterns()[optimizer]).values())

    def trainable_patterns(self) -> Mapping[str, tuple[str, ...]]:
        """`trainable`, less what this configuration switches off; override where it does."""
        return self.trainable

    def all_trainable(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its dotted name."""
        return matching(self, [pattern for patterns in self.trainable_patterns().values() for pattern in patterns])

    def draws(self, batch: Batch) -> Draws:
        """Random numbers for this batch that resume and several processes reproduce."""
        index = batch.get("index")
        if index is None:  # a foreign data module: count what this run has seen
            size = len(batch["lq"])
            first = ((int(self.train_step) - 1) * self.trainer.world_size + self.global_rank) * size
            index = torch.arange(first, first + size)
        return Draws(self.seed, index, self.device)

    @contextmanager
    def turn(self, name: str) -> Iterator[Callable[[Tensor], None]]:
        """One optimiser's turn: only its parameters require grad, and the yielded function updates them by a loss.

        The update runs backward and, at the end of an accumulation window, clips (after unscaling), steps, advances the
        scheduler and zeroes. Only the first optimiser's steps count as Lightning's `global_step`, so that `max_steps`,
        checkpoints and schedules count train steps, not optimiser calls.
        """
        order = list(self.trainable_patterns())
        which = order.index(name)
        optimizers = self.optimizers(use_pl_optimizer=True)
        optimizer: Any = optimizers[which] if isinstance(optimizers, list) else optimizers

        def update(loss: Tensor) -> None:
            self._stop_if_not_finite(name, loss)
            self.manual_backward(loss / self.accumulate)
            if int(self.train_step) % self.accumulate:
                return
            if which:
                optimizer._on_before_step = optimizer._on_after_step = lambda: None
            optimizer.step()
            # not in the hook: Lightning drops an epoch's first numbers when two hooks log by turns
            self.log(f"grad_norm/{name}", self._grad_norm)
            optimizer.zero_grad()
            schedulers: Any = self.lr_schedulers()
            schedulers = schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []
            for scheduler in schedulers:
                if getattr(scheduler, "optimizer", None) is optimizer.optimizer:
                    scheduler.step()
            if which == 0 and self.ema is not None:
                self.ema.update(self.all_trainable())

        with self.toggled_optimizer(optimizer):
            yield update

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip; called after mixed precision has unscaled the gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._grad_norm = nn.utils.clip_grad_norm_(parameters, self.clip if self.clip is not None else float("inf"))

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's, but training's numbers are means over all processes: what one process with all samples logs."""
        kwargs["sync_dist"] = kwargs.get("sync_dist", False) or name.startswith("train/")
        super().log(name, value, *args, **kwargs)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count the step before it runs, so that a checkpoint made after it agrees."""
        self.train_step += 1
        self._batch = batch

    def _stop_if_not_finite(self, name: str, loss: Tensor) -> None:
        if bool(torch.isfinite(loss)):
            return
        path = self._run_dir / f"nonfinite_step{int(self.train_step)}_rank{self.global_rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(
            {key: value.cpu() if isinstance(value, Tensor) else value for key, value in self._batch.items()}, path
        )
        raise NonFiniteLossError(
            f"the {name} loss is {float(loss)} at train step {int(self.train_step)}; its batch is in {path} and the "
            "last checkpoint is unharmed: lower the learning rate, or look at that batch"
        )

    # Images come as uint8 and become float on the device

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """uint8 to float in [0,1]."""
        for key in ("lq", "hq"):
            if key in batch and batch[key].dtype == torch.uint8:
                batch[key] = batch[key].float() / 255
        return batch

    # Inference

    @torch.no_grad()
    def upscale(self, x_lq: Tensor, prompts: list[str]) -> Upscaled:
        """Restore whole images of any size, tile by tile, and fix their colours.

        Args:
            x_lq: (B,3,h,w), [0,1].
            prompts: One text an image.

        Returns:
            Outputs of exactly scale times the size.
        """
        inference, scale = self.inference, self.scale
        conditions = self.prepare(x_lq, prompts)
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
        sr = color_fix(inference.color_fix, raw, self.color_reference(x_lq))
        return Upscaled(sr.clamp(0, 1), raw.clamp(0, 1))

    def _check_tile(self) -> None:
        tile, multiple = self.inference.tile, self.scale * self.size_multiple
        if tile is not None and tile % multiple:
            raise ValueError(
                f"inference.tile={tile} must be a multiple of {multiple} px for this network; set "
                f"model.inference.tile={max(1, tile // multiple) * multiple}, or null for no tiles"
            )

    def on_fit_start(self) -> None:
        """Say now what validation would only find out after many steps."""
        self._check_tile()
        self._run_dir = Path(self.trainer.log_dir or ".")  # asking for it is a broadcast: all processes must

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score and preview a batch."""
        dataset = self._dataset_name("val", dataloader_idx)
        sr, _ = self.upscale(batch["lq"], batch["prompt"])
        self._score(self.run_name, dataset, batch, sr)
        previews = self._previews[dataset]
        if len(previews) < self.inference.preview:
            previews.append(side_by_side(batch, sr, self.scale).cpu())

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch with and without the colour fix and save its images."""
        dataset = self._dataset_name("test", dataloader_idx)
        sr, raw = self.upscale(batch["lq"], batch["prompt"])
        self._score(self.run_name, dataset, batch, sr)
        if self.inference.color_fix != "none":
            self._score(f"{self.run_name} (raw)", dataset, batch, raw)
        self._write(self._results() / "test" / dataset, batch["name"], sr)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Upscale a batch to PNG files named after the inputs; nothing is kept in memory."""
        folder = self.results_dir or self._results() / "predict"
        self._write(folder, batch["name"], self.upscale(batch["lq"], batch["prompt"]).sr)

    @property
    def run_name(self) -> str:
        """Name of this run in tables: its folder's."""
        name = getattr(self.trainer.logger, "name", None)
        return str(name).rpartition("/")[2] if name else type(self).__name__

    def _results(self) -> Path:
        return self.results_dir or Path(self.trainer.log_dir or ".")

    def _write(self, folder: Path, names: list[str], x_01: Tensor) -> None:
        for name, image in zip(names, to_uint8(x_01).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            write_png(folder / f"{name}.png", image)

    def _dataset_name(self, stage: str, dataloader_idx: int) -> str:
        names = getattr(getattr(self.trainer, "datamodule", None), "dataset_names", {}).get(stage, [])
        return str(names[dataloader_idx]) if dataloader_idx < len(names) else f"{stage}{dataloader_idx}"

    def _score(self, method: str, dataset: str, batch: Batch, sr: Tensor) -> None:
        for i, name in enumerate(batch["name"]):
            sr_u8 = to_uint8(sr[i]).permute(1, 2, 0).cpu().numpy()
            hq_u8 = to_uint8(batch["hq"][i]).permute(1, 2, 0).cpu().numpy() if "hq" in batch else None
            for metric_id in self.inference.metrics:
                metric = self._metric(metric_id)
                if isinstance(metric, str):
                    self._scores.append(Score(method, dataset, name, metric_id, None, f"not computed: {metric}"))
                elif hq_u8 is not None or not metric.needs_hq:
                    value = metric(sr_u8, hq_u8)
                    self._scores.append(Score(method, dataset, name, metric_id, value, metric.describe()))

    def _metric(self, metric_id: str) -> MetricProtocol | str:
        """The metric, or the reason why it cannot be had, found out once."""
        if metric_id not in self._metrics:
            try:
                self._metrics[metric_id] = build_metric(metric_id, device=self.device)
            except MetricUnavailableError as error:
                log.warning("metric %s is not computed: %s", metric_id, error)
                self._metrics[metric_id] = str(error)
        return self._metrics[metric_id]

    def _gathered_scores(self) -> list[Score]:
        """All processes' scores, an image that two of them saw only once, in a fixed order."""
        scores, self._scores = self._scores, []
        if self.trainer.world_size > 1:
            parts: list[list[Score]] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(parts, scores)
            scores = [score for part in parts for score in part]
        unique = {(s.method, s.dataset, s.image, s.metric): s for s in scores}
        return sorted(unique.values(), key=lambda s: (s.dataset, s.method, s.metric, s.image))

    def _log_means(self, stage: str, scores: list[Score]) -> None:
        values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for score in scores:
            if score.value is not None:
                values[score.method, score.dataset, score.metric].append(score.value)
        for (method, dataset, metric), numbers in values.items():
            suffix = "_raw" if method.endswith("(raw)") else ""
            mean = sum(numbers) / len(numbers)
            self.log(f"{stage}/{dataset}/{metric}{suffix}", mean, rank_zero_only=True, prog_bar=not suffix)

    def on_validation_epoch_end(self) -> None:
        """Log means and previews."""
        self._log_means("val", self._gathered_scores())
        experiment: Any = getattr(self.trainer.logger, "experiment", None)
        for dataset, rows in self._previews.items():
            if hasattr(experiment, "add_image") and not self.trainer.sanity_checking:
                width = min(row.shape[-1] for row in rows)
                grid = torch.cat([row[..., :width] for row in rows], dim=-2)
                experiment.add_image(f"val/{dataset}: lq | bicubic | sr | hq", grid, self.trainer.global_step)
        self._previews.clear()
        self._swap_ema()  # here and not in on_validation_end, before which ModelCheckpoint saves the weights

    def on_test_epoch_end(self) -> None:
        """Log means and write every image's scores to metrics.csv."""
        scores = self._gathered_scores()
        self._log_means("test", scores)
        path = self._results() / "test" / "metrics.csv"  # asked for by all processes: trainer.log_dir is a broadcast
        if self.trainer.is_global_zero and scores:
            write_scores(path, scores)
        self._swap_ema()

    # The averaged weights are what is looked at

    def _swap_ema(self) -> None:
        if self.ema is not None:
            self.ema.swap(self.all_trainable())

    def on_validation_start(self) -> None:
        """Put the averages in; the end of the epoch takes them out."""
        self._swap_ema()

    on_test_start = on_predict_start = on_predict_epoch_end = on_validation_start

    # Checkpoints hold what is trained

    def checkpoint_keys(self) -> set[str]:
        """State-dict keys that a checkpoint of this method holds."""
        return kept_keys(self, self.all_trainable())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the frozen base."""
        keys = self.checkpoint_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keys}
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that it fits before anything is loaded."""
        check_keys(self.checkpoint_keys(), set(checkpoint["state_dict"]), "the checkpoint")
        check_shapes(self, checkpoint["state_dict"], "the checkpoint")
        if self.ema is not None:
            if "ema" not in checkpoint:
                raise ValueError("ema_decay is set and the checkpoint holds no average; set model.ema_decay=null")
            self.ema.load_state_dict(checkpoint["ema"], self.all_trainable())


def side_by_side(batch: Batch, sr: Tensor, scale: int) -> Tensor:
    """LQ (pixels repeated) | bicubic | SR | HQ of a batch's first image, (3, s*h, n*s*w), [0,1]."""
    lq = batch["lq"][:1]
    nearest = lq.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    images = [nearest, bicubic_upsample(lq, scale), sr[:1], *([batch["hq"][:1]] if "hq" in batch else [])]
    return torch.cat([image[0].float() for image in images], dim=-1)


def write_scores(path: Path, scores: list[Score]) -> None:
    """Write scores in long form: method, dataset, image, metric, value, protocol."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "dataset", "image", "metric", "value", "protocol"])
        for s in scores:
            value = "" if s.value is None else f"{s.value:.6f}"
            writer.writerow([s.method, s.dataset, s.image, s.metric, value, s.protocol])
    part.replace(path)
