"""Colour profiles: the numbers of a file become sRGB, by relative colorimetric intent with black point compensation."""

from __future__ import annotations

import functools
import io
import logging
import struct
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from common.errors import one_line

Pixels = NDArray[np.uint8]
Convert = Callable[[NDArray], Pixels]

_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_SPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}
_STEPS = 65536  # of linear light, in the table that encodes it: 0.05 of a level at most
_named: set[bytes] = set()

log = logging.getLogger(__name__)


def to_8_bit(values: NDArray) -> Pixels:
    """Round 16-bit values / 257 (65535 -> 255); 8-bit values stay."""
    return values if values.dtype == np.uint8 else ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def apply_profile(samples: NDArray, profile: bytes, path: object) -> Pixels | None:
    """Convert an image from its profile's colours to sRGB.

    Args:
        samples: (H, W, 1) grey, (H, W, 3) RGB or (H, W, 4) CMYK; uint8 or uint16.
        profile: The bytes of an ICC profile.
        path: The image's file, for the log.

    Returns:
        (H, W, 3), or None if nothing is converted: the profile is sRGB, or it cannot be used. The log names an
        unusable profile and its first file once in each process.
    """
    converter = _converter(profile, samples.shape[2], samples.dtype == np.uint16)
    if isinstance(converter, str):
        if profile not in _named:
            _named.add(profile)
            log.warning("%s: the colour profile is ignored here and in all files that hold it: %s", path, converter)
        return None
    return None if converter is None else converter(samples)


@functools.lru_cache(maxsize=64)
def _converter(profile: bytes, channels: int, deep: bool) -> Convert | str | None:
    """The conversion, None for sRGB, or the reason why the profile cannot be used."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        if channels == 1 and space == "RGB":
            colour = _converter(profile, 3, deep)
            return _by_table(colour, deep) if callable(colour) else colour
        if space != _SPACES[channels]:
            return f"it is for {space}, the image is {_SPACES[channels]}"
        lookup = "A2B0" in (tags := _tags(profile)) or "A2B1" in tags
        if channels == 3 and not lookup and opened.profile.connection_space.strip() == "XYZ":
            convert = _by_curves_and_matrix(opened.profile, tags, deep)
        else:
            convert = _by_transform(opened, channels, deep)
        return None if _changes_nothing(convert, channels, deep) else convert
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError, struct.error) as error:
        return one_line(error)


def _changes_nothing(convert: Convert, channels: int, deep: bool) -> bool:
    """No colour of a grid moves by more than one level: many programs write sRGB profiles, each with other bytes."""
    if channels == 4:
        return False
    steps = np.linspace(0, 255, 256 if channels == 1 else 18).astype(np.uint8)
    grid = np.stack(np.meshgrid(*[steps] * channels, indexing="ij"), axis=-1).reshape(1, -1, channels)
    moved = convert(grid.astype(np.uint16) * 257 if deep else grid).astype(int) - grid
    return bool(np.abs(moved).max() <= 1)


def _by_transform(opened: ImageCms.ImageCmsProfile, channels: int, deep: bool) -> Convert:
    """By PIL's LittleCMS, which has no 16-bit mode for colours: such data is rounded to 8 bits first."""
    mode = "I;16" if channels == 1 and deep else _MODES[channels]
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if channels == 1:  # a table is made, so that exact is fast enough
        flags |= ImageCms.Flags.NOOPTIMIZE
    transform = ImageCms.buildTransform(
        opened,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags,
    )
    if channels == 1:
        return _by_table(lambda grey: np.asarray(transform.apply(Image.fromarray(grey[..., 0]))), deep)
    return lambda samples: np.asarray(transform.apply(Image.fromarray(to_8_bit(samples), mode)))


def _by_table(convert: Convert, deep: bool) -> Convert:
    """Grey images by a table of all levels, which is converted once."""
    levels = np.arange(65536, dtype=np.uint16) if deep else np.arange(256, dtype=np.uint8)
    table = convert(np.repeat(levels[None, :, None], 3, axis=2))[0]
    return lambda samples: table[samples[..., 0]]


def _by_curves_and_matrix(opened: Any, tags: dict[str, bytes], deep: bool) -> Convert:
    """By a table for each channel's curve, a 3 x 3 matrix and a table for sRGB's curve; 16-bit data in float64."""
    values = np.arange(65536 if deep else 256) / (65535 if deep else 255)
    kind = np.float64 if deep else np.float32
    curves = np.stack([_curve(tags[f"{channel}TRC"], values) for channel in "rgb"]).astype(kind)
    matrix = np.linalg.solve(_colorants(ImageCms.createProfile("sRGB")), _colorants(opened)) * _STEPS
    light = (np.arange(_STEPS) + 0.5) / _STEPS  # in the middle of each step of the last table
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    encoded = np.rint(255 * srgb).astype(np.uint8)

    def convert(samples: NDArray) -> Pixels:
        if deep:
            linear = cv2.merge([np.take(curve, samples[..., i]) for i, curve in enumerate(curves)])
        else:
            linear = cv2.LUT(np.ascontiguousarray(samples), np.ascontiguousarray(curves.T)[None])
        steps = cv2.transform(linear, matrix).astype(np.intp)
        return np.take(encoded, steps, mode="clip")  # what lies outside sRGB takes the nearest value of each channel

    return convert


def _colorants(opened: Any) -> NDArray[np.float64]:
    """XYZ of red, green and blue as columns, adapted to D50."""
    found = [opened.red_colorant, opened.green_colorant, opened.blue_colorant]
    if None in found:
        raise ValueError("its colorants are missing")
    return np.array([xyz for xyz, _ in found]).T


def _tags(profile: bytes) -> dict[str, bytes]:
    """The profile's tags by name (ICC.1:2022, 7.3)."""
    (count,) = struct.unpack_from(">I", profile, 128)
    table = (struct.unpack_from(">4sII", profile, 132 + 12 * i) for i in range(min(count, len(profile) // 12)))
    return {name.decode("latin-1"): profile[start : start + size] for name, start, size in table}


def _curve(tag: bytes, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear light of stored values in [0, 1] (ICC.1:2022, 10.6 curveType and 10.18 parametricCurveType)."""
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        points = np.array(struct.unpack_from(f">{count}H", tag, 12))
        if count < 2:
            return np.asarray(values ** (points[0] / 256 if count else 1.0))
        return np.interp(values, np.linspace(0, 1, count), points / 65535)
    if tag[:4] != b"para":
        raise ValueError(f"its curve is of the unknown type {tag[:4]!r}")
    (function,) = struct.unpack_from(">H", tag, 8)
    given = np.array(struct.unpack_from(f">{(1, 3, 4, 5, 7)[function]}i", tag, 12)) / 65536
    gamma, a, b, c, d, e, f = _parameters(function, list(given))
    power = np.clip(a * values + b, 0, None) ** gamma + e
    return np.clip(np.where(values >= d, power, c * values + f), 0, 1)


def _parameters(function: int, given: list[float]) -> list[float]:
    """g, a, b, c, d, e, f of Y = (a X + b)^g + e for X >= d, else c X + f, from any of the five functions' lists."""
    if function == 0:
        return [given[0], 1, 0, 0, 0, 0, 0]
    if function in {1, 2}:
        gamma, a, b = given[:3]
        offset = given[3] if function == 2 else 0
        return [gamma, a, b, 0, -b / a, offset, offset]
    return [*given, 0, 0] if function == 3 else given
