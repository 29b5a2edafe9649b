"""The published second-order degradation written out plainly in torch, one image at a time, as a yardstick.

It follows the published code step by step: float images throughout, kernels zero-padded to 21 taps, torch.poisson
with the number of distinct levels counted by torch.unique, F.interpolate, a JPEG on 8x8 matrix products. Nothing is
shared with `data.degradations` but the configuration. Three things are not as published, none of which costs time:
the first resize is given the new size and not the factor (the published way drops a strip at two edges), the JPEG
has the standard's luma table (the published one is transposed) and pads by repeating edge pixels (there: zeros).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special

from data.degradations.config import DegradationConfig, StageConfig

Tensor = torch.Tensor

# ITU-T T.81, annex K, tables K.1 and K.2
LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
RGB_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
KERNEL_PAD = 21


def sigma_inverse(sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    return np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)


def bell_kernel(kind: str, size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> np.ndarray:
    axis = np.arange(size) - (size - 1) / 2
    points = np.stack(np.meshgrid(axis, axis), axis=-1)
    q = np.einsum("ijk,kl,ijl->ij", points, sigma_inverse(sigma_x, sigma_y, theta), points)
    kernel = 1 / (1 + q**beta) if kind == "plateau" else np.exp(-0.5 * q**beta)
    return kernel / kernel.sum()


def sinc_kernel(size: int, cutoff: float) -> np.ndarray:
    axis = np.arange(size) - (size - 1) / 2
    r = np.hypot(axis[:, None], axis[None])
    with np.errstate(invalid="ignore"):
        kernel = cutoff * special.j1(cutoff * r) / (2 * math.pi * r)
    kernel[r == 0] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def filter2d(image: Tensor, kernel: np.ndarray, depthwise: bool) -> Tensor:
    """Correlate (1, 3, H, W) with a kernel padded to 21 taps, reflected borders."""
    pad = (KERNEL_PAD - len(kernel)) // 2
    weight = torch.from_numpy(np.pad(kernel, pad)).float()[None, None]
    image = F.pad(image, [KERNEL_PAD // 2] * 4, mode="reflect")
    if depthwise:
        return F.conv2d(image, weight.expand(3, 1, -1, -1), groups=3)
    return F.conv2d(image.transpose(0, 1), weight).transpose(0, 1)


def rgb_to_gray(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def add_gaussian_noise(image: Tensor, sigma: float, gray: bool, generator: torch.Generator) -> Tensor:
    shape = (1, 1, *image.shape[2:]) if gray else image.shape
    return (image + torch.randn(shape, generator=generator) * (sigma / 255)).clamp(0, 1)


def add_poisson_noise(image: Tensor, factor: float, gray: bool, generator: torch.Generator) -> Tensor:
    base = rgb_to_gray(image) if gray else image
    base = (base * 255).round().clamp(0, 255) / 255
    peak = 2 ** math.ceil(math.log2(len(torch.unique(base))))
    noise = torch.poisson(base * peak, generator=generator) / peak - base
    return (image + factor * noise).clamp(0, 1)


def dct_matrix() -> Tensor:
    k, n = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    matrix = 0.5 * torch.cos((2 * n + 1) * k * math.pi / 16)
    matrix[0] /= math.sqrt(2)
    return matrix


def quantise(plane: Tensor, table: tuple, quality: float) -> Tensor:
    """8x8 DCT of a plane (H, W) of levels around 0, coefficients rounded to multiples of the scaled table."""
    factor = 5000 / quality if quality < 50 else 200 - 2 * quality
    step = ((torch.tensor(table) * factor + 50) / 100).floor().clamp(1, 255)
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8).transpose(1, 2)
    dct = dct_matrix()
    coefficients = ((dct @ blocks @ dct.T) / step).round() * step
    return (dct.T @ coefficients @ dct).transpose(1, 2).reshape(height, width)


def jpeg(image: Tensor, quality: float) -> Tensor:
    """JPEG round trip of (1, 3, H, W) in [0, 1], chroma at half resolution, float result."""
    height, width = image.shape[2:]
    padded = F.pad(image.clamp(0, 1) * 255, [0, -width % 16, 0, -height % 16], mode="replicate")
    to_ycc = torch.tensor(RGB_TO_YCC)
    ycc = torch.einsum("ij,njhw->nihw", to_ycc, padded)
    luma = quantise(ycc[0, 0] - 128, LUMA_TABLE, quality) + 128
    chroma = F.avg_pool2d(ycc[:, 1:], 2)[0]
    chroma = torch.stack([quantise(plane, CHROMA_TABLE, quality) for plane in chroma])
    chroma = chroma.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    ycc = torch.cat([luma[None], chroma])[None]
    rgb = torch.einsum("ij,njhw->nihw", torch.linalg.inv(to_ycc), ycc)
    return rgb[..., :height, :width].clamp(0, 255) / 255


class ReferenceDegradation:
    """Callable like `data.degradations.realesrgan.Degradation`: uint8 RGB (H, W, 3) in and out.

    `depthwise` runs the blurs as one grouped convolution, which is faster on a CPU than the published code's one
    channel at a time.
    """

    def __init__(self, config: DegradationConfig, depthwise: bool = False) -> None:
        self.config = config
        self.depthwise = depthwise

    @torch.no_grad()
    def __call__(self, hq: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        config = self.config
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        height, width = hq.shape[0] // config.scale, hq.shape[1] // config.scale
        image = torch.from_numpy(hq).permute(2, 0, 1)[None].float() / 255
        image = self.stage(image, config.first, hq.shape[0], hq.shape[1], rng, generator)
        image = jpeg(image, rng.uniform(*config.first.jpeg_range))
        if rng.uniform() < config.second_order_prob:
            image = self.stage(image, config.second, height, width, rng, generator)
        quality = rng.uniform(*config.second.jpeg_range)
        if rng.uniform() < config.final_jpeg_last_prob:
            image = jpeg(self.finish(image, height, width, rng), quality)
        else:
            image = self.finish(jpeg(image, quality), height, width, rng)
        return (image * 255).round().clamp(0, 255)[0].permute(1, 2, 0).to(torch.uint8).numpy()

    def kernel(self, stage: StageConfig, rng: np.random.Generator) -> np.ndarray:
        size = int(rng.choice(stage.kernel_sizes))
        if rng.uniform() < stage.sinc_prob:
            return sinc_kernel(size, rng.uniform(math.pi / 3 if size < 13 else math.pi / 5, math.pi))
        kind, isotropic = [(k, i) for k in ("gaussian", "generalized", "plateau") for i in (True, False)][
            rng.choice(6, p=stage.kernel_probs)
        ]
        sigma_x, sigma_y = rng.uniform(*stage.sigma, size=2)
        theta = rng.uniform(-math.pi, math.pi)
        beta = 1.0
        if kind != "gaussian":
            low, high = stage.betag if kind == "generalized" else stage.betap
            beta = rng.uniform(low, 1) if rng.uniform() < 0.5 else rng.uniform(1, high)
        return bell_kernel(kind, size, sigma_x, sigma_x if isotropic else sigma_y, theta, beta)

    def stage(
        self,
        image: Tensor,
        stage: StageConfig,
        height: int,
        width: int,
        rng: np.random.Generator,
        generator: torch.Generator,
    ) -> Tensor:
        if rng.uniform() < stage.blur_prob:
            image = filter2d(image, self.kernel(stage, rng), self.depthwise)
        direction = rng.choice(["up", "down", "keep"], p=stage.resize_prob)
        factor = 1.0
        if direction == "up":
            factor = rng.uniform(1, stage.resize_range[1])
        elif direction == "down":
            factor = rng.uniform(stage.resize_range[0], 1)
        mode = str(rng.choice(["area", "bilinear", "bicubic"]))
        image = F.interpolate(image, size=(int(height * factor), int(width * factor)), mode=mode)
        gray = bool(rng.uniform() < stage.gray_noise_prob)
        if rng.uniform() < stage.gaussian_noise_prob:
            return add_gaussian_noise(image, rng.uniform(*stage.noise_range), gray, generator)
        return add_poisson_noise(image, rng.uniform(*stage.poisson_scale_range), gray, generator)

    def finish(self, image: Tensor, height: int, width: int, rng: np.random.Generator) -> Tensor:
        mode = str(rng.choice(["area", "bilinear", "bicubic"]))
        image = F.interpolate(image, size=(height, width), mode=mode)
        if rng.uniform() < self.config.final_sinc_prob:
            size = int(rng.choice(self.config.final_sinc_sizes))
            image = filter2d(image, sinc_kernel(size, rng.uniform(math.pi / 3, math.pi)), self.depthwise)
        return image
