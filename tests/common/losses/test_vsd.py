"""VSD: the gradient written out, its zeros, its sign on Gaussians whose denoisers are known, and who gets none."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from common.diffusion import NoiseSchedule
from common.losses.vsd import vsd_gradient, vsd_loss

_SHAPE = (2, 4, 4, 8)  # 256 elements: dividing by it is exact
_SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class _Eps(nn.Module):
    """A linear noise prediction that depends on t, with parameters, and a record of how it was called."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(_randn(4, 4, seed=seed))
        self.calls: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        out = torch.einsum("oc,bchw->bohw", self.mix.to(z_t.dtype), z_t) * (1 + t.view(-1, 1, 1, 1) / 1000)
        self.calls.append((z_t, t, out.requires_grad))
        return out


class _Case:
    """Three networks, latents with a graph, noise and timesteps; `gradient` fills in what a test does not give."""

    def __init__(self) -> None:
        self.teacher, self.null, self.student = (_Eps(seed) for seed in (11, 12, 13))
        self.z, self.noise = _randn(*_SHAPE).requires_grad_(), _randn(*_SHAPE, seed=1).requires_grad_()
        self.t = torch.tensor([20, 979])
        self.schedule = NoiseSchedule(_SD)

    def gradient(self, **given: Any) -> Tensor:
        given = {"teacher": self.teacher, "teacher_null": self.null, "student": self.student} | given
        given = {"z": self.z, "noise": self.noise, "t": self.t} | given
        return vsd_gradient(**given, schedule=self.schedule)


@pytest.fixture
def case() -> _Case:
    return _Case()


class TestGradient:
    @pytest.mark.parametrize("cfg", [0.0, 1.0, 7.5])
    def test_is_the_guided_difference_over_m_written_out_for_each_sample(self, case: _Case, cfg: float) -> None:
        found = case.gradient(cfg=cfg)
        for i in range(2):
            t, z, n = case.t[i : i + 1], case.z[i].detach(), case.noise[i].detach()
            a, s = _ABAR[t].sqrt(), (1 - _ABAR[t]).sqrt()
            z_t = a * z + s * n
            e, e_null, e_reg = (net(z_t[None], t)[0].detach() for net in (case.teacher, case.null, case.student))
            e_fix = (1 - cfg) * e_null + cfg * e
            m = (z - (z_t - s * e_fix) / a).abs().mean()
            assert_close(found[i], s / a * (e_fix - e_reg) / m, rtol=1e-8, atol=1e-8)
        assert found.abs().mean() > 0.1

    def test_is_zero_where_student_and_unguided_teacher_agree(self, case: _Case) -> None:
        g = case.gradient(student=case.teacher, cfg=1.0)
        assert torch.equal(g, torch.zeros(_SHAPE, dtype=torch.float64))
        vsd_loss(g, case.z).mean().backward()
        assert case.z.grad is not None
        assert not case.z.grad.any()
        assert case.gradient(student=case.teacher).abs().mean() > 0.1  # guidance moves the teacher

    def test_of_weight_1_never_asks_for_the_null_condition(self, case: _Case) -> None:
        g = case.gradient(cfg=1.0)
        assert not case.null.calls
        assert torch.equal(g, case.gradient(cfg=1, teacher_null=None))

    def test_of_weight_0_is_that_of_the_null_branch(self, case: _Case) -> None:
        assert torch.equal(case.gradient(cfg=0.0), case.gradient(teacher=case.null, cfg=1.0))

    def test_calls_each_network_once_without_a_graph_at_the_same_noised_latents(self, case: _Case) -> None:
        g = case.gradient()
        for network in (case.teacher, case.null, case.student):
            ((z_t, t, with_graph),) = network.calls
            assert torch.equal(z_t, case.schedule.add_noise(case.z, case.noise, case.t))
            assert torch.equal(t, case.t)
            assert not with_graph
        assert not g.requires_grad
        vsd_loss(g, case.z).mean().backward()
        assert case.z.grad is not None
        assert case.noise.grad is None
        assert all(network.mix.grad is None for network in (case.teacher, case.null, case.student))

    def test_does_not_depend_on_the_rest_of_the_batch(self, case: _Case) -> None:
        both = case.gradient()
        for i in (slice(0, 1), slice(1, 2)):
            assert_close(case.gradient(z=case.z[i], noise=case.noise[i], t=case.t[i]), both[i])

    def test_m_does_not_fall_below_the_floor(self, case: _Case) -> None:
        shift = 3.0

        def exact(z_t: Tensor, _: Tensor) -> Tensor:  # z_0 = z, so m is 0 but for rounding
            return case.noise

        g = case.gradient(teacher=exact, student=lambda *call: exact(*call) - shift, cfg=1.0, floor=0.5)
        ratio = ((1 - _ABAR) / _ABAR).sqrt()[case.t].view(-1, 1, 1, 1)
        assert_close(g, (ratio * shift / 0.5).expand(_SHAPE))  # e_fix - e_reg = shift
        zeros = torch.zeros(_SHAPE)
        nothing = case.gradient(teacher=lambda z_t, _: z_t, student=lambda z_t, _: z_t, z=zeros, noise=zeros, cfg=1.0)
        assert torch.equal(nothing, zeros)  # and not 0 / 0

    def test_guides_and_subtracts_16_bit_predictions_in_fp32(self, case: _Case) -> None:
        z, noise = case.z.detach().bfloat16(), case.noise.detach().bfloat16()
        predictions = [_randn(*_SHAPE, seed=seed).bfloat16() for seed in (5, 6, 7)]
        teacher, null, student = (lambda *_, p=p: p for p in predictions)
        g = case.gradient(teacher=teacher, teacher_null=null, student=student, z=z, noise=noise)
        assert g.dtype == torch.float32
        teacher, null, student = (lambda *_, p=p: p.double() for p in predictions)
        in_fp64 = case.gradient(teacher=teacher, teacher_null=null, student=student, z=z.double(), noise=noise.double())
        assert_close(g.double(), in_fp64, rtol=1e-4, atol=1e-4)

    def test_guidance_without_a_null_condition_is_refused(self, case: _Case) -> None:
        with pytest.raises(ValueError, match=r"cfg=7\.5 needs teacher_null"):
            case.gradient(teacher_null=None)

    @pytest.mark.parametrize("name", ["teacher", "teacher_null", "student"])
    def test_a_prediction_that_would_broadcast_is_refused(self, case: _Case, name: str) -> None:
        with pytest.raises(ValueError, match=rf"{name} has shape \(1, 4, 4, 8\) for z \(2, 4, 4, 8\)"):
            case.gradient(**{name: lambda z_t, _: z_t[:1]})

    def test_noise_that_would_broadcast_is_refused(self, case: _Case) -> None:
        with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 4, 8\)"):
            case.gradient(noise=case.noise[:1])


