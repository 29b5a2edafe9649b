"""Losses given as gradients: exact slopes, who gets none, and descent on a Gaussian whose denoiser is known."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from common.diffusion import NoiseSchedule
from common.losses.distribution_matching import distribution_matching_gradient, noise_gradient, score_surrogate

_SHAPE = (2, 4, 4, 8)  # 256 elements: dividing by it is exact
_SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_HALF = {"num_train_timesteps": 1, "beta_start": 0.5, "beta_end": 0.5, "beta_schedule": "linear"}  # abar[0] = 0.5


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class _Mu(nn.Module):
    """A linear noise prediction that depends on t, with parameters, and a record of how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(_randn(4, 4, seed=11))
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        out = torch.einsum("oc,bchw->bohw", self.mix, z_t) * (1 + t.view(-1, 1, 1, 1) / 1000)
        self.calls.append((z_t, t, out.requires_grad))
        return out


class TestSurrogate:
    def test_has_the_gradient_g_over_numel_which_is_that_of_half_the_mse(self) -> None:
        g, z = _randn(3, 4, 5, 7), _randn(3, 4, 5, 7, seed=1).requires_grad_()
        (slope,) = torch.autograd.grad(score_surrogate(g, z).mean(), z)
        assert_close(slope, g / g.numel(), rtol=0, atol=1e-17)
        (of_mse,) = torch.autograd.grad(0.5 * F.mse_loss(z, (z - g).detach()), z)
        assert_close(slope, of_mse, rtol=0, atol=1e-9)
        (without_half,) = torch.autograd.grad(F.mse_loss(z, (z - g).detach()), z)
        assert_close(2 * slope, without_half, rtol=0, atol=1e-9)

    def test_is_one_value_per_sample(self) -> None:
        g, z = _randn(3, 4, 5, 7), _randn(3, 4, 5, 7, seed=1)
        expected = torch.tensor([float((g[i] * z[i]).sum()) / 140 for i in range(3)], dtype=torch.float64)
        assert_close(score_surrogate(g, z), expected)

    def test_equals_grad_outputs_through_a_linear_encoder_exactly(self) -> None:
        theta, x = _randn(4, 4, seed=2).requires_grad_(), _randn(*_SHAPE, seed=3)
        g = _randn(*_SHAPE)

        def encode() -> Tensor:
            return torch.einsum("oc,bchw->bohw", theta, x)

        (through_loss,) = torch.autograd.grad(score_surrogate(g, encode()).mean(), theta)
        (by_cotangent,) = torch.autograd.grad(encode(), theta, grad_outputs=g / g.numel())
        assert torch.equal(through_loss, by_cotangent)

    def test_does_not_differentiate_g(self) -> None:
        g, z = _randn(*_SHAPE).requires_grad_(), _randn(*_SHAPE, seed=1).requires_grad_()
        score_surrogate(g, z).mean().backward()
        assert g.grad is None
        assert z.grad is not None

    def test_of_bf16_latents_is_fp32(self) -> None:
        value = score_surrogate(_randn(*_SHAPE).bfloat16(), _randn(*_SHAPE, seed=1).bfloat16())
        assert value.dtype == torch.float32

    def test_refuses_shapes_that_would_broadcast(self) -> None:
        with pytest.raises(ValueError, match=r"g \(1, 4, 4, 8\), z \(2, 4, 4, 8\)"):
            score_surrogate(_randn(1, 4, 4, 8), _randn(*_SHAPE))


