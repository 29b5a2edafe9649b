"""`compare`: from methods and test sets to a report, making and measuring only what is not there yet."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from rich.progress import Progress

from common.errors import one_line
from common.files import check_free, held
from common.metrics import MetricProtocol, MetricUnavailableError
from data.images import ImageError, read_image
from data.inventory import write_unused
from launch.comparison import measures
from launch.comparison.efficiency import Cost, measure
from launch.comparison.inputs import ImageSet, Item, open_sets
from launch.comparison.methods import Baseline, Method, Results, Run, Weights
from launch.comparison.outputs import copy_figures, write_files
from launch.comparison.pictures import Crop, NamedFigure, Pictures, largest_differences, spread
from launch.comparison.published import published
from launch.comparison.statistics import FEW, Gain, Mean, gain_of, mean_of, mean_ranks, photo_of
from launch.comparison.store import Record, Store, digest
from launch.errors import UsageError

BICUBIC = "bicubic"
_WHOLE = 192  # px: larger images are shown by a window
_SHOWN = 6


@dataclass(frozen=True)
class Comparison:
    """What `compare` wrote.

    Args:
        page: The page to open, `report.html`.
        markdown: The same to read, `report.md`.
        data: What both show; see `launch.page.write_page`.
    """

    page: Path
    markdown: Path
    data: dict[str, Any]


@dataclass
class _Work:
    """What one call of `compare` has made."""

    store: Store
    methods: list[Method]
    items: list[Item]
    records: dict[tuple[str, Item], Record] = field(default_factory=dict)
    failures: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fail(self, method: Method, item: Item, error: Exception) -> None:
        reason = one_line(error)
        failure = {"dataset": item.dataset, "image": item.name, "reason": reason}
        self.failures.setdefault(method.name, []).append(failure)


def compare(
    runs: Mapping[str, Path] | None = None,
    results: Mapping[str, Path] | None = None,
    weights: Mapping[str, Path] | None = None,
    blurs: Mapping[str, float] | None = None,
    pairs: Sequence[Path] = (),
    data: LightningDataModule | Sequence[Path] = (),
    output: Path = Path("runs/compare"),
    metrics: Sequence[str] = measures.WEIGHTLESS,
    reference: str = BICUBIC,
    images: Mapping[str, Path] | None = None,
    figures: Sequence[NamedFigure] = (),
    notes: Sequence[str] = (),
    sources: Sequence[str] = (),
    title: str = "Comparison",
    fid: bool = False,
    efficiency: bool = True,
    embed: bool = False,
    device: str = "auto",
    scale: int = 4,
    progress: bool = True,
) -> Comparison:
    """Put methods side by side under one protocol and write the report; bicubic enlargement is always among them.

    Args:
        runs: Name -> a run's folder, a version of it, or a checkpoint.
        results: Name -> folder of images that another program wrote.
        weights: Name -> file of weights that spandrel can load.
        blurs: Name -> width in px of a Gaussian blur after bicubic enlargement.
        pairs: Folders of pairs in a layout of `data.layouts`, or of low-quality images alone.
        data: Configurations whose test sets are taken, or a data module; default, where there are no pairs either: the
            embedded photos.
        output: Folder of the report; what is kept there from an earlier call is not made again.
        metrics: Ids or short names of metrics, see `measures`.
        reference: The method that the others are compared with.
        images: Name of a run -> folder in which `isr test` left its results, `<folder>/<test set>/<image>.png`; they
            are taken, and the run's model serves the efficiency alone.
        figures: Plots that the methods left.
        notes: What a reader must know to judge the numbers.
        sources: Where the methods come from.
        title: Heading.
        fid: Compute FID too.
        efficiency: Measure what the methods cost; loads every model.
        embed: Put the images into the page instead of naming their files.
        device: `cpu`, `cuda`, or `auto`.
        scale: Super-resolution factor of `pairs`.
        progress: Show progress bars.

    Returns:
        Where the report is, and what it shows.

    Raises:
        FileNotFoundError: A source is not there.
        InUseError: Another process writes into the output folder.
        UsageError: A name is there twice or unknown, or a source is of the wrong kind.
        ValueError: A test set cannot be read.
    """
    from launch.page import write_page

    chosen = torch.device(_device(device))
    methods = _methods(runs or {}, results or {}, weights or {}, blurs or {}, images or {}, chosen)
    if reference not in [method.name for method in methods]:
        raise UsageError(f"reference={reference} is no method; take {', '.join(method.name for method in methods)}")
    wanted = list(dict.fromkeys(measures.full_id(name) for name in metrics))
    sets = open_sets(pairs, data, scale)
    _check_scales(methods, sets)
    check_free(output, own="cache")
    inventories = [test_set.samples.inventory("test") for test_set in sets if hasattr(test_set.samples, "inventory")]
    for inventory in inventories:
        inventory.check_apart(output)
        print(f"isr: {inventory}", flush=True)
    built, missing = _build([name for name in wanted if name != measures.FID], chosen)

    with held(output):
        write_unused(output / "skipped.csv", inventories)
        store = Store(output)
        work = _Work(store, methods, [item for image_set in sets for item in store.items(image_set)])
        in_sets = Counter(item.name for item in work.items)
        for method in methods:
            if isinstance(method, Results):
                method.shared = {name for name, count in in_sets.items() if count > 1}
        with Progress(disable=not progress) as bars:
            _restore(work, efficiency, chosen, bars)
            lacking = _measure(work, built, bars)
        for name, reasons in lacking.items():
            missing[name] = "; ".join(f"{reason} ({count} results)" for reason, count in reasons.items())
        for method in methods:
            work.notes += method.notes(work.items)
        work.notes += _few_photos(work.items)
        if any(name.startswith("pyiqa:") for name in built):
            work.notes.append("Metrics of pyiqa are computed by software under the PolyForm Noncommercial licence.")
        papers = {method.paper for method in methods if isinstance(method, Run)}
        shown = _data(work, sets, built, reference, missing)
        if fid or measures.FID in wanted:
            _add_fid(shown, work, chosen)
        shown |= {
            "title": title,
            "notes": [*notes, *work.notes],
            "sources": list(sources),
            "efficiency": [cost.row() for cost in work.costs],
            "published": published(papers),
            "figures": copy_figures(output, figures),
        }
        markdown = write_files(output, shown, _pictures(work, shown), figures)
        return Comparison(write_page(output, shown, embed), markdown, shown)


def _few_photos(items: Sequence[Item]) -> list[str]:
    """A sentence for each test set of so few photos that they may agree by chance."""
    found = []
    for dataset in dict.fromkeys(item.dataset for item in items):
        images = [item.name for item in items if item.dataset == dataset]
        photos = len({photo_of(image) for image in images})
        if photos < FEW:
            shown = f"{len(images)} images show {photos} photo{'s' if photos > 1 else ''}"
            drawn = " draw the images, as if each were a photo of its own, and" if photos < len(images) else ""
            found.append(
                f"{dataset}: its {shown}. Of fewer than {FEW} photos the intervals{drawn} are too narrow; they, and "
                "what is bold by them, say little about photos at large."
            )
    return found


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _methods(
    runs: Mapping[str, Path],
    results: Mapping[str, Path],
    weights: Mapping[str, Path],
    blurs: Mapping[str, float],
    images: Mapping[str, Path],
    device: torch.device,
) -> list[Method]:
    stray = sorted(images.keys() - runs.keys())
    if stray:
        raise UsageError(f"images names {stray[0]}, which is no run; name one of {', '.join(runs) or 'none'}")
    methods: list[Method] = [Baseline(BICUBIC)]
    methods += [Baseline(name, sigma) for name, sigma in blurs.items()]
    methods += [Weights(name, path, device) for name, path in weights.items()]
    methods += [Results(name, path) for name, path in results.items()]
    methods += [Run(name, path, device, images.get(name)) for name, path in runs.items()]
    count = Counter(method.name.casefold() for method in methods)
    twice = [method.name for method in methods if count[method.name.casefold()] > 1]
    if twice:
        raise UsageError(f"two methods are called {' and '.join(twice[:2])}; give one another name: NAME=PATH")
    return methods


def _check_scales(methods: Sequence[Method], sets: Sequence[ImageSet]) -> None:
    """Refuse a run of another factor than a test set, before its network is loaded.

    Raises:
        UsageError: There is one.
    """
    for method in methods:
        for image_set in sets:
            if method.scale not in (None, image_set.scale):
                raise UsageError(
                    f"scale={image_set.scale} of the test set {image_set.name} is not scale={method.scale} of "
                    f"{method.name}; compare methods and test sets of one scale"
                )


def _build(wanted: Sequence[str], device: torch.device) -> tuple[dict[str, MetricProtocol], dict[str, str]]:
    """The metrics that can be computed, and why the others cannot."""
    built: dict[str, MetricProtocol] = {}
    missing: dict[str, str] = {}
    for name in wanted:
        try:
            built[name] = measures.build(name, device)
        except MetricUnavailableError as error:
            missing[name] = str(error).removeprefix(f"{name}: ")
    return built, missing


def _restore(work: _Work, efficiency: bool, device: torch.device, bars: Progress) -> None:
    """Make every result that is not there, method by method, and measure what it costs while it is loaded."""
    bar = bars.add_task("restore", total=len(work.methods) * len(work.items))
    for method in work.methods:
        for item in work.items:
            try:
                record = work.store.find(method, item)
                if not record.png.is_file():
                    work.store.fill(record, _checked(method, item))
                work.records[method.name, item] = record
            except Exception as error:  # whatever a method raises is its own failure
                work.fail(method, item, error)
            bars.advance(bar)
        if efficiency:
            try:
                work.costs.append(measure(method, work.items[0], device))
            except Exception as error:  # likewise
                work.costs.append(Cost(method.name))
                work.notes.append(f"The efficiency of {method.name} is not known: {one_line(error)}")
        method.close()


def _checked(method: Method, item: Item) -> Any:
    image = method.restore(item)
    if image.shape[:2] != item.size:
        (height, width), (wanted_height, wanted_width) = image.shape[:2], item.size
        raise ImageError(f"wrong size: {width} x {height} px, {wanted_width} x {wanted_height} are wanted")
    return image


def _measure(work: _Work, built: Mapping[str, MetricProtocol], bars: Progress) -> dict[str, Counter[str]]:
    """Compute every number that is not there, image by image.

    Returns:
        Metric -> why it was not computed -> of how many results.
    """
    lacking: dict[str, Counter[str]] = {}
    bar = bars.add_task("measure", total=len(work.items) * len(work.methods))
    for item in work.items:
        metrics = [metric for metric in built.values() if item.hq is not None or not metric.needs_hq]
        hq = None
        for method in work.methods:
            bars.advance(bar)
            record = work.records.get((method.name, item))
            if record is None:
                continue
            todo = [metric for metric in metrics if Store.key(metric, item) not in record.values]
            if not todo:
                continue
            sr = read_image(record.png)
            if item.hq is not None and hq is None:
                hq = read_image(item.hq)
            for metric in todo:
                try:
                    value = metric(sr, hq)
                    if not math.isfinite(value):
                        raise ValueError(f"its value is {value}")
                    record.values[Store.key(metric, item)] = value
                except (ValueError, RuntimeError) as error:
                    reason = one_line(error)
                    lacking.setdefault(metric.id, Counter())[reason] += 1
            record.save()
    return lacking


def _data(
    work: _Work,
    sets: Sequence[ImageSet],
    built: Mapping[str, MetricProtocol],
    reference: str,
    missing: Mapping[str, str],
) -> dict[str, Any]:
    """All but what `compare` adds itself."""
    by_set = {image_set.name: [item for item in work.items if item.dataset == image_set.name] for image_set in sets}
    names = [method.name for method in work.methods]
    values = {dataset: {name: _values(work, name, items, built) for name in names} for dataset, items in by_set.items()}
    means: dict[str, Any] = {dataset: {name: {} for name in names} for dataset in by_set}
    gains: dict[str, Any] = {dataset: {name: {} for name in names} for dataset in by_set}
    ranks: dict[str, Any] = {dataset: {name: {} for name in names} for dataset in by_set}
    pairs: dict[str, Any] = {dataset: {} for dataset in by_set}
    for dataset, found in values.items():
        for metric in built.values():
            numbers = {name: found[name].get(metric.id, {}) for name in names}
            for name in names:
                mean = mean_of(numbers[name])
                gain = gain_of(numbers[name], numbers[reference], metric.lower_better) if name != reference else None
                if mean is not None:
                    means[dataset][name][metric.id] = _plain(mean)
                if gain is not None:
                    gains[dataset][name][metric.id] = _plain(gain) | {"wins": gain.wins}
            for name, rank in mean_ranks(numbers, metric.lower_better).items():
                ranks[dataset][name][metric.id] = rank
            for name, other in _pairs(work.methods):
                gain = gain_of(numbers[name], numbers[other], metric.lower_better)
                if gain is not None:
                    found_pair = pairs[dataset].setdefault(f"{name} over {other}", {})
                    found_pair[metric.id] = _plain(gain) | {"wins": gain.wins}
    computed = {name for found in means.values() for of_method in found.values() for name in of_method}
    return {
        "reference": reference,
        "metrics": [
            {
                "id": metric.id,
                "protocol": metric.describe(),
                "lower_better": metric.lower_better,
                "digits": measures.KNOWN[metric.id].digits,
            }
            for metric in built.values()
            if metric.id in computed
        ],
        "datasets": [
            {"name": name, "paired": all(item.hq for item in items), "images": [item.name for item in items]}
            for name, items in by_set.items()
        ],
        "methods": [
            {"name": method.name, "kind": method.kind, "failures": work.failures.get(method.name, [])}
            for method in work.methods
        ],
        "values": values,
        "means": means,
        "gains": gains,
        "ranks": ranks,
        "pairs": pairs,
        "missing": {
            **missing,
            **{name: "no test set has references" for name in built if name not in computed and name not in missing},
        },
        "images": {dataset: {item.name: _image(work, item) for item in items} for dataset, items in by_set.items()},
    }


def _pairs(methods: Sequence[Method]) -> list[tuple[str, str]]:
    """Which methods are compared besides with the reference: runs with their paper's first, and all with the blurs."""
    runs = [method for method in methods if isinstance(method, Run)]
    firsts = {run.paper: run.name for run in reversed(runs)}
    blurs = [method.name for method in methods if isinstance(method, Baseline) and method.sigma is not None]
    within = [(run.name, firsts[run.paper]) for run in runs if firsts[run.paper] != run.name]
    return within + [(method.name, blur) for method in methods if not isinstance(method, Baseline) for blur in blurs]


