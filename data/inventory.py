"""What a source holds: its images, their layout, and the files that are there and not used."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.files import printable, replacing
from data.images import Source, is_hidden, is_image

_NAMED = 4  # kinds of unused files that a line names


@dataclass(frozen=True)
class Inventory:
    """What a source holds. `str` of it is one line for the screen.

    Args:
        argument: Name of the user's argument, e.g. `predict`.
        source: Its value.
        images: Number of images that are used; a pair counts once.
        layout: How they lie there, e.g. `pairs in test_LR and test_HR`.
        unused: Files that are there and not used, and hidden folders -> why.
    """

    argument: str
    source: str
    images: int
    layout: str
    unused: Mapping[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """`predict=photos: 12 images (a folder of images); not used: 3 files (2 .heic, 1 .png)`."""
        line = f"{self.argument}={self.source}: {self.images} image{'' if self.images == 1 else 's'} ({self.layout})"
        if not self.unused:
            return line
        kinds = Counter(path.suffix.lower() or "without extension" for path in self.unused).most_common()
        named = [f"{count} {kind}" for kind, count in kinds[:_NAMED]]
        if more := sum(count for _, count in kinds[_NAMED:]):
            named.append(f"{more} others")
        return f"{line}; not used: {len(self.unused)} file{'' if len(self.unused) == 1 else 's'} ({', '.join(named)})"


def unused_files(source: Source, used: Iterable[Path], reasons: Mapping[Path, str], other: str) -> dict[Path, str]:
    """Find the files below the folders of a source that are not used.

    Args:
        source: One source or several, as `data.images.list_entries` takes them; lists and images have no such files.
        used: The files that are used.
        reasons: Files that are known not to be used -> why.
        other: Why an image is not used that `reasons` does not name.

    Returns:
        File, or hidden folder -> why it is not used; in a fixed order, those of `reasons` last.
    """
    places: dict[str, str] = {}

    def key(path: Path) -> tuple[str, str]:
        folder, name = os.path.split(path)
        if folder not in places:
            places[folder] = os.path.realpath(folder)
        return places[folder], name

    taken = {key(path) for path in (*used, *reasons)}
    sources: Sequence[str | Path] = [source] if isinstance(source, str | Path) else source
    found: dict[Path, str] = {}
    for folder in (Path(part).expanduser() for part in sources):
        for path in _files(folder) if folder.is_dir() else ():
            if key(path) not in taken:
                hidden = is_hidden(path.name)
                found[path] = "hidden" if hidden else other if is_image(path) else "no image of a kind that is read"
    return {**found, **reasons}


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, and its hidden folders as a whole; links are followed once, as in `list_entries`."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(root, name) for name in sorted([*files, *filter(is_hidden, folders)]))
        folders[:] = sorted(name for name in folders if not is_hidden(name))


def write_unused(path: Path, inventories: Iterable[Inventory]) -> bool:
    """Write a table (argument, file, reason) of the files that are not used.

    Args:
        path: The csv file to write. Without unused files nothing is written, unless an older table is there.
        inventories: What the sources hold.

    Returns:
        Whether there are such files.
    """
    rows = [
        (inventory.argument, printable(file), reason)
        for inventory in inventories
        for file, reason in inventory.unused.items()
    ]
    if rows or path.exists():
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("argument", "file", "reason"), *rows])
    return bool(rows)
