"""Scores of restored images: which metrics can be computed, each image's numbers, means, tables and previews."""

from __future__ import annotations

import csv
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import one_line
from common.files import csv_text, replacing
from common.images import bicubic_upsample
from common.metrics import Image, MetricProtocol, build_metric, to_uint8
from common.pyiqa import MetricUnavailableError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """One number about one image, with the protocol it was measured by."""

    method: str
    dataset: str
    image: str
    metric: str
    value: float | None
    protocol: str


class Scores:
    """The metrics of a model, each made once, and the scores of this process since the last `take`."""

    def __init__(self) -> None:
        self.rows: list[Score] = []
        self._metrics: dict[str, MetricProtocol | str] = {}
        self._warned: set[str] = set()  # reasons why images have no number

    def metric(self, metric_id: str, device: torch.device) -> MetricProtocol | str:
        """The metric, or the reason why it is not available.

        Args:
            metric_id: See `common.metrics.build_metric`.
            device: Device of the metric's networks.
        """
        if metric_id not in self._metrics:
            try:
                self._metrics[metric_id] = build_metric(metric_id, device=device)
            except MetricUnavailableError as error:
                log.warning("metric %s is not computed: %s", metric_id, error)
                self._metrics[metric_id] = str(error)
        return self._metrics[metric_id]

    def check(self, metrics: Sequence[str], device: torch.device) -> None:
        """Check before the work that a metric can be made.

        Raises:
            MetricUnavailableError: None of the metrics can be made.
        """
        reasons = [reason for metric in metrics if isinstance(reason := self.metric(metric, device), str)]
        if reasons and len(reasons) == len(metrics):
            raise MetricUnavailableError(f"{_none_computed(metrics)}: {'; '.join(reasons)}")

    def add(self, metrics: Sequence[str], method: str, dataset: str, batch: Mapping[str, Any], sr: Tensor) -> None:
        """Score a batch of restored images.

        Args:
            metrics: Ids of the metrics.
            method: Name of the method.
            dataset: Name of the test set.
            batch: `name`, and `hq` (B,3,H,W), [0,1], where the set has references.
            sr: Restored images, (B,3,H,W), [0,1].
        """
        for i, name in enumerate(batch["name"]):
            sr_u8 = to_uint8(sr[i]).permute(1, 2, 0).cpu().numpy()
            hq_u8 = to_uint8(batch["hq"][i]).permute(1, 2, 0).cpu().numpy() if "hq" in batch else None
            for metric_id in metrics:
                metric = self.metric(metric_id, sr.device)
                if isinstance(metric, str):
                    self.rows.append(Score(method, dataset, name, metric_id, None, f"{_NOT_COMPUTED}{metric}"))
                elif hq_u8 is not None or not metric.needs_hq:
                    value, protocol = measured(metric, sr_u8, hq_u8)
                    self.rows.append(Score(method, dataset, name, metric_id, value, protocol))

    def take(self, gathered: Callable[[list[Score]], list[Score]]) -> list[Score]:
        """Scores of all processes, each once, in a fixed order; `rows` is empty afterwards.

        Args:
            gathered: Gives the lists of all processes, one after the other.
        """
        scores, self.rows = self.rows, []
        unique = {(s.method, s.dataset, s.image, s.metric): s for s in gathered(scores)}
        return sorted(unique.values(), key=lambda s: (s.dataset, s.method, s.metric, s.image))

    def collect(self, stage: str, gathered: Callable[[list[Score]], list[Score]], warns: bool) -> list[Score]:
        """As `take`, with warnings.

        Args:
            stage: `val` or `test`.
            gathered: As for `take`.
            warns: True in the process that logs why images have no number.
        """
        scores = self.take(gathered)
        if warns:
            self.warn(stage, scores)
        return scores

    def keep(self, path: Path) -> int:
        """Write this process's scores of a test that stopped early.

        Args:
            path: A csv file, written if there are scores.

        Returns:
            The number of images with a score.
        """
        if self.rows:
            write_scores(path, self.rows)
        return len({(score.dataset, score.image) for score in self.rows})

    def warn(self, stage: str, scores: Iterable[Score]) -> None:
        """Log why images have no number, each reason once."""
        for line in lacking(scores):
            if line not in self._warned:
                log.warning("%s: %s", stage, line)
            self._warned.add(line)


