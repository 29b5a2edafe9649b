"""The files of a comparison but its page: tables as csv, Markdown and LaTeX, the picture, and all for TensorBoard."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from common.figures import read_caption
from common.files import csv_text, inside, replacing
from common.restoration import Score, write_scores
from launch.comparison.pictures import ENLARGE, NamedFigure, Pictures, draw_grid
from launch.comparison.statistics import FEW, RESAMPLES, gain_of

Data = Mapping[str, Any]
"""What the report shows; see `engine.compare`."""

_MARKDOWN_IMAGE = re.compile(r"!\[(?P<tag>.+?)\]\(.+?\)")
_TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "|": r"\textbar{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", '"': r"\textquotedbl{}", "\n": " ", "\r": " "}
)
_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\n": " ", "\r": " "} | {c: f"\\{c}" for c in "`*[]"}
)
_ESCAPING = re.compile(r"\\(?=[!-/:-@\[-`{-~]|$)")  # a backslash that Markdown would not show


def write_files(folder: Path, data: Data, pictures: Pictures, figures: Sequence[NamedFigure]) -> Path:
    """Write all but the page, over the files of an earlier comparison.

    Args:
        folder: Where to.
        data: What the report shows.
        pictures: Rows and columns of the picture.
        figures: Plots that the methods left.

    Returns:
        Path of `report.md`.
    """
    write_scores(folder / "metrics.csv", _scores(data))
    _write(folder / "summary.csv", _summary(data))
    _write(folder / "efficiency.csv", _csv([[*row.values()] for row in data["efficiency"]], _COST_COLUMNS))
    _write(folder / "table.tex", _latex(data))
    text = _markdown(data, pictures, figures)
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
        {"label": f"{figure.label}: {figure.path.stem}", "caption": _caption(figure), "path": figure.copy}
        for figure in figures
    ]


def significantly_best(data: Data, dataset: str, metric: Mapping[str, Any]) -> str | None:
    """The method with the best mean, if its paired difference to each other method has an interval beside zero."""
    means = {
        method: of_metric["mean"]
        for method, found in data["means"][dataset].items()
        if (of_metric := found.get(metric["id"])) is not None
    }
    if len(means) < 2:
        return None
    lower, values = metric["lower_better"], data["values"][dataset]
    best = (min if lower else max)(means, key=lambda method: means[method])
    for other in means.keys() - {best}:
        ours, theirs = (values[method].get(metric["id"], {}) for method in (best, other))
        gain = gain_of(ours, theirs, lower)
        if gain is None or not gain.better(lower):
            return None
    return best


def _scores(data: Data) -> list[Score]:
    scores = [
        Score(method, dataset, image, metric["id"], value, metric["protocol"])
        for dataset, methods in data["values"].items()
        for method, found in methods.items()
        for metric in data["metrics"]
        for image, value in sorted(found.get(metric["id"], {}).items())
    ]
    failed = [
        Score(method["name"], failure["dataset"], failure["image"], "", None, f"failed: {failure['reason']}")
        for method in data["methods"]
        for failure in method["failures"]
    ]
    return scores + failed


_SUMMARY_COLUMNS = (
    *("dataset", "method", "metric", "n", "mean", "low", "high"),
    *("gain_n", "gain", "gain_low", "gain_high", "wins", "rank", "protocol"),
)


def _summary(data: Data) -> str:
    """A row for each data set, method and metric."""
    rows = []
    for dataset, method, metric, mean in _cells(data):
        gain = data["gains"][dataset].get(method, {}).get(metric["id"], {})
        numbers = [mean["mean"], mean["low"], mean["high"]]
        gains = [gain.get(key) for key in ("mean", "low", "high", "wins")]
        rank = data["ranks"][dataset].get(method, {}).get(metric["id"])
        rows.append(
            [
                *(dataset, method, metric["id"], mean["n"], *map(_number, numbers)),
                *(gain.get("n", ""), *map(_number, gains), _number(rank), metric["protocol"]),
            ]
        )
    return _csv(rows, _SUMMARY_COLUMNS)


def _cells(data: Data) -> list[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every mean there is: data set, method, metric, mean."""
    return [
        (dataset, method, metric, found[metric["id"]])
        for dataset, methods in data["means"].items()
        for method, found in methods.items()
        for metric in data["metrics"]
        if metric["id"] in found
    ]


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


