"""The embedded foundation: small enough, loads as Stable Diffusion does, and its recipe runs."""

import math

import pytest
import torch
from diffusers import AutoencoderKL

from common.autoencoder import ImageCodec
from common.conditioning.features import DinoFeatures
from common.conditioning.text import encode_prompts
from common.diffusion import NoiseSchedule
from common.draws import Draws
from common.foundation.autoencoder import TinyAutoencoder, reconstruction_loss
from common.foundation.schedule import Anneal, anneal
from common.images import to_01, to_pm1
from common.pretrained import TINY, load_schedule_config, load_unet, load_vae
from data.crops import GridCrops


def test_it_weighs_under_fifteen_megabytes() -> None:
    """20 MB in all with the parts that later papers add."""
    assert sum(file.stat().st_size for file in TINY.rglob("*")) < 15e6


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


def test_the_text_condition_is_a_function_of_the_bytes() -> None:
    cat, dog = encode_prompts("tiny", ["a cat", "a dog"])
    assert cat.shape == (32, 32)
    assert not torch.allclose(cat, dog)


def test_reconstruction_loss_by_hand() -> None:
    """A constant error e: e + 0.5 e^2, and the pooled term sees the same error: w (2 e + 4 e^2)."""
    x = torch.zeros(1, 3, 8, 8)
    assert reconstruction_loss(x + 0.5, x, 0.0).item() == pytest.approx(0.5 + 0.125)
    assert reconstruction_loss(x + 0.5, x, 1.0).item() == pytest.approx(0.625 + 1 + 1)


def test_the_pooled_term_is_blind_to_texture_whose_mean_is_right() -> None:
    x = torch.zeros(1, 3, 8, 8)
    checker = torch.ones(8, 8)
    checker[::2, ::2] = checker[1::2, 1::2] = -1
    assert reconstruction_loss(x + checker, x, 7.0) == reconstruction_loss(x + checker, x, 0.0)


def test_the_learning_rate_warms_up_stays_and_decays_to_a_twentieth() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    factor = Anneal(optimizer, 1000, warmup=20, tail=0.3).lr_lambdas[0]
    assert factor(0) == pytest.approx(1 / 20)
    assert factor(500) == factor(700) == 1
    assert factor(850) == pytest.approx(math.sqrt(0.05))
    assert factor(1000) == pytest.approx(0.05)
    assert anneal(optimizer, 1000, tail=0.0)["lr_scheduler"]["scheduler"].lr_lambdas[0](999) == 1


def test_latent_noise_is_up_to_its_share_of_each_channels_deviation(monkeypatch) -> None:
    """What the decoder gets, less the posterior's sample, against the latents' standard deviation; 0 adds none."""
    batch = {"hq": torch.stack([item["hq"] for item in GridCrops("val", 64)][:32])}
    shares = {}
    for strength in (0.0, 0.3):
        stage = TinyAutoencoder(start="tiny", latent_noise=strength)
        stage.log_dict = lambda *args, **kwargs: None
        decoded = []
        decode = stage.vae.decode
        monkeypatch.setattr(stage.vae, "decode", lambda z, decode=decode, kept=decoded: kept.append(z) or decode(z))
        torch.manual_seed(0)
        stage.training_step(batch, 0)
        torch.manual_seed(0)
        z = stage.vae.encode(batch["hq"] * 2 - 1).latent_dist.sample()
        noise = (decoded[0] - z) / z.std((0, 2, 3), keepdim=True)
        shares[strength] = noise.std((1, 2, 3))
    assert shares[0.0].abs().max() < 1e-5
    assert shares[0.3].max() <= 0.31
    assert 0.1 < shares[0.3].mean() < 0.2
    assert shares[0.3].min() < 0.1


def test_decoder_tuning_leaves_encoder_and_latent_statistics_alone(tmp_path) -> None:
    load_vae("tiny").save_pretrained(tmp_path / "old" / "vae")
    stage = TinyAutoencoder(start=str(tmp_path / "old"), decoder_only=True, kl_weight=0.0)
    assert {name.split(".")[0] for name, p in stage.vae.named_parameters() if p.requires_grad} == {
        "decoder",
        "post_quant_conv",
    }
    stage.save_foundation(str(tmp_path / "new"), [{"hq": torch.rand(2, 3, 32, 32)}])
    new = AutoencoderKL.from_pretrained(tmp_path / "new")
    assert new.config.latents_mean == load_vae("tiny").config.latents_mean


@pytest.mark.slow
def test_the_recipe_runs_from_nothing_to_a_foundation_and_skips_what_is_there(tmp_path, monkeypatch) -> None:
    from launch.foundation import run

    monkeypatch.chdir(tmp_path)
    assert run("foundation", ["--output", "out", "--steps", "1"]) == 0
    stages = tmp_path / "out" / "stages"
    before = {file: file.stat().st_mtime_ns for file in stages.rglob("*.safetensors")}
    assert len(before) == 9  # six VAEs, two U-Nets, a text encoder
    assert run("foundation", ["--output", "out", "--steps", "1"]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in stages.rglob("*.safetensors")}
    assert load_unet(str(tmp_path / "out")).config.in_channels == load_vae(str(tmp_path / "out")).config.latent_channels


PSNR_RGB_SHIPPED = 32.47  # dB, measured on the shipped weights; see common/foundation/README.md
