"""Content of the report: every number, mean, difference and rank of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common.metrics import MetricProtocol
from common.statistics import FEW
from launch.comparison import measures
from launch.comparison.inputs import Item
from launch.comparison.methods import Baseline, Method
from launch.comparison.statistics import Mean, PairedGain, gain_of, mean_of, mean_ranks, photo_of
from launch.comparison.store import Store
from launch.comparison.work import Work

Numbers = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Method -> metric -> image -> number."""


@dataclass
class Report:
    """Content of a report. Tables are keyed by test set, then by method, then by metric; unknown numbers are None.

    Args:
        reference: Method that the others are compared with.
        metrics: `id`, `protocol`, `lower_better` and `digits` of each metric.
        datasets: `name`, `paired` and `images` (names) of each test set.
        methods: `name`, `kind` and `failures` of each method.
        values: Image -> number.
        means: `mean`, `low`, `high` and `n`.
        gains: Differences to the reference: the same, and `wins`.
        ranks: Mean rank.
        pairs: Test set -> `A over B` -> metric -> difference, as in `gains`.
        missing: Metric -> the reason why it was not computed.
        images: Test set -> image -> its files and windows.
        title: Heading.
        notes: Notes for the reader.
        sources: Sources of the methods.
        efficiency: Costs of each method, see `efficiency.Cost`.
        published: Tables of the papers, see `published`.
        figures: `label`, `caption` and `path` of each plot.
    """

    reference: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    methods: list[dict[str, Any]] = field(default_factory=list)
    values: Mapping[str, Numbers] = field(default_factory=dict)
    means: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    gains: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    ranks: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    pairs: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    images: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    title: str = "Comparison"
    notes: Sequence[str] = ()
    sources: Sequence[str] = ()
    efficiency: Sequence[dict[str, Any]] = ()
    published: Sequence[dict[str, Any]] = ()
    figures: Sequence[dict[str, str]] = ()


def build(work: Work, built: Mapping[str, MetricProtocol], reference: str, missing: Mapping[str, str]) -> Report:
    """Put the numbers of a comparison into a report.

    Args:
        work: Methods, images and results.
        built: Metrics that were computed, by their ids.
        reference: Method that the others are compared with.
        missing: Metric -> the reason why it was not computed.

    Returns:
        The report; its windows, texts, costs and figures are not set yet.
    """
    by_set: dict[str, list[Item]] = {}
    for item in work.items:
        by_set.setdefault(item.dataset, []).append(item)
    names = [method.name for method in work.methods]
    report = Report(
        reference,
        datasets=[
            {"name": name, "paired": all(item.hq for item in items), "images": [item.name for item in items]}
            for name, items in by_set.items()
        ],
        methods=[
            {"name": method.name, "kind": method.kind, "failures": work.failures.get(method.name, [])}
            for method in work.methods
        ],
        values={
            dataset: {name: _values(work, name, items, built) for name in names} for dataset, items in by_set.items()
        },
    )
    pairs = _pairs(work.methods)
    for dataset in by_set:
        _add_statistics(report, dataset, built, pairs)
    computed = {name for found in report.means.values() for of_method in found.values() for name in of_method}
    report.metrics = [
        metric_entry(metric.id, metric.describe(), metric.lower_better)
        for metric in built.values()
        if metric.id in computed
    ]
    unpaired = [name for name in built if name not in computed and name not in missing]
    report.missing = {**missing, **dict.fromkeys(unpaired, "no test set has references")}
    return report


def metric_entry(name: str, protocol: str, lower_better: bool) -> dict[str, Any]:
    """A metric as the report lists it."""
    digits = measures.KNOWN[name].digits
    return {"id": name, "protocol": protocol, "lower_better": lower_better, "digits": digits}


def _add_statistics(
    report: Report, dataset: str, built: Mapping[str, MetricProtocol], pairs: Sequence[tuple[str, str]]
) -> None:
    """Add means, differences and ranks on one test set."""
    values, reference = report.values[dataset], report.reference
    means: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in values}
    gains: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in values}
    ranks: dict[str, dict[str, float]] = {name: {} for name in values}
    of_pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in built.values():
        numbers = {name: found.get(metric.id, {}) for name, found in values.items()}
        for name in values:
            mean = mean_of(numbers[name])
            gain = gain_of(numbers[name], numbers[reference], metric.lower_better) if name != reference else None
            if mean is not None:
                means[name][metric.id] = _plain(mean)
            if gain is not None:
                gains[name][metric.id] = _plain(gain) | {"wins": gain.wins}
        for name, rank in mean_ranks(numbers, metric.lower_better).items():
            ranks[name][metric.id] = rank
        for name, other in pairs:
            gain = gain_of(numbers[name], numbers[other], metric.lower_better)
            if gain is not None:
                of_pairs.setdefault(f"{name} over {other}", {})[metric.id] = _plain(gain) | {"wins": gain.wins}
    report.means[dataset], report.gains[dataset], report.ranks[dataset] = means, gains, ranks
    report.pairs[dataset] = of_pairs


def _pairs(methods: Sequence[Method]) -> list[tuple[str, str]]:
    """Pairs that are compared in addition: runs with their paper's first run, and all methods with the blurs."""
    runs = [method for method in methods if method.kind == "run"]
    firsts = {run.paper: run.name for run in reversed(runs)}
    blurs = [method.name for method in methods if isinstance(method, Baseline) and method.sigma is not None]
    within = [(run.name, firsts[run.paper]) for run in runs if firsts[run.paper] != run.name]
    return within + [(method.name, blur) for method in methods if not isinstance(method, Baseline) for blur in blurs]


def _values(
    work: Work, name: str, items: Sequence[Item], built: Mapping[str, MetricProtocol]
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


def _plain(found: Mean | PairedGain) -> dict[str, Any]:
    low, high = found.interval if found.interval is not None else (None, None)
    return {"mean": found.mean, "low": low, "high": high, "n": found.n}


def notes_on_few_photos(items: Sequence[Item]) -> list[str]:
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
