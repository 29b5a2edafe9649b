"""Files that hold everything or what they held before."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