class TestDistributionMatchingGradient:
    t = torch.tensor([7, 420])

    def test_is_the_difference_of_two_predictions_written_out(self) -> None:
        mu, schedule = _Mu(), NoiseSchedule(_SD)
        z, h, noise = (_randn(*_SHAPE, seed=seed) for seed in range(3))
        g = distribution_matching_gradient(mu, z, h, noise, self.t, schedule)
        # The shared noise cancels in a linear mu: g = (1 + t / 1000) M a (z - h).
        abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[self.t]
        factor = ((1 + self.t / 1000) * abar.sqrt()).view(-1, 1, 1, 1)
        assert_close(g, factor * torch.einsum("oc,bchw->bohw", mu.mix, z - h).detach(), rtol=0, atol=1e-7)
        assert g.abs().mean() > 0.1

    def test_is_exactly_zero_at_the_target_because_the_noise_is_shared(self) -> None:
        mu, schedule = _Mu(), NoiseSchedule(_SD)
        h, noise, other = (_randn(*_SHAPE, seed=seed) for seed in range(3))
        g = distribution_matching_gradient(mu, h.clone(), h, noise, self.t, schedule)
        assert torch.equal(g, torch.zeros(_SHAPE, dtype=torch.float64))
        with torch.no_grad():
            unshared = mu(schedule.add_noise(h, noise, self.t), self.t) - mu(
                schedule.add_noise(h, other, self.t), self.t
            )
        assert unshared.abs().mean() > 0.1

    def test_calls_the_network_twice_without_a_graph_on_the_noised_batches(self) -> None:
        mu, schedule = _Mu(), NoiseSchedule(_SD)
        z, h, noise = (_randn(*_SHAPE, seed=seed).requires_grad_() for seed in range(3))
        g = distribution_matching_gradient(mu, z, h, noise, self.t, schedule)
        assert [with_graph for _, _, with_graph in mu.calls] == [False, False]
        for latent, (z_t, t, _) in zip((z, h), mu.calls, strict=True):
            assert torch.equal(z_t, schedule.add_noise(latent, noise, self.t))
            assert torch.equal(t, self.t)
        assert not g.requires_grad
        score_surrogate(g, z).mean().backward()
        assert z.grad is not None
        assert_close(z.grad, g / g.numel(), rtol=0, atol=1e-17)
        assert h.grad is None
        assert noise.grad is None
        assert mu.mix.grad is None

    def test_takes_the_difference_of_16_bit_predictions_in_fp32(self) -> None:
        z, h, noise = (_randn(*_SHAPE, seed=seed).float() for seed in range(3))
        seen = []

        def predict_eps(z_t: Tensor, _: Tensor) -> Tensor:
            seen.append(z_t.bfloat16())
            return seen[-1]

        g = distribution_matching_gradient(predict_eps, z, h, noise, self.t, NoiseSchedule(_SD))
        assert g.dtype == torch.float32
        assert torch.equal(g, seen[0].float() - seen[1].float())

    def test_refuses_noise_that_would_broadcast(self) -> None:
        with pytest.raises(ValueError, match=r"noise \(1, 4, 4, 8\); pass tensors of one shape"):
            distribution_matching_gradient(
                _Mu(), _randn(*_SHAPE), _randn(*_SHAPE), _randn(1, 4, 4, 8), self.t, NoiseSchedule(_SD)
            )


class TestNoiseGradient:
    t = torch.tensor([7, 420])

    def test_is_minus_the_residual_and_as_printed_plus(self) -> None:
        mu, schedule = _Mu(), NoiseSchedule(_SD)
        h, eps = _randn(*_SHAPE), _randn(*_SHAPE, seed=1)
        abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[self.t]
        a, s = (c.sqrt().view(-1, 1, 1, 1) for c in (abar, 1 - abar))
        r = (mu(a * h + s * eps, self.t) - eps).detach()
        assert_close(noise_gradient(mu, h, eps, self.t, schedule, "corrected"), -r, rtol=0, atol=1e-7)
        assert_close(noise_gradient(mu, h, eps, self.t, schedule, "printed"), r, rtol=0, atol=1e-7)

    def test_is_zero_where_the_noise_denoises_to_the_target(self) -> None:
        h, eps = _randn(*_SHAPE), _randn(*_SHAPE, seed=1)
        g = noise_gradient(lambda *_: eps, h, eps, self.t, NoiseSchedule(_SD), "corrected")
        assert torch.equal(g, torch.zeros_like(g))

    def test_calls_the_network_once_and_its_surrogate_reaches_only_the_encoder(self) -> None:
        mu, h = _Mu(), _randn(*_SHAPE).requires_grad_()
        theta, x = _randn(4, 4, seed=2).requires_grad_(), _randn(*_SHAPE, seed=3)
        x_sr = torch.einsum("oc,bchw->bohw", theta, x)
        eps = mu(x_sr, self.t)
        mu.calls.clear()
        g = noise_gradient(mu, h, eps, self.t, NoiseSchedule(_SD), "corrected")
        assert [with_graph for _, _, with_graph in mu.calls] == [False]
        assert not g.requires_grad
        (by_cotangent,) = torch.autograd.grad(x_sr, theta, grad_outputs=g / g.numel(), retain_graph=True)
        score_surrogate(g, x_sr).mean().backward()
        assert theta.grad is not None
        assert torch.equal(theta.grad, by_cotangent)
        assert mu.mix.grad is None
        assert h.grad is None

    def test_an_unknown_sign_is_refused(self) -> None:
        with pytest.raises(ValueError, match="sign='plus' is unknown; use 'corrected' or 'printed'"):
            noise_gradient(_Mu(), _randn(*_SHAPE), _randn(*_SHAPE), self.t, NoiseSchedule(_SD), "plus")

    def test_refuses_shapes_that_would_broadcast(self) -> None:
        with pytest.raises(ValueError, match=r"h \(1, 4, 4, 8\), eps \(2, 4, 4, 8\)"):
            noise_gradient(_Mu(), _randn(1, 4, 4, 8), _randn(*_SHAPE), self.t, NoiseSchedule(_SD), "printed")


