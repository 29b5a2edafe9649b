"""Photos whose output does not fit in memory: tiles go to disk one by one, the joined image into its file by rows.

Held at once are the low-quality image, one tile and one band of output rows, so memory grows with the width alone. The
tiles lie in `<target>.part/` until the target is written; a run that was killed finds them there and restores only
those that are missing. Joining and colour fix read the tiles again, band by band, in the order of
`common.tiling.tiled`, always on the CPU. The result does not depend on when the run was killed, and equals that of
`RestorationModule.upscale` where both fit in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.color import LEVELS, VARIANCE_EPS, recolored, wavelet
from common.files import held, replacing
from common.images import bicubic_upsample
from common.metrics import to_uint8
from common.tiling import Blend, blend_in, blend_window, pad_to_multiple, plan_tiles

ColorFix = Literal["adain", "wavelet", "none"]
PixelRows = NDArray[np.uint8]
RowRange = tuple[int, int]  # first output row, and the one after the last

BAND_PIXELS = 2**18
"""Output pixels of a band, the unit of all passes: some 50 MB of intermediates."""

_MIN_ROWS = 64  # of a band, however wide the image: the halo of the wavelet fix costs 62 more
_STRIP = 64  # rows of a TIFF strip

log = logging.getLogger(__name__)


@torch.no_grad()
def upscale_large(
    restore: Callable[[Tensor], Tensor],
    x_lq: Tensor,
    target: str | Path,
    *,
    scale: int,
    tile: int,
    overlap: int,
    blend: Blend = "average",
    color_fix: ColorFix = "adain",
    size_multiple: int = 1,
    key: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Restore an image of any size into a file, in bounded memory, and continue where a killed run stopped.

    The tiles need 12 bytes of disk for each of their pixels, overlaps counted as often as they are covered.

    Args:
        restore: From a tile (1, 3, th, tw) in [0, 1] to (1, 3, scale * th, scale * tw) near [0, 1], see
            `RestorationModule.restore`. Tiles are on `x_lq`'s device. It must be a function of the tile alone,
            without draws from a generator with state, or a continued run differs from an uninterrupted one.
        x_lq: The whole low-quality image, (1, 3, h, w), [0, 1].
        target: File to write, .png, .tif or .tiff; missing folders are made.
        scale: Output pixels per input pixel.
        tile: Side of a tile, input pixels.
        overlap: Pixels of the input that neighbours share.
        blend: Weights of overlapping tiles, see `common.tiling.tiled`.
        color_fix: The colour fix, see `common.color`; its reference is the bicubically enlarged input.
        size_multiple: The image is padded to multiples of this before it is cut to tiles.
        key: Key of everything else that determines a tile: weights, prompt, precision. Tiles of another key, other
            pixels or other tile settings are deleted, with a warning; blend and colour fix may change in between.
        progress: Called as (steps done, steps in all) after each tile, kept ones included, and each band of each pass.

    Raises:
        InUseError: Another process restores into the same target.
        ValueError: An argument is out of range, or `restore` gives another size or a value that is not finite.
        OSError: The disk is full or the folder cannot be written; the message names the file, the tiles are kept.
    """
    target = Path(target)
    if x_lq.ndim != 4 or x_lq.shape[:2] != (1, 3) or not x_lq.is_floating_point():
        raise ValueError(f"x_lq is {x_lq.dtype} of shape {tuple(x_lq.shape)}; pass one float image, (1, 3, h, w)")
    if color_fix not in ("adain", "wavelet", "none"):
        raise ValueError(f"color_fix is {color_fix!r}; use adain, wavelet or none")
    write_rows = writer_of(target)
    padded, (height, width) = pad_to_multiple(x_lq, size_multiple)
    tiles = TileStore(target.with_name(f"{target.name}.part"), padded.shape[-2:], tile, overlap, scale, blend)
    bands = plan_bands(scale * height, scale * width)
    steps = itertools.count(1)
    in_all = len(tiles.places) + len(bands) * (2 if color_fix == "adain" else 1)

    def step() -> None:
        if progress is not None:
            progress(next(steps), in_all)

    with held(tiles.folder):
        tiles.open({"pixels": _digest(x_lq), "size_multiple": str(size_multiple), "key": key})
        for top, left in tiles.places:
            if not tiles.has(top, left):
                tiles.write(top, left, restore(padded[..., top : top + tile, left : left + tile]))
            step()

        def raw(band: RowRange) -> Tensor:
            return tiles.band(band)[..., : scale * width]

        def reference(band: RowRange) -> Tensor:
            return bicubic_band(x_lq, scale, band)

        fixed: Callable[[RowRange], Tensor] = raw
        if color_fix == "adain":
            fixed = _adain(raw, reference, bands, step)
        elif color_fix == "wavelet":
            fixed = _wavelet(raw, reference, scale * height)

        def rows() -> Iterator[PixelRows]:
            for band in bands:
                yield to_uint8(fixed(band))[0].permute(1, 2, 0).contiguous().numpy()
                step()

        write_rows(target, rows(), scale * height, scale * width)
        tiles.clear()
    with suppress(OSError):  # something foreign is in it
        tiles.folder.rmdir()


