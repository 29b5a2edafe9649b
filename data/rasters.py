"""Decoding of image files: upright arrays as they are stored, with the profile for sRGB.

TIFFs of 8 and 16 bits are decoded by tifffile, 16-bit PNGs by OpenCV, and everything else by PIL: PIL cuts 16-bit
colours off to their high bytes. Variants that these libraries decode wrongly are refused, and named.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from data.colours import Pixels, apply_profile, to_8_bit

Image.MAX_IMAGE_PIXELS = None  # check_memory takes its place
MOST_TEXT = 2**28  # bytes of a PNG's texts and profile; photos carry megabytes of them
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MOST_TEXT

ORIENTATION = 0x0112  # EXIF and TIFF tag
_BYTES_PER_PIXEL = 12  # at the peak of decoding: PIL's 4, and two arrays of up to 4
_SMALL = 2**26  # px that are read without a check of the free memory
_COMPRESSIONS = {1, 5, 8, 32946, 32773}  # none, LZW, deflate by two numbers, PackBits
_PREDICTED = {5, 8, 32946}  # with others, decoders disagree about a predictor
_CHANNELS = {0: 1, 1: 1, 2: 3, 5: 4}  # of TIFF's WhiteIsZero, BlackIsZero, RGB and CMYK
_ASSOCIATED, _UNASSOCIATED = 1, 2  # TIFF's kinds of alpha


@dataclass(frozen=True)
class Raster:
    """An upright image in its file's own colours.

    Args:
        samples: (H, W, C), uint8 or uint16: grey, RGB or CMYK, without alpha.
        alpha: (H, W) of any of these types; None is opaque.
        profile: ICC profile; None is sRGB.
        path: The file, for the log.
    """

    samples: NDArray
    alpha: NDArray | None = None
    profile: bytes | None = None
    path: object = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, px."""
        return self.samples.shape[0], self.samples.shape[1]

    def crop(self, top: int, left: int, height: int, width: int) -> Raster:
        """A part of it, which does not keep the rest in memory."""
        place = slice(top, top + height), slice(left, left + width)
        alpha = None if self.alpha is None else self.alpha[place].copy()
        return replace(self, samples=self.samples[place].copy(), alpha=alpha)

    def rgb(self) -> Pixels:
        """Convert to sRGB, composite over white, round to 8 bits: (H, W, 3)."""
        converted = None if self.profile is None else apply_profile(self.samples, self.profile, self.path)
        rgb = _without_profile(self.samples) if converted is None else converted
        return rgb if self.alpha is None else _on_white(rgb, self.alpha)


