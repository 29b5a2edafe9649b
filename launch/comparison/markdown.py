"""The report as Markdown, `report.md`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any
from urllib.parse import quote

from common.figures import read_caption
from common.statistics import FEW, RESAMPLES
from launch.comparison.pictures import ENLARGE, NamedFigure, Pictures
from launch.comparison.report import Report
from launch.comparison.tables import (
    arrow,
    costs_table,
    details_table,
    means_table,
    pairs_table,
    published_table,
    shown,
)

_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": " ", "\r": " "} | {c: f"\\{c}" for c in "`*[]"}
)
_ESCAPING = re.compile(r"\\(?=[!-/:-@\[-`{-~]|$)")  # a backslash that Markdown would not show
_DIFFERENCES = (
    "A difference is the mean of the differences image by image, method minus reference, over the images both "
    f"have. In brackets: 95 % bootstrap intervals (percentile, {RESAMPLES} draws, seed 0). Crops of one photo are "
    f"drawn together where there are {FEW} photos or more, so that an interval is as wide as the number of photos "
    "makes it; of fewer photos the crops are drawn, and the interval is too narrow. A win is an image on which the "
    "method is better than the reference, a tie half a win. The mean rank is over the images that all methods "
    "have, 1 for the best."
)
_BOLD = (
    "Bold, in the tables of one metric and of differences: the interval of the difference lies on the better side "
    "of zero. Bold, in the tables of means: the best mean, if the intervals of its differences to all others "
    "do. Many tables are many tests: one bold cell in twenty may be chance."
)
_PROTOCOLS = (
    "A protocol reads: metric | colour space and range | border cropped | rounding | implementation. Numbers under "
    "another protocol are not comparable with these. Sharpness, colourfulness and neutrality say what changed, not "
    "whether it is better."
)
_EFFICIENCY = (
    "On one image, the same for all, in this run: parameters that take part in restoring, multiply-accumulate "
    "operations of matrix products and convolutions, median seconds and their standard deviation after two "
    "calls that do not count, peak memory with weights, and calls of the denoiser (tiles included)."
)
_FILES = (
    "`metrics.csv` holds every number, `summary.csv` every mean, difference and rank, `efficiency.csv` the costs, "
    "`table.tex` the means for LaTeX (package booktabs), `report.html` all of this with the images, `cache` the "
    "results and the numbers of each."
)


def markdown(data: Report, pictures: Pictures, figures: Sequence[NamedFigure]) -> str:
    """Write the report as text.

    Args:
        data: Content of the report.
        pictures: Rows and columns of the picture.
        figures: Plots that the methods left.
    """
    ours = [part.name for part in fields(data) if part.name != "published"]
    data = replace(data, **{name: _marked(getattr(data, name)) for name in ours})
    parts = [
        f"# {data.title}",
        "Every method restores the same low-quality images, and every result is measured by the same metrics. "
        f"Differences are to `{data.reference}`, image by image.",
    ]
    if data.notes:
        parts += ["## Read this first", _bullets(data.notes)]
    for dataset in data.datasets:
        parts += _dataset(data, dataset)
    parts += ["## How to read the tables", _DIFFERENCES, _BOLD]
    parts += ["## How it was measured", _bullets([f"{metric['id']}: {metric['protocol']}" for metric in data.metrics])]
    parts += [_PROTOCOLS, "## What is missing", _gaps(data)]
    if data.sources:
        parts += ["## Where the methods come from", _bullets(data.sources)]
    if data.efficiency:
        parts += ["## Efficiency", _EFFICIENCY, costs_table(data)]
    parts += [*_published(data), *_figures(figures), *_grid(pictures), "## Files", _FILES]
    return "\n\n".join(parts) + "\n"


def _dataset(data: Report, dataset: Mapping[str, Any]) -> list[str]:
    """Tables of one test set."""
    name = dataset["name"]
    kind = "with references" if dataset["paired"] else "without references"
    parts = [f"## {name}", f"{len(dataset['images'])} images {kind}.", means_table(data, dataset)]
    for metric in data.metrics:
        if shown(metric, data, name):
            better = arrow(metric, "higher", "lower")
            parts += [f"### {name}: {metric['id']} ({better} is better)", details_table(data, name, metric)]
    if pairs := pairs_table(data, name):
        parts += [f"### {name}: differences to other methods", pairs]
    return parts


def _gaps(data: Report) -> str:
    """Metrics that were not computed, and images that methods lack."""
    gaps = [f"{metric}: not computed: {reason}" for metric, reason in data.missing.items()]
    for method in data.methods:
        for dataset in data.datasets:
            failed = [failure for failure in method["failures"] if failure["dataset"] == dataset["name"]]
            if failed:
                counted = f"{len(failed)} of {len(dataset['images'])} images of {dataset['name']}"
                named = (f"  - {failure['image']}: {failure['reason']}" for failure in failed)
                gaps.append("\n".join([f"{method['name']} has no result of {counted}:", *named]))
    return _bullets(gaps) if gaps else "Nothing: every method has every image and metric."


def _published(data: Report) -> list[str]:
    """Tables of the papers, each with our test sets that are cut from theirs."""
    if not data.published:
        return []
    parts = ["## Published numbers", "As the papers print them. Their protocols differ from ours and each other."]
    ours = [dataset["name"] for dataset in data.datasets]
    for table in data.published:
        parts += [f"### {table['paper']}, {table['table']}", f"Protocol: {table['protocol']}"]
        for dataset in table["rows"]:
            parts.append(published_table(table, dataset))
            same = _same_set(dataset, ours)
            parts += [f"Ours, on {', '.join(same)}: see the tables above, under our protocols."] if same else []
    return parts


def _figures(figures: Sequence[NamedFigure]) -> list[str]:
    """Plots of the methods with their captions."""
    parts = ["## Figures"] if figures else []
    for figure in figures:
        label, tag, stem = map(_marked, (figure.label, figure.tag, figure.path.stem))
        parts += [f"### {label}: {stem}", f"![{tag}]({quote(figure.copy)})"]
        parts += [_marked(caption)] if (caption := caption_of(figure)) else []
    return parts


def _grid(pictures: Pictures) -> list[str]:
    """The picture, with its rows and columns."""
    columns = ", ".join(map(_marked, dict.fromkeys(column for row in pictures.values() for column in row)))
    names = ", ".join(map(_marked, pictures))
    return [
        "## Pictures",
        f"Columns: {columns}. Rows: {names}; chosen by a fixed rule, not by their looks; of large images the window "
        f"in which the methods differ most. Pixels are enlarged {ENLARGE} times, LQ to the size of the others.",
        "![grid](grid.png)",
    ]


def _marked(tree: Any) -> Any:
    """Texts of a tree, keys too, as Markdown that shows them as they are: names and reasons come from elsewhere."""
    if isinstance(tree, str):
        return _ESCAPING.sub(r"\\\\", tree).translate(_MARKDOWN)
    if isinstance(tree, Mapping):
        return {_marked(key): _marked(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_marked(value) for value in tree]
    return tree


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def _same_set(published: str, ours: Sequence[str]) -> list[str]:
    """Our test sets whose names say that they are cut from a published one."""
    return [name for name in ours if _plain(name).startswith(_plain(published)) or _plain(published) in _plain(name)]


def caption_of(figure: NamedFigure) -> str:
    """Caption of a plot, on one line."""
    return " ".join(read_caption(figure.path).split())
