"""Image files in and out: whatever a folder holds becomes uint8 RGB, or an error that names the file.

Colour profiles are not applied: like the field's own loaders, a file's numbers are taken as sRGB.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]
Source = str | Path | Sequence[str | Path]

IMAGE_EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif"}
)
_ORIENTATION = 0x0112  # EXIF and TIFF tag
_BITS_PER_SAMPLE = 258  # TIFF tag
_META_INFO_SIZE = re.compile(r"\s+\(\d+,\s*\d+(,\s*\d+)?\)$")  # BasicSR meta_info: "name.png (480,480,3)"


class Window(NamedTuple):
    """A square of a photo, px: rows `top` to `top + side`, columns `left` to `left + side`."""

    top: int
    left: int
    side: int


class Entry(NamedTuple):
    """An image that a source lists; what the source does not give is None."""

    path: Path
    prompt: str | None = None
    window: Window | None = None


class ImageError(ValueError):
    """A file that is not a readable image; the message names it and says why."""


def is_image(path: str | Path) -> bool:
    """Whether the name ends like an image file, in upper or lower case."""
    return os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS


def is_hidden(name: str) -> bool:
    """Whether a folder's entry is left out of listings: dot-files, and what macOS puts into archives."""
    return name.startswith(".") or name == "__MACOSX"


def first_five(items: Iterable[object]) -> str:
    """The first five of them for an error message, and how many more there are."""
    listed = [str(item) for item in items]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _image_error(path: str | Path, reason: object) -> ImageError:
    text = " ".join(str(reason).split()) or type(reason).__name__
    return ImageError(f"cannot read image {path}: {text}; replace the file or take it out of the set")


