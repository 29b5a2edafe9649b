"""Results and numbers are made once, and a failure is of its method or metric alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.decoding import Pixels
from launch.comparison import compare, measures
from launch.comparison.inputs import Item
from launch.comparison.methods import Baseline

from ..conftest import QUICK, photo, save


class Counting:
    """Counts the calls of a method's `restore`, and interrupts one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[str] = []
        self.measured: list[str] = []
        self.stop: int | None = None
        restore, build = Baseline.restore, measures.build

        def counted(method: Baseline, item: Item) -> Pixels:
            if len(self.images) == self.stop:
                raise KeyboardInterrupt
            self.images.append(f"{method.name} {item.name}")
            return restore(method, item)

        def built(name: str, device: Any) -> Any:
            metric = build(name, device)
            function = metric.function
            called = lambda sr, hq: (self.measured.append(name), function(sr, hq))[1]  # noqa: E731  # short-lived
            object.__setattr__(metric, "function", called)
            return metric

        monkeypatch.setattr(Baseline, "restore", counted)
        monkeypatch.setattr(measures, "build", built)

    def taken(self) -> tuple[list[str], list[str]]:
        """What was made and measured since the last call."""
        taken = self.images, self.measured
        self.images, self.measured = [], []
        return taken


def test_a_killed_comparison_goes_on_and_what_is_new_alone_is_made(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, call = Counting(monkeypatch), {**QUICK, "pairs": [pairs], "output": tmp_path / "out"}
    count.stop = 2
    with pytest.raises(KeyboardInterrupt):
        compare(**call)
    assert count.taken()[0] == ["bicubic cat", "bicubic dog"]
    count.stop = None
    compare(**{**call, "metrics": ["psnr"]})
    assert count.taken() == (["bicubic hat"], ["psnr_y"] * 3)
    compare(**{**call, "metrics": ["psnr", "ssim"]})
    assert count.taken() == ([], ["ssim_y"] * 3)
    compare(blurs={"blur": 1.0}, **{**call, "metrics": ["psnr", "ssim"]})
    made, measured = count.taken()
    assert made == ["blur cat", "blur dog", "blur hat"]
    assert measured == ["psnr_y", "ssim_y"] * 3
    save(pairs / "test_LR" / "dog.png", photo(9)[::4, ::4])  # another input: made and measured again
    compare(blurs={"blur": 1.0}, **{**call, "metrics": ["psnr"]})
    assert count.taken() == (["bicubic dog", "blur dog"], ["psnr_y"] * 2)
    save(pairs / "test_HR" / "hat.png", photo(9))  # another reference: measured again
    compare(blurs={"blur": 2.0}, **{**call, "metrics": ["psnr"]})  # and another blur: made again
    assert count.taken() == (["blur cat", "blur dog", "blur hat"], ["psnr_y"] * 4)


def test_a_method_that_fails_is_reported_and_the_others_go_on(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Baseline.restore

    def failing(method: Baseline, item: Item) -> Pixels:
        if method.sigma and item.name == "dog":
            raise RuntimeError("out of\nmemory")
        return restore(method, item)

    monkeypatch.setattr(Baseline, "restore", failing)
    data = compare(blurs={"blur": 1.0}, pairs=[pairs], output=tmp_path / "out", **QUICK).data
    assert data.methods[1]["failures"] == [{"dataset": "shots", "image": "dog", "reason": "out of memory"}]
    assert data.means["shots"]["blur"]["psnr_y"]["n"] == 2
    assert data.means["shots"]["bicubic"]["psnr_y"]["n"] == 3
    assert "| blur | 2 of 3 |" in (tmp_path / "out" / "report.md").read_text()


def test_a_metric_that_cannot_run_is_not_computed_for_a_reason(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    quick = {**QUICK, "metrics": ["psnr", "lpips", "ms_ssim", "musiq"]}
    made = compare(pairs=[pairs], output=tmp_path / "out", fid=True, **quick)
    missing = made.data.missing
    assert "LPIPS_v0.1_alex" in missing["pyiqa:lpips"]
    assert missing["pyiqa:musiq"].endswith("isr metrics fetch pyiqa:musiq")
    assert missing["torchmetrics:ms_ssim"] == "ms_ssim needs more than 160 px a side, an image is smaller (3 results)"
    assert "isr metrics fetch pyiqa:fid" in missing["pyiqa:fid"]
    assert [metric["id"] for metric in made.data.metrics] == ["psnr_y"]
    assert "- pyiqa:lpips: not computed: weights are not here" in made.markdown.read_text()


def test_a_number_that_is_none_is_no_number(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = measures.build("sharpness")
    save(pairs / "test_LR" / "dog.png", np.zeros((16, 16, 3), np.uint8))
    object.__setattr__(metric, "function", lambda sr, hq: float("nan") if sr.max() == 0 else 1.0)
    monkeypatch.setattr(measures, "build", lambda name, device: metric)
    made = compare(pairs=[pairs], output=tmp_path / "out", **{**QUICK, "metrics": ["sharpness"]})
    assert made.data.means["shots"]["bicubic"]["sharpness"]["n"] == 2
    assert made.data.missing == {"sharpness": "its value is nan (1 results)"}
    json.dumps(vars(made.data), allow_nan=False)
