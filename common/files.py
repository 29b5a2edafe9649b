"""Atomic writes, folders locked by one process, and file names that are safe and unique."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import re
import socket
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

from common.made import note, record_of, refuse_foreign

log = logging.getLogger(__name__)

_LOCK = ".lock"
_LONGEST = 200  # bytes of a name; file systems take 255, and results add their own extensions
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, single surrogates, separators of lines and paragraphs
_held: set[int] = set()  # descriptors of this process's locks


class InUseError(OSError):
    """Another process writes into a folder."""


def inside(folder: str | Path, name: str | Path) -> Path:
    """Path of a file or folder whose name comes from outside, such as a list, a table or a checkpoint.

    Args:
        folder: Where the file belongs.
        name: Its name, perhaps with sub-folders.

    Raises:
        ValueError: The name is empty or leads out of the folder: absolute, with `..`, with a drive, through a link.
    """
    folder, text = Path(folder), str(name)
    windows = PureWindowsPath(text)
    absolute = Path(text).is_absolute() or windows.is_absolute()
    if not Path(text).parts or "\0" in text or ".." in {*Path(text).parts, *windows.parts} or absolute:
        raise ValueError(f"name={text!r} is not a name of a file inside {folder}; rename it")
    path = folder / text
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} leads out of {folder} by a link; remove the link, or give another folder")
    return path


def csv_text(text: str) -> str:
    """A text as a table cell; one that a spreadsheet would run as a formula gets a quote in front."""
    if not text.startswith(("=", "+", "-", "@", "\t", "\r")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


@contextmanager
def safe_loading() -> Iterator[None]:
    """Within this context torch reads only tensors and plain values from files, also on a library's behalf."""
    ours = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def printable(text: object) -> str:
    """A text that every table, report and log can hold: control characters and bytes that are not UTF-8 are escaped."""
    raw = str(text)
    if raw.isprintable():
        return raw
    return "".join(_escaped(char) if unicodedata.category(char) in _UNPRINTABLE else char for char in raw)


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # Python's stand-in for a byte
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def first_five(items: Iterable[object]) -> str:
    """The first five of them for an error message, and how many more there are."""
    rest = iter(items)
    named = [printable(item) for item in itertools.islice(rest, 5)]
    more = sum(1 for _ in rest)
    return ", ".join(named) + (f" and {more} more" if more else "")


def plain_name(name: str) -> str:
    """A name, perhaps with sub-folders, that results can have: printable, and short enough for what is added to it.

    A part that changes gets its digest, so that no two names become one.
    """
    parts = []
    for part in name.split("/"):
        plain = printable(part)
        if plain != part or len(plain.encode()) > _LONGEST:
            digest = hashlib.blake2b(part.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
            plain = f"{plain.encode()[: _LONGEST - 13].decode('utf-8', 'ignore')}~{digest}"
        parts.append(plain)
    return "/".join(parts)


def check_free(folder: str | Path, own: str | None = None) -> None:
    """Refuse an output folder that holds files which this command has not written.

    Args:
        folder: The folder; it need not exist.
        own: Name of a file in the folder that marks a command's own earlier output. None: the folder must be empty.

    Raises:
        FileExistsError: It holds files, but none named `own`.
    """
    folder = Path(folder)
    there = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if (there and own not in there) or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(
            f"output={folder} holds files that this command has not made: {', '.join(sorted(there)[:5]) or folder}; "
            "give an empty folder"
        )


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Lock a folder within this context, so that no other process can lock it.

    The system releases the lock when this process ends, also when it is killed.

    Args:
        folder: The folder; made where missing.

    Raises:
        InUseError: Another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    descriptor = _locked(path)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not so in a forked process
            path.unlink(missing_ok=True)  # before the lock ends, so that others notice it
            _held.discard(descriptor)
            os.close(descriptor)


def _locked(path: Path) -> int:
    """An open lock file that is locked and names its holder."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if _lock(descriptor, path.parent):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            if _same_file(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed it


def _lock(descriptor: int, folder: Path) -> bool:
    """Lock a file; False, with a warning, where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise InUseError(f"{folder} is in use by {holder}; wait for it, end it, or give another folder") from None
    except OSError as error:
        log.warning("%s: this file system has no locks (%s); start no second process on it", folder, error.strerror)
        return False
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """A forked process, such as a data worker, must not keep a lock that outlives its parent."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def replacing(path: str | Path, shared: bool = True, recorded: bool = True) -> Iterator[Path]:
    """A temporary path beside a target, which takes the target's place once the block has succeeded.

    Below a folder with a record (`common.made`), a target is replaced only if it is ours, and is recorded.

    Args:
        path: Target; missing folders are made.
        shared: True if several processes may write the target at the same time. If false, the next process overwrites
            what a killed one has left.
        recorded: False for a file that is removed later.

    Yields:
        Temporary path to write to; it is removed if the block fails.

    Raises:
        FileExistsError: The target is there and not ours.
        OSError: The disk is full or the folder cannot be written; the message names the target.
    """
    path = Path(path)
    recorded = recorded and record_of(path) is not None
    if recorded:
        refuse_foreign([path])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # writing would follow a link
        try:
            yield temporary
            if recorded:
                note(path, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error.strerror or error}); what was written before it is complete"
        ) from error


_REPLACED = re.compile(r"^\.|[^\w.-]")  # in names of folders


def folder_name(name: str) -> str:
    """A name as one folder; a name with replaced characters gets its digest, so that two names never share a folder."""
    plain = _REPLACED.sub("_", name.replace("/", "-"))
    return plain if plain == name else f"{plain}-{hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest()}"


def distinct_names(names: Sequence[str], sources: Sequence[str | Path] | None = None) -> list[str]:
    """Change names that are alike until all are distinct.

    Names are alike if they differ at most in case and in characters that the name of a folder replaces.

    Args:
        names: The names.
        sources: The file or folder behind each name: alike names get the name of the folder above it in front. Names
            that are alike even so, all but the first, get a number.

    Returns:
        The names in the same order. `plain_name` applies to all; distinct names are not changed further.
    """
    found = [plain_name(name) for name in names]
    if sources is not None:
        count = Counter(map(_key, found))
        above = [plain_name(os.path.basename(os.path.dirname(os.path.abspath(source)))) for source in sources]
        found = [f"{a}_{name}" if a and count[_key(name)] > 1 else name for a, name in zip(above, found, strict=True)]
    taken = set(map(_key, found))
    seen: set[str] = set()
    for place, name in enumerate(found):
        number = 1
        while _key(found[place]) in (seen if number == 1 else seen | taken):
            number += 1
            found[place] = f"{name}-{number}"
        seen.add(_key(found[place]))
    return found


def _key(name: str) -> str:
    return _REPLACED.sub("_", name).casefold()
