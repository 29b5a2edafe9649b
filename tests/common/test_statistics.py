"""Intervals against scipy's, and against draws one by one."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from common.statistics import FEW, RESAMPLES, bootstrap_interval


@pytest.mark.parametrize(("n", "method"), [(5, "percentile"), (63, "percentile"), (63, "BCa")])
def test_the_interval_agrees_with_scipys_bootstrap(n: int, method: str) -> None:
    values = np.random.default_rng(n).normal(0.4, 1.0, n)
    interval = bootstrap_interval(values)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method=method, rng=np.random.default_rng(7)
    ).confidence_interval
    assert interval is not None
    tolerance = (0.03 if method == "percentile" else 0.06) * (expected.high - expected.low)
    assert interval == pytest.approx((expected.low, expected.high), abs=tolerance)


def test_crops_of_one_photo_are_drawn_together_as_scipy_draws_pairs_of_sum_and_count() -> None:
    rng = np.random.default_rng(0)
    sizes = [3, 9, 1, 6, 4, 12, 2, 5]
    photos = [f"p{photo}" for photo, size in enumerate(sizes) for _ in range(size)]
    levels = rng.normal(0, 1, len(sizes))
    values = np.concatenate([level + rng.normal(0, 0.1, size) for level, size in zip(levels, sizes, strict=True)])
    sums = np.array([values[[p == f"p{i}" for p in photos]].sum() for i in range(len(sizes))])
    expected = scipy.stats.bootstrap(
        (sums, np.array(sizes)),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        n_resamples=20_000,
        method="percentile",
        paired=True,
        vectorized=True,
        rng=np.random.default_rng(7),
    ).confidence_interval
    interval, alone = bootstrap_interval(values, photos), bootstrap_interval(values)
    assert interval is not None
    assert alone is not None
    assert interval == pytest.approx((expected.low, expected.high), abs=0.04 * (expected.high - expected.low))
    assert interval.high - interval.low > 1.5 * (alone.high - alone.low)


def test_of_a_single_image_there_is_no_interval() -> None:
    assert bootstrap_interval([0.25]) is None
    assert bootstrap_interval([0.25], ["cat"]) is None
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)


def test_of_few_photos_the_crops_are_drawn() -> None:
    values = np.concatenate([np.random.default_rng(photo).normal(photo, 1, 30) for photo in range(FEW)])
    photos = [f"p{photo}" for photo in range(FEW) for _ in range(30)]
    few = 30 * (FEW - 1)
    assert bootstrap_interval(values[:few], photos[:few]) == bootstrap_interval(values[:few])
    together, alone = bootstrap_interval(values, photos), bootstrap_interval(values)
    assert together is not None
    assert alone is not None
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


@pytest.mark.parametrize("n", [2, 5, 17, 100])
def test_it_draws_as_one_would_one_sample_after_the_other(n: int) -> None:
    values = np.random.default_rng(n).normal(0.1, 1.0, n)
    rng = np.random.default_rng(0)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    assert bootstrap_interval(values) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=1e-12)
