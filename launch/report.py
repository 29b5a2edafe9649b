"""Methods side by side: tables with intervals, a picture, and where every number comes from.

`write_report` turns scores and images into a folder: `metrics.csv` (every number), `summary.csv` (a row for each method
and data set), `report.md` (to be read), `grid.png` (to be looked at), `figures/` (plots that the methods left) and all
that is read or looked at for TensorBoard too. But for the TensorBoard events, equal inputs give equal bytes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from common.figures import read_caption
from common.restoration import Score, write_scores

Pixels = NDArray[np.uint8]
"""An RGB image, (H, W, 3), uint8."""

Pictures = Mapping[str, Mapping[str, Pixels | None]]
"""Name of an image -> title of a column -> pixels, None where the method has no such image."""

RESAMPLES = 10_000
_CHUNK = 1_000  # resamples at a time
_CROP = re.compile(r"(?P<photo>.+)_(?P<place>r\d+c\d+)_s\d+")
_MARKDOWN_IMAGE = re.compile(r"!\[(?P<tag>.+?)\]\(.+?\)")
_GAP, _FONT_SIZE, _LINE = 6, 14, 18
_ENLARGE = 2


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Gain(NamedTuple):
    """Mean paired difference of a method to a baseline over the `n` images both have; no interval of one image."""

    mean: float
    interval: Interval | None
    n: int


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
        """How TensorBoard calls it."""
        return f"figures/{self.label}/{self.path.stem}"


class Scores:
    """Scores, looked up by method and data set; methods, data sets and metrics stay in the order they came in.

    Args:
        scores: All numbers; those that are None carry the reason in `protocol`.

    Attributes:
        methods: Names of the methods.
        datasets: Names of the data sets.
        metrics: Ids of the metrics.
        values: (data set, method, metric) -> name of the image -> number.
        protocols: Metric -> how it was measured.
        reasons: Metric -> why it was not computed somewhere.

    Raises:
        ValueError: There are no scores, one occurs twice, or one metric was measured by several protocols.
    """

    def __init__(self, scores: Sequence[Score]) -> None:
        if not scores:
            raise ValueError("scores is empty; test a method first")
        self.methods = list(dict.fromkeys(score.method for score in scores))
        self.datasets = list(dict.fromkeys(score.dataset for score in scores))
        self.metrics = list(dict.fromkeys(score.metric for score in scores))
        self.values: dict[tuple[str, str, str], dict[str, float]] = {}
        self.protocols: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        for score in scores:
            if score.value is None:
                self.reasons[score.metric] = score.protocol
                continue
            known = self.protocols.setdefault(score.metric, score.protocol)
            if known != score.protocol:
                raise ValueError(
                    f"{score.metric} of {score.method} was measured by {score.protocol!r}, others by {known!r}; "
                    "such numbers cannot be compared, test again under one protocol"
                )
            images = self.values.setdefault((score.dataset, score.method, score.metric), {})
            if score.image in images:
                raise ValueError(
                    f"{score.metric} of {score.method} on {score.image} is there twice; drop one of the two"
                )
            images[score.image] = score.value
        self._scores = scores

    def images(self, dataset: str, method: str | None = None) -> list[str]:
        """Names of the images that a method, or any method, was scored on, sorted."""
        return sorted({s.image for s in self._scores if s.dataset == dataset and method in (None, s.method)})

    def in_order(self) -> list[Score]:
        """All scores by data set, method, metric, image."""
        return sorted(
            self._scores,
            key=lambda s: (
                self.datasets.index(s.dataset),
                self.methods.index(s.method),
                self.metrics.index(s.metric),
                s.image,
            ),
        )

    def mean(self, dataset: str, method: str, metric: str) -> float | None:
        """Mean over the images that have the number; None where none has."""
        values = self.values.get((dataset, method, metric))
        return None if not values else float(np.mean([values[image] for image in sorted(values)]))

    def gain(self, dataset: str, method: str, baseline: str, metric: str) -> Gain | None:
        """How much higher a method scores than a baseline, image by image; None where they share no image."""
        ours = self.values.get((dataset, method, metric), {})
        theirs = self.values.get((dataset, baseline, metric), {})
        both = sorted(ours.keys() & theirs.keys())
        if method == baseline or not both:
            return None
        differences = np.array([ours[image] - theirs[image] for image in both])
        return Gain(float(differences.mean()), bootstrap_interval(differences), len(both))

    def gaps(self) -> list[str]:
        """A sentence for each method that lacks the numbers of some images, or a metric."""
        sentences = [f"{metric} has empty cells: {reason}" for metric, reason in self.reasons.items()]
        for dataset in self.datasets:
            everything = self.images(dataset)
            for method in self.methods:
                has = set(self.images(dataset, method))
                lacks = [image for image in everything if image not in has]
                if lacks:
                    sentences.append(f"{method} was not scored on {listed(lacks)} of {dataset}.")
        return sentences


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} image{'s' if len(names) > 1 else ''} ({', '.join(names[:most])}{more})"


def bootstrap_interval(differences: NDArray[np.float64], seed: int = 0) -> Interval | None:
    """95 % percentile bootstrap interval of the mean: images are drawn with replacement.

    Args:
        differences: One number for each image, (n,).
        seed: Of the draws.

    Returns:
        The interval; None for a single image, of which nothing can be drawn.
    """
    n = len(differences)
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    means = [differences[rng.integers(n, size=(_CHUNK, n))].mean(axis=1) for _ in range(RESAMPLES // _CHUNK)]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(low), float(high))


def spread(names: Sequence[str], count: int = 6) -> list[str]:
    """Choose images for the picture: in turn from all photos, from different places of each and under different seeds.

    Args:
        names: Names of test images, `<photo>_r<row>c<column>_s<seed>`; any other name counts as a photo.
        count: How many to choose at most.

    Returns:
        The names, photo by photo.
    """
    photos: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names):
        match = _CROP.fullmatch(name)
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
        The picture, columns titled; a cell without an image says so.

    Raises:
        ValueError: There is no image.
    """
    columns = list(dict.fromkeys(title for row in pictures.values() for title in row))
    shapes = [image.shape[:2] for row in pictures.values() for image in row.values() if image is not None]
    if not shapes:
        raise ValueError("pictures holds no image; give at least one row with one image")
    height, width = (_ENLARGE * max(side) for side in zip(*shapes, strict=True))
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