def _values(
    work: _Work, name: str, items: Sequence[Item], built: Mapping[str, MetricProtocol]
) -> dict[str, dict[str, float]]:
    """Metric -> image -> number of one method on one test set."""
    values: dict[str, dict[str, float]] = {}
    for item in items:
        record = work.records.get((name, item))
        for metric in built.values() if record is not None else ():
            number = record.values.get(Store.key(metric, item)) if record is not None else None
            if number is not None:
                values.setdefault(metric.id, {})[item.name] = number
    return values


def _plain(found: Mean | Gain) -> dict[str, Any]:
    low, high = found.interval if found.interval is not None else (None, None)
    return {"mean": found.mean, "low": low, "high": high, "n": found.n}


def _image(work: _Work, item: Item) -> dict[str, Any]:
    """What the page shows of an image."""
    records = {method.name: work.records.get((method.name, item)) for method in work.methods}
    there = {name: record for name, record in records.items() if record is not None}
    return {
        "lq": work.store.relative(item.lq),
        "hq": work.store.relative(item.hq) if item.hq is not None else None,
        "methods": {name: work.store.relative(record.png) for name, record in there.items()},
        "crops": [crop._asdict() for crop in _crops(work, item, there)],
    }


def _crops(work: _Work, item: Item, records: Mapping[str, Record]) -> list[Crop]:
    key = digest("crops", str(item.scale), *sorted(record.made for record in records.values()))

    def find() -> list[dict[str, int]]:
        found = largest_differences([read_image(record.png) for record in records.values()], item.scale)
        return [crop._asdict() for crop in found]

    return [Crop(**crop) for crop in work.store.remembered(key, find)]


