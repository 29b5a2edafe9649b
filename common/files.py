"""Files that hold everything or what they held before, and names that no two inputs share."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path, shared: bool = True) -> Iterator[Path]:
    """A temporary path beside a target, which takes the target's place once the block has succeeded.

    Args:
        path: Target; missing folders are made.
        shared: Whether several processes may write the target at a time; if not, what a killed one left is overwritten
            by the next.

    Yields:
        Where to write; removed if the block fails.

    Raises:
        OSError: The disk is full or the folder cannot be written; the message names the target.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
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
    """Change names that are alike until no two are.

    Names are alike if they differ at most in case and in characters that the name of a folder replaces.

    Args:
        names: The names.
        sources: The file or folder behind each name: alike names get the name of the folder above it in front. Names
            that are alike even so, all but the first, get a number.

    Returns:
        The names in the same order; a name that is like no other stays as it is.
    """
    found = list(names)
    if sources is not None:
        count = Counter(map(_key, found))
        above = [os.path.basename(os.path.dirname(os.path.abspath(source))) for source in sources]
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
