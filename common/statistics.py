"""The one bootstrap: an interval of a mean that resamples photos, not the crops of one, which resemble each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
FEW = 6
"""Photos below which images are drawn: of k photos, k agree by chance, one way, in 2 of 2^k cases, with 6 in 3 %."""
_CHUNK = 1_000  # resamples at a time


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def bootstrap_interval(values: ArrayLike, photos: Sequence[str] | None = None, seed: int = 0) -> Interval | None:
    """95 % percentile bootstrap interval of the mean: photos are drawn with replacement, images where photos are few.

    Args:
        values: One number for each image, (n,).
        photos: The photo each image belongs to; default, and where there are fewer than `FEW`: every image is one.
        seed: Random seed of the draws.

    Returns:
        The interval; None for a single image, of which nothing can be drawn.
    """
    numbers = np.asarray(values, dtype=np.float64)
    sums: NDArray[np.float64] = numbers
    counts: NDArray[np.float64] = np.ones(len(numbers))
    if photos is not None and len(set(photos)) >= FEW:
        _, group = np.unique(list(photos), return_inverse=True)
        sums = np.bincount(group, numbers).astype(np.float64)
        counts = np.bincount(group).astype(np.float64)
    if len(sums) < 2:
        return None
    rng = np.random.default_rng(seed)
    means: list[NDArray[np.float64]] = []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = rng.integers(len(sums), size=(_CHUNK, len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(low), float(high))