def means_table(scores: Scores, dataset: str) -> str:
    """Markdown table of the means on a data set, a row for each method."""
    rows = []
    for method in scores.methods:
        count = len(scores.images(dataset, method))
        if count:
            means = [_cell(scores.mean(dataset, method, metric), metric) for metric in scores.metrics]
            rows.append([method, str(count), *means])
    return _table(["method", "images", *scores.metrics], rows)


def gains_table(scores: Scores, dataset: str, metric: str, baselines: Sequence[str]) -> str:
    """Markdown table of the methods' paired differences to the baselines in one metric."""
    rows = []
    for method in scores.methods:
        gains = [scores.gain(dataset, method, baseline, metric) for baseline in baselines]
        if any(gains):
            rows.append([method, *(_gain_cell(gain, metric) for gain in gains)])
    return _table(["method", *(f"over {baseline}" for baseline in baselines)], rows)


def pairs_table(scores: Scores, dataset: str) -> str:
    """Markdown table of the paired differences between two methods `paper/name` of one paper; empty if there are none.

    The first in order over each later one; a method without its colour fix does not count as one.
    """
    papers: dict[str, list[str]] = {}
    for method in scores.methods:
        paper, slash, _ = method.partition("/")
        if slash and not method.endswith("(raw)") and scores.images(dataset, method):
            papers.setdefault(paper, []).append(method)
    rows = [
        [f"{first} over {other}", *(_gain_cell(scores.gain(dataset, first, other, m), m) for m in scores.metrics)]
        for first, *others in papers.values()
        for other in others
    ]
    return _table(["methods of one paper", *scores.metrics], rows) if rows else ""


