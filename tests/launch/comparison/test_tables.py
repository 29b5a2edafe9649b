"""Bold cells."""

from __future__ import annotations

import numpy as np

from launch.comparison.report import Report
from launch.comparison.tables import significantly_best


def test_bold_is_only_what_the_images_tell_apart_from_all_others() -> None:
    values = {
        "ours": {"m": {f"i{i}": 1.0 + 0.01 * i for i in range(9)}},
        "near": {"m": {f"i{i}": 1.0 + 0.01 * i + (-1) ** i * 0.1 - 0.001 for i in range(9)}},
        "far": {"m": {f"i{i}": 0.5 + 0.01 * i for i in range(9)}},
    }

    def best(*methods: str, lower: bool = False) -> str | None:
        kept = {method: values[method] for method in methods}
        means = {method: {"m": {"mean": float(np.mean(list(found["m"].values())))}} for method, found in kept.items()}
        metric = {"id": "m", "lower_better": lower}
        return significantly_best(Report(values={"set": kept}, means={"set": means}), "set", metric)

    assert best("ours", "far") == "ours"
    assert best("ours", "far", lower=True) == "far"
    assert best("ours", "near", "far") is None
    assert best("ours") is None
