"""Notes on few photos, and the pairs of methods that are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.decoding import Pixels
from launch.comparison import compare, engine
from launch.comparison.inputs import Item
from launch.comparison.methods import Baseline, Method

from ..conftest import NAMES, QUICK, photo, save


def test_a_test_set_of_few_photos_is_said_to_tell_little(pairs: Path, tmp_path: Path) -> None:
    said = compare(pairs=[pairs], output=tmp_path / "out", **QUICK).data.notes
    assert said[0].startswith("shots: its 3 images show 3 photos. Of fewer than 6 photos the intervals are too narrow;")
    for name in "abc":
        for side, image in (("HR", photo(5)), ("LR", photo(5)[::4, ::4])):
            save(pairs / f"test_{side}" / f"{name}.png", image)
    assert compare(pairs=[pairs], output=tmp_path / "out", **QUICK).data.notes == []


def test_crops_of_few_photos_are_said_to_be_drawn_as_if_each_were_a_photo(tmp_path: Path) -> None:
    for side, step in (("HR", 1), ("LR", 4)):
        for place in range(4):
            save(tmp_path / f"shots/test_{side}/cat_r0c{place}_s0.png", photo(place)[::step, ::step])
    data = compare(pairs=[tmp_path / "shots"], output=tmp_path / "out", **QUICK).data
    assert data.notes[0].startswith(
        "shots: its 4 images show 1 photo. Of fewer than 6 photos the intervals draw the images, as if each were a "
        "photo of its own, and are too narrow;"
    )
    values = list(data.values["shots"]["bicubic"]["psnr_y"].values())
    mean = data.means["shots"]["bicubic"]["psnr_y"]
    assert min(values) < mean["low"] < mean["mean"] < mean["high"] < max(values)


def test_methods_are_compared_with_the_blurs_and_within_a_paper_with_its_first(
    pairs: Path, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "Run", FakeRun)
    call = {**QUICK, "pairs": [pairs], "output": tmp_path / "out", "sources": ["GAN: from afar"]}
    runs = {name: Path(name) for name in ("x/first", "y/only", "x/ours")}
    made = compare(runs=runs, results={"GAN": foreign}, blurs={"blur": 1.0}, **call)
    found = made.data.pairs["shots"]
    over_blur = [f"{name} over blur" for name in ("GAN", "x/first", "y/only", "x/ours")]
    assert list(found) == ["x/ours over x/first", *over_blur]
    ours, base = (made.data.values["shots"][name]["psnr_y"] for name in ("x/ours", "x/first"))
    differences = [ours[name] - base[name] for name in NAMES]
    gain = found["x/ours over x/first"]["psnr_y"]
    assert gain["mean"] == pytest.approx(np.mean(differences))
    assert (gain["n"], gain["wins"]) == (3, np.mean([difference > 0 for difference in differences]))
    assert gain["low"] < gain["mean"] < gain["high"]
    assert set(found["GAN over blur"]) == {"psnr_y", "ssim_y", "sharpness"}
    text = made.markdown.read_text()
    shown = f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
    table = text.partition("### shots: differences to other methods")[2].partition("## ")[0]
    assert "| method over another | psnr_y (higher) | ssim_y (higher) | sharpness (higher) |" in table
    assert f"| x/ours over x/first | {shown} |" in table.replace("**", "")
    assert "- GAN: from afar" in text.partition("## Where the methods come from")[2]
    alone = compare(**{**call, "sources": []})
    assert alone.data.pairs == {"shots": {}}
    assert "differences to other" not in alone.markdown.read_text()
    assert "come from" not in alone.markdown.read_text()


class FakeRun(Method):
    """A run of the paper before the slash, that blurs by the length of its name."""

    kind = "run"

    def __init__(self, name: str, path: Path, device: torch.device, images: Path | None) -> None:
        super().__init__(name)
        self.paper, self.blur = name.partition("/")[0], Baseline("", len(name) / 4)

    def key(self, item: Item) -> str:
        return self.name

    def restore(self, item: Item) -> Pixels:
        return self.blur.restore(item)