def _digits(metric: str) -> int:
    return 2 if "psnr" in metric else 4  # dB to a hundredth; what lies in [0, 1] finer


def _cell(value: float | None, metric: str) -> str:
    return "-" if value is None else f"{value:.{_digits(metric)}f}"


def _gain_cell(gain: Gain | None, metric: str) -> str:
    if gain is None:
        return "-"
    digits = _digits(metric)
    if gain.interval is None:
        return f"{gain.mean:+.{digits}f}"
    return f"{gain.mean:+.{digits}f} [{gain.interval.low:+.{digits}f}, {gain.interval.high:+.{digits}f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _summary(scores: Scores, reference: str) -> str:
    """`summary.csv`: a row for each data set and method."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    parts = ("", "_n", "_gain", "_gain_low", "_gain_high")
    writer.writerow(["method", "dataset", "n", *(metric + part for metric in scores.metrics for part in parts)])
    for dataset in scores.datasets:
        for method in scores.methods:
            count = len(scores.images(dataset, method))
            if not count:
                continue
            row: list[str] = [method, dataset, str(count)]
            for metric in scores.metrics:
                mean, gain = scores.mean(dataset, method, metric), scores.gain(dataset, method, reference, metric)
                low_high = gain.interval if gain is not None and gain.interval is not None else (None, None)
                row.append(_number(mean))
                row.append(str(len(scores.values.get((dataset, method, metric), {}))))
                row += [_number(value) for value in (gain.mean if gain is not None else None, *low_high)]
            writer.writerow(row)
    return file.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown(
    title: str,
    scores: Scores,
    baselines: Sequence[str],
    pictures: Pictures,
    notes: Sequence[str],
    sources: Sequence[str],
    figures: Sequence[NamedFigure],
) -> str:
    reference = baselines[0]
    parts = [
        f"# {title}",
        "Every method restores the same low-quality images; its output is compared with the image these were made "
        "from. Higher is better for PSNR (in dB) and SSIM (1 is identical). Rows that begin with "
        f"`{reference}` use no network. A method marked `(raw)` is that method before its colours were set to those of "
        "the low-quality image.",
    ]
    if notes:
        parts += ["## Read this first", _bullets(notes)]
    for dataset in scores.datasets:
        count = len(scores.images(dataset))
        parts += [f"## {dataset}: means over images", f"{count} images.", means_table(scores, dataset)]
        for metric in scores.metrics:
            if metric in scores.protocols:
                parts += [f"### {dataset}: gain in {metric}", gains_table(scores, dataset, metric, baselines)]
        if pairs := pairs_table(scores, dataset):
            parts += [f"### {dataset}: gains within a paper", pairs]
    parts += [
        "## How to read the gains",
        "A gain is the mean of the differences image by image, method minus baseline, over the images both have. In "
        f"brackets: its 95 % bootstrap interval ({RESAMPLES} draws of the images, seed 0). An interval that holds 0 "
        "means that these images do not tell the two apart. Crops of one photo, and one crop degraded several times, "
        "resemble each other: for photos at large the uncertainty is wider than the interval.",
        f"A method above `{reference}` but not above the blurs has removed noise and restored no detail that these "
        "metrics see.",
        "## How it was measured",
        _bullets([f"{metric}: {scores.protocols[metric]}" for metric in scores.metrics if metric in scores.protocols]),
        "A protocol reads: metric | colour space and range | border cropped | rounding | implementation. Numbers under "
        "another protocol are not comparable with these.",
    ]
    gaps = scores.gaps()
    columns = list(dict.fromkeys(column for row in pictures.values() for column in row))
    for column in columns:
        lacks = [name for name, row in pictures.items() if row.get(column) is None]
        if lacks:
            gaps.append(f"{column} has no picture of {listed(lacks)}.")
    parts += ["## What is missing", _bullets(gaps) if gaps else "Nothing: every row has every image and metric."]
    if sources:
        parts += ["## Where the rows come from", _bullets(sources)]
        parts += ["A run folder holds the whole configuration, config.yaml, and versions and git commit, run.json."]
    if figures:
        parts.append("## Figures")
    for figure in figures:
        parts += [f"### {figure.label}: {figure.path.stem}", f"![{figure.tag}]({figure.copy})"]
        caption = " ".join(read_caption(figure.path).split())
        parts += [caption] if caption else []
    parts += [
        "## Pictures",
        f"Columns: {', '.join(columns)}. Rows: {', '.join(pictures)}; chosen by a fixed rule, not by their looks. "
        f"Pixels are enlarged {_ENLARGE} times, LQ to the size of the others.",
        "![grid](grid.png)",
        "## Files",
        "`metrics.csv` holds every number, `summary.csv` a row for each method and data set: the mean of each metric, "
        f"how many images it is over, and the gain over `{reference}` with its interval.",
    ]
    return "\n\n".join(parts) + "\n"


def _copy_figures(folder: Path, figures: Sequence[NamedFigure]) -> None:
    """Copy the figures into the report's folder, and remove those of an earlier report."""
    contents = {folder / figure.copy: figure.path.read_bytes() for figure in figures}
    for old in set((folder / "figures").glob("*.png")) - contents.keys():
        old.unlink()
    for path, content in contents.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _write_events(folder: Path, text: str, grid: Image.Image, figures: Sequence[NamedFigure]) -> None:
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        writer.add_image("grid", np.asarray(grid), dataformats="HWC")
        for figure in figures:
            with Image.open(folder / figure.copy) as image:
                writer.add_image(figure.tag, np.asarray(image.convert("RGB")), dataformats="HWC")
        writer.add_text("report", _MARKDOWN_IMAGE.sub(r"See the image `\g<tag>`.", text))


