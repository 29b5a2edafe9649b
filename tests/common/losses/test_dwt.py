"""The low bands by hand, in numpy, and against values of pytorch_wavelets; what the loss must not see."""

from typing import Literal

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor
from torch.testing import assert_close

from common.losses.dwt import _NEAR_SYM_B, _QSHIFT_B, dwt_low, dwt_low_loss

_Wavelet = Literal["haar", "dtcwt3"]
_BOTH = pytest.mark.parametrize("wavelet", ["haar", "dtcwt3"])

# Low band of channel 1 of `_integer_pattern`, whole and cropped to 7 x 9, from pytorch_wavelets 1.3.0 in float64:
# DTCWTForward(J=3, biort="near_sym_b", qshift="qshift_b").
_GOLDEN = [
    [2.014784809628, 2.038008042154, 2.018847539841, 2.083795107790],
    [1.908650803754, 1.886404484928, 1.874280608234, 1.933609786121],
    [1.952030804151, 1.866386349838, 1.903643972507, 2.065244347963],
    [2.165482448098, 1.987558023762, 2.074047858512, 2.414581503465],
]
_GOLDEN_ODD = [
    [2.204306658474, 1.988635215367, 2.130734187197, 2.586959285030],
    [1.308164274523, 1.599491299955, 2.259213799851, 2.857501224555],
]


