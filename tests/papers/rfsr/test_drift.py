"""What training did to each test image: rewards and Gram distance against theta', and the figure."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from common.losses import GramKL
from papers.rfsr import RFSR
from papers.rfsr.drift import plot_drift

Batch = dict[str, Any]
Make = Callable[..., RFSR]


def run(model: RFSR, batch: Batch, folder: Path) -> list[dict[str, str]]:
    model.output.folder = folder
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    batches: Any = [dict(batch), dict(batch) | {"name": ["a", "c"]}]  # a is seen twice, as by two processes
    trainer.test(model, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    with (folder / "test" / "drift.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("regulariser", ["gram", "none", "lora"])
def test_before_training_there_is_none(make: Make, batch: Batch, tmp_path: Path, regulariser: str) -> None:
    rows = run(make(measure_drift=True, regulariser=regulariser), batch, tmp_path)
    assert [row["image"] for row in rows] == ["a", "b", "c"]
    assert list(rows[0]) == ["dataset", "image", "gram", "bright_base", "bright"]
    for row in rows:
        assert float(row["gram"]) == 0
        assert row["bright"] == row["bright_base"]
        assert 0 < float(row["bright"]) < 1


def test_afterwards_it_is_that_of_the_images(
    make: Make, disturb: Callable[..., RFSR], batch: Batch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"measure_drift": True, "gram_features": "plain", "ema_decay": None}
    model = disturb(make(**options))
    x_lq = batch["lq"].float() / 255
    was, now = (m.upscale(x_lq, batch["prompt"]).sr for m in (make(**options), model))
    distance = GramKL("random", 0.1, "plain")(now, was)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = run(model, batch, tmp_path)
    for i, row in enumerate(rows[:2]):
        assert float(row["gram"]) == pytest.approx(float(distance[i]), rel=1e-2)
        assert float(row["bright"]) == pytest.approx(float(now[i].mean()), rel=1e-5)
        assert float(row["bright_base"]) == pytest.approx(float(was[i].mean()), rel=1e-5)
        assert abs(float(row["bright"]) - float(row["bright_base"])) > 1e-6
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with Image.open(tmp_path / "test" / "figures" / "drift_bright.png") as figure:
        assert figure.size == (600, 400)


def test_it_is_the_averages_drift(make: Make, disturb: Callable[..., RFSR], batch: Batch, tmp_path: Path) -> None:
    """Which here has not moved while the weights have."""
    model: Any = make(measure_drift=True, ema_decay=0.9)
    model.ema.start(model.all_trainable())
    rows = run(disturb(model), batch, tmp_path)
    assert {float(row["gram"]) for row in rows} == {0.0}


def test_the_figures_title_is_the_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []
    monkeypatch.setattr("papers.rfsr.drift.save_figure", lambda path, figure, caption: saved.append((figure, caption)))
    rows = [{"gram": 0.5, "r": 3.0, "r_base": 1.0}, {"gram": 1.5, "r": 1.0, "r_base": 2.0}]
    plot_drift(tmp_path / "x.png", rows, "r")
    ((figure, caption),) = saved
    (axes,) = figure.axes
    assert axes.get_title() == "n = 2: mean gain +0.5000, mean Gram distance 1"
    assert axes.collections[0].get_offsets().tolist() == [[0.5, 2.0], [1.5, -1.0]]
    assert "reward r" in caption
