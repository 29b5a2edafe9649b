"""AdaIN gives the reference's statistics; the wavelet fix keeps the fine bands and takes the reference's rest."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from common.color import adain, color_fix, low_band, wavelet


def images(height: int = 48, width: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An output with a cast and a reference, (2, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.rand(2, 3, height, width, generator=generator) * 0.6 + 0.2
    sr = 0.5 * torch.rand(2, 3, height, width, generator=generator) + torch.tensor([0.3, 0.1, 0.0]).view(1, 3, 1, 1)
    return sr, reference


def plain_low(x: np.ndarray, levels: int) -> np.ndarray:
    """One plane, two-dimensional 3 x 3 kernel, pixel by pixel with clamped coordinates, float64."""
    kernel = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    for level in range(levels):
        step = 2**level
        rows, columns = np.arange(x.shape[0]), np.arange(x.shape[1])
        blurred = np.zeros_like(x)
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                y_at = np.clip(rows + i * step, 0, x.shape[0] - 1)
                x_at = np.clip(columns + j * step, 0, x.shape[1] - 1)
                blurred += kernel[i + 1, j + 1] * x[np.ix_(y_at, x_at)]
        x = blurred
    return x


def plain_wavelet(sr: np.ndarray, reference: np.ndarray, levels: int) -> np.ndarray:
    """Band by band: the bands of sr, one after the other, on the rest of the reference."""
    bands, rest = np.zeros_like(sr), sr
    for level in range(levels):
        coarser = plain_low(sr, level + 1)
        bands += rest - coarser
        rest = coarser
    return bands + plain_low(reference, levels)


class TestAdain:
    def test_output_has_the_statistics_of_the_reference(self):
        sr, reference = images()
        fixed = adain(sr, reference)
        assert_close(fixed.mean((2, 3)), reference.mean((2, 3)), atol=1e-5, rtol=0)
        assert_close(fixed.std((2, 3)), reference.std((2, 3)), atol=1e-3, rtol=0)

    def test_equals_eq_8_in_float64(self):
        sr, reference = images()
        x, y = sr.double(), reference.double()
        mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        scale = ((y.var((2, 3), correction=0, keepdim=True) + 1e-5) / (variance + 1e-5)).sqrt()
        expected = (x - mean) * scale + y.mean((2, 3), keepdim=True)
        assert_close(adain(sr, reference).double(), expected, atol=1e-6, rtol=0)

    def test_undoes_a_gain_and_a_cast_per_channel_and_image(self):
        _, reference = images()
        gain = torch.tensor([0.7, 1.2, 0.9, 1.1, 0.8, 1.3]).view(2, 3, 1, 1)
        assert_close(adain(reference * gain + 0.1, reference), reference, atol=2e-4, rtol=0)

    def test_a_second_pass_changes_nothing(self):
        sr, reference = images()
        once = adain(sr, reference)
        assert_close(adain(once, reference), once, atol=1e-4, rtol=0)

    def test_an_image_already_right_is_left_alone(self):
        _, reference = images()
        assert_close(adain(reference, reference), reference, atol=1e-6, rtol=0)

    def test_a_flat_image_takes_the_mean_and_stays_finite(self):
        _, reference = images()
        fixed = adain(torch.full_like(reference, 0.4), reference)
        assert_close(fixed, reference.mean((2, 3), keepdim=True).expand_as(fixed), atol=1e-4, rtol=0)
        assert adain(torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)).abs().max() == 0


class TestWavelet:
    @pytest.mark.parametrize("levels", [1, 3, 5])
    def test_equals_the_band_by_band_definition_in_float64(self, levels):
        sr, reference = images()
        fixed = wavelet(sr, reference, levels)
        expected = plain_wavelet(sr[1, 2].double().numpy(), reference[1, 2].double().numpy(), levels)
        assert_close(fixed[1, 2].double(), torch.from_numpy(expected), atol=1e-6, rtol=0)

    def test_fine_bands_are_those_of_sr_and_the_rest_is_that_of_the_reference(self):
        sr, reference = (x.double() for x in images())
        fixed = wavelet(sr.float(), reference.float()).double()
        assert_close(fixed - low_band(reference, 5), sr - low_band(sr, 5), atol=1e-6, rtol=0)
        # the blur is no projection, so the result's own low band is close to the reference's, not equal to it
        before = (low_band(sr, 5) - low_band(reference, 5)).abs().mean()
        after = (low_band(fixed, 5) - low_band(reference, 5)).abs().mean()
        assert after < 0.05 * before

    def test_a_constant_cast_is_removed_whole(self):
        _, reference = images()
        cast = torch.tensor([0.2, -0.1, 0.05]).view(1, 3, 1, 1)
        assert_close(wavelet(reference + cast, reference), reference, atol=1e-6, rtol=0)

    def test_a_linear_shading_is_removed_away_from_the_border(self):
        # a symmetric kernel leaves a ramp as it is; the blur reaches 1 + 2 + 4 + 8 + 16 = 31 pixels
        _, reference = images(80, 80)
        shading = torch.linspace(-0.2, 0.2, 80).view(1, 1, 1, 80)
        fixed = wavelet(reference + shading, reference)
        assert_close(fixed[..., 31:-31], reference[..., 31:-31], atol=1e-6, rtol=0)
        assert (fixed - reference)[..., 0].abs().min() > 1e-3

    def test_detail_that_the_reference_lacks_stays(self):
        checkerboard = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 - 0.5).expand(1, 3, 64, 64) * 0.2
        flat = torch.full((1, 3, 64, 64), 0.5)
        fixed = wavelet(checkerboard + 0.7, flat)
        assert_close(fixed[..., 31:-31, 31:-31], (checkerboard + flat)[..., 31:-31, 31:-31], atol=1e-6, rtol=0)

    def test_works_on_images_smaller_than_the_blur(self):
        assert_close(
            wavelet(torch.full((1, 3, 1, 2), 0.3), torch.full((1, 3, 1, 2), 0.6)), torch.full((1, 3, 1, 2), 0.6)
        )

    def test_refuses_no_levels(self):
        sr, reference = images()
        with pytest.raises(ValueError, match="levels is 0"):
            wavelet(sr, reference, levels=0)


class TestColorFix:
    def test_none_hands_back_the_same_tensor(self):
        sr, reference = images()
        assert color_fix("none", sr, reference) is sr

    def test_names_lead_to_the_functions(self):
        sr, reference = images()
        assert torch.equal(color_fix("adain", sr, reference), adain(sr, reference))
        assert torch.equal(color_fix("wavelet", sr, reference), wavelet(sr, reference))

    def test_an_unknown_kind_lists_the_known_ones(self):
        with pytest.raises(ValueError, match="'ycbcr' is unknown; use adain, wavelet or none"):
            color_fix("ycbcr", *images())

    @pytest.mark.parametrize("kind", ["adain", "wavelet"])
    def test_names_both_shapes_when_they_differ(self, kind):
        sr, reference = images()
        with pytest.raises(ValueError, match=r"sr is \(2, 3, 48, 40\) and reference is \(2, 3, 12, 10\)"):
            color_fix(kind, sr, reference[..., ::4, ::4])

    @pytest.mark.parametrize("kind", ["adain", "wavelet"])
    def test_half_precision_is_computed_in_float32_and_comes_back_as_it_was(self, kind):
        sr, reference = (x.bfloat16() for x in images())
        fixed = color_fix(kind, sr, reference)
        assert fixed.dtype == torch.bfloat16
        assert torch.equal(fixed, color_fix(kind, sr.float(), reference.float()).bfloat16())

    @pytest.mark.parametrize("kind", ["adain", "wavelet"])
    def test_images_of_a_batch_do_not_see_each_other_and_nothing_is_clamped(self, kind):
        sr, reference = images()
        both = color_fix(kind, sr, reference)
        assert_close(both[1:], color_fix(kind, sr[1:], reference[1:]))
        assert color_fix(kind, sr, reference + 1).max() > 1.2
