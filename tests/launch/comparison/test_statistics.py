"""Paired differences, wins and ranks by hand."""

from __future__ import annotations

import pytest

from launch.comparison.statistics import gain_of, mean_of, mean_ranks, photo_of


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
