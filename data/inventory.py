"""Inventory of a source: its images, their layout, and its unused files."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from common.files import first_five, printable, replacing
from common.made import RECORD
from data.decoding import is_image
from data.packed import Lookup, path_texts
from data.sources import Part, Source, is_hidden, walk

_NAMED = 4  # kinds of unused files that a line names


class RealPaths:
    """Paths with links resolved, folder by folder, which saves most of the work where many files lie in one."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def folder(self, folder: str) -> str:
        """The real path of a folder."""
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return self._folders[folder]

    def __call__(self, file: str) -> str:
        """The real path of a file."""
        if os.path.islink(file):
            return os.path.realpath(file)
        return os.path.join(self.folder(os.path.dirname(file)), os.path.basename(file))


@dataclass(frozen=True)
class Inventory:
    """Inventory of a source. Its `str` is one line for the screen.

    Args:
        argument: Name of the user's argument, e.g. `predict`.
        source: Its value, as `data.sources.list_entries` takes it; None for the embedded photos.
        images: Number of images that are used; a pair counts once.
        layout: Their layout, e.g. `pairs in test_LR and test_HR`.
        unused: Unused files and hidden folders -> reason.
        used: The files that are used.
    """

    argument: str
    source: Source | None
    images: int
    layout: str
    unused: Mapping[Path, str] = field(default_factory=dict)
    used: Sequence[Path] = ()

    def __str__(self) -> str:
        """`predict=photos: 12 images (a folder of images); not used: 3 files (2 .heic, 1 .png)`."""
        line = f"{self._given()}: {self.images} image{'' if self.images == 1 else 's'} ({self.layout})"
        if not self.unused:
            return line
        kinds = Counter(path.suffix.lower() or "without extension" for path in self.unused).most_common()
        named = [f"{count} {kind}" for kind, count in kinds[:_NAMED]]
        if more := sum(count for _, count in kinds[_NAMED:]):
            named.append(f"{more} others")
        return f"{line}; not used: {len(self.unused)} file{'' if len(self.unused) == 1 else 's'} ({', '.join(named)})"

    def _given(self) -> str:
        if self.source is None:
            return f"{self.argument}=embedded photos"
        return (
            f"{self.argument}={self.source if isinstance(self.source, str | Path | Part) else first_five(self.source)}"
        )

    def check_apart(self, output: Path, within: bool = False) -> None:
        """Refuse an output folder that the next run would read, or that holds input files; links are resolved.

        Args:
            output: The folder, or the only file that is written.
            within: Allow input files in the output folder; only an output within the input is refused.

        Raises:
            ValueError: The output is, holds or lies in the input.
        """
        out = os.path.realpath(output)
        files = RealPaths()
        lost, inside = False, ""  # of the files in or below the output, the first by name
        for path in path_texts(self.used):
            file = files(path)
            lost |= file == out
            if file.startswith(os.path.join(out, "")) and (not inside or file < inside):
                inside = file
        if lost:
            raise ValueError(f"output={output} is an image of {self._given()}, which would be lost; give another name")
        above = {out, *map(str, Path(out).parents)}
        folders = () if self.source is None else _folders(self.source)
        read = dict.fromkeys(os.path.realpath(root) for folder in folders for root, _, _ in walk(folder))
        hint = "give an output folder apart from the input"
        if folder := next((folder for folder in read if folder in above), None):
            relation = "is" if folder == out else f"lies in {folder}, which is"
            raise ValueError(
                f"output={output} {relation} read as {self._given()}, so the next run would read it; {hint}"
            )
        if within:
            return
        for folder in [*read, *([os.path.dirname(inside)] if inside else [])]:
            if folder == out or folder.startswith(os.path.join(out, "")):
                raise ValueError(f"output={output} holds {folder}, where images of {self._given()} lie; {hint}")


def unused_files(
    source: Source, used: Iterable[Iterable[Path]], reasons: Mapping[Path, str], other: str
) -> dict[Path, str]:
    """Find the unused files below the folders of a source.

    Args:
        source: One source or several, as `data.sources.list_entries` takes them; lists and images have no such files.
        used: The files that are used, list by list.
        reasons: Files that are known not to be used -> reason.
        other: Reason for unused images that `reasons` does not name.

    Returns:
        File or hidden folder -> reason why it is not used; in a fixed order, those of `reasons` last.
    """
    real = RealPaths()

    def keys(paths: Iterable[str]) -> Iterator[str]:
        return (os.path.join(real.folder(os.path.dirname(path)), os.path.basename(path)) for path in paths)

    folders = _folders(source)
    taken = Lookup(keys(chain(*map(path_texts, used), path_texts(reasons))) if folders else ())
    found: dict[Path, str] = {}
    for folder in folders:
        for root, files, hidden in walk(folder):
            names = sorted([*files, *hidden])
            places = taken.places(keys(os.path.join(root, name) for name in names))
            for name, place in zip(names, places, strict=True):
                if place < 0 and name != RECORD:
                    kind = other if is_image(name) else "no image of a kind that is read"
                    found[Path(root, name)] = "hidden" if is_hidden(name) else kind
    return {**found, **reasons}


def _folders(source: Source) -> list[Path]:
    """The folders among one source or several."""
    sources = [source] if isinstance(source, str | Path | Part) else source
    paths = [Path(part.source if isinstance(part, Part) else part).expanduser() for part in sources]
    return [path for path in paths if path.is_dir()]


def write_unused(path: Path, inventories: Iterable[Inventory]) -> int:
    """Write a table (argument, file, reason) of the files that are not used.

    Args:
        path: The csv file to write. Without unused files nothing is written, unless an older table is there.
        inventories: Inventories of the sources.

    Returns:
        Their number.
    """
    rows = list(
        dict.fromkeys(
            (inventory.argument, printable(file), reason)
            for inventory in inventories
            for file, reason in inventory.unused.items()
        )
    )
    if rows or path.exists():
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("argument", "file", "reason"), *rows])
    return len(rows)
