"""Image quality metrics, each with its protocol: native PSNR and SSIM, and all of pyiqa's metrics.

Two tables can only be compared where their protocols are the same text, so each metric carries its own
(`MetricProtocol`), printed and stored with every number. All metrics read images rounded to 8 bits (`to_uint8`), as a
published PNG would be.

The default convention is the one of the field's published tables: BT.601 luma in 16..235, no border cropped. It equals
pyiqa's "psnr" and "ssim" created with `test_y_channel=True, color_space="ycbcr"`. pyiqa's "psnry" and its default
"ssim" use YIQ luma in 0..255 and read lower (about 1.3 dB and 0.03).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.draws import own_random_state
from common.pyiqa import PYIQA, load_pyiqa
from common.rewards import build_reward

Image = NDArray[np.uint8]
"""An RGB image, (H, W, 3), uint8."""

BT601_LUMA = np.array([[65.481, 128.553, 24.966]]) / 255
"""Weights of R, G, B in 0..255 that with an offset of 16 give Y in 16..235 (ITU-R BT.601)."""

PSNR_EPS = 1e-8
"""Added to the mean squared error of images in [0, 1], as pyiqa does: identical images read 80 dB, not infinity."""

_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_SSIM_STRIP = 64  # rows at a time: what fits in the cache takes half the time


@dataclass(frozen=True)
class MetricProtocol:
    """A metric together with everything that decides its number; call it on two images.

    Two protocols are equal when their fields are; the function does not take part.

    Args:
        id: Name in configs and tables, e.g. "psnr_y" or "pyiqa:musiq".
        metric: Name of the quantity, with the options that change it, e.g. "psnr".
        space: Colour space and range the metric reads, e.g. "BT.601 Y (16..235)".
        crop: Pixels cut from each border before measuring.
        rounding: Rounding of the inputs.
        source: "native", or library and version, e.g. "pyiqa 0.1.16".
        lower_better: True if smaller is better.
        needs_hq: True if the metric compares with a reference image; if false, a given reference is ignored.
        function: The computation, from the cropped images to the number.
    """

    id: str
    metric: str
    space: str
    crop: int
    rounding: str
    source: str
    lower_better: bool
    needs_hq: bool
    function: Callable[[Image, Image | None], float] = field(repr=False, compare=False)

    def __call__(self, sr: Image, hq: Image | None = None) -> float:
        """Measure one image.

        Args:
            sr: The image to score, (H, W, 3) uint8 RGB.
            hq: The reference, same size; may be left out where `needs_hq` is false.

        Returns:
            The metric's value.

        Raises:
            ValueError: An image is not (H, W, 3) uint8, the sizes differ, or the reference is missing.
        """
        sr = self._cropped(sr, "sr")
        if not self.needs_hq:
            return self.function(sr, None)
        if hq is None:
            raise ValueError(f"hq is missing: {self.id} compares with a reference image; pass one")
        hq = self._cropped(hq, "hq")
        if sr.shape != hq.shape:
            sizes = " and ".join(f"{name} is {x.shape[1]} x {x.shape[0]} px" for name, x in (("sr", sr), ("hq", hq)))
            after = f" after cropping {self.crop} px" if self.crop else ""
            raise ValueError(f"{self.id}: {sizes} (width x height{after}); give both one size: nothing is resized")
        return self.function(sr, hq)

    def __str__(self) -> str:
        """Return the protocol as one line."""
        return self.describe()

    def describe(self) -> str:
        """Return the protocol as one line, to be printed and stored with each number."""
        crop = f"crop {self.crop} px" if self.crop else "no crop"
        return f"{self.metric} | {self.space} | {crop} | {self.rounding} | {self.source}"

    def _cropped(self, image: Image, name: str) -> Image:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"{name} is {image.dtype} of shape {image.shape}; pass (H, W, 3) uint8 RGB, see to_uint8")
        height, width = image.shape[:2]
        if min(height, width) <= 2 * self.crop:
            raise ValueError(f"{name} is {width} x {height} px, and crop={self.crop} leaves nothing; lower crop")
        return np.ascontiguousarray(image[self.crop : height - self.crop, self.crop : width - self.crop])


def to_uint8(x_01: Tensor) -> Tensor:
    """Round an image to 8 bits: clamp to [0, 1], times 255, to the nearest, halves up.

    Args:
        x_01: RGB image or images, (B, 3, H, W) or (3, H, W), [0, 1], any floating type.

    Returns:
        Same shape and device, uint8 in 0..255.

    Raises:
        ValueError: The shape or type is another one, or a value is not finite.
    """
    if x_01.ndim not in (3, 4) or x_01.shape[-3] != 3 or not x_01.is_floating_point():
        raise ValueError(f"x_01 is {x_01.dtype} of shape {tuple(x_01.shape)}; pass float (B, 3, H, W) or (3, H, W)")
    if not x_01.isfinite().all():
        raise ValueError("x_01 holds values that are not finite; an overflow is likely: use a higher precision")
    return x_01.float().clamp(0, 1).mul(255).add(0.5).floor().to(torch.uint8)


def build_metric(metric_id: str, crop: int = 0, device: str | torch.device = "cpu") -> MetricProtocol:
    """Make a metric from its id.

    Args:
        metric_id: "psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", the weightless rewards "sharpness", "colourfulness"
            and "neutrality" (`common.rewards.weightless`), or "pyiqa:" and a name pyiqa knows.
        crop: Pixels cut from each border before measuring; the default protocol cuts none.
        device: Where pyiqa's networks run; native metrics run on the CPU.

    Returns:
        The metric with its protocol, ready to be called.

    Raises:
        ValueError: The id is unknown or the crop is negative.
        MetricUnavailableError: pyiqa or the metric's weights are not available.
    """
    if crop < 0:
        raise ValueError(f"crop is {crop}; pass the pixels to cut from each border, 0 or more")
    if metric_id.startswith(PYIQA):
        return pyiqa_metric(metric_id.removeprefix(PYIQA), crop, device)
    if metric_id not in _NATIVE:
        known = ", ".join(_NATIVE)
        raise ValueError(f"metric {metric_id!r} is unknown; use one of {known}, or {PYIQA}<name> for one of pyiqa's")
    metric, space, rounding, needs_hq, function = _NATIVE[metric_id]
    return MetricProtocol(metric_id, metric, space, crop, rounding, "native", False, needs_hq, function)


def pyiqa_metric(name: str, crop: int = 0, device: str | torch.device = "cpu") -> MetricProtocol:
    """Make one of pyiqa's metrics; pyiqa is imported here and its weights are loaded (downloaded where absent) here.

    The network stays in evaluation mode, outside any module of the caller's, so no `train()` reaches it. Neither making
    nor calling the metric changes the global random states; a metric's own draws start at seed 0 each time.

    Args:
        name: pyiqa's name, e.g. "musiq", "lpips", "maniqa-pipal".
        crop: Pixels cut from each border before measuring.
        device: Where the network runs.

    Returns:
        The metric; its protocol names pyiqa's version and the options of the metric.

    Raises:
        ValueError: pyiqa has no metric of this name, or the metric scores folders, not images.
        MetricUnavailableError: pyiqa is not installed, or the metric's imports or weights are not available.
    """
    device = torch.device(device)
    model, settings = load_pyiqa(name, device)
    listed = ", ".join(f"{key}={value}" for key, value in settings.items())
    return MetricProtocol(
        id=PYIQA + name,
        metric=f"{name} ({listed})" if listed else name,
        space="RGB in [0, 1]",
        crop=crop,
        rounding="images rounded to 8 bits",
        source=f"pyiqa {importlib.metadata.version('pyiqa')}",
        lower_better=bool(model.lower_better),
        needs_hq=model.metric_mode == "FR",
        function=partial(_run_pyiqa, model, device),
    )


def _run_pyiqa(model: Callable[..., Tensor], device: torch.device, sr: Image, hq: Image | None) -> float:
    images = [torch.from_numpy(x).permute(2, 0, 1)[None].to(device).float() / 255 for x in (sr, hq) if x is not None]
    with own_random_state(device), torch.no_grad():
        return float(model(*images))


def _luma(image: Image) -> NDArray[np.float64]:
    """BT.601 Y in 16..235, (H, W), rounded to 8 bits as pyiqa does before SSIM."""
    return np.rint(cv2.transform(image.astype(np.float64), BT601_LUMA) + 16)


def _psnr_y(sr: Image, hq: Image | None) -> float:
    # Y is affine in RGB, so the difference of the two lumas is the luma of the difference, without the offset of 16
    assert hq is not None
    return _psnr(cv2.transform(cv2.subtract(sr, hq, dtype=cv2.CV_32F), BT601_LUMA))


def _psnr_rgb(sr: Image, hq: Image | None) -> float:
    assert hq is not None
    return _psnr(cv2.subtract(sr, hq, dtype=cv2.CV_32F))


def _psnr(difference: NDArray) -> float:
    """PSNR in dB with a peak of 255, from a difference in 0..255; 80 dB at most, by `PSNR_EPS`."""
    mse = float(np.mean(np.square(difference, dtype=np.float64))) / 255**2
    return float(-10 * np.log10(mse + PSNR_EPS))


def _ssim_y(sr: Image, hq: Image | None) -> float:
    assert hq is not None
    return _ssim(_luma(sr), _luma(hq))


def _ssim_rgb(sr: Image, hq: Image | None) -> float:
    assert hq is not None
    return float(np.mean([_ssim(sr[..., c].astype(np.float64), hq[..., c].astype(np.float64)) for c in range(3)]))


def _ssim(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """SSIM of two planes in 0..255, (H, W), Wang et al. 2004, mean over the windows that lie wholly inside.

    Raises:
        ValueError: The image is smaller than the window.
    """
    height, width = x.shape
    if min(height, width) < _SSIM_WINDOW:
        raise ValueError(f"ssim needs {_SSIM_WINDOW} px per side and the image is {width} x {height} px")
    rows, columns = height - _SSIM_WINDOW + 1, width - _SSIM_WINDOW + 1
    strips = (slice(top, top + _SSIM_STRIP + _SSIM_WINDOW - 1) for top in range(0, rows, _SSIM_STRIP))
    return sum(float(_ssim_map(x[strip], y[strip]).sum()) for strip in strips) / (rows * columns)


def _ssim_map(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """SSIM of each whole window, (H, W) -> (H - 10, W - 10).

    The Gaussian window is separable; the two variances enter only as their sum, so four filters do. Negative
    contrast-structure terms count as zero, as in pyiqa.
    """
    mean_x, mean_y, mean_squares, mean_xy = (_window_mean(plane) for plane in (x, y, x * x + y * y, x * y))
    squares, product = mean_x * mean_x + mean_y * mean_y, mean_x * mean_y
    contrast = (2 * (mean_xy - product) + _SSIM_C2) / (mean_squares - squares + _SSIM_C2)
    luminance = (2 * product + _SSIM_C1) / (squares + _SSIM_C1)
    return luminance * np.maximum(contrast, 0)


def _window_mean(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian-weighted mean over each whole window, (H, W) -> (H - 10, W - 10)."""
    radius = _SSIM_WINDOW // 2
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / _SSIM_SIGMA) ** 2)
    kernel /= kernel.sum()
    return cv2.sepFilter2D(plane, cv2.CV_64F, kernel, kernel)[radius:-radius, radius:-radius]


