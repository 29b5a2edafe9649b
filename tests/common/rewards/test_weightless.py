"""Sharpness, colourfulness and neutrality against closed forms, and on photos that are blurred and made noisy."""

import math
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from common.rewards import Colourfulness, Neutrality, Sharpness
from data.photos import photo_paths

PHOTOS = {**photo_paths("val"), **photo_paths("test")}


def grey(plane: Tensor) -> Tensor:
    return plane.double().expand(1, 3, *plane.shape)


def score(x: Tensor, **arguments: float) -> float:
    return Sharpness(**arguments)(x, [""] * len(x)).item()


def window(sigma: float) -> Tensor:
    offsets = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1).double()
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    return torch.stack([offsets, weights / weights.sum()])


class TestSharpness:
    @pytest.mark.parametrize("sigma", [1.0, 2.0])
    @pytest.mark.parametrize(("slope_x", "slope_y"), [(0.01, 0.0), (0.0, 0.01), (0.006, -0.003), (0.002, 0.0)])
    def test_of_a_ramp_is_one_over_one_plus_the_windows_variance(
        self, sigma: float, slope_x: float, slope_y: float
    ) -> None:
        i, j = torch.meshgrid(torch.arange(40), torch.arange(50), indexing="ij")
        offsets, weights = window(sigma)
        variance = (weights * offsets**2).sum().item()
        found = score(grey(0.3 + slope_x * j + slope_y * i), sigma=sigma, floor=1e-14)
        assert_close(found, 1 / (1 + variance), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("cycles", [2, 5, 12])
    @pytest.mark.parametrize("across", [0, 1])
    def test_of_a_wave_is_its_central_difference_over_its_variance(self, cycles: int, across: int) -> None:
        """Over whole periods: A = a^2 sin(w)^2 / 2 and V = a^2 (1 - G(w)^2) / 2, G the window's response."""
        frequency = 2 * math.pi * cycles / 48
        j = torch.arange(48 + 14)  # 14: what Scharr's operator and the window of radius 6 take off
        plane = (0.5 + 0.2 * torch.sin(frequency * j.double())).expand(62, 62)
        offsets, weights = window(2.0)
        response = (weights * torch.cos(frequency * offsets)).sum().item()
        slope, spread = math.sin(frequency) ** 2, 1 - response**2
        found = score(grey(plane.T if across else plane), floor=1e-14)
        assert_close(found, slope / (slope + spread), rtol=1e-6, atol=0)

    def test_of_flat_images_is_zero_with_a_finite_gradient(self) -> None:
        for level in (0.0, 0.3, 1.0):
            x = torch.full((1, 3, 32, 32), level, requires_grad=True)
            found = Sharpness()(x, [""])
            found.backward()
            assert 0 <= found.item() < 1e-4
            assert x.grad is not None
            assert x.grad.isfinite().all()

    def test_of_the_finest_stripes_and_checks_is_zero(self) -> None:
        """They are sampling artefacts, and a central difference does not see them."""
        i, j = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
        for plane in (j % 2, (i + j) % 2):
            assert score(grey(plane)) < 1e-6

    def test_does_not_change_with_gain_offset_and_pose(self) -> None:
        x = photo("chelsea")[..., :120, :160]
        expected = score(x, floor=1e-14)
        for same in (0.5 * x + 0.2, 1 - x, x.flip(3), x.flip(2), x.transpose(2, 3)):
            assert_close(score(same, floor=1e-14), expected, rtol=1e-9, atol=0)

    def test_counts_variance_below_the_floor_as_flat(self) -> None:
        x = 0.5 + 1e-5 * (photo("chelsea") - 0.5)
        assert score(x) < 1e-3
        assert score(x, floor=1e-16) > 0.1

    def test_gradient_equals_finite_differences(self) -> None:
        x = torch.rand(1, 3, 10, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.1
        reward = Sharpness(sigma=1.0)
        assert torch.autograd.gradcheck(lambda z: reward(z, [""]), x.requires_grad_())

    def test_refuses_images_smaller_than_its_window(self) -> None:
        assert score(torch.rand(1, 3, 15, 15)) > 0
        with pytest.raises(ValueError, match="x_01 is 20 x 14 px; the sharpness needs 15 x 15 or more"):
            score(torch.rand(1, 3, 14, 20))
        with pytest.raises(ValueError, match=r"sigma=0 and floor=.* must be positive"):
            Sharpness(sigma=0)


def photo(name: str) -> Tensor:
    """The middle of a photo, (1, 3, 256, 256)."""
    image = cv2.cvtColor(cv2.imread(str(PHOTOS[name])), cv2.COLOR_BGR2RGB)
    top, left = ((length - 256) // 2 for length in image.shape[:2])
    image = np.ascontiguousarray(image[top : top + 256, left : left + 256])
    return torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255


def blurred(x: Tensor, sigma: float) -> Tensor:
    image = np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())
    return torch.from_numpy(cv2.GaussianBlur(image, (0, 0), sigma)).permute(2, 0, 1)[None]


def noisy(x: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return (x + sigma / 255 * noise).clamp(0, 1)


@pytest.mark.parametrize("name", PHOTOS)
class TestSharpnessOfPhotos:
    def test_falls_with_every_step_of_blur(self, name: str) -> None:
        x = photo(name)
        found = [score(x), *(score(blurred(x, sigma)) for sigma in (0.5, 1, 2, 4))]
        assert all(sharp > 1.02 * soft for sharp, soft in pairwise(found)), found

    def test_falls_with_every_step_of_noise_sharp_or_blurred(self, name: str) -> None:
        for x in (photo(name), blurred(photo(name), 1), blurred(photo(name), 2)):
            found = [score(x), *(score(noisy(x, sigma)) for sigma in (5, 15, 30))]
            assert found == sorted(found, reverse=True), found

    def test_exceeds_that_of_noise_alone(self, name: str) -> None:
        x = photo(name)
        noise = noisy(torch.full_like(x, 0.5), 30)
        assert score(x) > 1.8 * score(noise)

    def test_rises_along_its_gradient(self, name: str) -> None:
        soft = blurred(photo(name), 1)[..., :160, :160].requires_grad_()
        found = Sharpness()(soft, [""])
        (gradient,) = torch.autograd.grad(found.sum(), soft)
        step = gradient / gradient.square().mean().sqrt() / 255
        assert score(soft.detach() + step) > found.item()


class TestNeutrality:
    def test_of_one_colour_by_hand(self) -> None:
        """Means 0.8, 0.5, 0.2: variance (0.09 + 0 + 0.09) / 3."""
        x = torch.tensor([0.8, 0.5, 0.2]).view(1, 3, 1, 1).expand(1, 3, 5, 4)
        assert_close(Neutrality()(x, [""]).item(), 1 - math.sqrt(0.06))

    def test_places_do_not_matter_and_opposite_colours_make_grey(self) -> None:
        x = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        shuffled = x.flatten(2)[..., torch.randperm(36)].view_as(x)
        assert_close(Neutrality()(x, [""]), Neutrality()(shuffled, [""]))
        assert Neutrality()(torch.cat([x, 1 - x], 3), [""]).item() == pytest.approx(1, abs=1e-9)

    def test_grey_is_the_best_and_its_gradient_is_finite(self) -> None:
        x = torch.full((1, 3, 4, 4), 0.3, dtype=torch.float64, requires_grad=True)
        score = Neutrality()(x, [""])
        assert score.item() == 1
        (grad,) = torch.autograd.grad(score.sum(), x)
        assert torch.equal(grad, torch.zeros_like(x))

    def test_its_gradient_takes_a_cast_away(self) -> None:
        x = torch.full((1, 3, 4, 4), 0.3, dtype=torch.float64)
        x[:, 0] = 0.6
        (grad,) = torch.autograd.grad(Neutrality()(x.requires_grad_(), [""]).sum(), x)
        assert grad[:, 0].max() < 0 < grad[:, 1:].min()


class TestColourfulness:
    def test_of_two_flat_halves_is_hasler_and_suesstrunks_by_hand(self) -> None:
        """Red and blue: rg = 1, 0 and yb = 1/2, -1; std 1/2, 3/4; means 1/2, -1/4."""
        x = torch.zeros(1, 3, 4, 6)
        x[:, 0, :, :3] = 1
        x[:, 2, :, 3:] = 1
        expected = math.hypot(1 / 2, 3 / 4) + 0.3 * math.hypot(1 / 2, 1 / 4)
        assert_close(Colourfulness()(x, [""]).item(), expected)

    def test_of_one_colour_is_the_strength_of_its_opponents(self) -> None:
        x = torch.tensor([0.8, 0.5, 0.1]).view(1, 3, 1, 1).expand(1, 3, 5, 5)
        assert_close(Colourfulness()(x, [""]).item(), 0.3 * math.hypot(0.3, 0.55))

    def test_of_grey_images_is_zero_with_a_finite_gradient(self) -> None:
        x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, 3, 8, 8).clone()
        x.requires_grad_()
        found = Colourfulness()(x, ["", ""])
        found.sum().backward()
        assert_close(found, torch.zeros(2), rtol=0, atol=1e-6)
        assert x.grad is not None
        assert x.grad.isfinite().all()

    def test_scales_with_saturation_and_forgets_brightness_and_place(self) -> None:
        x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5
        grey_level = x.mean(1, keepdim=True)
        full = Colourfulness()(x, [""])
        assert_close(Colourfulness()(grey_level + 0.4 * (x - grey_level), [""]), 0.4 * full)
        assert_close(Colourfulness()(x + 0.3, [""]), full)
        shuffled = x.flatten(2)[..., torch.randperm(64, generator=torch.Generator().manual_seed(2))].view(1, 3, 8, 8)
        assert_close(Colourfulness()(shuffled, [""]), full)

    def test_equals_the_definition_in_numpy_on_a_photo(self) -> None:
        x = photo("coffee")
        red, green, blue = x[0].numpy()
        rg, yb = red - green, 0.5 * (red + green) - blue
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert_close(Colourfulness()(x, [""]).item(), float(expected))
