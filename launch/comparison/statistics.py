"""Means, paired differences and ranks of per-image numbers, with bootstrap intervals that resample photos.

Crops of one photo, and one crop degraded several times, resemble each other. Where the images' names mark such crops
(`<photo>_r<row>c<column>_s<seed>`), whole photos are drawn, all of a photo's crops with it. Any other image counts as a
photo of its own, and the interval is the ordinary bootstrap's. With fewer than `FEW` photos too few samples could be
drawn for an interval; the images are then drawn, as if each were a photo.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from common.statistics import Interval, bootstrap_interval

CROP = re.compile(r"(?P<photo>.+)_(?P<place>r\d+c\d+)_s\d+")
"""Name of a crop of the embedded photos."""


class Mean(NamedTuple):
    """Mean over `n` images; no interval of one image."""

    mean: float
    interval: Interval | None
    n: int


class PairedGain(NamedTuple):
    """Mean paired difference to another method over the `n` images both have; `wins` is the share that are better."""

    mean: float
    interval: Interval | None
    n: int
    wins: float

    def better(self, lower_better: bool) -> bool:
        """True where the whole interval lies on the good side of zero."""
        return self.interval is not None and (self.interval.high < 0 if lower_better else self.interval.low > 0)


def photo_of(image: str) -> str:
    """The photo that an image is a crop of, by its name; the image itself if the name does not say."""
    match = CROP.fullmatch(image)
    return match["photo"] if match else image


def mean_of(values: Mapping[str, float]) -> Mean | None:
    """Mean of numbers by image, with its interval; None where there are none."""
    images = sorted(values)
    if not images:
        return None
    numbers = np.array([values[image] for image in images])
    return Mean(float(numbers.mean()), bootstrap_interval(numbers, [*map(photo_of, images)]), len(images))


def gain_of(ours: Mapping[str, float], theirs: Mapping[str, float], lower_better: bool = False) -> PairedGain | None:
    """Difference of one method's numbers to another's, image by image; None where they share no image.

    Args:
        ours: Image -> number.
        theirs: Image -> number of the other method.
        lower_better: True where a smaller number wins; a tie is half a win.
    """
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    differences = np.array([ours[image] - theirs[image] for image in both])
    good = -differences if lower_better else differences
    wins = float((np.sign(good) + 1).mean() / 2)
    return PairedGain(
        float(differences.mean()), bootstrap_interval(differences, [*map(photo_of, both)]), len(both), wins
    )


def mean_ranks(values: Mapping[str, Mapping[str, float]], lower_better: bool = False) -> dict[str, float]:
    """Mean rank of each method over the images that all of them have, 1 for the best; equal numbers share their ranks.

    Args:
        values: Method -> image -> number; methods without numbers get no rank.
        lower_better: True where a smaller number ranks higher.

    Returns:
        Method -> mean rank; empty where no image is common to all.
    """
    from scipy.stats import rankdata

    ranked = {method: numbers for method, numbers in values.items() if numbers}
    common = sorted(set.intersection(*(set(numbers) for numbers in ranked.values()))) if ranked else []
    if not common:
        return {}
    table = np.array([[numbers[image] for image in common] for numbers in ranked.values()])
    ranks = rankdata(table if lower_better else -table, axis=0).mean(axis=1)
    return {method: float(rank) for method, rank in zip(ranked, ranks, strict=True)}