def write_report(
    folder: Path,
    scores: Scores,
    baselines: Sequence[str],
    pictures: Pictures,
    notes: Sequence[str] = (),
    sources: Sequence[str] = (),
    title: str = "Report",
    figures: Sequence[NamedFigure] = (),
) -> Path:
    """Write the report's files into a folder, over those of an earlier report.

    Args:
        folder: Where to; made if absent.
        scores: All methods' and baselines' numbers.
        baselines: Methods that the others are compared with; the first is the one of `summary.csv`.
        pictures: Rows and columns of the picture.
        notes: What a reader must know to judge the numbers.
        sources: A line for each method: configuration, steps, seconds.
        title: Heading.
        figures: Plots to show with their captions, in order.

    Returns:
        Path of `report.md`.

    Raises:
        ValueError: A baseline has no scores on a data set, there is no image, or two figures would be one file.
        FileNotFoundError: A figure is not there.
    """
    for dataset in scores.datasets:
        for baseline in baselines:
            if not scores.images(dataset, baseline):
                raise ValueError(f"baselines: {baseline} has no scores on {dataset}; score it there too")
    copies = [figure.copy for figure in figures]
    if len(set(copies)) < len(copies):
        twice = next(copy for copy in copies if copies.count(copy) > 1)
        raise ValueError(f"figures: two would be {twice}; rename one of the two")
    folder.mkdir(parents=True, exist_ok=True)
    grid = draw_grid(pictures)
    text = _markdown(title, scores, baselines, pictures, notes, sources, figures)
    write_scores(folder / "metrics.csv", scores.in_order())
    (folder / "summary.csv").write_text(_summary(scores, baselines[0]))
    grid.save(folder / "grid.png")
    report = folder / "report.md"
    report.write_text(text)
    _copy_figures(folder, figures)
    _write_events(folder, text, grid, figures)
    return report


def read_scores(path: Path) -> list[Score]:
    """Read what `common.restoration.write_scores` wrote.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run isr test to make it")
    with path.open(newline="") as file:
        return [
            Score(
                row["method"],
                row["dataset"],
                row["image"],
                row["metric"],
                float(row["value"]) if row["value"] else None,
                row["protocol"],
            )
            for row in csv.DictReader(file)
        ]
