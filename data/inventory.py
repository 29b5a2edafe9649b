"""What a source holds: its images, their layout, and the files that are there and not used."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.files import printable, replacing
from common.made import RECORD
from data.images import Part, Source, first_five, is_hidden, is_image, walk

_NAMED = 4  # kinds of unused files that a line names


@dataclass(frozen=True)
class Inventory:
    """What a source holds. `str` of it is one line for the screen.

    Args:
        argument: Name of the user's argument, e.g. `predict`.
        source: Its value, as `data.images.list_entries` takes it; None for the embedded photos.
        images: Number of images that are used; a pair counts once.
        layout: How they lie there, e.g. `pairs in test_LR and test_HR`.
        unused: Files that are there and not used, and hidden folders -> why.
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
        """Refuse an output folder from which the next run would read, or in which input files lie; links are resolved.

        Args:
            output: The folder, or the only file that is written.
            within: Allow input files in the output folder; only an output within the input is refused.

        Raises:
            ValueError: The output is, holds or lies in the input.
        """
        out, files = os.path.realpath(output), {os.path.realpath(path) for path in self.used}
        if out in files:
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
        for folder in dict.fromkeys([*read, *map(os.path.dirname, sorted(files))]):
            if folder == out or folder.startswith(os.path.join(out, "")):
                raise ValueError(f"output={output} holds {folder}, where images of {self._given()} lie; {hint}")


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
    found: dict[Path, str] = {}
    for folder in _folders(source):
        for path in _files(folder):
            if key(path) not in taken and path.name != RECORD:
                hidden = is_hidden(path.name)
                found[path] = "hidden" if hidden else other if is_image(path) else "no image of a kind that is read"
    return {**found, **reasons}


def _folders(source: Source) -> list[Path]:
    """The folders among one source or several."""
    sources = [source] if isinstance(source, str | Path | Part) else source
    paths = [Path(part.source if isinstance(part, Part) else part).expanduser() for part in sources]
    return [path for path in paths if path.is_dir()]


def _files(folder: Path) -> Iterator[Path]:
    """Each file and each hidden folder below a folder."""
    return (Path(root, name) for root, files, hidden in walk(folder) for name in sorted([*files, *hidden]))


def write_unused(path: Path, inventories: Iterable[Inventory]) -> int:
    """Write a table (argument, file, reason) of the files that are not used.

    Args:
        path: The csv file to write. Without unused files nothing is written, unless an older table is there.
        inventories: What the sources hold.

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
