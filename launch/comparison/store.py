"""Files kept between two runs of a comparison: inputs and results as PNG, and a json of numbers beside each result.

A result is made again when what made it has changed: the method's fingerprint, the low-quality pixels or the prompt. A
number belongs to a result's pixels, a reference's pixels and a metric's protocol, all of which are in its key. So
adding a method or a metric computes what is new, and a killed comparison goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.files import folder_name, inside, replacing
from common.images import write_png
from common.metrics import Image, MetricProtocol
from launch.comparison.inputs import ImageSet, Item
from launch.comparison.methods import Method


def digest(*parts: bytes | str) -> str:
    """A short digest of bytes and texts."""
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        made.update(part.encode() if isinstance(part, str) else part)
        made.update(b"\0")
    return made.hexdigest()


def digest_image(image: Image) -> str:
    """A digest of an image's pixels and size."""
    return digest(str(image.shape), np.ascontiguousarray(image).tobytes())


@dataclass
class Record:
    """A method's result for one image.

    Args:
        png: The result.
        file: The json beside it.
        made: Key of what made it.
        values: Key of a metric -> its number.
    """

    png: Path
    file: Path
    made: str
    values: dict[str, float] = field(default_factory=dict)

    def save(self) -> None:
        """Write the json, whole or not at all."""
        with replacing(self.file) as temporary:
            temporary.write_text(json.dumps({"made": self.made, "values": self.values}, indent=1, sort_keys=True))


class Store:
    """The folder `cache` of a comparison.

    Args:
        folder: Where the comparison is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "cache"
        self._notes_file = self.root / "notes.json"
        self._notes: dict[str, Any] = {}
        if self._notes_file.is_file():
            self._notes = json.loads(self._notes_file.read_text())

    def items(self, test_set: ImageSet) -> list[Item]:
        """Keep a test set's images as files; what is there already is not written again."""
        return [self._item(test_set, test_set.samples[i]) for i in range(len(test_set.samples))]

    def _item(self, test_set: ImageSet, sample: Any) -> Item:
        name, keys, paths = str(sample["name"]), {"lq": "", "hq": ""}, {}
        for side in ("lq", "hq"):
            if side in sample:
                image = np.ascontiguousarray(sample[side].permute(1, 2, 0).numpy())
                keys[side] = digest_image(image)
                file = f"{name}.{keys[side][:8]}.png"
                paths[side] = inside(self.root / "inputs" / folder_name(test_set.name) / side, file)
                if not paths[side].is_file():
                    write_png(paths[side], image)
        height, width = (test_set.scale * int(side) for side in sample["lq"].shape[-2:])
        return Item(
            test_set.name,
            name,
            str(sample["prompt"]),
            paths["lq"],
            paths.get("hq"),
            keys["lq"],
            keys["hq"],
            (height, width),
            test_set.scale,
        )

    def find(self, method: Method, item: Item) -> Record:
        """The record of a method's result, empty where it has none yet or one that is out of date.

        Raises:
            ImageError: The method has no such image and never will.
        """
        made = digest(method.key(item), item.lq_key, item.prompt)
        folder = self.root / "methods" / folder_name(method.name) / folder_name(item.dataset)
        record = Record(inside(folder, f"{item.name}.png"), inside(folder, f"{item.name}.json"), made)
        try:
            kept = json.loads(record.file.read_text())
            if kept["made"] == made and record.png.is_file():
                record.values = {str(key): float(value) for key, value in kept["values"].items()}
                return record
        except (OSError, ValueError, KeyError, TypeError):  # none, or one that a full disk cut off
            pass
        record.png.unlink(missing_ok=True)
        return record

    @staticmethod
    def fill(record: Record, image: Image) -> None:
        """Keep a result."""
        write_png(record.png, image)
        record.save()

    def remembered(self, key: str, make: Callable[[], Any]) -> Any:
        """The value kept for this key; it is made where there is none, and must fit into json."""
        if key not in self._notes:
            self._notes[key] = make()
            with replacing(self._notes_file) as temporary:
                temporary.write_text(json.dumps(self._notes, indent=1, sort_keys=True))
        return self._notes[key]

    @staticmethod
    def key(metric: MetricProtocol, item: Item) -> str:
        """Key of everything that a number of a result depends on, except the result."""
        return f"{metric.id} | {metric.describe()}" + (f" | hq {item.hq_key}" if metric.needs_hq else "")

    def relative(self, path: Path) -> str:
        """A path as the report names it."""
        return path.relative_to(self.folder).as_posix()
