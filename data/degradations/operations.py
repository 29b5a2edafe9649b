"""The four operations a degradation is made of: blur, resize, noise, JPEG, on OpenCV and libjpeg.

Images are (H, W, 3) in BGR order, OpenCV's own, with grey levels 0 to 255: uint8 where an operation rounds,
float32 between the roundings. JPEG decodes to uint8, and so the chain rounds once a stage more than the published
float code does, which quantises the DCT coefficients of unrounded images.
"""

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from scipy.sparse import csr_array
from scipy.special import pdtr

from data.degradations.kernels import Array, separate, trim

RESIZE_MODES = ("area", "bilinear", "bicubic")
TRIM_TOLERANCE = 1e-3  # of a kernel's sum of |taps|
SPLIT_TOLERANCE = 2e-3  # of the same sum; the worst image then differs by 0.5 grey levels, photos by far less
_CELL_BITS = 12
_CELLS = 1 << _CELL_BITS
_SPLIT = 255  # mark of a table cell that more than one count shares
_CHUNK = 1 << 15  # draws at a time, so that temporaries stay in the cache
_TAIL = 1e-14  # probability left out on each side of a Poisson law


def blur(image: Array, kernel: Array) -> Array:
    """Convolve with reflected borders (edge pixel not repeated).

    The kernel is trimmed to the taps that matter and run as a few separable passes or directly, whichever is
    cheaper; all agree with the full convolution within the tolerances above.

    Args:
        image: uint8 or float32, (H, W, 3).
        kernel: float32, (k, k), k odd, point-symmetric, sum 1.

    Returns:
        float32, (H, W, 3), not clipped.
    """
    kernel = trim(kernel, TRIM_TOLERANCE)
    size = len(kernel)
    if size == 1:
        return image.astype(np.float32)
    pairs = separate(kernel, SPLIT_TOLERANCE)
    passes = len(pairs) * (size + 4)  # cost of the separable passes; the two bounds below were measured
    if size <= 11 and 0.4 * size**2 < passes:
        return cv2.filter2D(image.astype(np.float32), -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    if passes > 125:  # OpenCV goes through a Fourier transform for large kernels, at a cost that is the same for all
        return cv2.filter2D(image, cv2.CV_32F, kernel, borderType=cv2.BORDER_REFLECT_101)
    out = cv2.sepFilter2D(image, cv2.CV_32F, pairs[0][1], pairs[0][0], borderType=cv2.BORDER_REFLECT_101)
    part = np.empty_like(out)
    for column, row in pairs[1:]:
        cv2.sepFilter2D(image, cv2.CV_32F, row, column, dst=part, borderType=cv2.BORDER_REFLECT_101)
        cv2.add(out, part, dst=out)
    return out


def resize(image: Array, height: int, width: int, mode: str) -> Array:
    """Resize without anti-aliasing, as `torch.nn.functional.interpolate` does for the same mode.

    OpenCV's bilinear and bicubic (a = -0.75) are torch's; its INTER_AREA is not, since torch's "area" is adaptive
    average pooling: whole pixels in overlapping windows, also upwards. That one is written here.

    Args:
        image: float32, (H, W, 3).
        height: New height, px.
        width: New width, px.
        mode: `area`, `bilinear` or `bicubic`.

    Returns:
        float32, (height, width, 3); bicubic may leave the grey levels' range.
    """
    if image.shape[:2] == (height, width):
        return image
    if mode == "bilinear":
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    if mode == "bicubic":
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    if height >= image.shape[0] and width >= image.shape[1]:
        return _area_up(image, height, width)
    # Rows, then columns as rows of the transposed image: a sparse product adds whole rows, which is fast.
    rows = _pooling(image.shape[0], height) @ image.reshape(image.shape[0], -1)
    turned = cv2.transpose(rows.reshape(height, image.shape[1], 3))
    columns = _pooling(image.shape[1], width) @ turned.reshape(image.shape[1], -1)
    return cv2.transpose(columns.reshape(width, height, 3))


def _windows(size: int, new_size: int) -> tuple[Array, Array]:
    """First and one-past-last input pixel of each output pixel of adaptive average pooling."""
    index = np.arange(new_size)
    return index * size // new_size, -(-(index + 1) * size // new_size)


def _pooling(size: int, new_size: int) -> csr_array:
    """Adaptive average pooling along one axis as a sparse matrix, float32, (new_size, size)."""
    start, stop = _windows(size, new_size)
    width = stop - start
    pointer = np.concatenate(([0], np.cumsum(width)))
    column = np.arange(pointer[-1]) - np.repeat(pointer[:-1] - start, width)
    weight = np.repeat((1.0 / width).astype(np.float32), width)
    return csr_array((weight, column, pointer), shape=(new_size, size))


def _area_up(image: Array, height: int, width: int) -> Array:
    """Pool upwards: each output pixel averages one or two neighbours, that is, a bilinear look-up at n or n + 1/2."""
    at = []
    for size, new_size in zip(image.shape[:2], (height, width), strict=True):
        start, stop = _windows(size, new_size)
        at.append(((start + stop - 1) / 2).astype(np.float32))
    shape = (height, width)
    map_x, map_y = np.broadcast_to(at[1], shape), np.broadcast_to(at[0][:, None], shape)
    return cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def gaussian_noise(image: Array, sigma: float, gray: bool, rng: np.random.Generator) -> Array:
    """Add white Gaussian noise.

    Args:
        image: float32, (H, W, 3).
        sigma: Standard deviation, grey levels.
        gray: True if the three channels share one noise field.
        rng: Source of the noise.

    Returns:
        uint8, rounded and clipped.
    """
    shape = image.shape[:2] if gray else image.shape
    return _add(image, rng.standard_normal(shape, dtype=np.float32), sigma)


def poisson_noise(image: Array, factor: float, gray: bool, rng: np.random.Generator) -> Array:
    """Add shot noise, n = factor * (P(v x) / v - x), x the image rounded to 8 bits and scaled to [0, 1].

    v is the number of distinct levels in x, rounded up to a power of two, as in the published code. With `gray`,
    x is the luma and the noise is shared by the channels.

    Args:
        image: float32, (H, W, 3).
        factor: Scale of the noise; 1 is the Poisson law's own strength.
        gray: True if the three channels share one noise field.
        rng: Source of the noise.

    Returns:
        uint8, rounded and clipped.
    """
    base = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) if gray else image
    levels = to_uint8(base)
    distinct = np.count_nonzero(cv2.calcHist([levels.reshape(-1)], [0], None, [256], [0, 256]))
    peak = 1 << (int(distinct) - 1).bit_length()
    counts = poisson_counts(levels, peak, rng)
    noise = cv2.subtract(cv2.multiply(counts, 255.0 / peak, dtype=cv2.CV_32F), levels, dtype=cv2.CV_32F)
    return _add(image, noise, factor)


