"""Parts of `isr caption` around the captioner: photos cut to patches, a journal of the work, the manifest.

The journal lies beside the manifest until the work is done: JSON lines, the settings first, then one line a caption,
on the disk before the next batch begins. A process can be killed at any time; the next one continues from the journal.
Where several processes share the work, each has a journal of its own, and the last to end joins them.
"""

from __future__ import annotations

import csv
import fcntl
import glob
import importlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.files import replacing
from data.decoding import ImageError, Pixels, image_size, read_image
from data.sources import Window, require_pyarrow

COLUMNS = ("image_path", *Window._fields, "prompt")

Settings = Mapping[str, str | int | None]

log = logging.getLogger(__name__)


class Key(NamedTuple):
    """Subject of a caption: a file by its name in the manifest, and a window of it; None is the whole file."""

    name: str
    window: Window | None


def windows(height: int, width: int, patch: int, stride: int) -> list[Window]:
    """Cover a photo with square patches, row by row; the last of a row or column is moved inside.

    Args:
        height: Height of the photo, px.
        width: Width of the photo, px.
        patch: Side of a patch, px.
        stride: Distance from one patch to the next, px; at most `patch`.

    Returns:
        The patches; none if the photo is smaller than one.
    """
    if min(height, width) < patch:
        return []
    rows, columns = ([*range(0, side - patch, stride), side - patch] for side in (height, width))
    return [Window(top, left, patch) for top in rows for left in columns]


