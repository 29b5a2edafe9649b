"""Sources of images: folders, lists and manifests become entries of files, windows of photos and prompts."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.files import first_five, plain_name
from data.decoding import IMAGE_EXTENSIONS, is_image
from data.packed import Lazy, Packed, Paths, Picked, digests, numbered, path_texts
from data.textfiles import read_csv, read_lines

log = logging.getLogger(__name__)
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
        first: Number of photos to take, the first ones in the order of the list or of the sorted paths; null is all.
            Windows of one photo count as one.
        weight: Number of times that one pass over the data draws each of them.

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

    def of(self, entries: Entries) -> Iterator[Entry]:
        """The entries of the part, each as often as it is drawn.

        Args:
            entries: All entries of the source.
        """
        if self.first is not None and len(entries.files) < self.first:
            log.warning(
                "%s has %d photos, fewer than first=%d; all are taken", self.source, len(entries.files), self.first
            )
        taken = range(len(entries)) if self.first is None else np.flatnonzero(entries.file < self.first).tolist()
        return (entry for entry in map(entries.item, taken) for _ in range(self.weight))


Source = str | Path | Part | Sequence[str | Path | Part]


class Entry(NamedTuple):
    """An image that a source lists; values that the source does not give are None."""

    path: Path
    prompt: str | None = None
    window: Window | None = None


class Entries(Lazy[Entry]):
    """The entries of a source, in about the bytes of its texts and 28 more a row, also if many rows name one file.

    Args:
        rows: The entries.

    Attributes:
        files: The distinct files, in the order in which they first come.
        file: Number of each entry's file, (N,).
        prompts: Each entry's prompt, or None.
        windows: `top`, `left` and `side` of each entry, (N, 3), -1 where it has no window; None where no entry has one.
    """

    def __init__(self, rows: Iterable[Entry]) -> None:
        paths, texts = Packed(), Packed()
        path_at, text_at, cells = array("i"), array("i"), array("i")
        last_path: Path | None = None
        last_text: str | None = None
        for path, text, window in rows:
            if last_path is None or path != last_path:  # rows of one file mostly come one after the other
                paths.append(str(path))
                last_path = path
            if text is not None and text != last_text:
                texts.append(text)
                last_text = text
            path_at.append(len(paths) - 1)
            text_at.append(-1 if text is None else len(texts) - 1)
            cells.extend(window or (-1, -1, -1))
        first, number = numbered(digests(paths))
        if len(first) < len(paths):
            paths = Packed(Picked(paths, first))
        self.files = Paths(paths)
        self.file = number[np.array(path_at, np.int32)]
        self.prompts = Picked[str | None](texts, np.array(text_at, np.int32))
        windows = np.array(cells, np.int32).reshape(-1, 3)
        self.windows = windows if bool((windows >= 0).any()) else None

    def __len__(self) -> int:
        return len(self.file)

    def window(self, place: int) -> Window | None:
        """The window of an entry."""
        if self.windows is None or self.windows[place, 2] < 0:
            return None
        return Window(*map(int, self.windows[place]))

    def item(self, place: int) -> Entry:  # noqa: D102  # as of Lazy
        return Entry(self.files[int(self.file[place])], self.prompts[place], self.window(place))

    def keys(self) -> np.ndarray:
        """File and window of each entry, (N, 4): equal where entries are of the same pixels."""
        windows = np.full((len(self), 3), -1, np.int32) if self.windows is None else self.windows
        return np.column_stack([self.file, windows])

    def distinct(self) -> Entries:
        """The entries, of equal ones the first with the last one's prompt."""
        first, number = numbered(self.keys())
        last = np.zeros(len(first), np.int64)
        last[number] = np.arange(len(self))
        if len(first) == len(self):
            return self
        return Entries(
            self[i]._replace(prompt=self.prompts[j]) for i, j in zip(first.tolist(), last.tolist(), strict=True)
        )

    def smallest_side(self) -> int | None:
        """Side of the smallest window; None without one."""
        return None if self.windows is None else int(self.windows[self.windows[:, 2] > 0, 2].min())


def is_hidden(name: str) -> bool:
    """True if listings leave out a folder's entry: dot-files, and the files that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


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


def _images_below(folder: Path) -> list[str]:
    """Image files below a folder, hidden ones left out, sorted by relative path."""
    return sorted(
        os.path.join(root, name)
        for root, files, _ in walk(folder)
        for name in files
        if is_image(name) and not is_hidden(name)
    )


def _rows_of_parquet(path: Path, argument: str) -> Iterator[dict[str, Any]]:
    require_pyarrow(path, argument)
    table = importlib.import_module("pyarrow.parquet").ParquetFile(path)
    return (row for batch in table.iter_batches() for row in batch.to_pylist())


def require_pyarrow(path: Path, argument: str) -> None:
    """Refuse a parquet file where pyarrow, which is optional, is not installed.

    Raises:
        ValueError: It is not; the message names the user's argument.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{argument}={path}: parquet needs pyarrow; pip install pyarrow, or give a csv instead")