def _add_fid(shown: dict[str, Any], work: _Work, device: torch.device) -> None:
    """Add FID to the means, with its n; it has no values by image."""
    added = False
    try:
        for dataset, means in shown["means"].items():
            for method in work.methods:
                pairs = [
                    (record, item)
                    for (name, item), record in work.records.items()
                    if name == method.name and item.dataset == dataset and item.hq is not None
                ]
                if len(pairs) < 2:
                    continue
                value = _fid(work.store, pairs, device)
                means[method.name][measures.FID] = {"mean": value, "low": None, "high": None, "n": len(pairs)}
                added = True
    except MetricUnavailableError as error:
        shown["missing"][measures.FID] = str(error).removeprefix(f"{measures.FID}: ")
        return
    if added:
        digits = measures.KNOWN[measures.FID].digits
        protocol = measures.fid_protocol()
        shown["metrics"].append({"id": measures.FID, "protocol": protocol, "lower_better": True, "digits": digits})
    else:
        shown["missing"][measures.FID] = "it needs two images with references"


def _fid(store: Store, pairs: Sequence[tuple[Record, Item]], device: torch.device) -> float:
    measures.check_weights(measures.FID)
    key = digest(measures.fid_protocol(), *sorted(record.made + item.hq_key for record, item in pairs))

    def make() -> float:
        with tempfile.TemporaryDirectory() as folder:
            sides = Path(folder) / "results", Path(folder) / "references"
            for side in sides:
                side.mkdir()
            for number, (record, item) in enumerate(pairs):
                assert item.hq is not None
                for side, path in zip(sides, (record.png, item.hq), strict=True):
                    (side / f"{number}.png").symlink_to(path.resolve())
            return measures.fid(*sides, device)

    return float(store.remembered(key, make))


def _pictures(work: _Work, shown: Mapping[str, Any]) -> Pictures:
    """The images of the picture; of large ones the window of the largest difference."""
    by_name = {(f"{item.dataset}/" if len(shown["datasets"]) > 1 else "") + item.name: item for item in work.items}
    pictures: dict[str, dict[str, Any]] = {}
    for name in spread(list(by_name), _SHOWN):
        item = by_name[name]
        (height, width), crops = item.size, shown["images"][item.dataset][item.name]["crops"]
        crop = None
        if max(height, width) > _WHOLE:
            side = min(height, width, _WHOLE) // item.scale * item.scale
            crop = Crop(**crops[0]) if crops else Crop(0, 0, side)
        row = {"LQ": _window(item.lq, crop, item.scale)}
        for method in work.methods:
            record = work.records.get((method.name, item))
            row[method.name] = _window(record.png, crop, 1) if record is not None else None
        if item.hq is not None:
            row["HQ"] = _window(item.hq, crop, 1)
        pictures[name] = row
    return pictures


def _window(path: Path, crop: Crop | None, scale: int) -> Any:
    image = read_image(path)
    if crop is None:
        return image
    x, y, size = (number // scale for number in crop)
    return image[y : y + size, x : x + size]
