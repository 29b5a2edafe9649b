"""The steps between the ranges and sizes that images have on their way through a method."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def to_pm1(x_01: Tensor) -> Tensor:
    """[0, 1] to the [-1, 1] that the networks see."""
    return x_01 * 2 - 1


def to_01(x_pm1: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], without a clamp: a clamp before a loss kills the gradient outside the range."""
    return x_pm1 * 0.5 + 0.5


def bicubic_upsample(x_01: Tensor, scale: int) -> Tensor:
    """Enlarge images bicubically and clamp the overshoot.

    Args:
        x_01: (B, 3, h, w), [0, 1].
        scale: Factor.

    Returns:
        (B, 3, scale * h, scale * w), [0, 1].
    """
    return F.interpolate(x_01, scale_factor=scale, mode="bicubic", align_corners=False).clamp(0, 1)
