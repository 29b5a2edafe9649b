"""NF2T's algebra in float64: gradients in closed form, limits, what carries a reward signal, group rewards' bounds."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from papers.dnf_sr.losses import (
    implicit_velocities,
    nft_loss,
    normalised_rewards,
    old_share,
    on_policy_loss,
    self_normalised_nft_loss,
    two_branches,
)

SHAPE = (2, 3, 4, 4)
R = torch.tensor([0.3, 0.9], dtype=torch.float64)


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def image_of() -> Callable[[Tensor], Tensor]:
    """A smooth decoder that is not linear."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(6, 3, 4, 2, 1)]
    network = nn.Sequential(*layers).double().requires_grad_(False)
    return lambda v: network(tensor(9) - 0.5 * v)


def distance_to(target: Tensor) -> Callable[[Tensor], Tensor]:
    """Not quadratic, so that nothing cancels by luck; (B,)."""
    return lambda x: ((x - target).square() + 0.1 * (x - target) ** 4).mean((1, 2, 3))


class TestImplicitVelocities:
    @pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
    def test_they_lie_opposite_each_other_around_the_old_one(self, beta: float) -> None:
        v_old, v = tensor(0), tensor(1)
        plus, minus = implicit_velocities(v_old, v, beta)
        assert_close(plus + minus, 2 * v_old)
        assert_close(plus - minus, 2 * beta * (v - v_old))

    def test_beta_1_is_the_model_itself_and_its_mirror_image(self) -> None:
        v_old, v = tensor(0), tensor(1)
        plus, minus = implicit_velocities(v_old, v, 1.0)
        assert torch.equal(plus, v)
        assert torch.equal(minus, 2 * v_old - v)


class TestTwoBranches:
    def test_is_the_gradient_of_both_branches_at_once(self, image_of: Callable[[Tensor], Tensor]) -> None:
        v_old, v = tensor(0), tensor(1).requires_grad_()
        distance = distance_to(image_of(tensor(2)))
        plus, minus = 0.3 * v_old + 0.7 * v, 1.7 * v_old - 0.7 * v
        loss = (R * distance(image_of(plus)) + (1 - R) * distance(image_of(minus))).mean()
        (expected,) = torch.autograd.grad(loss, v)
        found = two_branches(v, v_old, 0.7, R, image_of, distance)
        assert_close(found.loss, loss.detach(), rtol=0, atol=1e-15)
        assert_close(found.gradient, expected, rtol=0, atol=1e-17)
        assert not found.gradient.requires_grad
        assert_close(found.gap, (image_of(plus) - image_of(minus)).abs().mean().detach())

    @pytest.mark.parametrize("beta", [0.3, 1.0])
    def test_on_policy_it_is_beta_2r_minus_1_times_the_plain_gradient(
        self, image_of: Callable[[Tensor], Tensor], beta: float
    ) -> None:
        v = tensor(0).requires_grad_()
        distance = distance_to(image_of(tensor(2)))
        found = two_branches(v, v.detach(), beta, R, image_of, distance)
        plain = distance(image_of(v))
        (each,) = torch.autograd.grad(plain.mean(), v)
        assert float(found.gap) < 1e-15
        assert_close(found.loss, plain.mean().detach(), rtol=0, atol=1e-15)  # whatever r is
        assert_close(found.gradient, beta * (2 * R - 1).view(-1, 1, 1, 1) * each, rtol=0, atol=1e-17)
        (fast,) = torch.autograd.grad(on_policy_loss(distance(image_of(v)), R, beta).mean(), v)
        assert_close(fast, found.gradient, rtol=0, atol=1e-17)

    def test_without_preference_an_on_policy_gradient_is_zero(self, image_of: Callable[[Tensor], Tensor]) -> None:
        v = tensor(0)
        found = two_branches(v, v, 1.0, torch.full((2,), 0.5).double(), image_of, distance_to(image_of(tensor(2))))
        assert float(found.gradient.abs().max()) < 1e-18

    def test_the_gradient_vanishes_linearly_with_beta(self, image_of: Callable[[Tensor], Tensor]) -> None:
        v_old, v = tensor(0), tensor(1)
        distance = distance_to(image_of(tensor(2)))
        norms = []
        for beta in (1e-3, 1e-4):
            found = two_branches(v, v_old, beta, R, image_of, distance)
            norms.append(float(found.gradient.norm()) / beta)
        assert norms[0] == pytest.approx(norms[1], rel=1e-2)
        assert found.gap < 1e-3

    def test_with_the_rollouts_noise_there_is_nothing_to_learn_at_the_start(
        self, image_of: Callable[[Tensor], Tensor]
    ) -> None:
        v = tensor(0)
        found = two_branches(v, v, 1.0, R, image_of, distance_to(image_of(v)))
        assert found.loss == 0
        assert not found.gradient.any()

    def test_with_the_rollouts_noise_rewards_matter_in_third_order_only(
        self, image_of: Callable[[Tensor], Tensor]
    ) -> None:
        """In image space to second order in v - v_old; with fresh noise in first."""
        v_old, step = tensor(0), tensor(1)
        sizes = {}
        for target in (v_old, tensor(2)):
            differences = []
            for size in (1e-2, 1e-3):
                losses = [
                    two_branches(v_old + size * step, v_old, 1.0, torch.full((2,), r).double(), image_of, distance).loss
                    for r in (0.0, 1.0)
                    for distance in [distance_to(image_of(target))]
                ]
                differences.append(abs(float(losses[1] - losses[0])))
            sizes[target is v_old] = math.log10(differences[0] / differences[1])
        assert sizes[True] > 2.7
        assert sizes[False] == pytest.approx(1, abs=0.1)