def _arrow(metric: Mapping[str, Any], up: str, down: str) -> str:
    return down if metric["lower_better"] else up


def _shown(metric: Mapping[str, Any], data: Data, dataset: str) -> bool:
    return any(metric["id"] in found for found in data["means"][dataset].values())


def _count(data: Data, dataset: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    failed = sum(failure["dataset"] == dataset["name"] for failure in method["failures"])
    return f"{len(dataset['images']) - failed} of {len(dataset['images'])}"


def means_table(data: Data, dataset: Mapping[str, Any]) -> str:
    """Markdown table of the means on one of the data sets, a row for each method."""
    name = dataset["name"]
    metrics = [metric for metric in data["metrics"] if _shown(metric, data, name)]
    best = {metric["id"]: significantly_best(data, name, metric) for metric in metrics}
    rows = []
    for method in data["methods"]:
        cells = []
        for metric in metrics:
            mean = data["means"][name].get(method["name"], {}).get(metric["id"])
            text = "-" if mean is None else f"{mean['mean']:.{metric['digits']}f}"
            if mean is not None and mean["n"] < len(dataset["images"]):
                text += f" (n={mean['n']})"
            cells.append(f"**{text}**" if best[metric["id"]] == method["name"] else text)
        rows.append([method["name"], _count(data, dataset, method), *cells])
    heads = [f"{metric['id']} ({_arrow(metric, 'higher', 'lower')})" for metric in metrics]
    return _table(["method", "images", *heads], rows)


def _details_table(data: Data, dataset: str, metric: Mapping[str, Any]) -> str:
    digits, rows = metric["digits"], []
    for method in data["methods"]:
        name = method["name"]
        mean = data["means"][dataset].get(name, {}).get(metric["id"])
        if mean is None:
            continue
        gain = data["gains"][dataset].get(name, {}).get(metric["id"])
        rank = data["ranks"][dataset].get(name, {}).get(metric["id"])
        row = [name, str(mean["n"]), _with_interval(mean, digits, "")]
        if gain is None:
            row += ["-", "-"]
        else:
            row += [_gain_cell(gain, metric), f"{gain['wins']:.0%} of {gain['n']}"]
        rows.append([*row, "-" if rank is None else f"{rank:.2f}"])
    return _table(["method", "n", "mean", f"difference to {data['reference']}", "wins", "mean rank"], rows)


def _pairs_table(data: Data, dataset: str) -> str:
    """The differences to other methods than the reference; empty where there are none."""
    pairs = data["pairs"][dataset]
    metrics = [metric for metric in data["metrics"] if any(metric["id"] in found for found in pairs.values())]
    rows = []
    for label, found in pairs.items():
        gains = [(found.get(metric["id"]), metric) for metric in metrics]
        rows.append([label, *("-" if gain is None else _gain_cell(gain, metric) for gain, metric in gains)])
    heads = [f"{metric['id']} ({_arrow(metric, 'higher', 'lower')})" for metric in metrics]
    return _table(["method over another", *heads], rows) if rows else ""


def _gain_cell(gain: Mapping[str, Any], metric: Mapping[str, Any]) -> str:
    """A difference with its interval, bold where that lies on the better side of zero."""
    text, low, high = _with_interval(gain, metric["digits"], "+"), gain["low"], gain["high"]
    good = low is not None and (high < 0 if metric["lower_better"] else low > 0)
    return f"**{text}**" if good else text


def _with_interval(found: Mapping[str, Any], digits: int, sign: str) -> str:
    text = f"{found['mean']:{sign}.{digits}f}"
    if found["low"] is None:
        return text
    return f"{text} [{found['low']:{sign}.{digits}f}, {found['high']:{sign}.{digits}f}]"


def _costs_table(data: Data) -> str:
    def cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            *(row["method"], cell(row["trainable"], ",d"), cell(row["total"], ",d"), cell(row["macs"], ".4g")),
            *(cell(row["seconds"], ".4g"), cell(row["spread"], ".2g"), cell(row["memory_mb"], ".4g")),
            cell(row["denoiser_calls"], "d"),
        ]
        for row in data["efficiency"]
    ]
    heads = ["trained parameters", "parameters", "MACs", "s an image", "std of s", "peak MB", "denoiser calls"]
    return _table(["method", *heads], rows)