def _without_profile(samples: NDArray) -> Pixels:
    if samples.shape[2] == 1:
        return np.repeat(to_8_bit(samples), 3, axis=2)
    if samples.shape[2] == 3:
        return to_8_bit(samples)
    most = np.iinfo(samples.dtype).max
    left = most - samples[..., 3:].astype(np.uint32)  # by black
    return to_8_bit((left - (samples[..., :3] * left + most // 2) // most).astype(samples.dtype))


def _on_white(rgb: Pixels, alpha: NDArray) -> Pixels:
    """Composite (H, W, 3) colours with (H, W) alpha over white, rounded."""
    most, a = np.iinfo(alpha.dtype).max, alpha[..., None].astype(np.uint32)
    return ((rgb * a + 255 * (most - a) + most // 2) // most).astype(np.uint8)


def check_memory(height: int, width: int) -> None:
    """Refuse an image that does not fit into memory; this replaces PIL's fixed limit on pixels.

    The environment's ISR_MAX_PIXELS, a number, is the limit where it is set.

    Raises:
        ValueError: The image is too large.
    """
    pixels, given = height * width, os.environ.get("ISR_MAX_PIXELS")
    if given is not None:
        if not given.isdecimal():
            raise ValueError(f"ISR_MAX_PIXELS={given} is not a number of pixels; set a whole number, or unset it")
        if pixels > int(given):
            raise ValueError(f"{width}x{height} px are more than ISR_MAX_PIXELS={given}; set it to {pixels} or more")
    elif pixels > _SMALL and pixels * _BYTES_PER_PIXEL > (free := _free_memory()):
        raise ValueError(
            f"{width}x{height} px take {pixels * _BYTES_PER_PIXEL / 2**30:.1f} GiB of memory to decode, "
            f"{free / 2**30:.1f} GiB are free; cut it into parts, or set ISR_MAX_PIXELS={pixels} to try"
        )


def _free_memory() -> int:
    """Bytes of free memory; within a container at most the container's."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            free = min(free, int(file.read()))
    except (OSError, ValueError, StopIteration):  # another system, or "max"
        pass
    return free


def decode(data: bytes, path: object) -> Raster:
    """Decode a file's bytes.

    Raises:
        Exception: The decoder's error for a damaged file; a ValueError names an unsupported variant.
    """
    if _is_tiff(data):
        return _tiff(data, path)
    with Image.open(io.BytesIO(data)) as image:
        check_memory(image.height, image.width)
        depth = data[24] if image.format == "PNG" else 8  # IHDR: 8 bytes signature, 8 chunk head, 8 size, the depth
        if depth == 16:
            return _deep_png(image, data, path)
        if depth in {2, 4} and image.mode == "L":
            _scale_colour_key(image, depth)
        return _by_pil(image, path)


def size_of(file: Any) -> tuple[int, int]:
    """Height and width of the upright image in a file opened for reading bytes; of most kinds only the header is read.

    Raises:
        Exception: As for `decode`.
    """
    head = file.read(4)
    file.seek(0)
    if _is_tiff(head):
        from tifffile import TiffFile

        with TiffFile(file) as tiff:
            page: Any = tiff.pages[0]
            height, width, orientation = page.imagelength, page.imagewidth, page.tags.valueof(ORIENTATION, 1)
            check_memory(height, width)
            _check_tiff(page)
    else:
        with Image.open(file) as image:
            height, width = image.height, image.width
            check_memory(height, width)
            orientation = image.getexif().get(ORIENTATION, 1)  # PNGs may have it at their end
    return (width, height) if 5 <= orientation <= 8 else (height, width)


def _is_tiff(data: bytes) -> bool:
    return data[:4] in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}


def _profile(image: Image.Image) -> bytes | None:
    """The file's profile; a damaged one, which PIL gives as None, is left for the log to name."""
    return image.info["icc_profile"] or b"damaged" if "icc_profile" in image.info else None


def _by_pil(image: Image.Image, path: object) -> Raster:
    """Decode files that PIL reads correctly."""
    image.load()  # the whole file is read here, so a truncated one fails
    ImageOps.exif_transpose(image, in_place=True)
    profile = None if image.mode == "LAB" else _profile(image)  # Lab needs none
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Raster(np.asarray(image).astype(np.uint16)[..., None], None, profile, path)
    if image.mode in {"I", "F"}:
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range, save it with 8 or 16 bits")
    if image.mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        return Raster(rgba[..., :3], rgba[..., 3], profile, path)
    if image.mode == "CMYK" and profile is not None:
        return Raster(np.asarray(image), None, profile, path)
    if image.mode in {"L", "1"} and profile is not None:
        return Raster(np.asarray(image.convert("L"))[..., None], None, profile, path)
    return Raster(np.asarray(image.convert("RGB")), None, profile, path)


def _scale_colour_key(image: Image.Image, bits: int) -> None:
    """Bring the transparent grey of a PNG to 8 bits, to which PIL brings the pixels of 2 and 4 bits alone."""
    key = image.info.get("transparency")
    if isinstance(key, int) and key < 2**bits:
        image.info["transparency"] = key * 255 // (2**bits - 1)


def _deep_png(image: Image.Image, data: bytes, path: object) -> Raster:
    image.load()  # which checks the whole file
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16:
        raise ValueError(f"PNG with 16 bits (mode {image.mode}) cannot be decoded, save it with 8 bits")
    stored = stored[..., None] if stored.ndim == 2 else stored
    samples = np.ascontiguousarray(stored[..., 2::-1])
    alpha = stored[..., 3] if stored.shape[2] == 4 else None
    if alpha is None and "transparency" in image.info:
        alpha = np.where((samples == image.info["transparency"]).all(axis=2), 0, 65535).astype(np.uint16)
    orientation = image.getexif().get(ORIENTATION, 1)
    return _upright(Raster(samples, alpha, _profile(image), path), orientation)


def _upright(raster: Raster, orientation: int) -> Raster:
    """Turn and mirror a stored array as the EXIF or TIFF tag asks; values beyond 1 to 8 mean nothing."""

    def turned(array: NDArray) -> NDArray:
        if orientation in {2, 3, 7, 8}:
            array = array[:, ::-1]
        if orientation in {3, 4, 6, 7}:
            array = array[::-1]
        return array.swapaxes(0, 1) if orientation in {5, 6, 7, 8} else array

    if orientation not in range(2, 9):
        return raster
    alpha = None if raster.alpha is None else turned(raster.alpha)
    return replace(raster, samples=turned(raster.samples), alpha=alpha)


def _check_tiff(page: Any) -> None:
    """Refuse TIFFs that neither decoder of `_tiff` reads correctly.

    Raises:
        ValueError: The message names the unsupported variant.
    """
    bits, kind = _every(page, 258, 1), _every(page, 339, 1)[0]  # BitsPerSample, SampleFormat
    if kind != 1:
        raise ValueError(f"TIFF with SampleFormat {kind} has no known range, save it with unsigned 8 or 16 bits")
    if len(set(bits)) > 1 or bits[0] not in {1, 2, 4, 8, 16}:
        raise ValueError(f"TIFF with {'/'.join(map(str, bits))} bits is not supported, save it with 8 or 16 bits")
    if not _by_arrays(page) and not _right_in_pil(page, bits[0]):
        raise ValueError(
            f"TIFF with {bits[0]} bits, {page.samplesperpixel} samples, Compression {int(page.compression)}, "
            f"PhotometricInterpretation {int(page.photometric)}, PlanarConfiguration {int(page.planarconfig)}, "
            f"Predictor {int(page.predictor)} and FillOrder {int(page.fillorder)} is not supported, save it as PNG"
        )


def _every(page: Any, tag: int, default: int) -> tuple[int, ...]:
    value = page.tags.valueof(tag, default)
    return tuple(value) if isinstance(value, tuple) else (int(value),)


def _by_arrays(page: Any) -> bool:
    """True if the samples are bytes or 16-bit words under a lossless compression, which `_samples` decodes."""
    return (
        _every(page, 258, 1)[0] in {8, 16}
        and page.compression in _COMPRESSIONS
        and page.photometric in _CHANNELS
        and page.samplesperpixel >= _CHANNELS[page.photometric]
        and (page.predictor == 1 or (page.predictor == 2 and page.compression in _PREDICTED))
        and page.fillorder == page.imagedepth == 1
        and (page.photometric in {1, 2} or _ASSOCIATED not in page.extrasamples)  # else what was multiplied is unclear
    )


def _right_in_pil(page: Any, bits: int) -> bool:
    """True for few bits, a palette, Lab, or an image compression, except variants that PIL decodes wrongly."""
    lossless = page.compression in _COMPRESSIONS
    arrays = lossless and bits == 8 and page.photometric in _CHANNELS
    return (
        not arrays
        and bits <= 8
        and page.planarconfig == 1
        and page.predictor == 1
        and (page.fillorder == 1 or bits == 1)
        and page.photometric in {0, 1, 2, 3, 5, 6, 8}
        and not (lossless and page.photometric == 6)  # YCbCr without JPEG
    )


def _tiff(data: bytes, path: object) -> Raster:
    """Decode the first page, by `_samples` where it can and otherwise by PIL."""
    from tifffile import TiffFile  # takes as long to import as everything else here

    with TiffFile(io.BytesIO(data)) as tiff:
        page: Any = tiff.pages[0]
        check_memory(page.imagelength, page.imagewidth)
        _check_tiff(page)
        if not _by_arrays(page):
            with Image.open(io.BytesIO(data)) as image:
                return _by_pil(image, path)
        samples = _samples(data, page)
        channels = _CHANNELS[page.photometric]
        colours, extra = samples[..., :channels], samples[..., channels:]
        kinds = [int(kind) for kind in page.extrasamples][: extra.shape[2]]
        orientation, profile = page.tags.valueof(ORIENTATION, 1), page.tags.valueof(34675)
    if page.photometric == 0:  # WhiteIsZero
        colours = np.iinfo(colours.dtype).max - colours
    alpha = next((extra[..., i] for i, kind in enumerate(kinds) if kind in {_ASSOCIATED, _UNASSOCIATED}), None)
    if alpha is not None and _ASSOCIATED in kinds:
        colours = _divided(colours, alpha)
    return _upright(Raster(np.ascontiguousarray(colours), alpha, profile, path), orientation)


def _divided(colours: NDArray, alpha: NDArray) -> NDArray:
    """Colours that were multiplied by alpha, as they were before, rounded."""
    most, a = np.iinfo(alpha.dtype).max, np.maximum(alpha, 1)[..., None].astype(np.uint64)
    return np.minimum((colours * np.uint64(most) + a // 2) // a, most).astype(colours.dtype)


def _samples(data: bytes, page: Any) -> NDArray:
    """All samples, (H, W, C): libtiff decompresses the strips or tiles, tifffile undoes predictor and byte order."""
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    height, width, words = page.imagelength, page.imagewidth, page.samplesperpixel // planes
    samples = np.empty((planes, height, width, words), page.dtype)
    rows, across = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
    down = -(-height // rows)
    count = planes * down * -(-width // across)
    if not count == len(page.dataoffsets) == len(page.databytecounts):
        raise ValueError(f"TIFF lists {len(page.dataoffsets)} strips or tiles, its size asks for {count}")
    last = range(down - 1, count, down) if not page.is_tiled and height % rows else range(0)
    row = across * words * page.dtype.itemsize
    stored = page.compression
    page.compression = 1  # what it decodes is decompressed
    for indices, length in (([i for i in range(count) if i not in last], rows), (list(last), height % rows)):
        for index, segment in zip(indices, _decompressed(data, page, stored, indices, length * row), strict=True):
            pixels, (plane, _, top, left, _), _ = page.decode(bytearray(segment), index)
            place = samples[plane, top : top + rows, left : left + across]
            place[:] = pixels[0, : place.shape[0], : place.shape[1]]
    return np.concatenate(list(samples), axis=2) if planes > 1 else samples[0]


def _decompressed(
    data: bytes, page: Any, compression: int, indices: list[int], size: int
) -> Iterable[NDArray[np.uint8]]:
    """Strips or tiles of one size in bytes, decompressed."""
    offsets, lengths = ([values[i] for i in indices] for values in (page.dataoffsets, page.databytecounts))
    if min(lengths, default=size) < size and compression == 1:
        raise ValueError(f"TIFF has a strip or tile of {min(lengths)} bytes, its size asks for {size}")
    if compression == 1 or not indices:
        return [np.frombuffer(data, np.uint8, size, offset) for offset in offsets]
    # libtiff reads the same file under another directory: a grey image, of which each is a row and a strip
    count, end = len(indices), len(data) + len(data) % 2
    arrays = end + 2 + 9 * 12 + 4  # behind the directory, unless there is but one value, which the directory holds
    entries = (
        (256, 1, size),
        (257, 1, count),
        (258, 1, 8),
        (259, 1, compression),
        (262, 1, 1),
        (273, count, arrays if count > 1 else offsets[0]),
        (277, 1, 1),
        (278, 1, 1),
        (279, count, arrays + 4 * count if count > 1 else lengths[0]),
    )
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, 4, *rest) for tag, *rest in entries
    )
    file = struct.pack("<4sI", b"II*\0", end) + data[8:].ljust(end - 8, b"\0") + directory + bytes(4)
    file += struct.pack(f"<{2 * count}I", *offsets, *lengths)
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image)
