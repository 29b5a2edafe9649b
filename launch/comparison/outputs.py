"""The files of a comparison but its page: tables as csv, Markdown and LaTeX, the picture, and all for TensorBoard."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.evaluation import Score, write_scores
from common.files import csv_text, inside, replacing
from launch.comparison.latex import latex
from launch.comparison.markdown import caption_of, markdown
from launch.comparison.pictures import NamedFigure, Pictures, draw_grid
from launch.comparison.report import Report
from launch.comparison.tables import cells

_MARKDOWN_IMAGE = re.compile(r"!\[(?P<tag>.+?)\]\(.+?\)")


def write_files(folder: Path, data: Report, pictures: Pictures, figures: Sequence[NamedFigure]) -> Path:
    """Write all but the page, over the files of an earlier comparison.

    Args:
        folder: Where to.
        data: Content of the report.
        pictures: Rows and columns of the picture.
        figures: Plots that the methods left.

    Returns:
        Path of `report.md`.
    """
    write_scores(folder / "metrics.csv", _scores(data))
    _write(folder / "summary.csv", _summary(data))
    _write(folder / "efficiency.csv", _csv([[*row.values()] for row in data.efficiency], _COST_COLUMNS))
    _write(folder / "table.tex", latex(data))
    text = markdown(data, pictures, figures)
    _write(folder / "report.md", text)
    grid = draw_grid(pictures)
    grid.save(folder / "grid.png")
    _write_events(folder, data, text, grid, pictures, figures)
    return folder / "report.md"


def copy_figures(folder: Path, figures: Sequence[NamedFigure]) -> list[dict[str, str]]:
    """Copy figures into the report's folder, remove those of an earlier report, and give what the page shows of them.

    Raises:
        FileNotFoundError: A figure is not there.
        ValueError: Two would be one file.
    """
    copies = [figure.copy for figure in figures]
    twice = next((copy for copy in copies if copies.count(copy) > 1), None)
    if twice is not None:
        raise ValueError(f"figures: two would be {twice}; rename one of the two")
    contents = {inside(folder, figure.copy): figure.path.read_bytes() for figure in figures}
    for old in set((folder / "figures").glob("*.png")) - contents.keys():
        old.unlink()
    for path, content in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return [
        {"label": f"{figure.label}: {figure.path.stem}", "caption": caption_of(figure), "path": figure.copy}
        for figure in figures
    ]


def _scores(data: Report) -> list[Score]:
    scores = [
        Score(method, dataset, image, metric["id"], value, metric["protocol"])
        for dataset, methods in data.values.items()
        for method, found in methods.items()
        for metric in data.metrics
        for image, value in sorted(found.get(metric["id"], {}).items())
    ]
    failed = [
        Score(method["name"], failure["dataset"], failure["image"], "", None, f"failed: {failure['reason']}")
        for method in data.methods
        for failure in method["failures"]
    ]
    return scores + failed


_SUMMARY_COLUMNS = (
    *("dataset", "method", "metric", "n", "mean", "low", "high"),
    *("gain_n", "gain", "gain_low", "gain_high", "wins", "rank", "protocol"),
)


def _summary(data: Report) -> str:
    """A row for each data set, method and metric."""
    rows = []
    for dataset, method, metric, mean in cells(data):
        gain = data.gains[dataset].get(method, {}).get(metric["id"], {})
        numbers = [mean["mean"], mean["low"], mean["high"]]
        gains = [gain.get(key) for key in ("mean", "low", "high", "wins")]
        rank = data.ranks[dataset].get(method, {}).get(metric["id"])
        rows.append(
            [
                *(dataset, method, metric["id"], mean["n"], *map(_number, numbers)),
                *(gain.get("n", ""), *map(_number, gains), _number(rank), metric["protocol"]),
            ]
        )
    return _csv(rows, _SUMMARY_COLUMNS)


_COST_COLUMNS = ("method", "trainable", "total", "macs", "seconds", "spread", "memory_mb", "denoiser_calls")


def _csv(rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> str:
    file = io.StringIO()
    safe = ([csv_text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    csv.writer(file, lineterminator="\n").writerows([columns, *safe])
    return file.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _write_events(
    folder: Path, data: Report, text: str, grid: Image.Image, pictures: Pictures, figures: Sequence[NamedFigure]
) -> None:
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for dataset, method, metric, mean in cells(data):
            writer.add_scalar(f"{dataset}/{metric['id']}/{method}", mean["mean"], 0)
        for row, images in pictures.items():
            for column, image in images.items():
                if image is not None:
                    writer.add_image(f"{row}/{column}", image, dataformats="HWC")
        writer.add_image("grid", np.asarray(grid), dataformats="HWC")
        for figure in figures:
            with Image.open(folder / figure.copy) as plot:
                writer.add_image(figure.tag, np.asarray(plot.convert("RGB")), dataformats="HWC")
        writer.add_text("report", _MARKDOWN_IMAGE.sub(r"See the image `\g<tag>`.", text))