def _published_table(table: Mapping[str, Any], dataset: str) -> str:
    rows = [
        [method, *("-" if number is None else str(number) for number in numbers)]
        for method, numbers in table["rows"][dataset].items()
    ]
    return _table([f"{table['paper']}: {dataset}", *table["columns"]], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in lines)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def _same_set(published: str, ours: Sequence[str]) -> list[str]:
    """Our test sets whose names say that they are cut from a published one."""
    return [name for name in ours if _plain(name).startswith(_plain(published)) or _plain(published) in _plain(name)]


def _markdown(data: Data, pictures: Pictures, figures: Sequence[NamedFigure]) -> str:
    data = {**_marked(data), "published": data["published"]}  # ours
    parts = [
        f"# {data['title']}",
        "Every method restores the same low-quality images, and every result is measured by the same metrics. "
        f"Differences are to `{data['reference']}`, image by image.",
    ]
    if data["notes"]:
        parts += ["## Read this first", _bullets(data["notes"])]
    for dataset in data["datasets"]:
        kind = "with references" if dataset["paired"] else "without references"
        parts += [f"## {dataset['name']}", f"{len(dataset['images'])} images {kind}.", means_table(data, dataset)]
        for metric in data["metrics"]:
            if _shown(metric, data, dataset["name"]):
                better = _arrow(metric, "higher", "lower")
                parts += [f"### {dataset['name']}: {metric['id']} ({better} is better)"]
                parts += [_details_table(data, dataset["name"], metric)]
        if pairs := _pairs_table(data, dataset["name"]):
            parts += [f"### {dataset['name']}: differences to other methods", pairs]
    parts += [
        "## How to read the tables",
        "A difference is the mean of the differences image by image, method minus reference, over the images both "
        f"have. In brackets: 95 % bootstrap intervals (percentile, {RESAMPLES} draws, seed 0). Crops of one photo are "
        f"drawn together where there are {FEW} photos or more, so that an interval is as wide as the number of photos "
        "makes it; of fewer photos the crops are drawn, and the interval is too narrow. A win is an image on which the "
        "method is better than the reference, a tie half a win. The mean rank is over the images that all methods "
        "have, 1 for the best.",
        "Bold, in the tables of one metric and of differences: the interval of the difference lies on the better side "
        "of zero. Bold, in the tables of means: the best mean, if the intervals of its differences to all others "
        "do. Many tables are many tests: one bold cell in twenty may be chance.",
        "## How it was measured",
        _bullets([f"{metric['id']}: {metric['protocol']}" for metric in data["metrics"]]),
        "A protocol reads: metric | colour space and range | border cropped | rounding | implementation. Numbers under "
        "another protocol are not comparable with these. Sharpness, colourfulness and neutrality say what changed, not "
        "whether it is better.",
        "## What is missing",
    ]
    gaps = [f"{metric}: not computed: {reason}" for metric, reason in data["missing"].items()]
    for method in data["methods"]:
        for dataset in data["datasets"]:
            failed = [failure for failure in method["failures"] if failure["dataset"] == dataset["name"]]
            if failed:
                counted = f"{len(failed)} of {len(dataset['images'])} images of {dataset['name']}"
                named = (f"  - {failure['image']}: {failure['reason']}" for failure in failed)
                gaps.append("\n".join([f"{method['name']} has no result of {counted}:", *named]))
    parts.append(_bullets(gaps) if gaps else "Nothing: every method has every image and metric.")
    if data["sources"]:
        parts += ["## Where the methods come from", _bullets(data["sources"])]
    if data["efficiency"]:
        parts += [
            "## Efficiency",
            "On one image, the same for all, in this run: parameters that take part in restoring, multiply-accumulate "
            "operations of matrix products and convolutions, median seconds and their standard deviation after two "
            "calls that do not count, peak memory with weights, and calls of the denoiser (tiles included).",
            _costs_table(data),
        ]
    if data["published"]:
        parts += ["## Published numbers", "As the papers print them. Their protocols differ from ours and each other."]
    ours = [dataset["name"] for dataset in data["datasets"]]
    for table in data["published"]:
        parts += [f"### {table['paper']}, {table['table']}", f"Protocol: {table['protocol']}"]
        for dataset in table["rows"]:
            parts.append(_published_table(table, dataset))
            same = _same_set(dataset, ours)
            parts += [f"Ours, on {', '.join(same)}: see the tables above, under our protocols."] if same else []
    if figures:
        parts.append("## Figures")
    for figure in figures:
        label, tag, stem = map(_marked, (figure.label, figure.tag, figure.path.stem))
        parts += [f"### {label}: {stem}", f"![{tag}]({quote(figure.copy)})"]
        parts += [_marked(caption)] if (caption := _caption(figure)) else []
    columns = ", ".join(map(_marked, dict.fromkeys(column for row in pictures.values() for column in row)))
    names = ", ".join(map(_marked, pictures))
    parts += [
        "## Pictures",
        f"Columns: {columns}. Rows: {names}; chosen by a fixed rule, not by their looks; of large images the window "
        f"in which the methods differ most. Pixels are enlarged {ENLARGE} times, LQ to the size of the others.",
        "![grid](grid.png)",
        "## Files",
        "`metrics.csv` holds every number, `summary.csv` every mean, difference and rank, `efficiency.csv` the costs, "
        "`table.tex` the means for LaTeX (package booktabs), `report.html` all of this with the images, `cache` the "
        "results and the numbers of each.",
    ]
    return "\n\n".join(parts) + "\n"


