"""The weights of the embedded foundation: small enough, and as good as their recipe makes them."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from common.autoencoder import ImageCodec
from common.conditioning.features import DinoFeatures
from common.conditioning.flux_text import encode_flux_prompts
from common.conditioning.text import encode_prompts
from common.denoisers.flux import FluxDenoiser
from common.diffusion import NoiseSchedule, flow_noise
from common.draws import Draws
from common.images import to_01, to_pm1
from common.loading import TINY, load_diffusers_model, load_schedule_config, load_unet, load_vae
from data.crops import GridCrops


def test_it_weighs_under_twenty_megabytes() -> None:
    assert sum(file.stat().st_size for file in TINY.rglob("*")) < 20e6


def test_latents_of_photos_are_white_channel_by_channel() -> None:
    """On the validation photos, with latents_mean and latents_std taken from training photos."""
    codec = ImageCodec(load_vae("tiny"))
    with torch.no_grad():
        z = codec.encode(to_pm1(torch.stack([item["hq"] for item in GridCrops("val", 128)])))
    assert z.mean((0, 2, 3)).abs().max() < 1
    assert 0.5 < z.std((0, 2, 3)).min() <= z.std((0, 2, 3)).max() < 2


def test_the_autoencoder_keeps_luma_and_colour_of_photos_it_never_saw() -> None:
    codec = ImageCodec(load_vae("tiny"))
    x = torch.stack([item["hq"] for item in GridCrops("val", 128)])
    with torch.no_grad():
        x_hat = to_01(codec.decode(codec.encode(to_pm1(x)))).clamp(0, 1)
    psnr_rgb = -10 * (x_hat - x).square().mean((1, 2, 3)).log10().mean()
    assert psnr_rgb > PSNR_RGB_SHIPPED - 0.3
    assert (x_hat - x).mean((0, 2, 3)).abs().max() < 0.01  # no colour cast


@pytest.mark.parametrize("subfolder", ["unet", "unet_features"])
def test_the_denoiser_beats_the_best_linear_shrinkage_at_every_noise_level(subfolder: str) -> None:
    """E|z0 - x0_hat|^2 against the best scalar estimate var(z0) s^2 / (var(z0) a^2 + s^2)."""
    codec, schedule = ImageCodec(load_vae("tiny")), NoiseSchedule(load_schedule_config("tiny"))
    unet = load_unet("tiny", subfolder)
    crops = [GridCrops("val", 128)[i] for i in range(0, 28, 4)]
    with torch.no_grad():
        x = torch.stack([item["hq"] for item in crops])
        z0 = codec.encode(to_pm1(x))
        text = subfolder == "unet"
        condition = encode_prompts("tiny", [item["prompt"] for item in crops]) if text else DinoFeatures("tiny")(x)
        noise = Draws(0, torch.arange(len(z0))).normal("test", z0.shape[1:])
        for t in (100, 250, 500, 800):
            z_t = schedule.add_noise(z0, noise, t)
            x0 = schedule.x0_from_eps(z_t, unet(z_t, t, condition).sample, t)
            power = z0.square().mean()
            signal, sigma = (float(c) for c in schedule.coefficients(t, z0))
            linear = power * sigma**2 / (power * signal**2 + sigma**2)
            assert (x0 - z0).square().mean() < 0.8 * linear, f"t={t}"


def test_the_flow_beats_the_best_linear_shrinkage_and_edits_its_reference() -> None:
    """E|v - v_hat|^2 against the best multiple of z_t; with the photo as its reference little is left to guess."""
    codec = ImageCodec(load_vae("tiny"))
    flow = FluxDenoiser(load_diffusers_model(FluxTransformer2DModel, "tiny", "transformer"))
    crops = [GridCrops("val", 128)[i] for i in range(0, 28, 4)]
    text = encode_flux_prompts("tiny", [item["prompt"] for item in crops])
    with torch.no_grad():
        z = codec.encode(to_pm1(torch.stack([item["hq"] for item in crops])))
        eps = Draws(0, torch.arange(len(z))).normal("test", z.shape[1:])
        for t in (0.25, 0.5, 0.75):
            z_t, v = flow_noise(z, eps, t), eps - z
            linear = v.square().mean() - (v * z_t).mean().square() / z_t.square().mean()
            error = (flow(z_t, t, text) - v).square().mean()
            assert error < 0.6 * linear, f"t={t}"
            assert (flow(z_t, t, text, z) - v).square().mean() < 0.1 * error, f"t={t}"


def test_the_flows_text_has_fluxs_layout_and_the_embedded_clip() -> None:
    cat, dog = encode_flux_prompts("tiny", ["a cat", "a dog"]).tokens
    assert cat.shape == dog.shape == (32, 32)
    assert not torch.allclose(cat, dog)
    pooled = encode_flux_prompts("tiny", ["a cat"]).pooled[0]
    assert torch.allclose(pooled, encode_prompts("tiny", ["a cat"])[0, len("a cat")], atol=1e-5)  # at the end's place


def test_the_text_condition_is_a_function_of_the_bytes() -> None:
    cat, dog = encode_prompts("tiny", ["a cat", "a dog"])
    assert cat.shape == (32, 32)
    assert not torch.allclose(cat, dog)


PSNR_RGB_SHIPPED = 32.47  # dB, measured on the shipped weights; see common/foundation/README.md
