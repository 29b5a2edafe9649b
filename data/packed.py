"""Texts of long lists in little memory: one buffer of bytes and a few integers each, not a Python object each.

A forked worker shares such a buffer with its parent, as reading it writes nothing; a Python object has a count that
every reader changes, which copies its page.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

T = TypeVar("T")

_DIGEST = 16  # bytes; two of a million texts share one with a chance of 1e-27


class Lazy(Sequence[T]):
    """A sequence that makes an item when it is read; equal to any sequence of equal items."""

    @abstractmethod
    def item(self, place: int) -> T:
        """The item at a place from 0 to the length."""

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self.item(i) for i in range(len(self))[place]]
        return self.item(range(len(self))[place])

    def __iter__(self) -> Iterator[T]:
        return map(self.item, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list


class Packed(Lazy[str]):
    """Texts in one buffer of UTF-8; each takes its bytes and 8 more.

    Args:
        texts: Any texts, also names with bytes that are not UTF-8, as surrogates.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text at the end."""
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def item(self, place: int) -> str:  # noqa: D102  # as of Lazy
        return self._bytes[self._ends[place] : self._ends[place + 1]].decode("utf-8", "surrogatepass")


class Paths(Lazy[Path]):
    """Texts as paths."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def item(self, place: int) -> Path:  # noqa: D102  # as of Lazy
        return Path(self.texts[place])


class Picked(Lazy[T]):
    """Items of a sequence by their places in it.

    Args:
        items: The sequence.
        places: A place in it for each item of this sequence; -1 stands for None.
    """

    def __init__(self, items: Sequence[T], places: np.ndarray) -> None:
        self.items, self.places = items, places

    def __len__(self) -> int:
        return len(self.places)

    def item(self, place: int) -> T:  # noqa: D102  # as of Lazy
        found = int(self.places[place])
        nothing: Any = None
        return self.items[found] if found >= 0 else nothing


def path_texts(paths: Iterable[Path]) -> Sequence[str]:
    """Paths as texts, without making a Path of what is a text already."""
    return paths.texts if isinstance(paths, Paths) else list(map(str, paths))


def digests(texts: Iterable[str]) -> np.ndarray:
    """A digest of each text, (N,) of 16 bytes: equal where the texts are."""
    found = bytearray()
    for text in texts:
        found += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()
    return np.frombuffer(bytes(found), f"S{_DIGEST}") if found else np.empty(0, f"S{_DIGEST}")


def numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct ones among keys in the order in which they first come.

    Args:
        keys: (N,) of digests, or (N, K) of integers, a row a key.

    Returns:
        Where each distinct key first comes, (M,); the number of each key, (N,).
    """
    _, first, number = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return first[order], rank[number.reshape(-1)]


class Lookup:
    """Places of texts in a list, in 24 bytes a text.

    Args:
        texts: The list.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        found = digests(texts)
        self._order = np.argsort(found, kind="stable")
        self._sorted = found[self._order]

    def places(self, texts: Iterable[str]) -> np.ndarray:
        """The place of each of some texts in the list, (N,); -1 where it is not in there."""
        wanted = digests(texts)
        if not len(self._sorted):
            return np.full(len(wanted), -1)
        near = np.searchsorted(self._sorted, wanted).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[near] == wanted, self._order[near], -1)
