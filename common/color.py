"""Colour fixes: give a super-resolved image back the colours of its low-quality input.

Both functions take the low-quality image already brought to the output's size. None of them clamps: do that once, when
the image is rounded.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANCE_EPS = 1e-5
LEVELS = 5
"""Bands that the wavelet fix keeps."""


def adain(sr: Tensor, reference: Tensor) -> Tensor:
    """Shift and scale each channel to the reference's mean and standard deviation (AdaIN, arXiv:1703.06868, Eq. (8)).

    `VARIANCE_EPS` is added to both variances, so a flat image is not divided by zero.

    Args:
        sr: Images to correct, (B, 3, H, W), [0, 1].
        reference: Images with the wanted colours, same shape and range.

    Returns:
        Corrected images, (B, 3, H, W), about [0, 1], not clamped, in `sr`'s type.

    Raises:
        ValueError: The shapes differ; the message names both.
    """
    _check_shapes(sr, reference)
    x = sr.float()
    mean, std = _statistics(x)
    reference_mean, reference_std = _statistics(reference.float())
    return recolored(x, mean, std, reference_mean, reference_std).to(sr.dtype)


def recolored(x: Tensor, mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor) -> Tensor:
    """Shift and scale images of one mean and standard deviation, each (B, 3, 1, 1), to those of a reference."""
    return (x - mean) / std * reference_std + reference_mean


def wavelet(sr: Tensor, reference: Tensor, levels: int = LEVELS) -> Tensor:
    """Exchange the low frequencies for the reference's, as StableSR (arXiv:2305.07015, Sec. 3.3) does.

    An a-trous decomposition splits an image into `levels` bands and a rest, `low`. The result is the bands of `sr` on
    the rest of the reference. The bands telescope to `sr - low(sr)` and `low` is linear, hence one decomposition:
    `sr - low(sr) + low(reference) = sr + low(reference - sr)`.

    Args:
        sr: Images to correct, (B, 3, H, W), [0, 1].
        reference: Images with the wanted colours, same shape and range.
        levels: Number of bands kept from `sr`, at least 1; the rest has been blurred over about 2^levels pixels.

    Returns:
        Corrected images, (B, 3, H, W), about [0, 1], not clamped, in `sr`'s type.

    Raises:
        ValueError: The shapes differ or `levels` is below 1.
    """
    _check_shapes(sr, reference)
    if levels < 1:
        raise ValueError(f"levels is {levels}; pass 1 or more, or use no colour fix")
    x = sr.float()
    return (x + low_band(reference.float() - x, levels)).to(sr.dtype)


def low_band(x: Tensor, levels: int) -> Tensor:
    """Blur by the 3-tap binomial kernel at dilations 1, 2, 4, .. 2^(levels - 1), edges replicated.

    Args:
        x: (B, C, H, W), floating.
        levels: Number of blurs.

    Returns:
        The rest of the a-trous decomposition after `levels` bands, (B, C, H, W).
    """
    for level in range(levels):
        step = 2**level
        height, width = x.shape[-2:]
        x = F.pad(x, (step, step, 0, 0), mode="replicate")
        x = 0.5 * x[..., step : step + width] + 0.25 * (x[..., :width] + x[..., 2 * step :])
        x = F.pad(x, (0, 0, step, step), mode="replicate")
        x = 0.5 * x[..., step : step + height, :] + 0.25 * (x[..., :height, :] + x[..., 2 * step :, :])
    return x


def color_fix(kind: Literal["adain", "wavelet", "none"], sr_01: Tensor, reference_01: Tensor) -> Tensor:
    """Apply the colour fix of that name.

    Args:
        kind: "adain", "wavelet" or "none".
        sr_01: Images to correct, (B, 3, H, W), [0, 1].
        reference_01: The low-quality images brought to the same size, [0, 1].

    Returns:
        Corrected images, not clamped; with "none", the input tensor itself.

    Raises:
        ValueError: The kind is unknown or the shapes differ.
    """
    if kind == "adain":
        return adain(sr_01, reference_01)
    if kind == "wavelet":
        return wavelet(sr_01, reference_01)
    if kind == "none":
        return sr_01
    raise ValueError(f"colour fix {kind!r} is unknown; use adain, wavelet or none")


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)  # each (B, 3, 1, 1)
    return mean, (variance + VARIANCE_EPS).sqrt()


def _check_shapes(sr: Tensor, reference: Tensor) -> None:
    if sr.ndim != 4 or sr.shape != reference.shape:
        shapes = f"sr is {tuple(sr.shape)} and reference is {tuple(reference.shape)}"
        raise ValueError(f"{shapes}; pass two (B, 3, H, W) of one shape (resize the reference to the output first)")
