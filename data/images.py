"""Image files in and out: whatever a folder holds becomes uint8 RGB, or an error that names the file.

Colour profiles are applied here and nowhere else: all that leaves `read_image` is sRGB. The field's own loaders take a
file's numbers as sRGB, whatever its profile says.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from common.files import printable
from data.colours import Pixels as Pixels
from data.rasters import MOST_TEXT, Raster, decode, size_of
from data.textfiles import read_csv, read_lines

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif"}
)
_META_INFO_SIZE = re.compile(r"\s+\(\d+,\s*\d+(,\s*\d+)?\)$")  # BasicSR meta_info: "name.png (480,480,3)"


class Window(NamedTuple):
    """A square of a photo, px: rows `top` to `top + side`, columns `left` to `left + side`."""

    top: int
    left: int
    side: int


@dataclass(frozen=True)
class Part:
    """A part of a set of photos, or a set that is drawn more often than others.

    Args:
        source: Folder, txt list, csv or parquet manifest.
        first: How many photos to take, the first ones in the order of the list or of the sorted paths; null is all.
            Windows of one photo count as one.
        weight: How many times one pass over the data draws each of them.

    Raises:
        ValueError: A number is out of range.
    """

    source: str
    first: int | None = None
    weight: int = 1

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("weight", self.weight)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} of {self.source} is out of range; set {name} >= 1")

    def __str__(self) -> str:
        """`FFHQ (first 10000, weight 2)`."""
        first = [] if self.first is None else [f"first {self.first}"]
        weight = [] if self.weight == 1 else [f"weight {self.weight}"]
        return self.source + (f" ({', '.join(first + weight)})" if first or weight else "")

    def of(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries of the part, each as often as it is drawn.

        Args:
            entries: All entries of the source.
        """
        paths = dict.fromkeys(entry.path for entry in entries)
        if self.first is not None and len(paths) < self.first:
            log.warning("%s has %d photos, fewer than first=%d; all are taken", self.source, len(paths), self.first)
        taken = set(itertools.islice(paths, self.first))
        return [entry for entry in entries if entry.path in taken for _ in range(self.weight)]


Source = str | Path | Part | Sequence[str | Path | Part]


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
    listed = [printable(item) for item in items]
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def _image_error(path: str | Path, reason: object) -> ImageError:
    text = " ".join(str(reason).split()) or type(reason).__name__
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

    Orientation is applied. Of an animation or a file of several pages the first one is taken.

    Args:
        path: The file.

    Raises:
        ImageError: The file is missing, empty, truncated, no image, too large for the memory there is, or of a kind
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
    if "MAX_TEXT" in str(error):  # PIL's advice is to change its constant
        return f"its texts or its colour profile take more than {MOST_TEXT} bytes; save it without them"
    return error


def read_image(path: str | Path) -> Pixels:
    """Read any common image file as 8-bit sRGB.

    Orientation is applied. Grey, palette, CMYK and grey-alpha files become RGB. Colours are converted from the file's
    profile to sRGB; a file without one is sRGB already. Transparent pixels are composited over white, what viewers
    show; merely dropping alpha would bring up colours nobody has ever seen. 16-bit values are divided by 257 and
    rounded. Of an animation the first frame is taken.

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
        ImageError: The header cannot be read, or says that `read_image` refuses the file.
    """
    try:
        with Path(path).open("rb") as file:
            return size_of(file)
    except Exception as error:  # as in read_raster
        raise _image_error(path, _reason(error)) from error


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Visit a folder and all folders below it; links are followed, each folder is visited once.

    Args:
        folder: The folder.

    Yields:
        A visited folder, the names of its files, and the names of its hidden folders, which are not visited.
    """
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden = [name for name in folders if is_hidden(name)]
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield root, files, hidden


def _images_below(folder: Path) -> list[Path]:
    """Image files below a folder, hidden ones left out, sorted by relative path."""
    found = [
        Path(root, name) for root, files, _ in walk(folder) for name in files if is_image(name) and not is_hidden(name)
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


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
    rows = _rows_of_parquet(path, argument) if path.suffix.lower() == ".parquet" else read_csv(path, argument)
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


def _named(folder: Path, line: str) -> Path:
    """The file that a list's line names: as it stands there where such a file exists, else without what is around."""
    bare = line.strip()
    names = (line, bare, _META_INFO_SIZE.sub("", bare))
    return next((path for path in (folder / name for name in names) if path.is_file()), folder / names[-1])


def _listed(path: Path, argument: str) -> list[Entry]:
    """Entries of a list or manifest; relative paths count from the folder the file lies in."""
    if path.suffix.lower() == ".txt":
        entries = [Entry(_named(path.parent, line)) for line in read_lines(path, argument) if line.strip()]
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
            `side` of a window in px), a `Part` of one of these, or a sequence of all these, one after the other. Lists
            keep their order, and what is named twice counts twice. Relative paths in a list count from the list's own
            folder.
        argument: Name of the user's argument, for messages.

    Returns:
        The entries in a fixed order.

    Raises:
        FileNotFoundError: The source, or a file it lists, does not exist (the first five are named).
        ValueError: The source holds no images, is of an unknown kind, or has a window that is none.
    """
    if isinstance(source, Part):
        return source.of(list_entries(source.source, argument))
    if not isinstance(source, str | Path):
        if not source:
            raise ValueError(f"{argument}=[] names nothing; give a folder, an image, a list or a manifest")
        return [entry for part in source for entry in list_entries(part, argument)]
    path = Path(source).expanduser()
    if path.is_dir():
        found = _images_below(path)
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
            f"{argument}={source} lists {windows} windows of photos (columns top, left, side), which only training and "
            f"validation take; give {argument} whole images"
        )
    return [(entry.path, entry.prompt) for entry in entries]
