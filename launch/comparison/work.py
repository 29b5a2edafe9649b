"""The work of a comparison: every result is made and measured that the folder of the report does not hold yet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from rich.progress import Progress

from common.errors import one_line
from common.metrics import MetricProtocol
from data.decoding import ImageError, Pixels, read_image
from launch.comparison import efficiency
from launch.comparison.inputs import Item
from launch.comparison.methods import Method
from launch.comparison.store import Record, Store


@dataclass
class Work:
    """Results, numbers and costs that one call of `compare` has made or found.

    Args:
        store: The folder that keeps them.
        methods: The methods.
        items: The images.
        records: Method and image -> its result.
        failures: Method -> its images without a result, with the reason.
        costs: Costs of the methods.
        notes: Notes for the reader of the report.
    """

    store: Store
    methods: list[Method]
    items: list[Item]
    records: dict[tuple[str, Item], Record] = field(default_factory=dict)
    failures: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    costs: list[efficiency.Cost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fail(self, method: Method, item: Item, error: Exception) -> None:
        """Note that a method has no result of an image."""
        reason = one_line(error)
        failure = {"dataset": item.dataset, "image": item.name, "reason": reason}
        self.failures.setdefault(method.name, []).append(failure)


def restore(work: Work, costs: bool, device: torch.device, bars: Progress) -> None:
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
        if costs:
            try:
                work.costs.append(efficiency.measure(method, work.items[0], device))
            except Exception as error:  # any failure of its costs is noted
                work.costs.append(efficiency.Cost(method.name))
                work.notes.append(f"The efficiency of {method.name} is not known: {one_line(error)}")
        method.close()


def _checked(method: Method, item: Item) -> Pixels:
    image = method.restore(item)
    if image.shape[:2] != item.size:
        (height, width), (wanted_height, wanted_width) = image.shape[:2], item.size
        raise ImageError(f"wrong size: {width} x {height} px, {wanted_width} x {wanted_height} are wanted")
    return image


def measure(work: Work, built: Mapping[str, MetricProtocol], bars: Progress) -> dict[str, str]:
    """Compute every number that is not there, image by image.

    Returns:
        Metric -> the reasons why it was not computed for some results, each with their number.
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
    return {
        name: "; ".join(f"{reason} ({count} results)" for reason, count in reasons.items())
        for name, reasons in lacking.items()
    }
