"""Blur kernels of Real-ESRGAN (arXiv:2107.10833, sections 3.1 and 3.3), and their split into separable parts.

Kernels are float32 arrays (k, k), k odd, centred on the middle tap, that sum to 1.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.special import j1

from data.degradations.config import KERNEL_NAMES, StageConfig

Array = np.ndarray


@cache
def _grid(size: int) -> tuple[Array, Array]:
    """Offsets x (along columns) and y (along rows) from the centre, px, each (size, size)."""
    offsets = np.arange(size) - size // 2
    x, y = np.meshgrid(offsets, offsets)
    return x.astype(np.float64), y.astype(np.float64)


def _mahalanobis(size: int, sigma_x: float, sigma_y: float, theta: float) -> Array:
    """Squared distance c^T Sigma^-1 c of each tap, Sigma with axes sigma_x, sigma_y turned by theta."""
    x, y = _grid(size)
    cos, sin = np.cos(theta), np.sin(theta)
    return ((cos * x + sin * y) / sigma_x) ** 2 + ((cos * y - sin * x) / sigma_y) ** 2


def _normalised(kernel: Array) -> Array:
    return (kernel / kernel.sum()).astype(np.float32)


def gaussian(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0) -> Array:
    """Gaussian kernel exp(-q / 2); isotropic where the two sigmas are equal.

    Args:
        size: Width, odd, px.
        sigma_x: Standard deviation along the first axis, px.
        sigma_y: Standard deviation along the second axis, px.
        theta: Angle from the columns to the first axis, radians.

    Returns:
        Kernel, (size, size).
    """
    return _normalised(np.exp(-0.5 * _mahalanobis(size, sigma_x, sigma_y, theta)))


def generalized_gaussian(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Array:
    """Generalized Gaussian kernel exp(-q^beta / 2); beta = 1 is the Gaussian. Arguments as in `gaussian`."""
    return _normalised(np.exp(-0.5 * _mahalanobis(size, sigma_x, sigma_y, theta) ** beta))


def plateau(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> Array:
    """Plateau-shaped kernel 1 / (1 + q^beta). Arguments as in `gaussian`."""
    return _normalised(1.0 / (1.0 + _mahalanobis(size, sigma_x, sigma_y, theta) ** beta))


def sinc(size: int, cutoff: float) -> Array:
    """Circular low-pass filter, cutoff * J1(cutoff * r) / (2 pi r), equation (6) of the paper.

    Args:
        size: Width, odd, px.
        cutoff: Cut-off frequency, radians per px, in (0, pi].

    Returns:
        Kernel, (size, size).
    """
    r = np.hypot(*_grid(size))
    r[size // 2, size // 2] = 1.0  # placeholder; the limit for r -> 0 follows
    kernel = cutoff * j1(cutoff * r) / (2.0 * np.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4.0 * np.pi)
    return _normalised(kernel)


def _draw_beta(low_high: tuple[float, float], rng: np.random.Generator) -> float:
    """Shape exponent: below or above 1 with equal chance, uniform within the side."""
    low, high = low_high
    return rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)


def draw_kernel(stage: StageConfig, rng: np.random.Generator) -> Array:
    """Draw a stage's blur kernel as the published code does.

    Args:
        stage: Probabilities and ranges.
        rng: Source of all randomness.

    Returns:
        Kernel of one of the stage's sizes.
    """
    size = draw_one(stage.kernel_sizes, rng)
    if rng.random() < stage.sinc_prob:
        return sinc(size, rng.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi))  # large kernels may cut lower
    name = KERNEL_NAMES[draw_index(stage.kernel_probs, rng)]
    sigma_x = sigma_y = rng.uniform(*stage.sigma)
    theta = 0.0
    if name.endswith("aniso"):
        sigma_y = rng.uniform(*stage.sigma)
        theta = rng.uniform(-np.pi, np.pi)
    if name.startswith("generalized"):
        return generalized_gaussian(size, sigma_x, sigma_y, theta, _draw_beta(stage.betag, rng))
    if name.startswith("plateau"):
        return plateau(size, sigma_x, sigma_y, theta, _draw_beta(stage.betap, rng))
    return gaussian(size, sigma_x, sigma_y, theta)


def draw_final_sinc(sizes: Sequence[int], rng: np.random.Generator) -> Array:
    """Draw the final sinc filter: any of the sizes, cut-off uniform in [pi / 3, pi]."""
    return sinc(draw_one(sizes, rng), rng.uniform(np.pi / 3, np.pi))


def draw_one(values: Sequence[int], rng: np.random.Generator) -> int:
    """Pick a value, all with the same chance."""
    return values[int(rng.integers(len(values)))]


def draw_index(probs: Sequence[float], rng: np.random.Generator) -> int:
    """Pick an index with the given probabilities (that sum to 1)."""
    index = int(np.searchsorted(np.cumsum(probs), rng.random(), side="right"))
    return min(index, len(probs) - 1)  # the sum may be 1 - 1e-16


def trim(kernel: Array, tolerance: float) -> Array:
    """Cut a kernel to the smallest centred square outside of which at most `tolerance` of its sum of |taps| lies.

    Args:
        kernel: Kernel, (k, k).
        tolerance: Share of the absolute mass that may go.

    Returns:
        Kernel (m, m), m odd and at most k, that sums to 1.
    """
    radius = len(kernel) // 2
    rings = np.maximum(*np.abs(_grid(len(kernel)))).astype(np.intp)  # distance of each tap's square ring
    mass = np.cumsum(np.bincount(rings.ravel(), weights=np.abs(kernel).ravel(), minlength=radius + 1))
    keep = int(np.searchsorted(mass, mass[-1] * (1.0 - tolerance)))
    cut = kernel[radius - keep : radius + keep + 1, radius - keep : radius + keep + 1]
    return _normalised(cut.astype(np.float64))


def separate(kernel: Array, tolerance: float) -> list[tuple[Array, Array]]:
    """Write a point-symmetric kernel as a short sum of outer products.

    The kernel is split into its part even in x (and so in y) and its part odd in both, and each part into its
    singular vectors, so that every vector is exactly even or odd: OpenCV runs those twice as fast. One pair is
    enough for an isotropic Gaussian.

    Args:
        kernel: Kernel with K(-x, -y) = K(x, y), (k, k), k odd.
        tolerance: Largest sum of |taps| of what the pairs leave out.

    Returns:
        Pairs (column vector along y, row vector along x), float32 of length k; the kernel is the sum of their
        outer products.
    """
    k = kernel.astype(np.float64)
    flipped = k[:, ::-1]
    terms: list[tuple[float, Array, Array]] = []
    for part, sign in (((k + flipped) / 2, 1.0), ((k - flipped) / 2, -1.0)):
        if np.abs(part).sum() <= 1e-3 * tolerance:  # an isotropic kernel has no odd part
            continue
        left, singular, right = np.linalg.svd(part)
        for value, u, v in zip(singular, left.T, right, strict=True):
            terms.append((value, (u + sign * u[::-1]) / 2, (v + sign * v[::-1]) / 2))
    terms.sort(key=lambda term: term[0], reverse=True)
    pairs: list[tuple[Array, Array]] = []
    residual = k
    for value, u, v in terms:
        root = np.sqrt(value)
        pairs.append(((root * u).astype(np.float32), (root * v).astype(np.float32)))
        residual = residual - value * np.outer(u, v)
        if np.abs(residual).sum() <= tolerance:
            break
    return pairs
