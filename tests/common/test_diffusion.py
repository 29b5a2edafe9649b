"""The noise schedule: reference values, diffusers' numbers, and conversions that undo one another."""

import copy
import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.testing import assert_close

from common.diffusion import NoiseSchedule, flow_clean, flow_noise, flow_velocity

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule(SD)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 4, 5, 6, dtype=torch.float64)


T = torch.tensor([0, 399, 999])


class TestAlphaBar:
    @pytest.mark.parametrize(("t", "value"), [(0, 0.999150), (250, 0.673792), (399, 0.426086), (999, 0.004660)])
    def test_has_the_reference_values_of_stable_diffusion(self, schedule: NoiseSchedule, t: int, value: float) -> None:
        assert schedule.alpha_bar[t].item() == pytest.approx(value, abs=1e-6)

    def test_linear_betas_by_hand(self) -> None:
        config = {"num_train_timesteps": 3, "beta_start": 0.1, "beta_end": 0.3, "beta_schedule": "linear"}
        expected = torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], dtype=torch.float64)
        assert_close(NoiseSchedule(config).alpha_bar, expected)

    @pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
    def test_agrees_with_diffusers(self, kind: str) -> None:
        reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kind)
        ours = NoiseSchedule(reference.config)
        assert ours.num_timesteps == 1000
        assert_close(ours.alpha_bar.float(), reference.alphas_cumprod, rtol=2e-5, atol=1e-7)

    def test_the_factors_dfosd_names_at_399_and_999(self, schedule: NoiseSchedule) -> None:
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        assert schedule.x0_from_eps(one, 0 * one, 399).item() == pytest.approx(1.5320, abs=5e-5)
        assert schedule.x0_from_eps(0 * one, one, 399).item() == pytest.approx(-1.1606, abs=5e-5)
        assert schedule.x0_from_eps(one, 0 * one, 999).item() == pytest.approx(14.65, abs=5e-3)
        assert schedule.x0_from_eps(0 * one, one, 999).item() == pytest.approx(-14.61, abs=5e-3)


class TestConversions:
    def test_adding_noise_and_velocity_agree_with_diffusers(
        self, schedule: NoiseSchedule, pair: tuple[Tensor, Tensor]
    ) -> None:
        z0, eps = (x.float() for x in pair)
        reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        assert_close(schedule.add_noise(z0, eps, T), reference.add_noise(z0, eps, T), rtol=1e-5, atol=1e-5)
        assert_close(schedule.v_from_eps_x0(eps, z0, T), reference.get_velocity(z0, eps, T), rtol=1e-5, atol=1e-5)

    def test_a_value_by_hand(self) -> None:
        # One step with beta = 0.36: abar = 0.64, so the coefficients are 0.8 and 0.6.
        schedule = NoiseSchedule(
            {"num_train_timesteps": 1, "beta_start": 0.36, "beta_end": 0.36, "beta_schedule": "linear"}
        )
        z0, eps = torch.full((1, 1), 2.0), torch.full((1, 1), 5.0)
        assert_close(schedule.add_noise(z0, eps, 0), torch.full((1, 1), 4.6))
        assert_close(schedule.v_from_eps_x0(eps, z0, 0), torch.full((1, 1), 2.8))

    @pytest.mark.parametrize("t", [0, 399, 999, T])
    def test_undo_one_another(self, schedule: NoiseSchedule, pair: tuple[Tensor, Tensor], t: int | Tensor) -> None:
        z0, eps = pair
        z_t, v = schedule.add_noise(z0, eps, t), schedule.v_from_eps_x0(eps, z0, t)
        assert_close(schedule.x0_from_eps(z_t, eps, t), z0)
        assert_close(schedule.eps_from_x0(z_t, z0, t), eps)
        assert_close(schedule.eps_from_v(z_t, v, t), eps)
        assert_close(schedule.x0_from_v(z_t, v, t), z0)

    def test_velocity_turns_the_pair_by_an_angle(self, schedule: NoiseSchedule, pair: tuple[Tensor, Tensor]) -> None:
        z0, eps = pair
        z_t, v = schedule.add_noise(z0, eps, T), schedule.v_from_eps_x0(eps, z0, T)
        assert_close(z_t.square() + v.square(), z0.square() + eps.square())

    def test_each_sample_has_its_own_timestep(self, schedule: NoiseSchedule, pair: tuple[Tensor, Tensor]) -> None:
        z0, eps = pair
        together = schedule.add_noise(z0, eps, T)
        for i, t in enumerate(T.tolist()):
            assert torch.equal(together[i : i + 1], schedule.add_noise(z0[i : i + 1], eps[i : i + 1], t))

    def test_little_noise_at_the_start_and_little_signal_at_the_end(self, schedule: NoiseSchedule) -> None:
        signal, sigma = schedule.coefficients(torch.tensor([0, 999]), torch.zeros(2, 1))
        assert signal.flatten().tolist() == pytest.approx([math.sqrt(0.99915), math.sqrt(0.00466)], abs=1e-5)
        assert_close(signal.square() + sigma.square(), torch.ones(2, 1))

    def test_gradients_reach_both_inputs_with_their_coefficients(self, schedule: NoiseSchedule) -> None:
        z_t, eps = (torch.ones(1, 1, requires_grad=True) for _ in range(2))
        schedule.x0_from_eps(z_t, eps, 399).sum().backward()
        assert z_t.grad.item() == pytest.approx(1.5320, abs=5e-5)
        assert eps.grad.item() == pytest.approx(-1.1606, abs=5e-5)


