"""Baselines without a network: bicubic enlargement, and bicubic enlargement blurred afterwards.

The blur is there for fairness: on noisy inputs a plain Gaussian blur takes most of the SSIM that a method gains over
bicubic. A method that is not above the blur has learnt to remove noise, not to restore detail. The blur's width is
chosen on the validation images, as a method's settings are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from common.images import bicubic_upsample
from common.metrics import build_metric, to_uint8
from data.decoding import Pixels

PairedSample = Mapping[str, Any]
"""`lq` (3,h,w) and `hq` (3,s*h,s*w), uint8 tensors; `name`: str."""

SIGMAS = tuple(0.5 + 0.25 * i for i in range(19))
"""Blur widths tried, HQ px: 0.5 to 5."""

CHOSEN_FOR = {"psnr_y": "best PSNR-Y", "ssim_y": "best SSIM-Y"}
"""Metric that chooses a blur's width -> its name in the label of the row."""


def bicubic(sample: PairedSample) -> NDArray[np.float32]:
    """Enlarge a sample's low-quality image to its reference's size: (H, W, 3), [0, 1], not rounded."""
    scale = sample["hq"].shape[-1] // sample["lq"].shape[-1]
    return bicubic_upsample(sample["lq"][None].float() / 255, scale)[0].permute(1, 2, 0).numpy()


def blurred(image: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Blur an image (H, W, 3) by a Gaussian of this width in px; borders are mirrored."""
    return cv2.GaussianBlur(np.ascontiguousarray(image), (0, 0), sigma)


def rounded(image: NDArray[np.float32]) -> Pixels:
    """Round [0, 1] to 8 bits by the rule of all methods, `common.metrics.to_uint8`."""
    return to_uint8(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()


def pixels(image: torch.Tensor) -> Pixels:
    """Turn a uint8 tensor (3, H, W) into an array (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def choose_sigmas(samples: Iterable[PairedSample], sigmas: Sequence[float] = SIGMAS) -> dict[str, float]:
    """Find the blur widths that are best on average.

    Args:
        samples: Validation images with references.
        sigmas: Widths to try, px.

    Returns:
        Metric of `CHOSEN_FOR` -> the width with the highest mean; the smaller one of two equals.

    Raises:
        ValueError: There is no sample.
    """
    metrics = {metric: build_metric(metric) for metric in CHOSEN_FOR}
    totals = {metric: np.zeros(len(sigmas)) for metric in metrics}
    count = 0
    for sample in samples:
        count += 1
        image, hq = bicubic(sample), pixels(sample["hq"])
        for place, sigma in enumerate(sigmas):
            sr = rounded(blurred(image, sigma))
            for name, metric in metrics.items():
                totals[name][place] += metric(sr, hq)
    if not count:
        raise ValueError("samples is empty, so no blur can be chosen; give validation images")
    return {name: float(sigmas[int(total.argmax())]) for name, total in totals.items()}


def blur_names(sigmas: Mapping[str, float]) -> dict[str, float]:
    """Name the blurs' rows, in the tables' order.

    Args:
        sigmas: Metric -> width, from `choose_sigmas`.

    Returns:
        Name -> width.
    """
    return {f"bicubic + blur ({CHOSEN_FOR[metric]}, sigma {sigma:g})": sigma for metric, sigma in sigmas.items()}
