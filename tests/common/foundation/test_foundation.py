"""The embedded foundation: small enough, loads as Stable Diffusion does, and its recipe runs."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from common.autoencoder import ImageCodec
from common.conditioning.features import DinoFeatures
from common.conditioning.flux_text import encode_flux_prompts
from common.conditioning.text import encode_prompts
from common.denoisers.flux import FluxDenoiser
from common.diffusion import NoiseSchedule, flow_noise
from common.draws import Draws
from common.foundation.autoencoder import TinyAutoencoder, reconstruction_loss
from common.foundation.flow import TinyFlow, mild_edit
from common.foundation.schedule import Anneal, anneal
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


class TestFlow:
    """The recipe of the flow transformer."""

    def test_starts_at_zero_and_is_taught_noise_minus_latent(self) -> None:
        stage, x, prompts = TinyFlow(), torch.rand(2, 3, 32, 32), ["a", "b"]
        z, noise, t = stage.codec.encode(to_pm1(x)), torch.randn(2, 8, 8, 8), torch.tensor([0.3, 0.9])
        start = stage.loss(stage.networks, x, prompts, t, noise, x)
        assert torch.allclose(start, (noise - z).square().mean((1, 2, 3)))
        seen = []
        oracle = {
            "transformer": lambda *given: seen.append(given) or noise - z,
            "text_encoder_2": stage.networks["text_encoder_2"],
        }
        assert stage.loss(oracle, x, prompts, t, noise, x).abs().max() == 0
        z_t, times, text, z_ref = seen[0]
        assert torch.allclose(z_t[1], 0.1 * z[1] + 0.9 * noise[1], atol=1e-6)
        assert torch.equal(times, t)
        assert torch.equal(z_ref, z)
        assert (text.tokens.shape, text.pooled.shape) == ((2, 32, 32), (2, 32))

    @pytest.mark.parametrize("quartered", [False, True])
    def test_a_step_sees_the_crops_or_their_quarters_each_with_draws_of_its_own(self, quartered: bool) -> None:
        stage = TinyFlow(quartered=float(quartered), with_reference=0.0, condition_dropout=0.0)
        stage.log = lambda *args, **kwargs: None
        seen = []
        stage.loss = lambda *given: seen.append(given) or torch.zeros(1)
        x = torch.rand(2, 3, 64, 64)
        stage.training_step({"hq": x, "prompt": ["a", "b"], "index": torch.tensor([6, 7])}, 0)
        _, crops, prompts, t, noise, x_ref = seen[0]
        assert x_ref is None
        if quartered:
            for row, column, place in ((0, 0, 0), (0, 32, 2), (32, 0, 4), (32, 32, 6)):
                assert torch.equal(crops[place : place + 2], x[..., row : row + 32, column : column + 32])
            assert prompts == ["a", "b"] * 4
        else:
            assert torch.equal(crops, x)
            assert prompts == ["a", "b"]
        assert len(t.unique()) == len(noise.flatten(1).unique(dim=0)) == len(crops)

    def test_a_reference_is_the_photo_a_blur_of_it_or_a_change_of_its_colours(self) -> None:
        x = 0.2 + 0.4 * torch.rand(1, 3, 32, 32).repeat(60, 1, 1, 1)
        edited = mild_edit(x, Draws(0, torch.arange(60)))
        same = [torch.equal(a, b) for a, b in zip(edited, x, strict=True)]
        ratio = edited / x
        gain = ratio.flatten(2).std(2).amax(1) < 1e-5
        blur = ~gain & (edited.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().lt(5e-3)
        assert 12 <= sum(same) <= 36
        assert 8 <= blur.sum() <= 28
        assert torch.all(gain | blur)
        assert (edited - x)[blur].flatten(1).std(1).min() > 0.01
        assert 0.7 < ratio[gain].min() < ratio[gain].max() < 1.3
        assert torch.equal(edited[7:9], mild_edit(x[7:9], Draws(0, torch.tensor([7, 8]))))


@pytest.mark.slow
def test_the_recipe_runs_from_nothing_to_a_foundation_and_skips_what_is_there(tmp_path, monkeypatch) -> None:
    from launch.commands.foundation import run

    monkeypatch.chdir(tmp_path)
    assert run("foundation", ["--output", "out", "--steps", "1"]) == 0
    stages = tmp_path / "out" / "stages"
    before = {file: file.stat().st_mtime_ns for file in stages.rglob("*.safetensors")}
    assert len(before) == 12  # six VAEs, two U-Nets, a text encoder, a flow transformer, its T5, a ControlNet
    assert run("foundation", ["--output", "out", "--steps", "1"]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in stages.rglob("*.safetensors")}
    assert load_unet(str(tmp_path / "out")).config.in_channels == load_vae(str(tmp_path / "out")).config.latent_channels


PSNR_RGB_SHIPPED = 32.47  # dB, measured on the shipped weights; see common/foundation/README.md