class TestGaussian:
    """Data N(m, v) in one dimension, abar = 0.5: E[eps | z_t] = s (z_t - a m) / (abar v + s^2)."""

    mean, variance, lr, steps = 0.3, 0.5, 0.02, 2000
    t = torch.tensor([0])
    schedule = NoiseSchedule(_HALF)

    def predict_eps(self, z_t: Tensor, _: Tensor) -> Tensor:
        a = s = 0.5**0.5
        return s * (z_t - a * self.mean) / (0.5 * self.variance + 0.5)

    def descend(self, start: float, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient descent by autograd on the surrogate; one element, so numel is 1."""
        z = torch.full((1, 1, 1, 1), start, dtype=torch.float64, requires_grad=True)
        for _ in range(self.steps):
            (slope,) = torch.autograd.grad(score_surrogate(gradient(z), z).mean(), z)
            with torch.no_grad():
                z -= self.lr * slope
        return z.detach()

    def test_distribution_matching_pulls_to_the_target(self) -> None:
        h = torch.full((1, 1, 1, 1), -0.7, dtype=torch.float64)
        noise = iter(_randn(self.steps, 1, 1, 1, 1))
        z = self.descend(
            0.8,
            lambda z: distribution_matching_gradient(self.predict_eps, z, h, next(noise), self.t, self.schedule),
        )
        # g = a s / (abar v + s^2) (z - h) = (z - h) / (v + 1), whatever the noise.
        expected = 1.5 * (1 - self.lr / (self.variance + 1)) ** self.steps
        assert_close(abs((z - h).item()), expected, rtol=1e-3, atol=0)
        assert abs((z - h).item()) < 1e-6

    @pytest.mark.parametrize("sign", ["corrected", "printed"])
    def test_noise_converges_with_the_corrected_sign_and_diverges_with_the_printed_one(self, sign: str) -> None:
        h = torch.full((1, 1, 1, 1), -0.7, dtype=torch.float64)
        rate = self.variance / (self.variance + 1)  # r = -rate (eps - eps*), hence |r| shrinks by 1 - lr rate a step
        solved = (-0.7 - self.mean) / self.variance  # mu = ((h - m) + eps) / (v + 1) is eps there
        start = solved + 0.28 / rate

        def residual(eps: Tensor) -> float:
            return abs(noise_gradient(self.predict_eps, h, eps, self.t, self.schedule, "printed").item())

        assert_close(residual(torch.full_like(h, start)), 0.28, rtol=1e-12, atol=0)
        eps = self.descend(start, lambda e: noise_gradient(self.predict_eps, h, e, self.t, self.schedule, sign))
        direction = -1 if sign == "corrected" else 1
        assert_close(residual(eps), 0.28 * (1 + direction * self.lr * rate) ** self.steps, rtol=1e-6, atol=0)
        assert residual(eps) < 1e-6 if sign == "corrected" else residual(eps) > 1e4
