"""FID of the methods on the test sets with references: one number for a whole set of images."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from common.pyiqa import MetricUnavailableError
from launch.comparison import measures
from launch.comparison.inputs import Item
from launch.comparison.report import Report, metric_entry
from launch.comparison.store import Record, Store, digest
from launch.comparison.work import Work


def add_fid(report: Report, work: Work, device: torch.device) -> None:
    """Add FID to the means, with its n; it has no values by image."""
    added = False
    try:
        for dataset, means in report.means.items():
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
        report.missing[measures.FID] = str(error).removeprefix(f"{measures.FID}: ")
        return
    if added:
        report.metrics.append(metric_entry(measures.FID, measures.fid_protocol(), lower_better=True))
    else:
        report.missing[measures.FID] = "it needs two images with references"


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
