"""The recipe of the embedded flow transformer."""

import pytest
import torch

from common.draws import Draws
from common.foundation.flow import TinyFlow, mild_edit
from common.images import to_pm1


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
