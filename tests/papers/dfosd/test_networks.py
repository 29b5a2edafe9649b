"""DFOSD's discriminators: counts, shapes, what they look at, agreement with the untouched U-Net."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from common.adapters import count_lora
from common.loading import architecture_only, load_unet
from common.parameters import count, is_lora
from papers.dfosd.networks import LatentDiscriminator, NoiseAwareDiscriminator, PixelDiscriminator, UNetTrunk


def load(folder: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


def latents(batch: int = 2, side: int = 8) -> torch.Tensor:
    return torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(0))


class TestFullSize:
    """Check 1 and 6 of the spec, on the meta device."""

    def test_sd21_counts_and_its_logits_are_8x8_for_512_px(self) -> None:
        with architecture_only(), torch.device("meta"):
            trunk = UNetTrunk(load_unet("random:sd21"))
            assert count(trunk).total == 351_662_080
            nad = NoiseAwareDiscriminator(load_unet("random:sd21"), 16, 16)
            assert count_lora(nad) == (110, 6_522_432)
            assert count(nad.head) == (656_385, 656_385)
            assert count(nad).trainable == 6_522_432 + 656_385
            logits = nad(torch.randn(3, 4, 64, 64), torch.zeros(3, dtype=torch.long), torch.randn(1, 77, 1024))
        assert logits.shape == (3, 1, 8, 8)

    def test_sdxl_trunk_counts_and_takes_sds_latents(self) -> None:
        with architecture_only(), torch.device("meta"):
            trunk = UNetTrunk(load_unet("random:sdxl"))
            assert count(trunk).total == 1_243_367_040
            assert trunk.is_sdxl
            assert trunk.channels == 1280


class TestTrunk:
    @pytest.mark.parametrize("which", ["sd", "sdxl"])
    def test_it_is_the_unets_first_half(self, which: str, request: pytest.FixtureRequest) -> None:
        unet = load(request.getfixturevalue(which))
        width = unet.config.cross_attention_dim
        trunk = UNetTrunk(copy.deepcopy(unet))
        z, t = latents(), torch.tensor([3, 800])
        prompt = torch.randn(2, 77, width, generator=torch.Generator().manual_seed(1))
        added = {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]] * 2)}
        seen: list[torch.Tensor] = []
        unet.mid_block.register_forward_hook(lambda _module, _args, out: seen.append(out))
        with torch.no_grad():
            unet(z, t, prompt, added_cond_kwargs=added if which == "sdxl" else None)
            features = trunk(z, t, prompt)
        torch.testing.assert_close(features, seen[0], rtol=1e-5, atol=1e-6)

    def test_the_second_half_is_freed(self, sd: str) -> None:
        unet = load(sd)
        before = sum(p.numel() for p in unet.parameters())
        trunk = UNetTrunk(unet)
        assert not any("up_blocks" in name or "conv_out" in name for name, _ in trunk.named_parameters())
        assert sum(p.numel() for p in trunk.parameters()) < 0.7 * before

    def test_one_prompt_serves_the_batch(self, sd: str) -> None:
        trunk = UNetTrunk(load(sd))
        prompt = torch.randn(1, 77, 16)
        t = torch.tensor([5, 5])
        with torch.no_grad():
            one, two = trunk(latents(), t, prompt), trunk(latents(), t, prompt.repeat(2, 1, 1))
        assert torch.equal(one, two)


class TestNoiseAware:
    def test_only_adapters_and_head_learn(self, sd: str) -> None:
        nad = NoiseAwareDiscriminator(load(sd), 4, 4, 8)
        for name, parameter in nad.named_parameters():
            assert parameter.requires_grad == (is_lora(name) or name.startswith("head."))

    def test_the_adapters_scale_is_alpha_over_rank(self, sd: str) -> None:
        nad = NoiseAwareDiscriminator(load(sd), 4, 8, 8)
        assert nad.trunk.unet.conv_in.scaling["default"] == 2.0

    def test_it_starts_as_the_plain_trunk(self, sd: str) -> None:
        nad, trunk = NoiseAwareDiscriminator(load(sd), 4, 4, 8), UNetTrunk(load(sd))
        prompt = torch.zeros(1, 77, 16)
        with torch.no_grad():
            features = [net(latents(), torch.tensor([9, 9]), prompt) for net in (nad.trunk, trunk)]
        torch.testing.assert_close(*features, rtol=1e-5, atol=1e-6)

    def test_logits_change_with_time_latents_and_text(self, sd: str) -> None:
        nad = NoiseAwareDiscriminator(load(sd), 4, 4, 8)
        z, t, prompt = latents(), torch.tensor([100, 100]), torch.zeros(1, 77, 16)
        with torch.no_grad():
            logits = nad(z, t, prompt)
            assert logits.shape == (2, 1, 4, 4)
            later, other, text = nad(z, t + 400, prompt), nad(z.flip(-1), t, prompt), nad(z, t, prompt + 1)
            mixed = nad(z, torch.tensor([100, 500]), prompt)
        for changed in (later, other, text):
            assert not torch.allclose(logits, changed, atol=1e-5)
        torch.testing.assert_close(mixed, torch.cat([logits[:1], later[1:]]), rtol=1e-5, atol=1e-6)  # each its own t

    def test_its_gradient_reaches_the_latents(self, sd: str) -> None:
        nad = NoiseAwareDiscriminator(load(sd), 4, 4, 8).requires_grad_(False)
        z = latents().requires_grad_()
        nad(z, torch.tensor([9, 9]), torch.zeros(1, 77, 16)).sum().backward()
        assert z.grad is not None
        assert z.grad.abs().sum() > 0


class TestOthers:
    def test_the_latent_one_sees_time_and_no_text(self) -> None:
        torch.manual_seed(0)
        net = LatentDiscriminator(4, (8, 16, 16, 16))
        z, t = latents(side=16), torch.tensor([100, 100])
        with torch.no_grad():
            logits = net(z, t, torch.zeros(1, 1, 1))
            assert logits.shape == (2, 1, 2, 2)
            assert torch.equal(logits, net(z, t, torch.ones(1, 1, 1)))
            assert not torch.allclose(logits, net(z, t + 800, torch.zeros(1, 1, 1)), atol=1e-5)
        assert count(net).trainable == count(net).total

    def test_the_pixel_one_is_spectrally_normalised(self) -> None:
        torch.manual_seed(0)
        net = PixelDiscriminator((8, 16, 16, 16))
        x = torch.rand(2, 3, 64, 64) * 2 - 1
        with torch.no_grad():
            for _ in range(100):
                logits = net(x)
        assert logits.shape == (2, 1, 4, 4)
        convs = [layer for layer in net.levels if isinstance(layer, torch.nn.Conv2d)][:-1]
        assert len(convs) == 4
        for conv in convs:
            assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)
