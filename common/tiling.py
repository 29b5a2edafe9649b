"""Tiles: run a function on parts of an image that is too large for it, and join the results.

Coordinates are pixels of the low-quality input; the output is `scale` times as large. The last tile of a row or column
ends at the border, and overlaps the one before it more than the others do. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Blend = Literal["average", "feather", "gaussian"]


def plan_tiles(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles along one side start.

    Args:
        length: Side of the image, pixels.
        tile: Side of a tile, pixels.
        overlap: Pixels that neighbours share, at least (the last two may share more).

    Returns:
        Starts, ascending; one zero if the image fits in a tile.

    Raises:
        ValueError: A number is out of its range; the message names it.
    """
    if length < 1:
        raise ValueError(f"length is {length}; pass the image's side, 1 px or more")
    if tile < 1:
        raise ValueError(f"tile is {tile}; pass 1 px or more")
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} and tile is {tile}; pass an overlap from 0 to {tile - 1}")
    last = max(length - tile, 0)
    return [*range(0, last, tile - overlap), last]


def feather_window(length: int, overlap: int) -> Tensor:
    """Weights of a tile along one side: a linear rise over the overlap, flat, and the same fall.

    In the usual overlap (no more than half a tile) the fall of one tile and the rise of the next sum to one.

    Args:
        length: Side of the tile, pixels.
        overlap: Pixels of rise and of fall.

    Returns:
        Weights, (length,), in (0, 1], float32.
    """
    position = torch.arange(1, length + 1, dtype=torch.float32)
    return torch.minimum(position, position.flip(0)).clamp(max=overlap + 1) / (overlap + 1)


def gaussian_window(length: int) -> Tensor:
    """Weights of a tile along one side: a Gaussian around its middle, a tenth of the side wide, as StableSR and InvSR.

    Args:
        length: Side of the tile, pixels.

    Returns:
        Weights, (length,), in (0, 1], float32; 4e-6 at the ends of long sides.
    """
    position = (torch.arange(length, dtype=torch.float32) - (length - 1) / 2) / length
    return torch.exp(-position.square() / (2 * 0.1**2))


def blend_window(sides: tuple[int, int], overlap: int, blend: Blend) -> Tensor:
    """Weights of a tile's pixels where it is joined with its neighbours.

    Args:
        sides: Height and width of the tile, pixels.
        overlap: Pixels that neighbours share.
        blend: "average" weighs all alike; "feather" fades linearly over the overlap, see `feather_window`; "gaussian"
            from the middle on, see `gaussian_window`.

    Returns:
        Weights, (height, width), in (0, 1], float32.

    Raises:
        ValueError: `blend` is none of the three.
    """
    if blend not in ("average", "feather", "gaussian"):
        raise ValueError(f"blend is {blend!r}; use average, feather or gaussian")
    ramp = overlap if blend == "feather" else 0
    return torch.outer(*(gaussian_window(n) if blend == "gaussian" else feather_window(n, ramp) for n in sides))


def tiled(
    function: Callable[[Tensor], Tensor],
    x_lq: Tensor,
    tile: int,
    overlap: int,
    scale: int,
    blend: Blend = "average",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run a function tile by tile and join the outputs by their weighted mean where they overlap.

    The mean is updated in float32 as the tiles come, `mean += (w / W) (x - mean)` with W the weight so far, so where
    tiles agree the result is their value to the bit. An image that fits in one tile goes through the function as it is.

    Args:
        function: From a tile (B, 3, th, tw) to (B, C, scale * th, scale * tw). Tiles are `tile` wide and high, or as
            much as the image has.
        x_lq: Input, (B, 3, h, w).
        tile: Side of a tile, input pixels.
        overlap: Pixels of the input that neighbours share.
        scale: Output pixels per input pixel.
        blend: Weights of a tile's pixels, see `blend_window`.
        progress: Called as (tiles done, tiles in all) after each tile.

    Returns:
        The joined output, (B, C, scale * h, scale * w), in the function's output type.

    Raises:
        ValueError: An argument is out of range, or the function's output does not have `scale` times the tile's size.
    """
    if x_lq.ndim != 4:
        raise ValueError(f"x_lq is of shape {tuple(x_lq.shape)}; pass (B, 3, h, w)")
    if scale < 1:
        raise ValueError(f"scale is {scale}; pass the output pixels per input pixel, 1 or more")
    height, width = x_lq.shape[-2:]
    tops, lefts = plan_tiles(height, tile, overlap), plan_tiles(width, tile, overlap)
    sides = (scale * min(tile, height), scale * min(tile, width))
    window = blend_window(sides, scale * overlap, blend).to(x_lq.device)
    mean = total = None
    for done, (top, left) in enumerate(((top, left) for top in tops for left in lefts), start=1):
        x_tile = x_lq[..., top : top + tile, left : left + tile]
        sr_tile = function(x_tile)
        expected = (scale * x_tile.shape[-2], scale * x_tile.shape[-1])
        if tuple(sr_tile.shape[-2:]) != expected:
            raise ValueError(
                f"function made {tuple(sr_tile.shape)} of a tile {tuple(x_tile.shape)}; scale={scale} asks for "
                f"{expected[0]} x {expected[1]} pixels"
            )
        if progress is not None:
            progress(done, len(tops) * len(lefts))
        if len(tops) == len(lefts) == 1:
            return sr_tile
        if mean is None or total is None:
            mean = sr_tile.new_zeros(*sr_tile.shape[:2], scale * height, scale * width, dtype=torch.float32)
            total = window.new_zeros(scale * height, scale * width)
        rows = slice(scale * top, scale * top + expected[0])
        columns = slice(scale * left, scale * left + expected[1])
        blend_in(mean[..., rows, columns], total[rows, columns], sr_tile.float(), window)
    assert mean is not None  # plan_tiles never returns an empty list
    return mean.to(sr_tile.dtype)


def blend_in(mean: Tensor, total: Tensor, x_tile: Tensor, window: Tensor) -> None:
    """Take a tile into the weighted mean of those before it, in place.

    Args:
        mean: Mean so far where the tile lies, (..., th, tw), float32.
        total: Weight so far there, (th, tw).
        x_tile: The tile, (..., th, tw), float32.
        window: Weights of its pixels, (th, tw).
    """
    total += window
    mean += window / total * (x_tile - mean)


def pad_to_multiple(x: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad right and bottom until both sides are multiples; reflect, or replicate a side too short to be reflected.

    Args:
        x: (B, C, h, w).
        multiple: The sides' divisor, e.g. 8.

    Returns:
        The padded images (the same tensor if nothing is missing) and (h, w), to crop the result with.

    Raises:
        ValueError: `multiple` is below 1.
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}; pass 1 or more")
    height, width = x.shape[-2:]
    missing_rows, missing_columns = -height % multiple, -width % multiple
    if missing_columns:
        x = F.pad(x, (0, missing_columns, 0, 0), mode="reflect" if missing_columns < width else "replicate")
    if missing_rows:
        x = F.pad(x, (0, 0, 0, missing_rows), mode="reflect" if missing_rows < height else "replicate")
    return x, (height, width)
