"""What `isr caption` needs but the captions themselves: photos cut to patches, a journal of the work, the manifest.

The journal lies beside the manifest while the work goes on: JSON lines, the settings first, then one line a caption,
on the disk before the next batch begins. A process can be killed at any time; the next one goes on from the journal.
"""

from __future__ import annotations

import csv
import fcntl
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.files import replacing
from data.images import ImageError, Pixels, Window, image_size, read_image, require_pyarrow

COLUMNS = ("image_path", *Window._fields, "prompt")

Settings = Mapping[str, str | int | None]

log = logging.getLogger(__name__)


class Key(NamedTuple):
    """What a caption is of: a file by its name in the manifest, and a window of it or, None, all of it."""

    name: str
    window: Window | None


def windows(height: int, width: int, patch: int, stride: int) -> list[Window]:
    """Cover a photo with square patches, row by row; the last of a row or column is moved inside.

    Args:
        height: Of the photo, px.
        width: Of the photo, px.
        patch: Side of a patch, px.
        stride: From one patch to the next, px; at most `patch`.

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
        stride: From one patch to the next, px.

    Attributes:
        keys: What there is to caption, by file.
        skipped: Why files were left out, one line each; unreadable ones may be found as late as in `batches`.
    """

    def __init__(self, paths: Sequence[Path], folder: Path, patch: int | None = None, stride: int = 1) -> None:
        self.paths = paths
        self.keys: dict[Path, list[Key]] = {}
        self.skipped: list[str] = []
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
            self.keys[path] = [Key(name, window) for window in cut]

    def all_keys(self) -> list[Key]:
        """What the manifest lists, in its order: image by image as the source names them."""
        return [key for path in self.paths for key in self.keys.get(path, [])]

    def batches(self, done: Mapping[Key, str], batch_size: int) -> Iterator[tuple[list[Key], Tensor]]:
        """Read what has no caption yet.

        A file that turns out to be unreadable moves from `keys` to `skipped`. Files without work are not read.

        Args:
            done: Captions there are.
            batch_size: At most so many patches a batch; they are of one size.

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
                self.skipped.append(str(error))
                del self.keys[path]
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
    """What the manifest calls a file."""
    name, root = os.path.abspath(path), os.path.join(os.path.abspath(folder), "")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ImageError(f"{os.fsencode(path)!r} is no UTF-8 name, which no manifest can hold; rename it") from None
    return name.removeprefix(root)


def _cut(photo: Pixels, window: Window) -> Pixels:
    top, left, side = window
    return photo[top : top + side, left : left + side].copy()  # does not keep the photo


def _stack(crops: Sequence[Pixels]) -> Tensor:
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


class Journal:
    """The captions made so far, in a file that is complete whenever the process dies.

    Only one process at a time can hold it. Lines that a crash left torn are dropped; what they held is captioned again.

    Args:
        path: The file; it is gone on with, or begun.
        settings: What the captions depend on.

    Attributes:
        done: The captions, by what they are of.

    Raises:
        ValueError: The file is no journal, was begun with other settings, or another process holds it.
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
                f"{self.path} is held by another process that captions into it; wait for it, or give another output"
            ) from None
        except OSError:
            log.warning("%s: this file system has no locks; start no second process on it", self.path)

    def _read(self, settings: Settings) -> None:
        self._file.seek(0)
        head = self._file.readline()
        if head[: len(self._BEGIN)] != self._BEGIN[: len(head)]:
            raise ValueError(f"{self.path} is no journal of isr caption; delete it, or give another output")
        whole, torn = len(head), 0
        for line in self._file:
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut short")
                whole += len(line)
                name, top, left, side, prompt = json.loads(line)
                window = None if top is None else Window(top, left, side)
                self.done[Key(name, window)] = prompt
            except (ValueError, TypeError):
                torn += 1
        if torn:
            log.warning("%s: %d lines are torn; what they held is captioned again", self.path, torn)
        if self.done:
            self._check(head, settings)
            self._file.truncate(whole)
        else:  # nothing to lose, so other settings may begin here
            self._file.truncate(0)
            self._append(json.dumps({"isr caption": dict(settings)}) + "\n")

    def _check(self, head: bytes, settings: Settings) -> None:
        try:
            begun = json.loads(head)["isr caption"]
        except ValueError:
            raise ValueError(
                f"{self.path} does not say any more what it was begun with; delete it to begin anew without its "
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

    def close(self) -> None:
        """Let go of the file, which stays."""
        with suppress(OSError):  # of a full disk, which `add` has reported
            self._file.close()

    def remove(self) -> None:
        """Delete the file: all it holds is elsewhere."""
        self.path.unlink()
        self.close()


def check_manifest(path: Path, argument: str) -> None:
    """Refuse what `write_manifest` could not write in the end.

    Raises:
        ValueError: The name ends in neither .parquet nor .csv, or parquet cannot be written here.
    """
    if path.suffix.lower() not in {".csv", ".parquet"}:
        raise ValueError(f"{argument}={path} is of no known kind; give a .parquet or a .csv")
    if path.suffix.lower() == ".parquet":
        require_pyarrow(path, argument)


def write_manifest(path: Path, keys: Sequence[Key], prompts: Mapping[Key, str]) -> None:
    """Write captions as a manifest that `data.images.list_entries` reads; the path holds all of it or what was there.

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