class Previews:
    """Images that a validation shows, by data set."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, dataset: str, batch: Mapping[str, Any], sr: Tensor, scale: int, limit: int) -> None:
        """Keep a batch's first image beside its inputs, while the data set has fewer images than `limit`."""
        if len(self._rows.get(dataset, ())) < limit:
            self._rows[dataset].append(side_by_side(batch, sr, scale).cpu())

    def take(self) -> dict[str, Tensor]:
        """One picture (3,H,W) in [0,1] a data set, by its name in the loggers, images below each other."""
        rows, self._rows = self._rows, defaultdict(list)
        widths = {dataset: min(row.shape[-1] for row in images) for dataset, images in rows.items()}
        return {
            f"val/{dataset}: lq | bicubic | sr | hq": torch.cat([row[..., : widths[dataset]] for row in images], dim=-2)
            for dataset, images in rows.items()
        }


def named_means(stage: str, scores: Iterable[Score]) -> dict[str, float]:
    """`means` by the names under which they are logged; those before the colour fix end in `_raw`."""
    return {
        f"{stage}/{dataset}/{metric}{'_raw' if method.endswith('(raw)') else ''}": mean
        for (method, dataset, metric), mean in means(scores).items()
    }


def means(scores: Iterable[Score]) -> dict[tuple[str, str, str], float]:
    """Means over the images that have a number, by method, data set and metric."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for score in scores:
        if score.value is not None:
            values[score.method, score.dataset, score.metric].append(score.value)
    return {key: sum(numbers) / len(numbers) for key, numbers in values.items()}


def refuse_without_numbers(metrics: Sequence[str], scores: Sequence[Score]) -> None:
    """Fail, after all is written, where no image has a number; warn where no set has references.

    Raises:
        MetricUnavailableError: No metric has a number of any image.
    """
    if not scores and metrics:
        log.warning("%s: they compare with references, and no set has any", _none_computed(metrics))
    elif scores and all(score.value is None for score in scores):
        raise MetricUnavailableError(f"{_none_computed(metrics)}: {'; '.join(lacking(scores))}")


def _none_computed(metrics: Sequence[str]) -> str:
    return f"model.inference.metrics={metrics}: none of them can be computed"


def side_by_side(batch: Mapping[str, Any], sr: Tensor, scale: int) -> Tensor:
    """LQ (pixels repeated) | bicubic | SR | HQ of a batch's first image, (3, s*h, n*s*w), [0,1]."""
    lq = batch["lq"][:1]
    nearest = lq.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    images = [nearest, bicubic_upsample(lq, scale), sr[:1], *([batch["hq"][:1]] if "hq" in batch else [])]
    return torch.cat([image[0].float() for image in images], dim=-1)


def measured(metric: MetricProtocol, sr: Image, hq: Image | None) -> tuple[float | None, str]:
    """A metric of one image.

    Args:
        metric: The metric.
        sr: The image, (H, W, 3) uint8.
        hq: Its reference, or None.

    Returns:
        The value and the protocol; where the metric fails on this image, None and `not computed: <reason>`.
    """
    try:
        value = metric(sr, hq)
        if not math.isfinite(value):
            raise ValueError(f"its value is {value}")
    except (ValueError, RuntimeError) as error:
        return None, _NOT_COMPUTED + one_line(error)
    return value, metric.describe()


def lacking(scores: Iterable[Score]) -> list[str]:
    """Why images have no number: `ssim_y of Set5, NAME: not computed (1), REASON`, a line for each reason."""
    found = Counter(
        (s.metric, s.dataset, s.method, s.protocol.removeprefix(_NOT_COMPUTED)) for s in scores if s.value is None
    )
    return [
        f"{metric} of {dataset}, {method}: not computed ({count}), {reason}"
        for (metric, dataset, method, reason), count in found.items()
    ]


_NOT_COMPUTED = "not computed: "


def write_scores(path: Path, scores: list[Score]) -> None:
    """Write scores in long form: method, dataset, image, metric, value, protocol."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "dataset", "image", "metric", "value", "protocol"])
        for s in scores:
            value = "" if s.value is None else f"{s.value:.6f}"
            names = map(csv_text, (s.method, s.dataset, s.image, s.metric))
            writer.writerow([*names, value, csv_text(s.protocol)])