class TestLoss:
    def test_has_the_gradient_2_g_over_numel_which_is_that_of_osediffs_mse(self) -> None:
        g, z = _randn(*_SHAPE), _randn(*_SHAPE, seed=1).requires_grad_()
        (slope,) = torch.autograd.grad(vsd_loss(g, z).mean(), z)
        assert torch.equal(slope, 2 * g / g.numel())
        (of_mse,) = torch.autograd.grad(F.mse_loss(z, (z - g).detach()), z)
        assert_close(slope, of_mse, rtol=0, atol=1e-15)

    def test_of_scale_1_has_that_of_half_the_mse(self) -> None:
        g, z = _randn(*_SHAPE), _randn(*_SHAPE, seed=1).requires_grad_()
        (slope,) = torch.autograd.grad(vsd_loss(g, z, scale=1.0).mean(), z)
        (of_mse,) = torch.autograd.grad(0.5 * F.mse_loss(z, (z - g).detach()), z)
        assert_close(slope, of_mse, rtol=0, atol=1e-15)

    def test_is_one_value_per_sample_and_does_not_differentiate_g(self) -> None:
        g, z = _randn(*_SHAPE).requires_grad_(), _randn(*_SHAPE, seed=1).requires_grad_()
        loss = vsd_loss(g, z)
        assert_close(loss, torch.stack([2 * (g[i] * z[i]).sum() / 128 for i in range(2)]))
        loss.mean().backward()
        assert g.grad is None


class TestGaussian:
    """Teacher N(0, 1), student N(b, 1) in one dimension: E[eps | z_t] = s (z_t - a mean) for data of variance 1."""

    t = torch.tensor([400])
    a, s = float(_ABAR[400].sqrt()), float((1 - _ABAR[400]).sqrt())

    @pytest.mark.parametrize("b", [-0.6, 0.6])
    @pytest.mark.parametrize("start", [-0.2, 1.3])
    def test_a_step_moves_against_b_from_the_students_mean_to_the_teachers(self, b: float, start: float) -> None:
        z = torch.full((1, 1, 1, 1), start, dtype=torch.float64, requires_grad=True)
        noise = _randn(1, 1, 1, 1, seed=3)
        g = vsd_gradient(
            lambda z_t, _: self.s * z_t,
            None,
            lambda z_t, _: self.s * (z_t - self.a * b),
            z,
            noise,
            self.t,
            NoiseSchedule(_SD),
            cfg=1.0,
        )
        # x0 = a z_t + s^2 mean for both, so x0_reg - x0_fix = s^2 b.
        m = abs(start - self.a * (self.a * start + self.s * noise.item()))
        assert g.item() == pytest.approx(self.s**2 * b / m, rel=1e-6)
        vsd_loss(g, z).mean().backward()
        assert z.grad is not None
        assert -z.grad.item() * b < 0
