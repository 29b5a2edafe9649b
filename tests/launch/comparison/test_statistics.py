"""Intervals against scipy's, paired differences, wins and ranks by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from launch.comparison.statistics import FEW, bootstrap_interval, gain_of, mean_of, mean_ranks, photo_of


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


def test_names_tell_which_images_are_crops_of_one_photo() -> None:
    assert photo_of("cat_r0c1_s2") == photo_of("cat_r3c0_s0") == "cat"
    assert photo_of("Canon_001_LR4") == "Canon_001_LR4"
    photos = {f"cat{number}": float(number % 2) for number in range(8)}
    crops = {f"{photo}_r0c{place}_s0": value for photo, value in photos.items() for place in range(5)}
    of_photos, of_crops = mean_of(photos), mean_of(crops)
    assert of_photos is not None
    assert of_crops is not None
    assert (of_crops.mean, of_crops.n) == (0.5, 40)
    assert of_crops.interval == of_photos.interval


def test_gains_are_paired_and_wins_count_a_tie_as_half() -> None:
    ours = {"a": 21.0, "b": 32.0, "c": 5.0, "e": 99.0}
    theirs = {"a": 20.0, "b": 32.0, "c": 6.0, "d": 0.0}
    gain, lower = gain_of(ours, theirs), gain_of(ours, theirs, lower_better=True)
    assert gain is not None
    assert lower is not None
    assert (gain.mean, gain.n) == (0.0, 3)
    assert (gain.wins, lower.wins) == (0.5, 0.5)
    assert gain_of({"a": 1.0}, {"b": 1.0}) is None
    up = gain_of({"a": 1.0, "b": 2.0, "c": 2.5}, {"a": 0.5, "b": 1.0, "c": 1.0})
    assert up is not None
    assert (up.wins, up.better(lower_better=False), up.better(lower_better=True)) == (1.0, True, False)
    down = gain_of({"a": 1.0, "b": 2.0, "c": 2.5}, {"a": 0.5, "b": 1.0, "c": 3.0}, lower_better=True)
    assert down is not None
    assert down.wins == pytest.approx(1 / 3)
    assert not gain.better(lower_better=False)


def test_equal_inputs_in_another_order_give_equal_numbers() -> None:
    values = {f"i{i}": float(i**2 % 7) for i in range(20)}
    assert mean_of(values) == mean_of(dict(reversed(values.items())))


def test_ranks_are_over_the_images_all_have_and_ties_share_them() -> None:
    values = {
        "x": {"a": 3.0, "b": 1.0, "only": 9.0},
        "y": {"a": 2.0, "b": 1.0},
        "z": {"a": 1.0, "b": 5.0},
        "nothing": {},
    }
    assert mean_ranks(values) == {"x": 1.75, "y": 2.25, "z": 2.0}
    assert mean_ranks(values, lower_better=True) == {"x": 2.25, "y": 1.75, "z": 2.0}
    assert mean_ranks({"x": {"a": 1.0}, "y": {"b": 1.0}}) == {}
