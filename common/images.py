"""The steps between the ranges and sizes that images have on their way through a method, and out into a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.files import replacing


def to_pm1(x_01: Tensor) -> Tensor:
    """[0, 1] to the [-1, 1] that the networks see."""
    return x_01 * 2 - 1


def to_01(x_pm1: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], without a clamp: a clamp before a loss kills the gradient outside the range."""
    return x_pm1 * 0.5 + 0.5


def as_float(batch: dict[str, Any]) -> dict[str, Any]:
    """Convert a batch's images, in place, from uint8 to float in [0, 1]: they come as bytes to the device."""
    for key in ("lq", "hq"):
        if key in batch and batch[key].dtype == torch.uint8:
            batch[key] = batch[key].float() / 255
    return batch


def bicubic_upsample(x_01: Tensor, scale: int) -> Tensor:
    """Enlarge images bicubically and clamp the overshoot.

    Args:
        x_01: (B, 3, h, w), [0, 1].
        scale: Factor.

    Returns:
        (B, 3, scale * h, scale * w), [0, 1].
    """
    return F.interpolate(x_01, scale_factor=scale, mode="bicubic", align_corners=False).clamp(0, 1)


def write_png(path: str | Path, array: NDArray[np.uint8]) -> None:
    """Write a PNG so that the path holds either the whole file or what was there before, even if the process is killed.

    Args:
        path: Target; missing folders are made.
        array: (H, W, 3) uint8, RGB.

    Raises:
        ValueError: The array is not (H, W, 3) uint8.
        OSError: The disk is full or the folder cannot be written; the message names the file.
    """
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"array: got {array.dtype} {array.shape} for {path}; write_png takes uint8 (H, W, 3)")
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")