def _images(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


def _integer_pattern() -> Tensor:
    c, i, j = torch.meshgrid(torch.arange(3), torch.arange(16), torch.arange(12), indexing="ij")
    return ((7 * i * i + 3 * i * j + 5 * j + 2 * c) % 11)[None].double() / 11


def _blocks_without_mean(*shape: int) -> Tensor:
    """Noise whose every 2x2 block sums to zero."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    blocks = noise.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
    return noise - blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)


class TestHaar:
    def test_hand_values(self) -> None:
        x = torch.tensor([[1.0, 2.0, 5.0, 5.0], [3.0, 4.0, 5.0, 5.0]]).view(1, 1, 2, 4)
        assert_close(dwt_low(x), torch.tensor([5.0, 10.0]).view(1, 1, 1, 2))

    def test_is_half_the_sum_of_each_block(self) -> None:
        x = _images(2, 3, 10, 14)[0].double().numpy()
        expected = (x[..., ::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 2
        assert_close(dwt_low(torch.from_numpy(x)), torch.from_numpy(expected))

    def test_keeps_the_power_of_images_made_of_2x2_blocks(self) -> None:
        x = _images(1, 3, 6, 6)[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert_close(dwt_low(x).square().sum(), x.square().sum())

    def test_odd_sides_are_reflected(self) -> None:
        x = torch.tensor([1.0, 2.0, 4.0, 7.0, 11.0]).expand(1, 1, 2, 5)
        expected = torch.tensor([3.0, 11.0, 18.0]).view(1, 1, 1, 3)  # 1 + 2, 4 + 7, 11 + 7
        assert_close(dwt_low(x), expected)
        assert_close(dwt_low(x.mT), expected.mT)

    def test_loss_does_not_see_patterns_whose_2x2_means_vanish(self) -> None:
        x, y = _images(2, 3, 16, 12)
        pattern = _blocks_without_mean(2, 3, 16, 12)
        assert pattern.abs().mean() > 0.3
        assert_close(dwt_low_loss(x + pattern, y), dwt_low_loss(x, y), rtol=1e-5, atol=0)
        assert dwt_low_loss(x + pattern, x).max() < 1e-6
        assert dwt_low_loss(x + pattern.roll(1, 3), x).min() > 0.1  # the same pattern astride the blocks

    def test_gradient_is_two_over_the_number_of_values(self) -> None:
        x = torch.full((1, 3, 8, 4), 1.3, requires_grad=True)
        dwt_low_loss(x, torch.zeros(1, 3, 8, 4)).sum().backward()
        assert_close(x.grad, torch.full((1, 3, 8, 4), 2 / 96))


class TestDTCWT:
    def test_equals_values_of_pytorch_wavelets(self) -> None:
        x = _integer_pattern()
        for crop, golden in ((x, _GOLDEN), (x[..., :7, :9], _GOLDEN_ODD)):
            expected = torch.tensor(golden, dtype=torch.float64)
            assert_close(dwt_low(crop, "dtcwt3")[0, 1], expected, rtol=0, atol=1e-6)
            assert_close(dwt_low(crop.float(), "dtcwt3")[0, 1].double(), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("shape", [(64, 48), (8, 16)])
    def test_is_filtering_and_decimation_with_mirrored_borders(self, shape: tuple[int, int]) -> None:
        x = _images(2, 3, *shape)[0].double()
        low = x.numpy()
        for axis in (2, 3):
            low = correlate1d(low, _NEAR_SYM_B, axis, mode="reflect")
        spread = np.zeros(27)
        for _ in range(2):
            for axis in (2, 3):
                trees = []
                for taps, start in ((_QSHIFT_B, 1), (_QSHIFT_B[::-1], 2)):
                    spread[::2] = taps
                    filtered = np.moveaxis(correlate1d(low, spread, axis, mode="reflect"), axis, -1)
                    trees.append(filtered[..., start::4])
                both = np.stack(trees, -1).reshape(*trees[0].shape[:-1], -1)
                low = np.moveaxis(both, -1, axis)
        found = dwt_low(x, "dtcwt3")
        assert found.shape == (2, 3, shape[0] // 4, shape[1] // 4)
        assert_close(found, torch.from_numpy(low.copy()))

    def test_filters_are_symmetric_and_orthonormal(self) -> None:
        near_sym, qshift = np.array(_NEAR_SYM_B), np.array(_QSHIFT_B)
        assert np.array_equal(near_sym, near_sym[::-1])
        np.testing.assert_allclose([near_sym.sum(), qshift.sum()], [1, 2**0.5], rtol=1e-12)
        products = [qshift[2 * k :] @ qshift[: 14 - 2 * k] for k in range(7)]
        np.testing.assert_allclose(products, [1, 0, 0, 0, 0, 0, 0], atol=1e-14)

    def test_turned_images_have_turned_bands(self) -> None:
        x = _images(1, 3, 16, 9)[0].double()
        assert_close(dwt_low(x.mT, "dtcwt3"), dwt_low(x, "dtcwt3").mT)

    def test_gradient_is_that_of_a_linear_map(self) -> None:
        x, direction = (image.double() for image in _images(1, 3, 24, 20))
        x.requires_grad_()
        band = dwt_low(x, "dtcwt3")
        (grad,) = torch.autograd.grad(band.square().sum() / 2, x)
        assert_close((grad * direction).sum(), (band * dwt_low(direction, "dtcwt3")).sum().detach())


@_BOTH
class TestBoth:
    @pytest.mark.parametrize("shape", [(16, 24), (7, 9), (2, 2)])
    def test_a_constant_is_multiplied_by_the_gain(self, wavelet: _Wavelet, shape: tuple[int, int]) -> None:
        low = dwt_low(torch.full((1, 3, *shape), 0.3), wavelet)
        gain = {"haar": 2, "dtcwt3": 4}[wavelet]
        assert_close(low, torch.full_like(low, 0.3 * gain))

    def test_loss_of_a_shift_in_brightness_is_the_gain_times_it_per_image(self, wavelet: _Wavelet) -> None:
        y = _images(2, 3, 16, 16)[0]
        x = y + torch.tensor([0.25, -0.5]).view(2, 1, 1, 1)
        gain = {"haar": 2, "dtcwt3": 4}[wavelet]
        assert_close(dwt_low_loss(x, y, wavelet), gain * torch.tensor([0.25, 0.5]))

    def test_loss_is_the_mean_difference_of_the_bands(self, wavelet: _Wavelet) -> None:
        x, y = _images(2, 3, 23, 18)
        expected = (dwt_low(x, wavelet) - dwt_low(y, wavelet)).abs().flatten(1).mean(1)
        assert_close(dwt_low_loss(x, y, wavelet), expected)

    def test_is_zero_at_equality_without_a_gradient(self, wavelet: _Wavelet) -> None:
        x = _images(2, 3, 16, 16)[0].requires_grad_()
        value = dwt_low_loss(x, x.detach().clone(), wavelet)
        value.sum().backward()
        assert torch.equal(value, torch.zeros(2))
        assert torch.equal(x.grad, torch.zeros_like(x))

    def test_gradient_reaches_the_image_also_out_of_range_and_not_the_target(self, wavelet: _Wavelet) -> None:
        x, y = (image.requires_grad_() for image in _images(1, 3, 16, 16))
        dwt_low_loss(x + 1.3, y, wavelet).sum().backward()
        assert x.grad.abs().min() > 0
        assert y.grad is None

    def test_16_bit_images_and_autocast_are_computed_in_fp32(self, wavelet: _Wavelet) -> None:
        x, y = _images(2, 3, 32, 32)
        for images in ((x, y), (x.bfloat16(), y.bfloat16())):
            with torch.autocast("cpu", torch.bfloat16):
                inside, band = dwt_low_loss(*images, wavelet), dwt_low(images[0], wavelet)
            assert inside.dtype == band.dtype == torch.float32
            assert_close(inside, dwt_low_loss(*(image.float() for image in images), wavelet), rtol=1e-6, atol=0)
            assert_close(band, dwt_low(images[0].float(), wavelet), rtol=1e-6, atol=0)

    def test_checks_shapes_always_and_ranges_in_debug_mode(
        self, wavelet: _Wavelet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, y = _images(1, 3, 8, 8)
        x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1
        with pytest.raises(ValueError, match="shape"):
            dwt_low_loss(x, y[:, :, :4], wavelet)
        dwt_low_loss(2 * x - 1, y, wavelet)
        monkeypatch.setenv("ISR_DEBUG", "1")
        dwt_low_loss(x, y, wavelet)
        for pair in ((2 * x - 1, y), (y, 2 * x - 1)):
            with pytest.raises(ValueError, match=r"_01 spans \[-1, 1\]"):
                dwt_low_loss(*pair, wavelet)


def test_an_unknown_wavelet_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"wavelet='db2'.*'haar' or 'dtcwt3'"):
        dwt_low(torch.zeros(1, 3, 8, 8), "db2")  # type: ignore[arg-type]
