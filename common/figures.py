"""Plots that a method leaves in its run folder, and that the report shows with their captions."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from common.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 200_000  # values of a distribution that are drawn
_BINS = 100
_DPI = 100


class Agreement(NamedTuple):
    """Agreement of predictions with their target; `r2` = 1 - SS_res / SS_tot, None where the target is constant."""

    rmse: float
    r2: float | None
    mean: float
    std: float
    min: float
    max: float


class Moments(NamedTuple):
    """Moments of n values; skewness and excess kurtosis are 0 for a normal distribution, None for a constant."""

    n: int
    mean: float
    std: float
    skewness: float | None
    kurtosis: float | None


def agreement(target: ArrayLike, predicted: ArrayLike) -> Agreement:
    """Compare predictions with their target; mean, std (over N, not N - 1), min and max are the target's.

    Args:
        target: True values, (N,).
        predicted: Predictions, (N,).

    Raises:
        ValueError: An argument is not one-dimensional, empty or not finite, or the two differ in length.
    """
    y, y_hat = _values("target", target), _values("predicted", predicted)
    if y.shape != y_hat.shape:
        raise ValueError(f"predicted has {len(y_hat)} values, target {len(y)}; give one prediction for each target")
    mse = float(((y_hat - y) ** 2).mean())
    r2 = None if y.min() == y.max() else 1 - mse / float(y.var())
    return Agreement(mse**0.5, r2, float(y.mean()), float(y.std()), float(y.min()), float(y.max()))


def moments(values: ArrayLike) -> Moments:
    """Mean, std (over n, not n - 1), skewness E[z^3] and excess kurtosis E[z^4] - 3 of z = (x - mean) / std.

    Args:
        values: (n,).

    Raises:
        ValueError: `values` is not one-dimensional, empty or not finite.
    """
    x = _values("values", values)
    if x.min() == x.max():
        return Moments(len(x), float(x[0]), 0.0, None, None)
    from scipy import stats

    return Moments(len(x), float(x.mean()), float(x.std()), float(stats.skew(x)), float(stats.kurtosis(x)))


def predicted_against_target(target: ArrayLike, predicted: ArrayLike, limit: float, name: str) -> Figure:
    """Draw predictions over their target with the identity line, titled with `agreement` and the target's spread.

    Args:
        target: True values, (N,).
        predicted: Predictions, (N,).
        limit: Both axes end here; they begin at 0, or at -limit where a target is negative. Points beyond are drawn at
            the edge, and counted in the title.
        name: Predicted quantity, with its unit.

    Raises:
        ValueError: `limit` is not positive, or `agreement` raises it.
    """
    from matplotlib.figure import Figure

    found = agreement(target, predicted)
    if not limit > 0:
        raise ValueError(f"limit={limit} is out of range; give the largest value to show, above 0")
    x, y = _values("target", target), _values("predicted", predicted)
    low = -limit if found.min < 0 else 0.0
    beyond = int(((x < low) | (x > limit) | (y < low) | (y > limit)).sum())
    r2 = "undefined (constant target)" if found.r2 is None else f"{found.r2:.3f}"
    title = (
        f"{name}, n = {len(x)}: RMSE {found.rmse:.4g}, R^2 {r2}\n"
        f"target: mean {found.mean:.4g}, std {found.std:.4g}, range {found.min:.4g} to {found.max:.4g}"
        + (f"; {beyond} beyond the axes" if beyond else "")
    )
    figure = Figure(figsize=(6, 6), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot([low, limit], [low, limit], color="gray", linewidth=1, label="identity")
    axes.scatter(x.clip(low, limit), y.clip(low, limit), s=8, alpha=0.5, linewidths=0, clip_on=False)
    axes.set(xlim=(low, limit), ylim=(low, limit), aspect="equal", xlabel=f"target {name}", ylabel=f"predicted {name}")
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left")
    return figure


def noise_distribution(eps: ArrayLike) -> Figure:
    """Draw a noise's histogram with the density of N(0, 1), and its quantiles against those of N(0, 1).

    Args:
        eps: Values, (n,). If there are more than 200,000, every k-th is taken, and the title states it.

    Raises:
        ValueError: `eps` is not one-dimensional, empty or not finite.
    """
    from matplotlib.figure import Figure
    from scipy.special import ndtri

    everything = _values("eps", eps)
    x = np.sort(everything[:: -(-len(everything) // _MOST)])
    found = moments(x)
    quantiles = ndtri((np.arange(len(x)) + 0.5) / len(x))  # of N(0, 1)
    edge = max(4.0, float(np.abs(x).max()))
    figure = Figure(figsize=(10, 5), dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(x, bins=_BINS, range=(-edge, edge), density=True, color="tab:blue", alpha=0.5, label="eps")
    grid = np.linspace(-edge, edge, 401)
    left.plot(grid, np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi), color="black", linewidth=1, label="N(0, 1)")
    left.set(xlabel="eps", ylabel="density")
    left.legend(loc="upper left")
    right.plot([-edge, edge], [-edge, edge], color="gray", linewidth=1, label="identity")
    right.plot(quantiles, x, ".", color="tab:blue", markersize=3, label="eps")
    right.set(xlabel="quantile of N(0, 1)", ylabel="quantile of eps")
    right.legend(loc="upper left")
    of = f" of {len(everything)}" if len(everything) > len(x) else ""
    shape = [
        f"{label} {'undefined' if value is None else f'{value:.3f}'}"
        for label, value in (("skewness", found.skewness), ("excess kurtosis", found.kurtosis))
    ]
    figure.suptitle(f"mean {found.mean:.4f}, std {found.std:.4f}, {', '.join(shape)}, n = {found.n}{of}", fontsize=10)
    return figure


def save_figure(path: Path, figure: Figure, caption: str) -> None:
    """Write a figure as a PNG of 100 dpi, whole or not at all; equal figures and captions give equal bytes.

    Args:
        path: Target; missing folders are made.
        figure: Figure to write.
        caption: Caption in the report; it is stored in the file's text chunk `Description`.

    Raises:
        ValueError: `caption` is empty.
        OSError: The file cannot be written.
    """
    if not caption.strip():
        raise ValueError(f"caption of {path} is empty; describe the figure in a sentence")
    with replacing(path) as temporary:
        temporary.write_bytes(_png(figure, _DPI, caption))


def read_caption(path: Path) -> str:
    """The caption that `save_figure` put into a PNG; empty where there is none.

    Raises:
        FileNotFoundError: There is no such file.
    """
    with Image.open(path) as image:
        return str(image.info.get("Description", ""))


def figure_to_tensor(figure: Figure) -> Tensor:
    """Pixels of a figure at its own dpi, (3, H, W) in [0, 1], for TensorBoard's `add_image`."""
    with Image.open(io.BytesIO(_png(figure, "figure"))) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def _png(figure: Figure, dpi: int | str, caption: str | None = None) -> bytes:
    file = io.BytesIO()
    # matplotlib's own Software would change the bytes with its version
    figure.savefig(file, format="png", dpi=dpi, metadata={"Description": caption, "Software": None})
    return file.getvalue()


def _values(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; pass one dimension and at least one value")
    wrong = int((~np.isfinite(array)).sum())
    if wrong:
        raise ValueError(f"{name} holds {wrong} of {array.size} values that are not finite; find where they arise")
    return array