class TestNFT:
    def test_gradient_in_closed_form(self) -> None:
        v_old, y, v = tensor(0), tensor(2), tensor(1).requires_grad_()
        beta, numel = 0.4, v[0].numel()
        (gradient,) = torch.autograd.grad(nft_loss(v, v_old, y, R, beta).sum(), v)
        expected = 2 * beta**2 * (v - v_old) + 2 * beta * (2 * R - 1).view(-1, 1, 1, 1) * (v_old - y)
        assert_close(gradient * numel, expected.detach())

    def test_its_stationary_point_is_guidance_by_one_over_beta(self) -> None:
        v_old, y, beta = tensor(0), tensor(2), 0.4
        v = (v_old + (2 * R - 1).view(-1, 1, 1, 1) / beta * (y - v_old)).requires_grad_()
        (gradient,) = torch.autograd.grad(nft_loss(v, v_old, y, R, beta).sum(), v)
        assert float(gradient.abs().max()) < 1e-15

    @pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
    def test_with_the_rollouts_noise_rewards_do_not_count(self, r: float) -> None:
        """The target is then v_old itself."""
        v_old, v, beta = tensor(0), tensor(1), 0.4
        loss = nft_loss(v, v_old, v_old, torch.full((2,), r).double(), beta)
        assert_close(loss, beta**2 * (v - v_old).square().mean((1, 2, 3)))

    def test_self_normalised_is_each_branch_over_its_own_error(self) -> None:
        v_old, y, v = tensor(0), tensor(2), tensor(1).requires_grad_()
        loss = self_normalised_nft_loss(v, v_old, y, R, 0.5, 0.25, 5.0)
        errors = [0.25 * (0.5 * v_old + 0.5 * v - y), 0.25 * (1.5 * v_old - 0.5 * v - y)]
        means = [(e.square().mean((1, 2, 3)) / e.abs().mean((1, 2, 3))).detach() for e in errors]
        assert_close(loss.detach(), 10 * (R * means[0] + (1 - R) * means[1]))
        (gradient,) = torch.autograd.grad(loss.sum(), v)
        scaled = [e / e.abs().mean((1, 2, 3), keepdim=True) for e in errors]
        weights = [share.view(-1, 1, 1, 1) for share in (R, R - 1)]
        expected = 10 * 2 * 0.25 * 0.5 * sum(w * s for w, s in zip(weights, scaled, strict=True)) / v[0].numel()
        assert_close(gradient, expected.detach())

    def test_self_normalised_stays_finite_at_the_target(self) -> None:
        v = tensor(0)
        assert not self_normalised_nft_loss(v, v, v, R, 1.0, 0.5, 5.0).any()


