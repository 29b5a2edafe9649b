"""Pictures of a comparison: windows where methods differ most, and a grid of rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.metrics import BT601_LUMA
from data.decoding import Pixels
from launch.comparison.statistics import CROP

Pictures = Mapping[str, Mapping[str, Pixels | None]]
"""Name of an image -> title of a column -> pixels, None where the method has no such image."""

_GAP, _FONT_SIZE, _LINE = 6, 14, 18
_SMALLEST = 32  # px of a window
ENLARGE = 2
"""Factor by which `draw_grid` enlarges pixels."""


class NamedFigure(NamedTuple):
    """A plot, a PNG as `common.figures.save_figure` writes it, of the method with this label."""

    label: str
    path: Path

    @property
    def copy(self) -> str:
        """Where the report keeps it, from the report's folder."""
        return f"figures/{self.label.replace('/', '-')}-{self.path.stem}.png"

    @property
    def tag(self) -> str:
        """Its tag in TensorBoard."""
        return f"figures/{self.label}/{self.path.stem}"


class Crop(NamedTuple):
    """A window: column and row of its upper left corner, and its side, px."""

    x: int
    y: int
    size: int


def largest_differences(images: Sequence[Pixels], multiple: int = 1, count: int = 2) -> list[Crop]:
    """Windows without overlap in which the results differ most: largest mean spread (standard deviation) of luma.

    Args:
        images: Results of several methods, all (H, W, 3).
        multiple: Corners and side are multiples of this, so that a window is one of the low-quality image too.
        count: Largest number of windows.

    Returns:
        The windows, the largest difference first; none of fewer than two results.
    """
    if len(images) < 2:
        return []
    lumas = [image.astype(np.float32) @ BT601_LUMA[0].astype(np.float32) for image in images]
    height, width = lumas[0].shape
    short = min(height, width)
    side = min(max(short // 4, _SMALLEST), short) // multiple * multiple
    means = cv2.integral(np.std(lumas, axis=0).astype(np.float32))
    sums = means[side:, side:] - means[:-side, side:] - means[side:, :-side] + means[:-side, :-side]
    sums = sums[::multiple, ::multiple].copy()
    steps = side // multiple
    found: list[Crop] = []
    while len(found) < count and sums.max() > 0:
        row, column = (int(place) for place in np.unravel_index(int(sums.argmax()), sums.shape))
        found.append(Crop(column * multiple, row * multiple, side))
        sums[max(0, row - steps + 1) : row + steps, max(0, column - steps + 1) : column + steps] = 0
    return found


def spread(names: Sequence[str], count: int = 6) -> list[str]:
    """Choose images for the picture: in turn from all photos, from different places of each and under different seeds.

    Args:
        names: Names of test images, `<photo>_r<row>c<column>_s<seed>`; any other name counts as a photo.
        count: Largest number of names.

    Returns:
        The names, photo by photo.
    """
    photos: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names):
        match = CROP.fullmatch(name)
        photo, place = (match["photo"], match["place"]) if match else (name, "")
        photos.setdefault(photo, {}).setdefault(place, []).append(name)
    number = min(count, len(photos))
    chosen: list[str] = []
    for i in range(number):
        places = list(list(photos.values())[i * len(photos) // number].values())
        turns = len(range(i, count, number))  # so many of this photo
        for turn in range(turns):
            crops = places[(2 * turn + 1) * len(places) // (2 * turns)]
            chosen.append(crops[(turn + i) % len(crops)])
    return list(dict.fromkeys(chosen))


def draw_grid(pictures: Pictures) -> Image.Image:
    """Put images side by side, a row each, twice their size with hard pixels; smaller ones fill their cell.

    Args:
        pictures: Rows and columns, in order; see `Pictures`.

    Returns:
        The picture with a title above each column; a cell without an image holds the words "no image".

    Raises:
        ValueError: There is no image.
    """
    columns = list(dict.fromkeys(title for row in pictures.values() for title in row))
    shapes = [image.shape[:2] for row in pictures.values() for image in row.values() if image is not None]
    if not shapes:
        raise ValueError("pictures holds no image; give at least one row with one image")
    height, width = (ENLARGE * max(side) for side in zip(*shapes, strict=True))
    font = ImageFont.load_default(_FONT_SIZE)
    titles = [_wrapped(title, font, width) for title in columns]
    head = _LINE * max(len(title) for title in titles) + _GAP
    size = (len(columns) * (width + _GAP) + _GAP, head + len(pictures) * (_LINE + height + _GAP))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for column, lines in enumerate(titles):
        for line, text in enumerate(lines):
            draw.text((_GAP + column * (width + _GAP), _LINE * line + 2), text, "black", font)
    for row, (name, images) in enumerate(pictures.items()):
        top = head + row * (_LINE + height + _GAP)
        draw.text((_GAP, top), name, "dimgray", font)
        for column, title in enumerate(columns):
            corner = (_GAP + column * (width + _GAP), top + _LINE)
            image = images.get(title)
            if image is None:
                draw.rectangle((*corner, corner[0] + width - 1, corner[1] + height - 1), "lightgray")
                draw.text((corner[0] + _GAP, corner[1] + _GAP), "no image", "black", font)
            else:
                grid.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), corner)
    return grid


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
