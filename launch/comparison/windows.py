"""Images of a comparison's results: the files and windows of the page, and the pixels of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.decoding import Pixels, read_image
from launch.comparison.inputs import Item
from launch.comparison.pictures import Crop, Pictures, largest_differences, spread
from launch.comparison.store import Record, digest
from launch.comparison.work import Work

_WHOLE = 192  # px: larger images are shown by a window
_SHOWN = 6


def images_of(work: Work) -> dict[str, dict[str, dict[str, Any]]]:
    """Files and windows that the page shows: test set -> image -> entry."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for item in work.items:
        found.setdefault(item.dataset, {})[item.name] = _entry(work, item)
    return found


def _entry(work: Work, item: Item) -> dict[str, Any]:
    """Files and windows that the page shows of an image."""
    records = {method.name: work.records.get((method.name, item)) for method in work.methods}
    there = {name: record for name, record in records.items() if record is not None}
    return {
        "lq": work.store.relative(item.lq),
        "hq": work.store.relative(item.hq) if item.hq is not None else None,
        "methods": {name: work.store.relative(record.png) for name, record in there.items()},
        "crops": [crop._asdict() for crop in _crops(work, item, there)],
    }


def _crops(work: Work, item: Item, records: Mapping[str, Record]) -> list[Crop]:
    key = digest("crops", str(item.scale), *sorted(record.made for record in records.values()))

    def find() -> list[dict[str, int]]:
        found = largest_differences([read_image(record.png) for record in records.values()], item.scale)
        return [crop._asdict() for crop in found]

    return [Crop(**crop) for crop in work.store.remembered(key, find)]


def grid_of(work: Work, images: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Pictures:
    """The images of the picture; large ones are shown by the window of the largest difference."""
    by_name = {(f"{item.dataset}/" if len(images) > 1 else "") + item.name: item for item in work.items}
    pictures: dict[str, dict[str, Pixels | None]] = {}
    for name in spread(list(by_name), _SHOWN):
        item = by_name[name]
        (height, width), crops = item.size, images[item.dataset][item.name]["crops"]
        crop = None
        if max(height, width) > _WHOLE:
            side = min(height, width, _WHOLE) // item.scale * item.scale
            crop = Crop(**crops[0]) if crops else Crop(0, 0, side)
        row: dict[str, Pixels | None] = {"LQ": _window(item.lq, crop, item.scale)}
        for method in work.methods:
            record = work.records.get((method.name, item))
            row[method.name] = _window(record.png, crop, 1) if record is not None else None
        if item.hq is not None:
            row["HQ"] = _window(item.hq, crop, 1)
        pictures[name] = row
    return pictures


def _window(path: Path, crop: Crop | None, scale: int) -> Pixels:
    image = read_image(path)
    if crop is None:
        return image
    x, y, size = (number // scale for number in crop)
    return image[y : y + size, x : x + size]
