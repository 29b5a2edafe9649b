"""GAN losses: values by hand, directions, the smoothed optimum, and how positions and levels are joined."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from common.losses.adversarial import discriminator_loss, generator_loss

_KINDS = ("bce", "bce_smooth", "hinge")


def _logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestValues:
    @pytest.mark.parametrize(
        ("kind", "generator", "discriminator"),
        [("bce", math.log(2), 2 * math.log(2)), ("bce_smooth", math.log(2), math.log(2)), ("hinge", 0.0, 1.0)],
    )
    def test_at_logits_of_zero(self, kind: str, generator: float, discriminator: float) -> None:
        zero = torch.zeros(2, 1, 4, 4)
        assert_close(generator_loss(kind, zero), torch.full((2,), generator))
        assert_close(discriminator_loss(kind, zero, zero), torch.full((2,), discriminator))

    def test_bce_equals_torchs_cross_entropy(self) -> None:
        real, fake = _logits(3, 1, 4, 4), _logits(3, 1, 4, 4, seed=1)
        ones, zeros = torch.ones_like(real), torch.zeros_like(real)
        bce = F.binary_cross_entropy_with_logits
        assert_close(generator_loss("bce", fake).mean(), bce(fake, ones))
        assert_close(discriminator_loss("bce", real, fake).mean(), bce(real, ones) + bce(fake, zeros))
        assert_close(generator_loss("bce_smooth", fake).mean(), bce(fake, 0.8 * ones))
        smooth = 0.5 * (bce(real, 0.8 * ones) + bce(fake, zeros))
        assert_close(discriminator_loss("bce_smooth", real, fake).mean(), smooth)

    def test_hinge_by_hand(self) -> None:
        real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 1.0]])
        assert_close(generator_loss("hinge", fake), torch.tensor([1.0]))
        # relu(1 - r) is 0 and 0.5, relu(1 + f) is 0 and 2: half of 0.25 + 1.
        assert_close(discriminator_loss("hinge", real, fake), torch.tensor([0.625]))

    def test_smoothed_generator_is_lowest_at_log_4(self) -> None:
        logits = torch.linspace(-4, 4, 8001, dtype=torch.float64)[:, None]
        values = generator_loss("bce_smooth", logits)
        assert_close(logits[values.argmin()].item(), math.log(4), rtol=0, atol=1e-3)
        assert_close(values.min().item(), 0.5004, rtol=0, atol=5e-5)


class TestDirections:
    @pytest.mark.parametrize("kind", ["bce", "hinge"])
    def test_generator_wants_higher_fake_logits(self, kind: str) -> None:
        values = generator_loss(kind, torch.linspace(-6, 6, 25)[:, None])
        assert (values.diff() < 0).all()

    def test_bce_does_not_saturate_where_the_discriminator_is_sure(self) -> None:
        fake = torch.tensor([[-20.0]], requires_grad=True)
        generator_loss("bce", fake).backward()
        assert_close(fake.grad, torch.tensor([[-1.0]]))

    @pytest.mark.parametrize("kind", _KINDS)
    def test_discriminator_wants_higher_real_and_lower_fake_logits(self, kind: str) -> None:
        real, fake = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
        discriminator_loss(kind, real, fake).backward()
        assert real.grad.item() < 0 < fake.grad.item()


class TestReduction:
    @pytest.mark.parametrize("kind", _KINDS)
    def test_positions_are_averaged_per_image(self, kind: str) -> None:
        real, fake = _logits(3, 1, 4, 2), _logits(3, 1, 2, 4, seed=1)
        singles = [discriminator_loss(kind, real[i : i + 1], fake[i : i + 1]) for i in range(3)]
        assert_close(discriminator_loss(kind, real, fake), torch.cat(singles))
        assert_close(
            generator_loss(kind, fake), torch.stack([generator_loss(kind, f.reshape(-1, 1)).mean() for f in fake])
        )

    @pytest.mark.parametrize("kind", _KINDS)
    def test_levels_weigh_the_same_whatever_their_size_and_sum_is_their_number_times_mean(self, kind: str) -> None:
        real, fake = ([_logits(2, 1, side, side, seed=seed + side) for side in (8, 4, 1)] for seed in (0, 10))
        summed = sum(discriminator_loss(kind, r, f) for r, f in zip(real, fake, strict=True))
        assert_close(discriminator_loss(kind, real, fake), summed)
        assert_close(discriminator_loss(kind, real, fake, "mean"), summed / 3)
        summed = sum(generator_loss(kind, f) for f in fake)
        assert_close(generator_loss(kind, fake), summed)
        assert_close(generator_loss(kind, fake, "mean"), summed / 3)

    def test_one_logit_per_image_is_enough(self) -> None:
        assert_close(generator_loss("hinge", torch.tensor([1.0, -2.0])), torch.tensor([-1.0, 2.0]))

    def test_16_bit_logits_give_fp32(self) -> None:
        logits = _logits(2, 1, 4, 4).bfloat16()
        assert generator_loss("bce", logits).dtype == torch.float32
        assert_close(
            discriminator_loss("bce", logits, logits), discriminator_loss("bce", logits.float(), logits.float())
        )


class TestErrors:
    def test_unknown_words_are_named(self) -> None:
        zero = torch.zeros(1, 1)
        with pytest.raises(ValueError, match=r"kind='wgan'.*hinge"):
            generator_loss("wgan", zero)
        with pytest.raises(ValueError, match=r"kind='wgan'.*hinge"):
            discriminator_loss("wgan", zero, zero)
        with pytest.raises(ValueError, match=r"levels='max'.*mean"):
            generator_loss("bce", zero, "max")

    def test_unequal_batches_or_levels_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"\[2\].*\[3\]"):
            discriminator_loss("bce", torch.zeros(2, 1), torch.zeros(3, 1))
        with pytest.raises(ValueError, match=r"\[2, 2\].*\[2\]"):
            discriminator_loss("bce", [torch.zeros(2, 1)] * 2, torch.zeros(2, 1))
        with pytest.raises(ValueError, match="no level"):
            generator_loss("bce", [])
