"""The record of the files that isr has made in a folder, so that no other file there is ever replaced.

`begin` starts a folder's record, a hidden file of lines (file, digest of its bytes). From then on
`common.files.replacing` replaces only those files below the folder whose content the record names, now or earlier. A
file that somebody else has put there or changed is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

RECORD = ".isr-made.jsonl"


class _Read(NamedTuple):
    """The part of a record that has been read."""

    inode: int
    size: int
    digests: dict[str, set[str]]


_read: dict[Path, _Read] = {}


def begin(folder: Path, adopt: bool = False) -> None:
    """Start the record of a folder, unless it has one.

    Args:
        folder: The folder; made where missing.
        adopt: Record the existing files, too; for folders that were made before there were records.
    """
    record = Path(os.path.abspath(folder), RECORD)
    if record.exists():
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    there = [Path(root, name) for root, _, names in os.walk(record.parent) for name in names] if adopt else []
    record.touch()
    for path in there:
        if path.is_file() and not path.is_symlink():
            note(path)


def record_of(path: Path) -> Path | None:
    """The record of the nearest folder above a file that has one."""
    for folder in Path(os.path.abspath(path)).parents:
        if (folder / RECORD).is_file():
            return folder / RECORD
    return None


def note(path: Path, content: Path | None = None) -> None:
    """Add a file to the record above it; without a record, do nothing.

    Args:
        path: The file.
        content: File with its bytes, if they are not at `path` yet.
    """
    record = record_of(path)
    if record is None:
        return
    line = json.dumps({"file": _name(record, path), "digest": _digest(content or path)})
    with record.open("ab") as file:  # one write: other processes append to it, too
        file.write(f"\n{line}\n".encode())  # on a line of its own, even if a killed process has left half a line


def is_made(path: Path) -> bool:
    """True if the record above a file names it with its present bytes."""
    record = record_of(path)
    if record is None or path.is_symlink() or not path.is_file():
        return False
    known = _digests(record).get(_name(record, path))
    return known is not None and _digest(path) in known


def refuse_foreign(paths: Iterable[Path], hint: str = "move it away, or give another output") -> None:
    """Refuse to overwrite files that isr has not made.

    Args:
        paths: The files to write.
        hint: Advice for the user.

    Raises:
        FileExistsError: Some exist and were not made by isr; the first five are named.
    """
    foreign = [path for path in paths if os.path.lexists(path) and not is_made(path)]
    if foreign:
        named = ", ".join(map(str, foreign[:5])) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise FileExistsError(f"output: not overwritten, as isr has not made them as they are now: {named}; {hint}")


def refuse_alike(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse to write files whose names differ in case alone into a folder that cannot hold both.

    Args:
        folder: The folder, with its record.
        paths: The files to write, in it or its sub-folders.

    Raises:
        ValueError: There are such names, and the file system takes them for one.
    """
    if not (folder / RECORD.upper()).exists():
        return
    seen: dict[str, Path] = {}
    for path in paths:
        other = seen.setdefault(str(path).casefold(), path)
        if other != path:
            raise ValueError(f"output: {other} and {path} are one file on this file system; rename one of the inputs")


def _name(record: Path, path: Path) -> str:
    return os.path.relpath(os.path.abspath(path), record.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digests(record: Path) -> dict[str, set[str]]:
    """All digests of each file; of a record that has grown, only the new lines are read.

    Earlier digests count too: a process may be killed after it has recorded a file and before it has replaced it.
    """
    state = record.stat()
    before = _read.get(record)
    if before is None or before.inode != state.st_ino or before.size > state.st_size:
        before = _Read(state.st_ino, 0, {})
    if before.size < state.st_size:
        with record.open("rb") as file:
            file.seek(before.size)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                entry = json.loads(line or b"null")
                before.digests.setdefault(entry["file"], set()).add(entry["digest"])
            except (ValueError, TypeError, KeyError):  # an empty line, or half of one that a killed process has left
                continue
        before = before._replace(size=before.size + len(whole))
    _read[record] = before
    return before.digests
