"""Prompts of images: from a folder of texts, a table, a manifest, or none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.files import first_five, plain_name
from data.decoding import is_image
from data.packed import Lookup, Packed, Paths, Picked, digests, numbered
from data.sources import read_table
from data.textfiles import read_text


class Prompts:
    """Prompts by image name, from a folder of texts or a table.

    Args:
        source: A folder (searched recursively) of `<image name>.txt`, or a csv or parquet file with the columns `name`
            and `prompt`. Names are with or without sub-folders and image extension.
        argument: Name of the user's argument, for messages.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: It holds no prompts, or two different ones for a name.
    """

    def __init__(self, source: str | Path, argument: str = "prompts") -> None:
        self.source, self.argument = source, argument
        path = Path(source).expanduser()
        self._files: Paths | None = None
        self._texts = Packed()
        names = Packed()
        if path.is_dir():
            self._files = Paths(Packed(sorted(map(str, path.rglob("*.txt")))))
            for file in self._files:
                names.append(plain_name(file.relative_to(path).with_suffix("").as_posix()))
        elif path.is_file():
            columns, rows = read_table(path, argument)
            if not {"name", "prompt"} <= set(columns):
                raise ValueError(f"{argument}={source} has columns {', '.join(columns)}; it needs name and prompt")
            for row in rows:
                if row["prompt"] is not None:
                    names.append(plain_name(self._bare(row["name"])))
                    self._texts.append(row["prompt"])
        else:
            raise FileNotFoundError(f"{argument}={source} does not exist; give a folder of <name>.txt or a csv")
        if not names:
            raise ValueError(f"{argument}={source} holds no prompts; put one <name>.txt an image there")
        self._places = Lookup(names)
        self._check_one_each(names)

    def _check_one_each(self, names: Sequence[str]) -> None:
        """Refuse two different prompts for one name."""
        first, number = numbered(digests(names))
        for place in np.flatnonzero(first[number] != np.arange(len(names))).tolist():  # none of a folder
            if self._texts[place] != self._texts[int(first[number[place]])]:
                raise ValueError(f"{self.argument}={self.source} has two prompts for {names[place]}; keep one")

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold them."""
        return [Path(self.source).expanduser()] if self._files is None else self._files

    @staticmethod
    def _bare(name: str) -> str:
        return os.path.splitext(name)[0] if is_image(name) else name

    def _find(self, names: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """Places of the prompts of names without extension: by the whole name, and by its last part; -1 for none."""
        whole, last = Packed(), Packed()
        for name in names:
            whole.append(name)
            last.append(name.rsplit("/", 1)[-1])
        return self._places.places(whole), self._places.places(last)

    def require(self, names: Sequence[str]) -> None:
        """Refuse names without a prompt.

        Raises:
            ValueError: Some have none, or several images share one by the last part of their names; the first five are
                named.
        """
        whole, last = self._find(map(self._bare, names))
        by_last = np.flatnonzero((whole < 0) & (last >= 0))
        first, _ = numbered(digests(self._bare(names[i]) for i in by_last.tolist()))
        places, number, images = np.unique(last[by_last[first]], return_inverse=True, return_counts=True)
        shared = by_last[first][images[number] > 1].tolist() if len(places) else []
        if shared:
            raise ValueError(
                f"{self.argument}={self.source} has one prompt for images of one name in different folders: "
                f"{first_five(sorted(self._bare(names[i]) for i in shared))}; name them with their folders there"
            )
        missing = np.flatnonzero((whole < 0) & (last < 0)).tolist()
        if missing:
            raise ValueError(
                f"{self.argument}={self.source} has no prompt for {len(missing)} of {len(names)} images: "
                f"{first_five(names[i] for i in missing)}; add them or leave {self.argument} out"
            )

    def __getitem__(self, name: str) -> str:
        (whole,), (last,) = self._find([self._bare(name)])
        place = int(whole if whole >= 0 else last)
        if place < 0:
            raise KeyError(name)
        if self._files is not None:
            return read_text(self._files[place], self.argument).strip()
        return self._texts[place]


GivenPrompts = Prompts | Mapping[str, str] | None


class Texts:
    """The prompt of each image: its manifest's, else the one from `prompts`, else empty."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold prompts, except manifests."""
        return self.prompts.files if isinstance(self.prompts, Prompts) else []

    def __init__(self, given: Sequence[str | None], names: Sequence[str], prompts: GivenPrompts) -> None:
        self.given, self.names, self.prompts = given, names, prompts
        if isinstance(prompts, Prompts):
            lacking = np.fromiter((i for i, prompt in enumerate(given) if prompt is None), np.int64)
            prompts.require(Picked(names, lacking))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self.given)))

    def __getitem__(self, index: int) -> str:
        prompt = self.given[index]
        if prompt is not None or self.prompts is None:
            return prompt or ""
        if isinstance(self.prompts, Prompts):
            return self.prompts[self.names[index]]
        return self.prompts.get(self.names[index], "")