def _marked(tree: Any) -> Any:
    """Texts of a tree, keys too, as Markdown that shows them as they are: names and reasons come from elsewhere."""
    if isinstance(tree, str):
        return _ESCAPING.sub(r"\\\\", tree).translate(_MARKDOWN)
    if isinstance(tree, Mapping):
        return {_marked(key): _marked(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_marked(value) for value in tree]
    return tree


def _latex(data: Data) -> str:
    """A table for each data set."""
    tables = []
    for dataset in data["datasets"]:
        name = dataset["name"]
        metrics = [metric for metric in data["metrics"] if _shown(metric, data, name)]
        best = {metric["id"]: significantly_best(data, name, metric) for metric in metrics}
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(name)}, {len(dataset['images'])} images. Bold: best, and the 95\,\% bootstrap intervals "
            r"of its paired differences to all other methods exclude zero.}",
            rf"\begin{{tabular}}{{l{'r' * (len(metrics) + 1)}}}",
            r"\toprule",
            " & ".join(
                [
                    "Method",
                    "$n$",
                    *(_tex(m["id"]) + _arrow(m, r" $\uparrow$", r" $\downarrow$") for m in metrics),
                ]
            )
            + r" \\",
            r"\midrule",
        ]
        for method in data["methods"]:
            means = [data["means"][name].get(method["name"], {}).get(metric["id"]) for metric in metrics]
            cells = []
            for metric, mean in zip(metrics, means, strict=True):
                text = "--" if mean is None else f"{mean['mean']:.{metric['digits']}f}"
                cells.append(rf"\textbf{{{text}}}" if best[metric["id"]] == method["name"] else text)
            failed = sum(failure["dataset"] == name for failure in method["failures"])
            cells = [_tex(method["name"]), str(len(dataset["images"]) - failed), *cells]
            lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", *(f"% {m['id']}: {m['protocol']}" for m in metrics)]
        tables.append("\n".join([*lines, r"\end{table}"]))
    return "\n\n".join(tables) + "\n"


def _tex(text: str) -> str:
    return text.translate(_TEX)


def _caption(figure: NamedFigure) -> str:
    return " ".join(read_caption(figure.path).split())


def _write_events(
    folder: Path, data: Data, text: str, grid: Image.Image, pictures: Pictures, figures: Sequence[NamedFigure]
) -> None:
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for dataset, method, metric, mean in _cells(data):
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
