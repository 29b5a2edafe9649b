"""The recipe of the embedded autoencoder."""

import pytest
import torch
from diffusers import AutoencoderKL

from common.foundation.autoencoder import TinyAutoencoder, reconstruction_loss
from common.loading import load_vae
from data.crops import GridCrops


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


def test_latent_noise_is_up_to_its_share_of_each_channels_deviation(monkeypatch) -> None:
    """The decoder's input less the posterior's sample, as a share of the latents' standard deviation; 0 adds none."""
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