class TestRewards:
    """Algorithm 1, lines 8 to 10."""

    def raw(self) -> Tensor:
        return tensor(5, 3, 8, 2)

    def test_two_by_hand(self) -> None:
        raw = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 2, 1)  # standardised: -1 and 1
        phi = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
        found = normalised_rewards(raw).r.flatten()
        assert_close(found, torch.tensor([1 - phi, phi], dtype=torch.float64))
        shrunk = 0.5 * (1 + math.erf(0.5))  # 1 / sqrt(2): the sample's deviation is sqrt(2)
        assert_close(normalised_rewards(raw, "sample").r.flatten(), torch.tensor([1 - shrunk, shrunk]).double())

    def test_the_samples_deviation_is_the_unbiased_one(self) -> None:
        raw = self.raw()
        standardised = (raw - raw.mean(1, keepdim=True)) / raw.std(1, correction=1, keepdim=True)
        expected = (0.5 * (1 + torch.erf(standardised / math.sqrt(2)))).mean(0)
        assert_close(normalised_rewards(raw, "sample").r, expected)

    def test_units_and_offsets_do_not_matter_and_groups_are_apart(self) -> None:
        raw = self.raw()
        found = normalised_rewards(raw).r
        assert_close(normalised_rewards(raw * torch.tensor([1e-3, 1.0, 70.0]).view(3, 1, 1) + 5).r, found)
        raw[:, :, 1] = 0.1
        assert_close(normalised_rewards(raw).r[:, 0], found[:, 0])

    def test_a_metric_keeps_the_order_and_its_negative_mirrors_it(self) -> None:
        raw = self.raw()[:1]
        found = normalised_rewards(raw).r
        assert torch.equal(found.argsort(0), raw[0].argsort(0))
        assert_close(normalised_rewards(-raw).r, 1 - found)

    def test_bounds_are_reached_by_one_that_stands_out(self) -> None:
        raw = torch.zeros(1, 8, 1, dtype=torch.float64)
        raw[0, 3] = 1
        for std, bound, best in (("population", math.sqrt(7), 0.9959), ("sample", 7 / math.sqrt(8), 0.9933)):
            found = normalised_rewards(raw, std).r  # type: ignore[arg-type]  # two of two
            assert float(found.max()) == pytest.approx(0.5 * (1 + math.erf(bound / math.sqrt(2))))
            assert float(found.max()) == pytest.approx(best, abs=5e-5)
        found = normalised_rewards(self.raw()).r
        assert 0.0041 <= float(found.min()) <= float(found.max()) <= 0.9959

    def test_equal_images_get_one_half_and_are_counted(self) -> None:
        raw = self.raw()
        raw[1, :, 0] = 0.3
        assert float(normalised_rewards(raw).flat) == pytest.approx(1 / 6)
        assert normalised_rewards(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)).flat == 0  # 2 has 1/2, the others not
        found = normalised_rewards(torch.full((2, 8, 3), 0.7))
        assert torch.equal(found.r, torch.full((8, 3), 0.5))
        assert found.flat == 1

    def test_small_spreads_count_as_much_as_large_ones(self) -> None:
        """No constant is added to the deviation: LPIPS varies by 1e-3 within a group."""
        raw = self.raw()[:1]
        assert_close(normalised_rewards(0.5 + 1e-5 * raw).r, normalised_rewards(raw).r, rtol=1e-6, atol=1e-6)


class TestOldShare:
    def test_a_hard_copy_keeps_nothing(self) -> None:
        assert {old_share("hard_copy", step) for step in (1, 100, 10_000)} == {0.0}

    def test_type_1(self) -> None:
        assert old_share("type1", 1) == pytest.approx(0.001)
        assert old_share("type1", 499) == pytest.approx(0.499)
        assert old_share("type1", 800) == 0.5

    def test_type_2(self) -> None:
        assert old_share("type2", 74) == old_share("type2", 75) == 0
        assert old_share("type2", 76) == pytest.approx(0.0075)
        assert old_share("type2", 208) < 0.999
        assert old_share("type2", 209) == old_share("type2", 1000) == 0.999
