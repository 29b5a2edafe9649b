"""The U-Net behind one call: eps and x0 from either prediction type, for SD and SDXL."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.testing import assert_close

from common.adapters import add_lora
from common.denoisers.unet import UNetDenoiser, sdxl_conditions
from common.diffusion import NoiseSchedule

from ..networks import small_unet

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_unet(**config: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return small_unet(**config).requires_grad_(False)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 4, 8, 8), torch.randn(2, 3, 32)


@pytest.mark.parametrize("t", [399, torch.tensor([399, 20])])
class TestPrediction:
    def test_an_epsilon_network_is_read_as_eps(self, inputs: tuple[Tensor, Tensor], t: int | Tensor) -> None:
        unet, (z_t, prompt) = make_unet(), inputs
        prediction = UNetDenoiser(unet, NoiseSchedule(SD))(z_t, t, prompt)
        assert torch.equal(prediction.eps, unet(z_t, t, prompt).sample)

    def test_a_v_network_is_read_as_v(self, inputs: tuple[Tensor, Tensor], t: int | Tensor) -> None:
        unet, (z_t, prompt) = make_unet(), inputs
        schedule = NoiseSchedule(SD | {"prediction_type": "v_prediction"})
        prediction = UNetDenoiser(unet, schedule)(z_t, t, prompt)
        v = unet(z_t, t, prompt).sample
        assert_close(schedule.v_from_eps_x0(prediction.eps, prediction.x0, t), v, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
    def test_both_forms_make_up_the_input(self, inputs: tuple[Tensor, Tensor], t: int | Tensor, kind: str) -> None:
        z_t, prompt = inputs
        schedule = NoiseSchedule(SD | {"prediction_type": kind})
        eps, x0 = UNetDenoiser(make_unet(), schedule)(z_t, t, prompt)
        assert_close(schedule.add_noise(x0, eps, t), z_t, rtol=1e-5, atol=1e-5)


def test_one_prompt_serves_the_whole_batch(inputs: tuple[Tensor, Tensor]) -> None:
    z_t, prompt = inputs
    denoiser = UNetDenoiser(make_unet(), NoiseSchedule(SD))
    assert_close(denoiser(z_t, 9, prompt[:1]).eps, denoiser(z_t, 9, prompt[:1].repeat(2, 1, 1)).eps)


def test_gradients_reach_latent_and_prompt_through_frozen_weights(inputs: tuple[Tensor, Tensor]) -> None:
    z_t, prompt = (x.requires_grad_() for x in inputs)
    denoiser = UNetDenoiser(make_unet(), NoiseSchedule(SD))
    denoiser(z_t, 9, prompt).x0.square().mean().backward()
    assert z_t.grad.abs().sum() > 0
    assert prompt.grad.abs().sum() > 0
    assert all(p.grad is None for p in denoiser.parameters())


def test_checkpointing_runs_blocks_twice_and_changes_no_gradient(inputs: tuple[Tensor, Tensor]) -> None:
    runs, grads = [], []
    for checkpointing in (False, True):
        z_t = inputs[0].clone().requires_grad_()
        denoiser = UNetDenoiser(make_unet(), NoiseSchedule(SD), gradient_checkpointing=checkpointing).eval()
        calls: list[int] = []
        denoiser.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        denoiser(z_t, 9, inputs[1]).x0.square().mean().backward()
        runs.append(len(calls))
        grads.append(z_t.grad)
    assert runs == [1, 2]
    assert_close(grads[0], grads[1])


def test_a_bfloat16_base_with_float32_adapters_answers_in_float32(inputs: tuple[Tensor, Tensor]) -> None:
    unet = add_lora(make_unet().bfloat16(), 2, 2, ["conv_in", "to_q"])
    eps, x0 = UNetDenoiser(unet, NoiseSchedule(SD))(inputs[0], 9, inputs[1])
    assert eps.dtype == x0.dtype == torch.float32


def test_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        unet = make_unet()
    z_t = torch.zeros(2, 4, 8, 8, device="meta")
    prediction = UNetDenoiser(unet, NoiseSchedule(SD))(z_t, 9, torch.zeros(1, 3, 32, device="meta"))
    assert prediction.x0.is_meta
    assert prediction.x0.shape == z_t.shape


def test_another_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        UNetDenoiser(make_unet(), NoiseSchedule(SD | {"prediction_type": "sample"}))


class TestSdxl:
    @pytest.fixture
    def denoiser(self) -> UNetDenoiser:
        unet = make_unet(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + 12
        )
        return UNetDenoiser(unet, NoiseSchedule(SD))

    def test_takes_its_conditions(self, denoiser: UNetDenoiser, inputs: tuple[Tensor, Tensor]) -> None:
        z_t, prompt = inputs
        at_512 = denoiser(z_t, 9, prompt, sdxl_conditions(2, 512, pooled_width=12)).eps
        at_1024 = denoiser(z_t, 9, prompt, sdxl_conditions(2, 1024, pooled_width=12)).eps
        assert at_512.shape == z_t.shape
        assert not torch.equal(at_512, at_1024)

    def test_does_not_run_without(self, denoiser: UNetDenoiser, inputs: tuple[Tensor, Tensor]) -> None:
        with pytest.raises(ValueError, match="sdxl_conditions"):
            denoiser(inputs[0], 9, inputs[1])

    def test_sizes_are_original_crop_target(self) -> None:
        conditions = sdxl_conditions(2)
        assert conditions["time_ids"].tolist() == [[512, 512, 0, 0, 512, 512]] * 2
        assert conditions["text_embeds"].shape == (2, 1280)
        assert not conditions["text_embeds"].any()