def plan_bands(height: int, width: int) -> list[RowRange]:
    """Cut an image into bands of about `BAND_PIXELS`, from top to bottom.

    Args:
        height: Rows of the output.
        width: Columns of the output.

    Returns:
        First row and the one after the last, of each band.
    """
    rows = max(_MIN_ROWS, BAND_PIXELS // width)
    return [(first, min(first + rows, height)) for first in range(0, height, rows)]


def bicubic_band(x_lq: Tensor, scale: int, band: RowRange) -> Tensor:
    """Rows of `bicubic_upsample(x_lq, scale)`, computed from the input's rows that they depend on.

    Args:
        x_lq: (1, 3, h, w), [0, 1], on any device.
        scale: Factor.
        band: First output row and the one after the last.

    Returns:
        (1, 3, rows, scale * w), [0, 1], float32, on the CPU.
    """
    first, last = band
    # a cubic reaches two rows beyond the one a pixel lies in; at the image's border the cut is the border itself
    top, bottom = max(first // scale - 2, 0), -(-last // scale) + 2
    rows = x_lq[..., top:bottom, :].float().cpu().contiguous()
    return bicubic_upsample(rows, scale)[..., first - scale * top : last - scale * top, :]


class TileStore:
    """The restored tiles of one image in a folder, and bands of output rows joined from them.

    A file holds a tile as (rows, 3, columns) float32, so that a range of rows is one read. It gets its name after its
    bytes have reached the disk. A tile is done if its file exists; there is no other record that could disagree.

    Args:
        folder: Where the files lie.
        size: Height and width of the input, padded, pixels.
        tile: Side of a tile, input pixels.
        overlap: Pixels of the input that neighbours share.
        scale: Output pixels per input pixel.
        blend: Weights of overlapping tiles.

    Attributes:
        places: (top, left) of all tiles, input pixels, in the order in which they are joined.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, folder: Path, size: tuple[int, ...], tile: int, overlap: int, scale: int, blend: Blend) -> None:
        if scale < 1:
            raise ValueError(f"scale is {scale}; pass the output pixels per input pixel, 1 or more")
        height, width = size
        tops, lefts = plan_tiles(height, tile, overlap), plan_tiles(width, tile, overlap)
        self.places = [(top, left) for top in tops for left in lefts]
        self.folder, self.scale, self.columns = folder, scale, scale * width
        self.sides = (scale * min(tile, height), scale * min(tile, width))
        self._window = blend_window(self.sides, scale * overlap, blend)
        self._settings = {"size": f"{height} x {width}", "tile": tile, "overlap": overlap, "scale": scale}

    @property
    def _fingerprint(self) -> Path:
        return self.folder / "fingerprint.json"

    def _path(self, top: int, left: int) -> Path:
        return self.folder / f"tile_{top}_{left}.f32"

    def open(self, decides: dict[str, str]) -> None:
        """Keep existing tiles of the same settings; delete others, with a warning.

        Args:
            decides: Digest of what determines the tiles' pixels, apart from the settings of this store.
        """
        now = {**self._settings, **decides}
        before = json.loads(self._fingerprint.read_text()) if self._fingerprint.exists() else None
        if before == now:
            kept = sum(self.has(*place) for place in self.places)
            log.info("%s: %d of %d tiles are there already", self.folder, kept, len(self.places))
            return
        if before is not None:
            changed = ", ".join(name for name in now if before.get(name) != now[name])
            log.warning("%s holds tiles of another %s; starting afresh", self.folder, changed)
        self.clear()
        with _replacing(self._fingerprint, recorded=False) as file:
            file.write(json.dumps(now, indent=1).encode())

    def has(self, top: int, left: int) -> bool:
        """True if this tile is done."""
        return self._path(top, left).exists()

    def write(self, top: int, left: int, sr_tile: Tensor) -> None:
        """Write a restored tile, (1, 3, *sides), to the disk.

        Raises:
            ValueError: It has another size, or holds a value that is not finite.
            OSError: It cannot be written.
        """
        if tuple(sr_tile.shape) != (1, 3, *self.sides):
            raise ValueError(
                f"restore made {tuple(sr_tile.shape)} of the tile at row {top}, column {left}; scale={self.scale} asks "
                f"for {(1, 3, *self.sides)}"
            )
        x = sr_tile[0].float().cpu()
        if not x.isfinite().all():
            raise ValueError(
                f"restore made values that are not finite of the tile at row {top}, column {left}; set "
                "trainer.precision=32 if an overflow made them"
            )
        with _replacing(self._path(top, left), recorded=False) as file:
            file.write(x.transpose(0, 1).contiguous().numpy().data)

    def band(self, band: RowRange) -> Tensor:
        """Rows of the image that `common.tiling.tiled` makes of these tiles, bit by bit.

        Args:
            band: First output row and the one after the last.

        Returns:
            (1, 3, rows, columns of the padded image), float32.
        """
        first, last = band
        mean, total = torch.zeros(3, last - first, self.columns), torch.zeros(last - first, self.columns)
        height, width = self.sides
        for top, left in self.places:
            start, column = self.scale * top, self.scale * left
            upper, lower = max(first, start), min(last, start + height)
            if upper >= lower:
                continue
            row = 3 * width  # numbers of one
            path, skipped, count = self._path(top, left), 4 * row * (upper - start), row * (lower - upper)
            x = torch.from_numpy(np.fromfile(path, np.float32, count, offset=skipped))
            area = (slice(upper - first, lower - first), slice(column, column + width))
            window = self._window[upper - start : lower - start]
            blend_in(mean[:, *area], total[area], x.view(-1, 3, width).transpose(0, 1), window)
        return mean[None]

    def clear(self) -> None:
        """Remove the tiles."""
        self._fingerprint.unlink(missing_ok=True)  # first, as tiles without it are never used
        for path in [*self.folder.glob("tile_*.f32"), *self.folder.glob(".*.tmp")]:
            path.unlink()


def _digest(x_lq: Tensor) -> str:
    return hashlib.blake2b(x_lq.float().cpu().contiguous().numpy().data, digest_size=16).hexdigest()


def _adain(
    raw: Callable[[RowRange], Tensor],
    reference: Callable[[RowRange], Tensor],
    bands: list[RowRange],
    step: Callable[[], None],
) -> Callable[[RowRange], Tensor]:
    """`common.color.adain` by bands, after one pass over all of them for the statistics, summed in float64."""
    sums = torch.zeros(4, 1, 3, 1, 1, dtype=torch.float64)
    count = 0
    for band in bands:
        x, y = raw(band).double(), reference(band).double()
        terms = [part.sum((2, 3), keepdim=True) for part in (x, x.square(), y, y.square())]
        sums += torch.stack(terms)
        count += x[0, 0].numel()
        step()
    mean, square, reference_mean, reference_square = sums / count
    std = (square - mean.square() + VARIANCE_EPS).sqrt().float()
    reference_std = (reference_square - reference_mean.square() + VARIANCE_EPS).sqrt().float()
    mean, reference_mean = mean.float(), reference_mean.float()
    return lambda band: recolored(raw(band), mean, std, reference_mean, reference_std)


def _wavelet(
    raw: Callable[[RowRange], Tensor], reference: Callable[[RowRange], Tensor], height: int
) -> Callable[[RowRange], Tensor]:
    """`common.color.wavelet` by bands, each computed with the rows around it that its blurs reach."""
    reach = 2**LEVELS - 1  # 1 + 2 + 4 + ..

    def fixed(band: RowRange) -> Tensor:
        first, last = band
        wider = (max(first - reach, 0), min(last + reach, height))
        x = wavelet(raw(wider), reference(wider))
        return x[..., first - wider[0] : last - wider[0], :]

    return fixed


# Files by rows


def write_png_rows(path: str | Path, rows: Iterable[PixelRows], height: int, width: int) -> None:
    """Write a PNG from blocks of rows; the path holds either the whole file or what was there before.

    Rows are stored as differences to the row above, deflated by run lengths: ten times as fast as Pillow's default, and
    a few per cent larger on photos.

    Args:
        path: Target; missing folders are made.
        rows: Blocks (n, width, 3) uint8, RGB, from top to bottom.
        height: Rows of all blocks together.
        width: Columns.

    Raises:
        ValueError: The blocks are not (n, width, 3) uint8, or do not add up to `height` rows.
        OSError: The disk is full or the folder cannot be written; the message names the file.
    """
    with _replacing(Path(path)) as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))  # 8 bits, RGB
        deflate = _deflate()
        above = np.zeros((1, width, 3), np.uint8)
        for block in _checked(path, rows, height, width):
            lines = np.full((len(block), 1 + 3 * width), 2, np.uint8)  # each begins with its filter, 2 is Up
            lines[:, 1:] = (block - np.concatenate([above, block[:-1]])).reshape(len(block), -1)
            above = block[-1:].copy()
            if data := deflate.compress(lines.data):
                file.write(_chunk(b"IDAT", data))
        file.write(_chunk(b"IDAT", deflate.flush()))
        file.write(_chunk(b"IEND", b""))


def write_tiff_rows(path: str | Path, rows: Iterable[PixelRows], height: int, width: int) -> None:
    """Write a TIFF from blocks of rows: deflated strips of differences to the left pixel; as `write_png_rows` else."""
    import tifffile

    def encoded(strip: PixelRows) -> bytes:
        strip[:, 1:] -= strip[:, :-1].copy()
        deflate = _deflate()
        return deflate.compress(strip.data) + deflate.flush()

    strips = map(encoded, _strips(_checked(path, rows, height, width)))
    with _replacing(Path(path)) as file:
        tifffile.imwrite(
            file,
            strips,
            shape=(height, width, 3),
            dtype=np.uint8,
            photometric="rgb",
            compression="zlib",
            predictor=True,
            rowsperstrip=_STRIP,
            bigtiff=height * width * 3 > 4e9,
            metadata=None,
        )
        next(strips, None)  # tifffile takes no more strips than it needs, so this finds rows too many


def writer_of(target: Path) -> Callable[[Path, Iterable[PixelRows], int, int], None]:
    """The function that writes a file of this name by rows.

    Raises:
        ValueError: There is none for its ending.
    """
    writers = {".png": write_png_rows, ".tif": write_tiff_rows, ".tiff": write_tiff_rows}
    if target.suffix.lower() not in writers:
        raise ValueError(f"target={target} is of no kind that is written by rows; end its name in {', '.join(writers)}")
    return writers[target.suffix.lower()]


@contextmanager
def _replacing(path: Path, recorded: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the path's place once it is on disk."""
    with replacing(path, shared=False, recorded=recorded) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _checked(path: str | Path, rows: Iterable[PixelRows], height: int, width: int) -> Iterator[PixelRows]:
    """The blocks, each of them looked at, and at the end their sum."""
    count = 0
    for block in rows:
        if block.dtype != np.uint8 or block.ndim != 3 or block.shape[1:] != (width, 3):
            raise ValueError(f"rows: got {block.dtype} {block.shape} for {path}; pass uint8 (n, {width}, 3)")
        count += len(block)
        if len(block):
            yield block
    if count != height:
        raise ValueError(f"rows: got {count} for {path}; height={height} asks for as many")


def _strips(rows: Iterable[PixelRows]) -> Iterator[PixelRows]:
    """Blocks of any number of rows to blocks of `_STRIP`, own memory, the last as many as are left."""
    kept: list[PixelRows] = []
    for block in rows:
        for row in block:
            kept.append(row)
            if len(kept) == _STRIP:
                yield np.array(kept)
                kept.clear()
    if kept:
        yield np.array(kept)


def _deflate() -> zlib._Compress:
    return zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