class Patches:
    """The patches of a set of images, or the images as they are.

    Args:
        paths: The images; one named twice is captioned once and written twice.
        folder: Where the manifest will lie. Images below it are named relative to it, others by their full path.
        patch: Side of a patch in px; None takes whole images of any size.
        stride: Distance from one patch to the next, px.
        most: Largest number of patches of an image, spread evenly over it; None takes all.

    Attributes:
        keys: Patches or images to caption, by file.
        skipped: Reasons for files that were left out, one line each; `batches` may find unreadable ones, too.
        unreadable: Those found in `batches`: name in the manifest -> why.
    """

    def __init__(
        self, paths: Sequence[Path], folder: Path, patch: int | None = None, stride: int = 1, most: int | None = None
    ) -> None:
        self.paths = paths
        self.keys: dict[Path, list[Key]] = {}
        self.skipped: list[str] = []
        self.unreadable: dict[str, str] = {}
        for path in dict.fromkeys(paths):
            try:
                name = _name(path, folder)
                height, width = image_size(path)
                cut: Sequence[Window | None] = [None] if patch is None else windows(height, width, patch, stride)
                if not cut:
                    raise ImageError(f"{path} is {width}x{height}, smaller than patch={patch}")
            except ImageError as error:
                self.skipped.append(str(error))
                continue
            keep = len(cut) if most is None else min(most, len(cut))
            self.keys[path] = [Key(name, cut[i * len(cut) // keep]) for i in range(keep)]

    def leave_out(self, unreadable: Mapping[str, str]) -> None:
        """Move images from `keys` to `skipped`.

        Args:
            unreadable: Names in the manifest -> why.
        """
        for path, keys in list(self.keys.items()):
            if keys[0].name in unreadable:
                self.skipped.append(unreadable[keys[0].name])
                del self.keys[path]

    def all_keys(self) -> list[Key]:
        """Rows of the manifest in its order: image by image as the source names them."""
        return [key for path in self.paths for key in self.keys.get(path, [])]

    def batches(self, done: Mapping[Key, str], batch_size: int) -> Iterator[tuple[list[Key], Tensor]]:
        """Read the patches that have no caption yet.

        A file that turns out to be unreadable moves from `keys` to `skipped`. Files without work are not read.

        Args:
            done: Existing captions.
            batch_size: Largest number of patches in a batch; they are of one size.

        Yields:
            The keys of a batch, and its patches: (B, 3, h, w), [0, 1].
        """
        keys: list[Key] = []
        crops: list[Pixels] = []
        for path in list(self.keys):
            wanted = [key for key in self.keys[path] if key not in done]
            if not wanted:
                continue
            try:
                photo = read_image(path)
            except ImageError as error:
                self.unreadable[wanted[0].name] = str(error)
                self.leave_out(self.unreadable)
                continue
            for key in wanted:
                crop = photo if key.window is None else _cut(photo, key.window)
                if keys and (len(keys) == batch_size or crop.shape != crops[0].shape):
                    yield keys, _stack(crops)
                    keys, crops = [], []
                keys.append(key)
                crops.append(crop)
        if keys:
            yield keys, _stack(crops)


def _name(path: Path, folder: Path) -> str:
    """Name of a file in the manifest."""
    name, root = os.path.abspath(path), os.path.join(os.path.abspath(folder), "")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ImageError(f"{os.fsencode(path)!r} is not a UTF-8 name, as manifests need; rename it") from None
    return name.removeprefix(root)


def _cut(photo: Pixels, window: Window) -> Pixels:
    top, left, side = window
    return photo[top : top + side, left : left + side].copy()  # does not keep the photo


def _stack(crops: Sequence[Pixels]) -> Tensor:
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


class Journal:
    """The captions made so far, in a file that is complete whenever the process dies.

    One process at a time can hold it. Incomplete lines after a crash are dropped; their patches are captioned again.

    Args:
        path: The file; an existing one is continued.
        settings: Settings that the captions depend on.

    Attributes:
        done: The captions by their subjects.

    Raises:
        ValueError: The file is not a journal, was begun with other settings, or another process holds it.
    """

    _BEGIN = b'{"isr caption": '

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.done: dict[Key, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._lock()
            self._read(settings)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is held by {_holder(self._file.fileno())} that captions into it; wait for it, or give "
                "another output"
            ) from None
        except OSError:
            log.warning("%s: this file system has no locks; start no second process on it", self.path)

    def _read(self, settings: Settings) -> None:
        self._file.seek(0)
        head = self._file.readline()
        if head[: len(self._BEGIN)] != self._BEGIN[: len(head)]:
            raise ValueError(f"{self.path} is not a journal of isr caption; delete it, or give another output")
        torn, kept = _take_lines(self._file, self.done, {})
        if torn:
            log.warning("%s: %d lines are incomplete; their patches are captioned again", self.path, torn)
        if self.done:
            self._check(head, settings)
            self._file.truncate(len(head) + kept)
        else:  # nothing to lose, so other settings may begin here
            self._file.truncate(0)
            self._append(json.dumps({"isr caption": dict(settings)}) + "\n")

    def _check(self, head: bytes, settings: Settings) -> None:
        try:
            begun = json.loads(head)["isr caption"]
        except ValueError:
            raise ValueError(
                f"{self.path} no longer holds the settings it was begun with; delete it to begin anew without its "
                f"{len(self.done)} captions"
            ) from None
        changed = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
        if changed:
            now, then = (
                ", ".join(f"{name}={found.get(name)}" for name in changed).replace("=None", "=null")
                for found in (settings, begun)
            )
            raise ValueError(
                f"{now}, but {self.path} was begun with {then}; set it back, or delete {self.path} to begin anew "
                f"without its {len(self.done)} captions"
            )

    def _append(self, text: str) -> None:
        try:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(
                f"cannot write {self.path} ({error.strerror or error}); what it holds is kept, the same command goes on"
            ) from error

    def add(self, keys: Sequence[Key], prompts: Sequence[str]) -> None:
        """Put the captions of a batch on the disk.

        Raises:
            OSError: The disk is full or gone.
            ValueError: There are not as many captions as keys.
        """
        new = dict(zip(keys, prompts, strict=True))
        rows = ([key.name, *(key.window or (None, None, None)), prompt] for key, prompt in new.items())
        self._append("".join(json.dumps(row) + "\n" for row in rows))
        self.done.update(new)

    def leave_out(self, unreadable: Mapping[str, str]) -> None:
        """Note which images cannot be read, and why, for the process that joins several journals."""
        self._append("".join(json.dumps([name, reason]) + "\n" for name, reason in unreadable.items()))

    def close(self) -> None:
        """Close the file and keep it."""
        with suppress(OSError):  # of a full disk, which `add` has reported
            self._file.close()

    def remove(self) -> None:
        """Delete the file, as the manifest holds its captions."""
        self.path.unlink()
        self.close()


def _take_lines(lines: Iterable[bytes], done: dict[Key, str], unreadable: dict[str, str]) -> tuple[int, int]:
    """Add a journal's lines but the first to captions and to reasons why images were left out.

    Returns:
        Number of incomplete lines, and the bytes of the complete ones.
    """
    torn = whole = 0
    for line in lines:
        try:
            if not line.endswith(b"\n"):
                raise ValueError("cut short")
            whole += len(line)
            name, *rest = json.loads(line)
            if len(rest) == 1:
                unreadable[name] = rest[0]
                continue
            top, left, side, prompt = rest
            done[Key(name, None if top is None else Window(top, left, side))] = prompt
        except (ValueError, TypeError):
            torn += 1
    return torn, whole


def _holder(descriptor: int) -> str:
    """The process that has locked a file; Linux only."""
    inode = os.fstat(descriptor).st_ino
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 1: FLOCK ADVISORY WRITE pid major:minor:inode ...
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                return f"process {fields[4]}"
    return "another process"


class Shard(NamedTuple):
    """Which part of the images a process captions: every `of`-th, from the `number`-th, which counts from 1."""

    number: int = 1
    of: int = 1

    def journal(self, output: Path) -> Path:
        """Path of this part's journal."""
        part = "" if self.of == 1 else f".{self.number}-of-{self.of}"
        return output.with_name(f"{output.name}{part}.part")

    def journals(self, output: Path) -> list[Path]:
        """The journals of all parts.

        Raises:
            ValueError: There are journals of another number of parts, whose captions would be lost.
        """
        own = [Shard(i + 1, self.of).journal(output) for i in range(self.of)]
        there = sorted(output.parent.glob(f"{glob.escape(output.name)}*.part"))
        form = re.compile(re.escape(output.name) + r"(\.\d+-of-\d+)?\.part")
        others = [path for path in there if form.fullmatch(path.name) and path not in own]
        if others:
            raise ValueError(
                f"output={output} was begun in other parts: {', '.join(path.name for path in others[:5])}; go on with "
                "the same number of processes, or delete these"
            )
        return own


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process after another into this block, for a folder; without locks all go at once."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def joined(journals: Iterable[Path], patches: Patches) -> dict[Key, str] | None:
    """All captions of several journals; None while one lacks some.

    Args:
        journals: The files of all processes.
        patches: All that is to be captioned; images that a process could not read leave it.
    """
    done: dict[Key, str] = {}
    unreadable: dict[str, str] = {}
    for path in journals:
        if not path.is_file():
            return None
        with path.open("rb") as lines:
            next(lines, b"")  # the settings
            _take_lines(lines, done, unreadable)
    captioned = {key.name for key in done}
    patches.leave_out({name: reason for name, reason in unreadable.items() if name not in captioned})
    return done if all(key in done for key in patches.all_keys()) else None


def check_manifest(path: Path, argument: str) -> None:
    """Refuse a manifest that `write_manifest` could not write.

    Raises:
        ValueError: The name ends in neither .parquet nor .csv, or parquet cannot be written here.
    """
    if path.suffix.lower() not in {".csv", ".parquet"}:
        raise ValueError(f"{argument}={path} is of no known kind; give a .parquet or a .csv")
    if path.suffix.lower() == ".parquet":
        require_pyarrow(path, argument)


def write_manifest(path: Path, keys: Sequence[Key], prompts: Mapping[Key, str]) -> None:
    """Write captions as a manifest that `data.sources.list_entries` reads; the path holds all of it or what was there.

    Args:
        path: A .parquet or .csv file.
        keys: The rows, in order.
        prompts: The captions.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    rows = ((key.name, *(key.window or (None, None, None)), prompts[key]) for key in keys)
    with replacing(path) as temporary:
        if path.suffix.lower() == ".csv":
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                writer.writerows(rows)
        else:
            pa = importlib.import_module("pyarrow")
            kinds = (pa.string(), pa.int32(), pa.int32(), pa.int32(), pa.string())
            columns = zip(*rows, strict=True)
            arrays = [pa.array(list(column), kind) for column, kind in zip(columns, kinds, strict=True)]
            importlib.import_module("pyarrow.parquet").write_table(pa.table(arrays, names=COLUMNS), temporary)
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
