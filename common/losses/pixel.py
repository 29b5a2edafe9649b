"""Per-image distances of pixels."""

import torch
from torch import Tensor

from common.losses.checks import check_pair


def mse(x_01: Tensor, y_01: Tensor) -> Tensor:
    """Mean squared error per image; only `x_01` gets a gradient.

    Args:
        x_01: Images, (B, 3, H, W), [0, 1]; nothing is clamped. On [-1, 1] images the value is four times as large.
        y_01: Targets, same shape and range.

    Returns:
        Mean over channels and pixels, (B,), fp32.

    Raises:
        ValueError: The shapes differ or are not (B, 3, H, W), or in debug mode the range is wrong.
    """
    return _difference(x_01, y_01).square().mean((1, 2, 3))


def l1(x_01: Tensor, y_01: Tensor) -> Tensor:
    """Mean absolute error per image; arguments, result and errors as for `mse`."""
    return _difference(x_01, y_01).abs().mean((1, 2, 3))


def _difference(x_01: Tensor, y_01: Tensor) -> Tensor:
    check_pair(x_01, y_01)
    dtype = torch.promote_types(x_01.dtype, torch.float32)
    return x_01.to(dtype) - y_01.detach().to(dtype)
