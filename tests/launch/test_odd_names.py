"""No name that a file system allows costs the results of the other images, in any output."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from common.files import plain_name
from common.images import bicubic_upsample
from common.restoration import Inference, RestorationModule
from data.datamodules import SRData
from data.datasets import LQImages
from data.decoding import read_image
from data.prompts import Prompts
from launch.comparison import compare

NAMES = [
    *(
        "line\nbreak",
        "carriage\rreturn",
        'quo"te',
        "it's",
        "by\udce9te",
        "x" * 240,
        "\u7167" * 80,
        "-dash",
        "=1+1",
        "dot.",
    ),
    *(" blank ", "tab\t", "line\u2028separator", "a,b;c", "%s {0} <b>&amp;", "\u7167\u7247", "line\\nbreak"),
]


class Bicubic(RestorationModule):
    def prepare(self, x_lq: Tensor, prompts: list[str]) -> None:
        return None

    def restore(self, x_lq: Tensor, conditions: None) -> Tensor:
        return bicubic_upsample(x_lq, self.scale)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs under odd names, each of a grey of its own, in a set of an odd name."""
    made = tmp_path / "set \udcff\n'"
    for number, name in enumerate(NAMES):
        for part, side in (("test_LR", 4), ("test_HR", 16)):
            (made / part).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side), (10 * number,) * 3).save(made / part / f"{name}.png")
    return made


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_image_is_scored_written_and_compared(folder: Path, tmp_path: Path) -> None:
    options = {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(**options, enable_model_summary=False, logger=TensorBoardLogger(tmp_path / "log"))  # type: ignore[arg-type]
    model: Any = Bicubic(inference=Inference(color_fix="none", tile=None, metrics=["psnr_rgb"], preview=1))
    model.output.folder = tmp_path / "results"
    data = SRData(val=[str(folder)], test=[str(folder)], predict=str(folder / "test_LR"), num_workers=0)
    trainer.validate(model, data, verbose=False)
    trainer.test(model, data, verbose=False)
    model.output.folder = tmp_path / "predicted"
    trainer.predict(model, data, return_predictions=False)

    scored = rows(tmp_path / "results" / "test" / "metrics.csv")
    assert len({row["image"] for row in scored}) == len(scored) == len(NAMES)
    assert len({row["dataset"] for row in scored}) == 1
    shades = sorted(10 * number for number in range(len(NAMES)))
    for place in ("results", "predicted"):
        files = list((tmp_path / place).rglob("*.png"))
        assert sorted(int(read_image(path)[0, 0, 0]) for path in files) == shades
    (log,) = {str(path.parent) for path in (tmp_path / "log").rglob("events*")}
    events = EventAccumulator(log, size_guidance={"scalars": 0}).Reload()
    name = plain_name(folder.name)
    assert {tag for tag in events.Tags()["scalars"] if name in tag} >= {f"val/{name}/psnr_rgb", f"test/{name}/psnr_rgb"}
    assert any(name in tag for tag in events.Tags()["images"])


def test_a_comparison_finds_foreign_results_by_their_odd_names(folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "foreign"
    results.mkdir()
    for number, name in enumerate(NAMES):
        Image.new("RGB", (16, 16), (10 * number + 1,) * 3).save(results / f"{name}.png")
    Image.new("RGB", (16, 16)).save(results / "extra\udce9.png")
    out = tmp_path / "out"
    data = compare(
        pairs=[folder],
        results={"foreign": results},
        output=out,
        metrics=["psnr_rgb"],
        efficiency=False,
        progress=False,
        device="cpu",
    ).data
    values = data.values[plain_name(folder.name)]["foreign"]["psnr_rgb"]
    assert len(values) == len(NAMES)
    np.testing.assert_allclose(list(values.values()), 48.13, atol=0.01)  # one level of 255 apart: 20 lg 255
    assert r"extra\xe9.png" in (out / "report.md").read_text(encoding="utf-8")
    listed = {row["image"] for row in rows(out / "metrics.csv") if row["method"] == "foreign"}
    assert len(listed) == len(NAMES)


def test_standard_output_takes_a_name_that_is_no_utf8(folder: Path, tmp_path: Path) -> None:
    code = f"from launch import cli; cli.main = lambda: print({os.fspath(folder)!r}); cli.entry()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rb"set \udcff" in done.stdout


def test_prompts_meet_their_images_under_odd_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in NAMES:
        (tmp_path / "texts" / f"{name}.txt").write_text(repr(name))
    images = LQImages(folder / "test_LR", Prompts(tmp_path / "texts"))
    assert [sample["prompt"] for sample in images] == [repr(path.stem) for path in images.paths]  # type: ignore[attr-defined]
