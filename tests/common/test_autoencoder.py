"""The codec: scaling there and back, determinism, and where gradients go."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.testing import assert_close

from common.autoencoder import ImageCodec


def make_vae(**config: object) -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**blocks, **config)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 3, 8, 12) * 2 - 1


class TestScaling:
    def test_is_the_factor_times_the_posteriors_mode(self, images: Tensor) -> None:
        vae = make_vae(scaling_factor=0.18215)
        assert_close(ImageCodec(vae).encode(images), 0.18215 * vae.encode(images).latent_dist.mean)

    def test_shift_comes_off_before_the_factor(self, images: Tensor) -> None:
        vae = make_vae(scaling_factor=0.3611, shift_factor=0.1159)
        assert_close(ImageCodec(vae).encode(images), 0.3611 * (vae.encode(images).latent_dist.mean - 0.1159))

    def test_channel_statistics_are_applied_channel_by_channel_and_alone(self, images: Tensor) -> None:
        mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
        vae = make_vae(latents_mean=mean, latents_std=std, scaling_factor=0.18215)
        raw = vae.encode(images).latent_dist.mean
        z = ImageCodec(vae).encode(images)
        for channel in range(4):
            assert_close(z[:, channel], (raw[:, channel] - mean[channel]) / std[channel])

    @pytest.mark.parametrize(
        "config",
        [
            {"scaling_factor": 0.18215},
            {"scaling_factor": 0.3611, "shift_factor": 0.1159},
            {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 4.0]},
        ],
    )
    def test_decoding_undoes_it(self, images: Tensor, config: dict[str, object]) -> None:
        vae = make_vae(**config)
        codec = ImageCodec(vae)
        expected = vae.decode(vae.encode(images).latent_dist.mean).sample
        assert_close(codec.decode(codec.encode(images)), expected, rtol=1e-5, atol=1e-5)

    def test_half_given_statistics_are_refused(self) -> None:
        with pytest.raises(ValueError, match="both of latents_mean and latents_std"):
            ImageCodec(make_vae(latents_mean=[0.0] * 4))

    def test_statistics_of_another_number_of_channels_are_refused(self) -> None:
        with pytest.raises(ValueError, match="latents_std has 3 values for 4 channels"):
            ImageCodec(make_vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 3))


class TestEncode:
    def test_the_mode_is_deterministic_and_a_sample_is_not(self, images: Tensor) -> None:
        codec = ImageCodec(make_vae())
        assert torch.equal(codec.encode(images), codec.encode(images))
        assert not torch.equal(codec.encode(images, sample=True), codec.encode(images, sample=True))

    def test_a_given_noise_scales_with_the_posteriors_deviation(self, images: Tensor) -> None:
        vae = make_vae(scaling_factor=2.0)
        codec = ImageCodec(vae)
        noise = torch.randn(2, 4, 4, 6)
        posterior = vae.encode(images).latent_dist
        expected = 2 * (posterior.mean + posterior.std * noise)
        assert_close(codec.encode(images, sample=True, noise=noise), expected)

    def test_noise_without_sampling_is_refused(self, images: Tensor) -> None:
        with pytest.raises(ValueError, match="sample=True"):
            ImageCodec(make_vae()).encode(images, noise=torch.zeros(2, 4, 4, 6))

    def test_a_size_it_would_floor_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"7x12.*multiples of 2"):
            ImageCodec(make_vae()).encode(torch.zeros(1, 3, 7, 12))

    def test_shapes_follow_the_config(self, images: Tensor) -> None:
        codec = ImageCodec(make_vae())
        assert (codec.downscale, codec.latent_channels) == (2, 4)
        assert codec.encode(images).shape == (2, 4, 4, 6)
        assert codec.decode(torch.zeros(2, 4, 4, 6)).shape == images.shape


class TestGradients:
    def test_pass_through_the_frozen_decoder_to_the_latent(self) -> None:
        codec = ImageCodec(make_vae())
        z = torch.randn(1, 4, 4, 4, requires_grad=True)
        codec.decode(z).square().mean().backward()
        assert z.grad is not None
        assert (z.grad != 0).all()
        assert all(p.grad is None and not p.requires_grad for p in codec.parameters())

    def test_pass_through_the_frozen_encoder_to_the_image(self, images: Tensor) -> None:
        codec = ImageCodec(make_vae())
        codec.encode(images.requires_grad_()).square().mean().backward()
        assert images.grad is not None
        assert images.grad.abs().sum() > 0

    def test_agree_with_a_finite_difference(self) -> None:
        codec = ImageCodec(make_vae().double())
        torch.manual_seed(2)
        z, step = torch.randn(1, 4, 2, 2, dtype=torch.float64), torch.randn(1, 4, 2, 2, dtype=torch.float64)
        z.requires_grad_()
        codec.decode(z).square().mean().backward()
        with torch.no_grad():
            ahead, behind = (codec.decode(z + h * step).square().mean() for h in (1e-5, -1e-5))
        assert_close((z.grad * step).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)

    def test_an_unclamped_decoder_keeps_them_outside_the_range(self) -> None:
        codec = ImageCodec(make_vae(scaling_factor=1e-3))
        z = torch.randn(1, 4, 4, 4, requires_grad=True)
        with torch.no_grad():
            codec.vae.decoder.conv_out.bias.fill_(3.0)
        x = codec.decode(z)
        assert x.max() > 1
        x.mean().backward()
        assert z.grad.abs().sum() > 0

    def test_checkpointing_runs_blocks_twice_and_changes_no_gradient(self) -> None:
        runs, grads = [], []
        for checkpointing in (False, True):
            codec = ImageCodec(make_vae(), gradient_checkpointing=checkpointing)
            calls: list[int] = []
            codec.vae.decoder.mid_block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            z = torch.linspace(-1, 1, 64).view(1, 4, 4, 4).requires_grad_()
            codec.decode(z).square().mean().backward()
            runs.append(len(calls))
            grads.append(z.grad)
        assert runs == [1, 2]
        assert_close(grads[0], grads[1])


class TestPrecision:
    def test_a_float32_vae_ignores_the_autocast_around_it(self, images: Tensor) -> None:
        codec = ImageCodec(make_vae())
        with torch.no_grad():
            z = codec.encode(images)
            x = codec.decode(z)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z_autocast, x_autocast = codec.encode(images), codec.decode(z.bfloat16().float())
                assert torch.is_autocast_enabled("cpu")
        assert z_autocast.dtype == x_autocast.dtype == torch.float32
        assert torch.equal(z, z_autocast)
        assert torch.equal(codec.decode(z.bfloat16()), x_autocast)
        assert x.shape == x_autocast.shape

    def test_a_bfloat16_vae_takes_float32_images(self, images: Tensor) -> None:
        codec = ImageCodec(make_vae().bfloat16())
        assert codec.encode(images).dtype == torch.bfloat16
        assert codec.decode(torch.zeros(1, 4, 2, 2)).dtype == torch.bfloat16

    def test_works_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            codec = ImageCodec(make_vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4))
        z = codec.encode(torch.zeros(1, 3, 8, 8, device="meta"))
        assert z.shape == (1, 4, 4, 4)
        assert codec.decode(z).is_meta