def _add(image: Array, noise: Array, strength: float) -> Array:
    """Return image + strength * noise as uint8; one noise field (H, W) serves all channels."""
    if noise.ndim == 2:
        noise = cv2.cvtColor(noise, cv2.COLOR_GRAY2BGR)
    return cv2.addWeighted(image, 1.0, noise, strength, 0.0, dtype=cv2.CV_8U)


def to_uint8(image: Array) -> Array:
    """Round to the nearest grey level and clip to 0..255."""
    return cv2.addWeighted(image, 1.0, image, 0.0, 0.0, dtype=cv2.CV_8U)


class _PoissonTable(NamedTuple):
    """Inverse of the Poisson distribution functions with means level / 255 * peak, level = 0..255."""

    offsets: Array  # uint8, (256 * cells): count - lowest[level] in a cell of the uniform variate, or _SPLIT
    lowest: Array  # int16, (256): smallest count of each level
    keys: Array  # float64: all distribution functions in one ascending row, level + P(X <= count)
    starts: Array  # int64, (256): where a level's keys begin


@lru_cache(maxsize=9)
def poisson_table(peak: int) -> _PoissonTable:
    """Tabulate the laws of one peak, a power of two up to 256; 1 MiB and about 0.1 s, kept for the process."""
    edges = np.arange(_CELLS + 1) / _CELLS
    offsets = np.empty((256, _CELLS), dtype=np.uint8)
    lowest = np.zeros(256, dtype=np.int16)
    rows, starts = [], np.zeros(256, dtype=np.int64)
    total = 0
    for level in range(256):
        mean = level / 255 * peak
        reach = 8 * np.sqrt(mean) + 12
        counts = np.arange(max(0, int(mean - reach)), int(mean + reach) + 1)
        cdf = pdtr(counts, mean)
        inside = (cdf > _TAIL) & (np.concatenate(([0.0], cdf[:-1])) < 1 - _TAIL)
        lowest[level] = counts[inside][0]
        cdf = cdf[inside]
        below = np.searchsorted(cdf, edges[:-1], side="right")  # count at the cell's lower edge
        above = np.searchsorted(cdf, edges[1:], side="left")  # count just under its upper edge
        offsets[level] = np.where(below == above, below, _SPLIT)
        rows.append(level + cdf[:-1])  # the last count takes all that is left
        starts[level] = total
        total += len(cdf) - 1
    return _PoissonTable(offsets.ravel(), lowest, np.concatenate(rows), starts)


def poisson_counts(levels: Array, peak: int, rng: np.random.Generator) -> Array:
    """Draw Poisson counts with means levels / 255 * peak, exactly, by inverting the distribution function.

    12 random bits select a cell of a table. Nearly all cells belong to one count; where several counts share the
    cell (about 2 % of the draws at peak 256), more random bits refine the variate and a binary search decides.

    Args:
        levels: uint8, any shape.
        peak: Mean count at level 255, a power of two up to 256.
        rng: Source of randomness.

    Returns:
        int16 counts, same shape.
    """
    table = poisson_table(peak)
    counts = np.empty(levels.shape, dtype=np.int16)
    flat, flat_counts = levels.reshape(-1), counts.reshape(-1)
    lowest = table.lowest.reshape(1, 256)
    for begin in range(0, flat.size, _CHUNK):
        level = flat[begin : begin + _CHUNK]
        words = rng.integers(0, 2**64 - 1, size=-(-level.size // 4), dtype=np.uint64, endpoint=True)
        cell = words.view(np.uint16)[: level.size] & np.uint16(_CELLS - 1)
        index = level.astype(np.uint32)
        index <<= _CELL_BITS
        index |= cell
        offset = table.offsets.take(index)
        count = cv2.LUT(level, lowest).reshape(-1)
        count += offset
        split = np.flatnonzero(offset == _SPLIT)
        at = level[split].astype(np.int64)
        variate = (cell[split] + rng.random(split.size)) / _CELLS
        rank = np.searchsorted(table.keys, at + variate, side="right") - table.starts[at]
        count[split] = table.lowest[at] + rank
        flat_counts[begin : begin + _CHUNK] = count
    return counts


def jpeg(image: Array, quality: float) -> Array:
    """Compress and decompress with libjpeg, chroma at half resolution.

    Args:
        image: uint8, (H, W, 3).
        quality: 1 to 100; rounded, libjpeg's scale is integer.

    Returns:
        uint8, (H, W, 3).
    """
    _, data = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, round(quality)))
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None  # libjpeg reads what it wrote
    return decoded
