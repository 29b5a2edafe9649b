"""Results of a test of stage 2: rewards of the same images before and after it, by the same noise, and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from common.figures import save_figure
from common.files import replacing
from common.statistics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 100


class Comparison(NamedTuple):
    """One restoration by stage 1's policy and one by stage 2's, from the same noise."""

    dataset: str
    image: str
    noise: int
    """Number of the noise."""
    before: dict[str, float]
    """Raw rewards, and PSNR-Y if there is a reference."""
    after: dict[str, float]
    images: tuple[Tensor, Tensor] | None
    """Both restorations, (3,H,W), [0,1], of the image that is drawn."""


class Gain(NamedTuple):
    """Paired difference of one metric."""

    metric: str
    before: float
    after: float
    low: float
    """Lower end of the 95 % interval of after - before."""
    high: float
    images: int
    noises: int


def paired_gains(rows: Sequence[Comparison]) -> list[Gain]:
    """Mean of each metric before and after, with a percentile bootstrap interval of the difference.

    Differences are averaged over an image's noises first, and images are drawn with replacement (10,000 times, seed 0):
    noises of one image are not independent of each other.
    """
    gains = []
    for metric in dict.fromkeys(metric for row in rows for metric in row.before):
        pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for row in rows:
            if metric in row.before:
                pairs.setdefault((row.dataset, row.image), []).append((row.before[metric], row.after[metric]))
        means = np.array([np.mean(values, axis=0) for values in pairs.values()])  # (images, 2)
        differences = means[:, 1] - means[:, 0]
        low, high = bootstrap_interval(differences) or (differences[0], differences[0])  # one image: no interval
        before, after = means.mean(0)
        noises = max(len(values) for values in pairs.values())
        gains.append(Gain(metric, float(before), float(after), float(low), float(high), len(means), noises))
    return gains


def write_comparison(folder: Path, rows: Sequence[Comparison], compared: int) -> list[Gain]:
    """Write `rewards.csv`, and into `figures` the plot of all pairs and the picture of one image's samples.

    Args:
        folder: Folder of the test's results.
        rows: All comparisons.
        compared: Noises of each image that count; the drawn image has more.

    Returns:
        The gains.
    """
    counted = [row for row in rows if row.noise < compared]
    gains = paired_gains(counted) if counted else []
    if gains:
        with replacing(folder / "rewards.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Gain._fields)
            writer.writerows(gains)
        caption = (
            "Raw rewards of the test images before (stage 1's policy) and after NF2T, from the same low-quality images "
            f"by the same noise: {gains[0].images} images, {gains[0].noises} noises each; the mean difference with its "
            "paired 95 % bootstrap interval over images."
        )
        save_figure(folder / "figures" / "rewards.png", pairs_figure(counted, gains), caption)
    drawn = [row for row in rows if row.images is not None]
    if drawn:
        drawn = [row for row in drawn if row[:2] == drawn[0][:2]]  # processes may have given the same numbers to images
        caption = f"{len(drawn)} samples of one test image before (above) and after NF2T (below), by the same noises."
        save_figure(folder / "figures" / "samples.png", samples_figure(drawn), caption)
    return gains


def pairs_figure(rows: Sequence[Comparison], gains: Sequence[Gain]) -> Figure:
    """Each restoration's metrics after over those before, one plot a metric."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(gains), 3.9), dpi=_DPI, layout="constrained")
    for axes, gain in zip(figure.subplots(1, len(gains), squeeze=False)[0], gains, strict=True):
        found = [row for row in rows if gain.metric in row.before]
        before, after = ([getattr(row, which)[gain.metric] for row in found] for which in ("before", "after"))
        ends = min(*before, *after), max(*before, *after)
        axes.plot(ends, ends, color="gray", linewidth=1)
        axes.scatter(before, after, s=8, alpha=0.5, linewidths=0)
        axes.set(xlabel="before", ylabel="after")
        difference = f"{gain.after - gain.before:+.4g} [{gain.low:+.4g}, {gain.high:+.4g}]"
        axes.set_title(f"{gain.metric}\n{gain.before:.4g} -> {gain.after:.4g}: {difference}", fontsize=8)
    return figure


def samples_figure(rows: Sequence[Comparison]) -> Figure:
    """Restorations of one image, before above and after below, one column a noise, each over its metrics."""
    from matplotlib.figure import Figure

    metrics = len(rows[0].before)
    figure = Figure(figsize=(1.9 * len(rows), 2 * (1.9 + 0.16 * metrics)), dpi=_DPI, layout="constrained")
    grid = figure.subplots(2, len(rows), squeeze=False)
    for column, row in enumerate(rows):
        assert row.images is not None
        for axes, image, scores in zip(grid[:, column], row.images, (row.before, row.after), strict=True):
            axes.imshow(image.float().permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel("\n".join(f"{name} {value:.4g}" for name, value in scores.items()), fontsize=6)
    for axes, label in zip(grid[:, 0], ("before", "after"), strict=True):
        axes.set_ylabel(label)
    return figure
