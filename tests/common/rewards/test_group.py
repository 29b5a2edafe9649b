"""Group rewards against hand-made values, their bounds and the invariances that they are for."""

import math

import pytest
import torch
from scipy.stats import norm, zscore
from torch import Tensor
from torch.testing import assert_close

from common.rewards import clipped_rewards, group_rewards


def raw(k: int = 8, m: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(k, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestGroupRewards:
    def test_equal_scipys_normal_scores(self) -> None:
        values = raw()
        expected = norm.cdf(zscore(values.numpy(), axis=0, ddof=0)).mean(1)
        assert_close(group_rewards(values, [False] * 3), torch.from_numpy(expected))

    def test_two_restorations_get_phi_of_plus_and_minus_one(self) -> None:
        found = group_rewards(torch.tensor([[3.0], [70.0]]), [False])
        assert_close(found, torch.tensor([0.15865525, 0.84134475]))
        assert_close(group_rewards(torch.tensor([[3.0], [70.0]]), [True]), found.flip(0))

    @pytest.mark.parametrize("k", [2, 3, 8])
    def test_one_that_stands_out_alone_reaches_the_bounds(self, k: int) -> None:
        values = torch.zeros(k, 1, dtype=torch.float64)
        values[1] = 5.0
        bound = norm.cdf(math.sqrt(k - 1))
        assert_close(group_rewards(values, [False])[1].item(), bound)
        assert_close(group_rewards(values, [True])[1].item(), 1 - bound)
        for seed in range(50):
            found = group_rewards(raw(k, 1, seed).pow(3), [False])
            assert found.max() <= bound + 1e-12
            assert found.min() >= 1 - bound - 1e-12

    def test_bounds_of_eight_are_those_of_the_paper(self) -> None:
        values = torch.eye(8, dtype=torch.float64)[:, :1]
        assert_close(group_rewards(values, [False])[0].item(), 0.9959, rtol=0, atol=5e-5)

    def test_unit_and_offset_of_a_metric_do_not_matter(self) -> None:
        values, lower = raw(), [False, True, False]
        changed = values * torch.tensor([1e-3, 50.0, 1.0]) + torch.tensor([7.0, -3.0, 1e3])
        assert_close(group_rewards(changed, lower), group_rewards(values, lower))

    def test_turning_a_metrics_direction_turns_its_rewards(self) -> None:
        values = raw(m=1)
        assert_close(group_rewards(values, [True]), 1 - group_rewards(values, [False]))
        assert_close(group_rewards(-values, [True]), group_rewards(values, [False]))

    def test_keep_the_order_of_a_metric(self) -> None:
        values = raw(m=1)
        assert torch.equal(group_rewards(values, [False]).argsort(), values[:, 0].argsort())

    def test_metrics_weigh_alike(self) -> None:
        values = raw(m=2)
        alone = [group_rewards(values[:, i : i + 1], [lower]) for i, lower in enumerate((False, True))]
        assert_close(group_rewards(values, [False, True]), (alone[0] + alone[1]) / 2)

    @pytest.mark.parametrize("k", [1, 3, 6, 7, 8])
    @pytest.mark.parametrize("value", [0.0, 0.1, 70.04, -1e4])
    def test_a_constant_metric_prefers_none(self, k: int, value: float) -> None:
        found = group_rewards(torch.full((k, 2), value), [False, True])
        assert torch.equal(found, torch.full((k,), 0.5))

    def test_small_spreads_count_in_full(self) -> None:
        values = raw(m=1)
        near = 0.3 + 1e-3 * values  # LPIPS within a group
        assert_close(group_rewards(near.float(), [False]), group_rewards(values, [False]).float(), rtol=0, atol=1e-4)

    def test_differences_in_the_last_digit_count_in_full(self) -> None:
        steps = torch.arange(4.0)[:, None]
        values = 8192 + steps * 2**-10  # neighbours in fp32
        assert_close(group_rewards(values, [False]), group_rewards(steps, [False]))

    def test_keep_the_type_and_refuse_the_rest(self) -> None:
        assert group_rewards(raw().bfloat16(), [False] * 3).dtype == torch.bfloat16
        for wrong, lower in ((raw(), [False] * 2), (raw()[:, 0], [False]), (torch.zeros(0, 2), [False] * 2)):
            with pytest.raises(ValueError, match=r"raw has shape \(.*\) and lower_better \d entries"):
                group_rewards(wrong, lower)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_of_a_group_with_a_value_that_is_not_finite_prefer_nothing(self, value: float) -> None:
        values = raw()
        values[2, 1] = value
        assert (group_rewards(values, [False] * 3) == 0.5).all()


class TestClippedRewards:
    def test_map_the_clipped_range_onto_0_1(self) -> None:
        advantages = torch.tensor([-9.0, -5.0, -2.5, 0.0, 1.0, 5.0, 9.0])
        assert_close(clipped_rewards(advantages), torch.tensor([0.0, 0.0, 0.25, 0.5, 0.6, 1.0, 1.0]))
        assert_close(clipped_rewards(torch.tensor([[1.0]]), clip=2.0), torch.tensor([[0.75]]))

    def test_refuse_an_empty_range(self) -> None:
        with pytest.raises(ValueError, match="clip=0 must be positive"):
            clipped_rewards(torch.zeros(1), clip=0)
