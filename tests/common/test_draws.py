"""Draws depend on (seed, stream, sample) alone, and have the distributions they claim."""

import pytest
import torch

from common.draws import Draws, generator


def draws(index: list[int], seed: int = 0) -> Draws:
    return Draws(seed, torch.tensor(index))


def test_a_sample_draws_the_same_in_any_batch() -> None:
    whole = draws([4, 5, 6, 7])
    parts = [draws([4, 5]), draws([6, 7])]
    for of in (
        lambda d: d.normal("a", (3, 2)),
        lambda d: d.integers("a", 0, 999),
        lambda d: d.uniform("a"),
    ):
        assert torch.equal(of(whole), torch.cat([of(part) for part in parts]))
        assert torch.equal(of(whole).flip(0), of(draws([7, 6, 5, 4])))


def test_asking_twice_and_in_another_order_changes_nothing() -> None:
    d = draws([1, 2])
    first = d.normal("a", (5,))
    d.integers("b", 0, 9)
    assert torch.equal(first, d.normal("a", (5,)))


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = draws([0]).normal("a", (5,))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, draws([0]).normal("a", (5,)))


def test_the_default_device_does_not_decide_them() -> None:
    for of in (
        lambda d: d.normal("a", (3, 2)),
        lambda d: d.integers("a", 0, 999),
        lambda d: d.uniform("a"),
    ):
        expected = of(draws([4, 5]))
        d = draws([4, 5])
        with torch.device("meta"):
            assert torch.equal(of(d).cpu(), expected)


def test_golden_values_hold_across_releases() -> None:
    """A change here breaks the resume of runs begun before it."""
    g = generator(0, "a", 0)
    assert g.initial_seed() == 9016986181784145983


@pytest.mark.parametrize("other", [{"seed": 1}, {"stream": "b"}, {"first": 4096}], ids=["seed", "stream", "sample"])
def test_seeds_streams_and_samples_are_independent(other: dict) -> None:
    """The correlation of n pairs of independent normals is within 5/sqrt(n) of 0."""
    n = 4096

    def sample(seed: int = 0, stream: str = "a", first: int = 0) -> torch.Tensor:
        return Draws(seed, torch.arange(first, first + n)).normal(stream, ())

    one, two = sample(), sample(**other)
    assert not torch.equal(one, two)
    assert abs(float((one * two).mean())) < 5 / n**0.5


def test_streams_whose_names_run_into_the_numbers_stay_apart() -> None:
    assert generator(1, "1", 1).initial_seed() != generator(11, "", 1).initial_seed()
    assert generator(0, "a/1", 0).initial_seed() != generator(0, "a", 10).initial_seed()


def test_normal_draws_are_standard_normal() -> None:
    x = draws(list(range(1000))).normal("a", (16,)).flatten()
    n = len(x)
    assert abs(float(x.mean())) < 5 / n**0.5
    assert abs(float(x.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((x < 1).float().mean()) - 0.841345) < 0.02
    assert x.dtype == torch.float32


def test_integers_hit_both_ends_alike() -> None:
    x = draws(list(range(4000))).integers("t", 3, 6)
    assert x.dtype == torch.int64
    counts = torch.bincount(x, minlength=7)
    assert counts[:3].sum() == 0
    assert all(abs(int(c) - 1000) < 5 * (1000 * 0.75) ** 0.5 for c in counts[3:])


def test_uniform_draws_fill_the_unit_interval() -> None:
    x = draws(list(range(4000))).uniform("u")
    assert 0 <= float(x.min()) < 0.01
    assert 0.99 < float(x.max()) < 1
    assert abs(float(x.mean()) - 0.5) < 5 * (1 / 12 / 4000) ** 0.5