class TestRobustness:
    def test_bfloat16_does_not_touch_the_coefficients(self, schedule: NoiseSchedule) -> None:
        before = schedule.coefficients(T, torch.zeros(3, 1))
        after = copy.deepcopy(schedule).to(torch.bfloat16).coefficients(T, torch.zeros(3, 1, dtype=torch.bfloat16))
        assert after[0].dtype == torch.float32
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])

    def test_is_the_same_when_made_on_the_meta_device_and_filled_later(self, schedule: NoiseSchedule) -> None:
        with torch.device("meta"):
            made = NoiseSchedule(SD)
        made.to_empty(device="cpu")
        one = torch.ones(1, 1)
        assert torch.equal(made.add_noise(one, one, 399), schedule.add_noise(one, one, 399))

    @pytest.mark.parametrize("t", [5, torch.tensor([5, 6], device="meta")])
    def test_works_on_meta_tensors(self, schedule: NoiseSchedule, t: int | Tensor) -> None:
        z = torch.zeros(2, 4, 8, 8, device="meta")
        assert schedule.add_noise(z, z, t).is_meta

    def test_first_use_in_validation_does_not_spoil_training(self, schedule: NoiseSchedule) -> None:
        with torch.inference_mode():
            schedule.add_noise(torch.ones(1, 1), torch.ones(1, 1), 3)
        z = torch.ones(1, 1, requires_grad=True)
        schedule.add_noise(z, z, 3).sum().backward()
        assert z.grad is not None

    def test_adds_nothing_to_a_checkpoint(self, schedule: NoiseSchedule) -> None:
        assert schedule.state_dict() == {}

    def test_an_impossible_timestep_is_named(self, schedule: NoiseSchedule) -> None:
        z = torch.zeros(2, 1)
        for t in (1000, -1, torch.tensor([3, -1])):
            with pytest.raises(ValueError, match=r"-1|1000"):
                schedule.add_noise(z, z, t)
        with pytest.raises(ValueError, match="3 timesteps for a batch of 2"):
            schedule.add_noise(z, z, T)
        with pytest.raises(ValueError, match="integers"):
            schedule.add_noise(z, z, torch.tensor([0.5, 1.0]))

    def test_a_schedule_it_does_not_know_is_named(self) -> None:
        with pytest.raises(ValueError, match="squaredcos_cap_v2"):
            NoiseSchedule(SD | {"beta_schedule": "squaredcos_cap_v2"})
        with pytest.raises(ValueError, match=r"lacks \['beta_start'"):
            NoiseSchedule({"num_train_timesteps": 1000, "shift": 3.0})
        with pytest.raises(ValueError, match="rescale_betas_zero_snr=True"):
            NoiseSchedule(SD | {"rescale_betas_zero_snr": True})

    def test_epsilon_is_the_prediction_type_when_none_is_written(self, schedule: NoiseSchedule) -> None:
        assert schedule.prediction_type == "epsilon"
        assert NoiseSchedule(SD | {"prediction_type": "v_prediction"}).prediction_type == "v_prediction"


class TestFlow:
    """Rectified flow: z_t = (1 - t) z + t eps, v = eps - z."""

    def test_by_hand(self) -> None:
        z, eps = torch.tensor([[8.0]]), torch.tensor([[4.0]])
        assert flow_noise(z, eps, 0.25).item() == 0.75 * 8 + 0.25 * 4 == 7
        assert flow_clean(torch.tensor([[7.0]]), torch.tensor([[-4.0]]), 0.25).item() == 8
        assert flow_velocity(torch.tensor([[7.0]]), z, 0.25).item() == -4

    def test_ends_are_the_latent_and_the_noise_bit_for_bit(self, pair: tuple[Tensor, Tensor]) -> None:
        z, eps = pair
        assert torch.equal(flow_noise(z, eps, 0.0), z)
        assert torch.equal(flow_noise(z, eps, torch.tensor([1.0, 1.0, 1.0])), eps)

    @pytest.mark.parametrize("t", [1e-3, 0.25, 0.5, 1.0, torch.tensor([0.1, 0.5, 1.0])])
    def test_the_oracles_velocity_leads_to_any_answer(self, pair: tuple[Tensor, Tensor], t: float | Tensor) -> None:
        """Check 2 of DNF-SR: v* = (z_slot - z) / t gives z, and eps - z_lq gives z_lq."""
        z_lq, eps = pair
        z_slot, z = flow_noise(z_lq, eps, t), torch.randn_like(z_lq)
        assert_close(flow_clean(z_slot, flow_velocity(z_slot, z, t), t), z)
        assert_close(flow_clean(z_slot, eps - z_lq, t), z_lq)
        assert_close(flow_velocity(z_slot, z, t), (eps - z_lq) + flow_velocity(z_lq, z, t))

    def test_each_sample_has_its_own_time_and_keeps_its_dtype(self, pair: tuple[Tensor, Tensor]) -> None:
        z, eps = (part.float() for part in pair)
        times = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64)
        together = flow_noise(z, eps, times)
        assert together.dtype == torch.float32
        for i, t in enumerate(times.tolist()):
            assert_close(together[i], flow_noise(z[i], eps[i], t))
