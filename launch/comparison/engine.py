"""`compare`: from methods and test sets to a report, making and measuring only what is not there yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from rich.progress import Progress

from common.files import check_free, held
from common.metrics import MetricProtocol
from common.pyiqa import MetricUnavailableError
from data.inventory import Inventory, write_unused
from launch.comparison import measures
from launch.comparison.fid import add_fid
from launch.comparison.inputs import ImageSet, open_sets
from launch.comparison.methods import Baseline, Method, Results, Run, Weights
from launch.comparison.outputs import copy_figures, write_files
from launch.comparison.pictures import NamedFigure
from launch.comparison.published import published
from launch.comparison.report import Report, build, notes_on_few_photos
from launch.comparison.store import Store
from launch.comparison.windows import grid_of, images_of
from launch.comparison.work import Work, measure, restore
from launch.errors import UsageError

BICUBIC = "bicubic"


@dataclass(frozen=True)
class WrittenReport:
    """The report that `compare` wrote.

    Args:
        page: The page to open, `report.html`.
        markdown: The same to read, `report.md`.
        data: Content of both.
    """

    page: Path
    markdown: Path
    data: Report


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
) -> WrittenReport:
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
        notes: Facts that a reader needs to judge the numbers.
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
    inventories = _inventories(sets, output)
    built, missing = _build([name for name in wanted if name != measures.FID], chosen)
    with held(output):
        write_unused(output / "skipped.csv", inventories)
        work = _work(Store(output), methods, sets)
        with Progress(disable=not progress) as bars:
            restore(work, efficiency, chosen, bars)
            missing |= measure(work, built, bars)
        report = build(work, built, reference, missing)
        report.images = images_of(work)
        if fid or measures.FID in wanted:
            add_fid(report, work, chosen)
        report.title, report.sources = title, list(sources)
        report.notes = [*notes, *_notes(work, built)]
        report.efficiency = [cost.row() for cost in work.costs]
        report.published = published({method.paper for method in methods if method.paper is not None})
        report.figures = copy_figures(output, figures)
        markdown = write_files(output, report, grid_of(work, report.images), figures)
        return WrittenReport(write_page(output, vars(report), embed), markdown, report)


def _inventories(sets: Sequence[ImageSet], output: Path) -> list[Inventory]:
    """Print the files of the test sets, and refuse an output folder that is in use or among them."""
    check_free(output, own="cache")
    found: list[Inventory] = []
    for image_set in sets:
        if hasattr(image_set.samples, "inventory"):
            found.append(image_set.samples.inventory("test"))
    for inventory in found:
        inventory.check_apart(output)
        print(f"isr: {inventory}", flush=True)
    return found


def _work(store: Store, methods: list[Method], sets: Sequence[ImageSet]) -> Work:
    """Collect the images of all sets; folders of results learn the names that several sets share."""
    work = Work(store, methods, [item for image_set in sets for item in store.items(image_set)])
    in_sets = Counter(item.name for item in work.items)
    for method in methods:
        if isinstance(method, Results):
            method.shared = {name for name, count in in_sets.items() if count > 1}
    return work


def _notes(work: Work, built: Mapping[str, MetricProtocol]) -> list[str]:
    """Notes of the work, the methods, the test sets and the metrics."""
    notes = list(work.notes)
    for method in work.methods:
        notes += method.notes(work.items)
    notes += notes_on_few_photos(work.items)
    if any(name.startswith("pyiqa:") for name in built):
        notes.append("Metrics of pyiqa are computed by software under the PolyForm Noncommercial licence.")
    return notes


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
