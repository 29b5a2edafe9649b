import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from common.metrics import build_metric
from launch.baselines import (
    SIGMAS,
    bicubic,
    blur_names,
    blurred,
    choose_sigmas,
    pixels,
    rounded,
)


def _smooth(seed, size=64, sigma=6.0):
    """A smooth image in [0, 1], (3, size, size), whose spectrum has nothing at the Nyquist limit."""
    noise = np.random.default_rng(seed).standard_normal((3, size, size))
    image = gaussian_filter(noise, (0, sigma, sigma), mode="mirror")
    image = (image - image.min()) / (image.max() - image.min())
    return torch.from_numpy(image).float()


def _sample(seed, noise, name="x", size=64, sigma=6.0):
    hq = _smooth(seed, size, sigma)
    generator = torch.Generator().manual_seed(seed)
    lq = F.avg_pool2d(hq[None], 4)[0] + noise * torch.randn(3, size // 4, size // 4, generator=generator)
    return {"lq": (lq.clamp(0, 1) * 255).round().byte(), "hq": (hq * 255).round().byte(), "name": name}


def test_bicubic_of_a_constant_image_is_that_constant():
    sample = {"lq": torch.full((3, 8, 8), 51, dtype=torch.uint8), "hq": torch.zeros(3, 32, 32, dtype=torch.uint8)}
    image = bicubic(sample)
    assert image.shape == (32, 32, 3)
    np.testing.assert_allclose(image, 0.2, atol=1e-6)


def test_blur_agrees_with_scipys_gaussian():
    image = np.random.default_rng(0).random((40, 36, 3)).astype(np.float32)
    for sigma in (0.5, 1.25, 3.0):
        expected = gaussian_filter(image.astype(np.float64), (sigma, sigma, 0), mode="mirror", truncate=4.0)
        np.testing.assert_allclose(blurred(image, sigma), expected, atol=2e-4)


def test_rounding_is_to_the_nearest_grey_level():
    image = np.array([0.0, 0.5 / 255 + 1e-6, 127.4 / 255, 1.2, -0.3, 1.0], dtype=np.float32).reshape(1, 2, 3)
    assert rounded(image).ravel().tolist() == [0, 1, 127, 255, 0, 255]


def _made_by(sigma, seed):
    """A sample whose reference is its own bicubic enlargement, blurred."""
    lq = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    made = bicubic({"lq": lq, "hq": torch.zeros(3, 64, 64)})
    hq = torch.from_numpy(rounded(made if sigma is None else blurred(made, sigma))).permute(2, 0, 1)
    return {"lq": lq, "hq": hq, "name": str(seed)}


def test_where_bicubic_is_right_the_narrowest_blur_is_chosen():
    samples = [_made_by(None, seed) for seed in range(2)]
    assert choose_sigmas(samples, (0.5, 1.5, 3.0, 5.0)) == {"psnr_y": 0.5, "ssim_y": 0.5}


def test_the_width_that_made_the_reference_is_the_one_chosen():
    samples = [_made_by(2.25, seed) for seed in range(3)]
    assert choose_sigmas(samples) == {"psnr_y": 2.25, "ssim_y": 2.25}


def test_more_noise_asks_for_more_blur():
    little = choose_sigmas([_sample(seed, 0.02) for seed in range(2)])
    much = choose_sigmas([_sample(seed, 0.15) for seed in range(2)])
    assert much["psnr_y"] > little["psnr_y"]
    assert much["ssim_y"] > little["ssim_y"]


def test_each_metric_chooses_its_own_width_by_the_mean_over_all_samples():
    samples = [_sample(seed, noise, sigma=3.0) for seed, noise in enumerate((0.02, 0.2, 0.08))]
    tried = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    for name, chosen in choose_sigmas(iter(samples), tried).items():
        metric = build_metric(name)
        means = [np.mean([metric(rounded(blurred(bicubic(s), g)), pixels(s["hq"])) for s in samples]) for g in tried]
        assert chosen == tried[int(np.argmax(means))]


def test_no_samples_are_an_error_that_says_so():
    with pytest.raises(ValueError, match="samples is empty"):
        choose_sigmas([])


def test_the_grid_of_widths_is_half_a_pixel_to_five():
    assert SIGMAS[0] == 0.5
    assert SIGMAS[-1] == 5.0
    assert set(np.diff(SIGMAS)) == {0.25}


def test_the_rows_are_named_by_what_chose_them_and_their_width():
    assert blur_names({"psnr_y": 1.5, "ssim_y": 2.0}) == {
        "bicubic + blur (best PSNR-Y, sigma 1.5)": 1.5,
        "bicubic + blur (best SSIM-Y, sigma 2)": 2.0,
    }