def _reward(name: str, sr: Image, hq: Image | None) -> float:
    x_01 = torch.from_numpy(sr).permute(2, 0, 1)[None].double() / 255
    return float(build_reward(name)(x_01, [""]))


_EIGHT_BITS = "images rounded to 8 bits"
_NATIVE: dict[str, tuple[str, str, str, bool, Callable[[Image, Image | None], float]]] = {
    "psnr_y": ("psnr", "BT.601 Y (16..235)", _EIGHT_BITS, True, _psnr_y),
    "ssim_y": ("ssim", "BT.601 Y (16..235)", f"{_EIGHT_BITS}, and Y too", True, _ssim_y),
    "psnr_rgb": ("psnr", "RGB (0..255)", _EIGHT_BITS, True, _psnr_rgb),
    "ssim_rgb": ("ssim", "RGB (0..255)", _EIGHT_BITS, True, _ssim_rgb),
    "sharpness": ("sharpness", "BT.601 luma of RGB in [0, 1]", _EIGHT_BITS, False, partial(_reward, "sharpness")),
    "colourfulness": ("colourfulness", "RGB in [0, 1]", _EIGHT_BITS, False, partial(_reward, "colourfulness")),
    "neutrality": ("neutrality", "RGB in [0, 1]", _EIGHT_BITS, False, partial(_reward, "neutrality")),
}
