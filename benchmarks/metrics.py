"""Time PSNR and SSIM on Y for one 512 x 512 image, one thread, against pyiqa and a plain torch convolution.

Run `python benchmarks/metrics.py`. All contenders run in this process on the same pair of images, in turns, so a slow
moment of the machine hits them alike. Pyiqa takes part if it is installed (`pip install 'isr-papers[metrics]'`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from common.metrics import Image, build_metric

SIDE, ROUNDS = 512, 15


def torch_ssim(sr: Image, hq: Image) -> float:
    """SSIM on Y as most repositories write it: five 11 x 11 convolutions in float64."""
    offset = torch.arange(-5, 6, dtype=torch.float64)
    kernel = torch.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    kernel = (kernel / kernel.sum())[None, None]
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64) / 255
    x, y = ((torch.from_numpy(image).double() @ weights + 16).round()[None, None] for image in (sr, hq))
    mean_x, mean_y, xx, yy, xy = (F.conv2d(plane, kernel) for plane in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    contrast = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float((luminance * contrast.relu()).mean())


def pyiqa_on_luma(name: str) -> Callable[[Image, Image], float]:
    """Make pyiqa's metric with the arguments of the published tables, fed as ours is: two 8-bit arrays."""
    import pyiqa

    metric = pyiqa.create_metric(name, test_y_channel=True, color_space="ycbcr", device="cpu")

    def measure(sr: Image, hq: Image) -> float:
        x, y = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in (sr, hq))
        return float(metric(x, y))

    return measure


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    hq = cv2.GaussianBlur(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8), (0, 0), 2)
    sr = np.clip(hq + rng.normal(0, 6, hq.shape), 0, 255).astype(np.uint8)
    contenders: dict[str, Callable[[Image, Image], float]] = {
        "psnr_y": build_metric("psnr_y"),
        "ssim_y": build_metric("ssim_y"),
        "torch float64 2D ssim": torch_ssim,
    }
    if importlib.util.find_spec("pyiqa"):
        contenders |= {"pyiqa psnr": pyiqa_on_luma("psnr"), "pyiqa ssim": pyiqa_on_luma("ssim")}
        print(f"pyiqa {importlib.metadata.version('pyiqa')}, ", end="")
    else:
        print("pyiqa is not installed and takes no part, ", end="")
    print(
        f"torch {torch.__version__}, OpenCV {cv2.__version__}, {SIDE} x {SIDE} px, 1 thread, {ROUNDS} rounds in turns"
    )

    times: dict[str, list[float]] = {name: [] for name in contenders}
    values = {name: function(sr, hq) for name, function in contenders.items()}  # also the warm-up
    for _ in range(ROUNDS):
        for name, function in contenders.items():
            start = time.perf_counter()
            function(sr, hq)
            times[name].append(1e3 * (time.perf_counter() - start))

    medians = {name: statistics.median(measured) for name, measured in times.items()}
    for name, measured in times.items():
        ours = "psnr_y" if "psnr" in name else "ssim_y"
        ratio = "" if name == ours else f"   {medians[name] / medians[ours]:6.1f} x {ours}"
        spread = f"({min(measured):.1f}-{max(measured):.1f})"
        print(f"{name:22} {medians[name]:8.2f} ms {spread:16} value {values[name]:.7f}{ratio}")


if __name__ == "__main__":
    main()