def read_table(path: Path, argument: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Read a csv or parquet file with a header.

    Args:
        path: The file.
        argument: The user's argument it came from, for messages.

    Returns:
        Its columns, and its rows as dicts, read one by one.

    Raises:
        ValueError: The file holds no rows, or parquet cannot be read here.
    """
    rows = _rows_of_parquet(path, argument) if path.suffix.lower() == ".parquet" else read_csv(path, argument)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{argument}={path} has no rows; give a table with a header line and at least one row")
    return list(first), itertools.chain([first], rows)


def _window(row: dict[str, Any], number: int, table: str) -> Window | None:
    """The window of a manifest's row; None where its three cells are empty."""
    cells = row["top"], row["left"], row["side"]
    if all(cell in (None, "") for cell in cells):
        return None
    try:
        window = Window(*(int(float(cell)) for cell in cells))  # a table with gaps holds 512.0 for 512
        if window != tuple(map(float, cells)) or min(window) < 0 or window.side < 1 or max(window) >= 1 << 31:
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


def _listed(path: Path, argument: str) -> Iterator[Entry]:
    """Entries of a list or manifest; relative paths count from the folder the file lies in."""
    if path.suffix.lower() == ".txt":
        return (Entry(_named(path.parent, line)) for line in read_lines(path, argument) if line.strip())
    columns, rows = read_table(path, argument)
    column = next((name for name in ("image_path", "path") if name in columns), None)
    if column is None:
        raise ValueError(f"{argument}={path} has columns {', '.join(columns)}; name the one with files image_path")
    given = [name for name in Window._fields if name in columns]
    if given and len(given) < len(Window._fields):
        raise ValueError(
            f"{argument}={path} has of a window's columns only {', '.join(given)}; give all of top, left, side, or none"
        )
    return (
        Entry(
            path.parent / row[column],
            row.get("prompt"),
            _window(row, number, f"{argument}={path}") if given else None,
        )
        for number, row in enumerate(rows, 1)
    )


def list_entries(source: Source, argument: str = "source") -> Entries:
    """List the image files, or the windows of them, that a source names.

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
        ValueError: The source holds no images, is of an unknown kind, or has an invalid window.
    """
    if isinstance(source, Part):
        return Entries(source.of(list_entries(source.source, argument)))
    if not isinstance(source, str | Path):
        if not source:
            raise ValueError(f"{argument}=[] names nothing; give a folder, an image, a list or a manifest")
        return Entries(entry for part in source for entry in list_entries(part, argument))
    path = Path(source).expanduser()
    if path.is_dir():
        found = _images_below(path)
        if not found:
            kinds = " ".join(sorted(IMAGE_EXTENSIONS))
            raise ValueError(f"{argument}={source} holds no images; put files there that end in one of {kinds}")
        return Entries(Entry(Path(file)) for file in found)
    if not path.exists():
        raise FileNotFoundError(f"{argument}={source} does not exist; give a folder, an image, a list or a manifest")
    if is_image(path):
        return Entries([Entry(path)])
    if path.suffix.lower() not in {".txt", ".csv", ".parquet"}:
        raise ValueError(f"{argument}={source} is of no known kind; give a folder, an image, a .txt, .csv or .parquet")
    entries = Entries(_listed(path, argument))
    if not len(entries):
        raise ValueError(f"{argument}={path} is an empty list; write one image path per line")
    gone = np.flatnonzero([not os.path.isfile(file) for file in entries.files.texts])
    if len(gone):
        missing = np.flatnonzero(np.isin(entries.file, gone)).tolist()
        raise FileNotFoundError(
            f"{argument}={source} lists {len(missing)} of {len(entries)} files that do not exist: "
            f"{first_five(entries[i].path for i in missing)}; correct the list (relative paths count from its folder)"
        )
    return entries


def whole_entries(source: Source, argument: str = "source") -> Entries:
    """List the image files that a source names, and refuse windows; arguments as for `list_entries`.

    Raises:
        FileNotFoundError: The source, or a file it lists, does not exist (the first five are named).
        ValueError: The source holds no images, is of an unknown kind, or lists windows.
    """
    entries = list_entries(source, argument)
    if entries.windows is not None:
        windows = int((entries.windows[:, 2] > 0).sum())
        raise ValueError(
            f"{argument}={source} lists {windows} windows of photos (columns top, left, side), which only training and "
            f"validation take; give {argument} whole images"
        )
    return entries


def list_images(source: Source, argument: str = "source") -> list[tuple[Path, str | None]]:
    """List the image files that a source names; arguments and errors are those of `whole_entries`.

    Returns:
        (path, prompt) in a fixed order; the prompt is None where the source gives none.
    """
    return [(entry.path, entry.prompt) for entry in whole_entries(source, argument)]


def unique_names(paths: Sequence[Path], root: Path | None = None) -> Packed:
    """A unique name for each file, used for its results.

    Args:
        paths: Distinct files.
        root: The folder they were found in: its sub-folders stay in the names. None: the bare stem where that is
            unique, otherwise with the folders below the common one.

    Returns:
        Names without extension; files of one stem (`a.png`, `a.jpg`) keep theirs. See `plain_name` for names with
        line ends, with bytes that are not UTF-8, and for very long ones.
    """
    texts = path_texts(paths)
    if root is None:
        if len(np.unique(digests(_stem(os.path.basename(text)) for text in texts))) == len(paths):
            return Packed(plain_name(_stem(os.path.basename(text))) for text in texts)
        root = Path(os.path.commonpath({os.path.dirname(os.path.abspath(text)) for text in texts}))
    top = os.path.join(os.path.abspath(root), "")

    def relative() -> Iterator[str]:
        return (os.path.abspath(text).removeprefix(top) for text in texts)

    _, number = numbered(digests(map(_stem, relative())))
    shared = np.bincount(number)[number] > 1

    def names() -> Iterator[str]:
        return (name if several else _stem(name) for name, several in zip(relative(), shared, strict=True))

    unique = len(np.unique(digests(names()))) == len(paths)
    return Packed(plain_name(name) for name in (names() if unique else relative()))


def _stem(path: str) -> str:
    """A path without its extension, as `Path.with_suffix("")`."""
    folder, slash, name = path.rpartition("/")
    dot = name.rfind(".")
    return folder + slash + (name[:dot] if 0 < dot < len(name) - 1 else name)
