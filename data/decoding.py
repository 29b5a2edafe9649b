"""Reading of image files: any file of a folder becomes uint8 RGB, or an error that names the file.

Colour profiles are applied only here: `read_image` always returns sRGB. The field's own loaders ignore the profile and
take a file's numbers as sRGB.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from common.errors import one_line
from common.files import printable
from data.colours import Pixels as Pixels
from data.rasters import MOST_TEXT, Raster, decode, size_of

IMAGE_EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif"}
)


class ImageError(ValueError):
    """A file that is not a readable image; the message names it and the reason."""


def is_image(path: str | Path) -> bool:
    """True if the name ends like an image file, in upper or lower case."""
    return os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS


def _image_error(path: str | Path, reason: object) -> ImageError:
    text = one_line(reason)
    return ImageError(f"cannot read image {printable(path)}: {text}; replace the file or take it out of the set")


def _bytes(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _image_error(path, error.strerror or error) from error
    if not data:
        raise _image_error(path, "the file is empty")
    return data


def read_raster(path: str | Path) -> Raster:
    """Decode an image file of any common kind, with the colours that its profile describes; `rgb` makes them sRGB.

    Orientation is applied. An animation gives its first frame, a file of several pages its first page.

    Args:
        path: The file.

    Raises:
        ImageError: The file is missing, empty, truncated, not an image, too large for the free memory, or of a kind
            that is refused; the message names the file and the reason.
    """
    data = _bytes(path)
    try:
        return decode(data, path)
    except Exception as error:  # the decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise _image_error(path, _reason(error)) from error


def _reason(error: Exception) -> object:
    if isinstance(error, UnidentifiedImageError):
        return "not an image PIL can identify"
    if "MAX_TEXT" in str(error):  # PIL's message advises to change its constant
        return f"its texts or its colour profile take more than {MOST_TEXT} bytes; save it without them"
    return error


def read_image(path: str | Path) -> Pixels:
    """Read any common image file as 8-bit sRGB.

    Orientation is applied. Grey, palette, CMYK and grey-alpha files become RGB. Colours are converted from the file's
    profile to sRGB; a file without one is sRGB already. Transparent pixels are composited over white, as
    viewers do; dropping alpha would show colours that are meant to be hidden. 16-bit values are divided by 257 and
    rounded. An animation gives its first frame.

    Args:
        path: The file.

    Returns:
        (H, W, 3) uint8, RGB, own and writable memory.

    Raises:
        ImageError: As for `read_raster`; 32-bit pixels are refused, for instance.
    """
    return np.array(read_raster(path).rgb(), dtype=np.uint8, order="C")


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width in px of what `read_image` gives; most kinds need only their header read.

    Raises:
        ImageError: The header cannot be read, or it shows that `read_image` refuses the file.
    """
    try:
        with Path(path).open("rb") as file:
            return size_of(file)
    except Exception as error:  # as in read_raster
        raise _image_error(path, _reason(error)) from error