def _bytes(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise _image_error(path, error.strerror or error) from error
    if not data:
        raise _image_error(path, "the file is empty")
    return data


def _bits_per_channel(image: Image.Image, data: bytes) -> int:
    """Stored bits of one channel, which PIL's mode hides for RGB and RGBA files."""
    if image.format == "PNG":
        return data[24]  # IHDR: 8 bytes signature, 8 chunk head, 4 width, 4 height, then the depth
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 8


def _to_8_bit(values: NDArray) -> Pixels:
    """Round 16-bit values / 257 (65535 -> 255), (H, W) or (H, W, C)."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _on_white(rgb: Pixels, alpha: Pixels) -> Pixels:
    """Composite (H, W, 3) colours with (H, W) alpha over white, rounded."""
    a = alpha[..., None].astype(np.uint32)
    return ((rgb * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in {"RGBA", "RGBa", "LA", "La", "PA"} or "transparency" in image.info


def _decode(image: Image.Image, data: bytes) -> Pixels:
    """PIL's image to (H, W, 3), see read_image."""
    deep = _bits_per_channel(image, data) > 8
    orientation = image.getexif().get(_ORIENTATION, 1)
    if deep and image.format == "TIFF" and orientation != 1:
        # OpenCV's releases disagree about turning such files
        raise ValueError(f"16-bit TIFF with orientation tag {orientation} is not supported, save it upright")
    image.load()  # the whole file is read here, so a truncated one fails
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return np.repeat(_to_8_bit(np.asarray(image))[..., None], 3, axis=2)
    if image.mode in {"I", "F"}:
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range, save it with 8 or 16 bits")
    if not deep:
        if _has_alpha(image):
            rgba = np.asarray(image.convert("RGBA"))
            return _on_white(rgba[..., :3], rgba[..., 3])
        return np.asarray(image.convert("RGB"))
    # PIL cuts 16-bit RGB off to its high byte; OpenCV keeps all bits (but no alpha under this flag)
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if bgr is None or bgr.dtype != np.uint16:
        raise ValueError(f"{image.format} with more than 8 bits (mode {image.mode}) is not supported, save it as PNG")
    rgb = _to_8_bit(bgr[..., ::-1])
    if orientation != 1:
        upright = Image.fromarray(rgb)
        upright.getexif()[_ORIENTATION] = orientation
        ImageOps.exif_transpose(upright, in_place=True)
        rgb = np.asarray(upright)
    return _on_white(rgb, np.asarray(image.convert("RGBA"))[..., 3]) if _has_alpha(image) else rgb


def read_image(path: str | Path) -> Pixels:
    """Read any common image file as 8-bit RGB.

    EXIF orientation is applied. Grey, palette, CMYK and grey-alpha files become RGB. Transparent pixels are composited
    over white, what viewers show; merely dropping alpha would bring up colours nobody has ever seen. 16-bit files are
    divided by 257 and rounded. Of an animation the first frame is taken.

    Args:
        path: The file.

    Returns:
        (H, W, 3) uint8, RGB, own and writable memory.

    Raises:
        ImageError: The file is missing, empty, truncated, no image, or of a kind that is refused (32-bit pixels,
            16-bit TIFF with an orientation tag); the message names the file and the reason.
    """
    data = _bytes(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = _decode(image, data)
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        reason = "not an image PIL can identify" if isinstance(error, UnidentifiedImageError) else error
        raise _image_error(path, reason) from error
    return np.array(pixels, dtype=np.uint8, order="C")


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width in px, with EXIF orientation applied; most kinds need only their header read.

    Raises:
        ImageError: The header cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":
                image.load()  # PIL turns such files by itself, some releases at opening, some at loading
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception as error:  # as in read_image
        reason = "not an image PIL can identify" if isinstance(error, UnidentifiedImageError) else error
        raise _image_error(path, reason) from error
    return (width, height) if turned else (height, width)


def _walk(folder: Path) -> list[Path]:
    """Image files below a folder, links followed once, dot-files left out, sorted by relative path."""
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        found += [Path(root, name) for name in files if is_image(name) and not is_hidden(name)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _rows_of_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(file)]


def _rows_of_parquet(path: Path, argument: str) -> list[dict[str, str]]:
    require_pyarrow(path, argument)
    return importlib.import_module("pyarrow.parquet").read_table(path).to_pylist()


def require_pyarrow(path: Path, argument: str) -> None:
    """Refuse a parquet file where pyarrow, which is optional, is not installed.

    Raises:
        ValueError: It is not; the message names the user's argument.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{argument}={path}: parquet needs pyarrow; pip install pyarrow, or give a csv instead")


def read_table(path: Path, argument: str) -> list[dict[str, str]]:
    """Rows of a csv or parquet file with a header, as dicts.

    Args:
        path: The file.
        argument: The user's argument it came from, for messages.

    Raises:
        ValueError: The file holds no rows, or parquet cannot be read here.
    """
    rows = _rows_of_parquet(path, argument) if path.suffix.lower() == ".parquet" else _rows_of_csv(path)
    if not rows:
        raise ValueError(f"{argument}={path} has no rows; give a table with a header line and at least one row")
    return rows


def _window(row: dict[str, Any], number: int, table: str) -> Window | None:
    """The window of a manifest's row; None where its three cells are empty."""
    cells = row["top"], row["left"], row["side"]
    if all(cell in (None, "") for cell in cells):
        return None
    try:
        window = Window(*(int(float(cell)) for cell in cells))  # a table with gaps holds 512.0 for 512
        if window != tuple(map(float, cells)) or min(window) < 0 or window.side < 1:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        given = ", ".join(f"{name}={cell}" for name, cell in zip(Window._fields, cells, strict=True))
        raise ValueError(
            f"{table}: row {number} has {given}; give whole px, side >= 1, or leave all three empty"
        ) from None
    return window


def _listed(path: Path, argument: str) -> list[Entry]:
    """Entries of a list or manifest; relative paths count from the folder the file lies in."""
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        entries = [Entry(path.parent / _META_INFO_SIZE.sub("", line)) for line in lines if line]
        if not entries:
            raise ValueError(f"{argument}={path} is an empty list; write one image path per line")
        return entries
    rows = read_table(path, argument)
    column = next((name for name in ("image_path", "path") if name in rows[0]), None)
    if column is None:
        raise ValueError(f"{argument}={path} has columns {', '.join(rows[0])}; name the one with files image_path")
    given = [name for name in Window._fields if name in rows[0]]
    if given and len(given) < len(Window._fields):
        raise ValueError(
            f"{argument}={path} has of a window's columns only {', '.join(given)}; give all of top, left, side, or none"
        )
    files = {name: path.parent / name for name in {row[column] for row in rows}}  # one for all windows of a photo
    return [
        Entry(
            files[row[column]],
            row.get("prompt"),
            _window(row, number, f"{argument}={path}") if given else None,
        )
        for number, row in enumerate(rows, 1)
    ]


def list_entries(source: Source, argument: str = "source") -> list[Entry]:
    """Find out which image files, or which windows of them, are meant.

    Args:
        source: A folder (searched recursively; sorted by relative path), an image file, a txt list (one path a line),
            a csv or parquet manifest (column `image_path` or `path`, optionally `prompt`, optionally `top`, `left` and
            `side` of a window in px), or a sequence of these, one after the other. Lists keep their order, and what is
            named twice counts twice, which is how a set is given more weight. Relative paths in a list count from the
            list's own folder.
        argument: Name of the user's argument, for messages.

    Returns:
        The entries in a fixed order.

    Raises:
        FileNotFoundError: The source, or a file it lists, does not exist (the first five are named).
        ValueError: The source holds no images, is of an unknown kind, or has a window that is none.
    """
    if not isinstance(source, str | Path):
        if not source:
            raise ValueError(f"{argument}=[] names nothing; give a folder, an image, a list or a manifest")
        return [entry for part in source for entry in list_entries(part, argument)]
    path = Path(source).expanduser()
    if path.is_dir():
        found = _walk(path)
        if not found:
            kinds = " ".join(sorted(IMAGE_EXTENSIONS))
            raise ValueError(f"{argument}={source} holds no images; put files there that end in one of {kinds}")
        return [Entry(file) for file in found]
    if not path.exists():
        raise FileNotFoundError(f"{argument}={source} does not exist; give a folder, an image, a list or a manifest")
    if is_image(path):
        return [Entry(path)]
    if path.suffix.lower() not in {".txt", ".csv", ".parquet"}:
        raise ValueError(f"{argument}={source} is of no known kind; give a folder, an image, a .txt, .csv or .parquet")
    entries = _listed(path, argument)
    gone = {file for file in dict.fromkeys(entry.path for entry in entries) if not file.is_file()}
    missing = [entry.path for entry in entries if entry.path in gone]
    if missing:
        raise FileNotFoundError(
            f"{argument}={source} lists {len(missing)} of {len(entries)} files that do not exist: "
            f"{first_five(missing)}; correct the list (relative paths count from its folder)"
        )
    return entries


def list_images(source: Source, argument: str = "source") -> list[tuple[Path, str | None]]:
    """Find out which image files are meant, where only whole images are of use; arguments as for `list_entries`.

    Returns:
        (path, prompt) in a fixed order; the prompt is None where the source gives none.

    Raises:
        FileNotFoundError: The source, or a file it lists, does not exist (the first five are named).
        ValueError: The source holds no images, is of an unknown kind, or lists windows.
    """
    entries = list_entries(source, argument)
    windows = sum(entry.window is not None for entry in entries)
    if windows:
        raise ValueError(
            f"{argument}={source} lists {windows} windows of photos (columns top, left, side), which only training "
            f"takes; give {argument} whole images"
        )
    return [(entry.path, entry.prompt) for entry in entries]
