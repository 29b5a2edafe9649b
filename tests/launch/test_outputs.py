"""The user's files: outputs are never inputs, nothing foreign is overwritten, and what is not used is named."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.images import bicubic_upsample
from common.restoration import Inference, RestorationModule
from launch.cli import main


class Bicubic(RestorationModule):
    """Restores by bicubic enlargement; stops at an image with the prompt `stop`."""

    def __init__(self) -> None:
        super().__init__(inference=Inference(metrics=["psnr_rgb"], color_fix="none"))
        self.net = nn.Conv2d(1, 1, 1)

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> Any:
        if "stop" in prompts:
            raise RuntimeError("the middle of a test")

    def restore(self, x_lq: Tensor, conditions: Any) -> Tensor:
        return bicubic_upsample(x_lq, self.scale)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        with self.optimizer_turn("net") as update:
            update(self.net(batch["lq"][:, :1]).mean())

    trainable = {"net": ("net.*",)}  # noqa: RUF012

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trainable_parameters("net"), lr=0.1)


def save(path: Path, size: int = 4, level: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), level, np.uint8)).save(path)
    return path


@pytest.fixture
def isr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`isr COMMAND` on a method that is quick to make; gives the exit code."""
    module = ModuleType("toy_method")
    module.Bicubic = Bicubic  # type: ignore[attr-defined]
    monkeypatch.setattr(Bicubic, "__module__", "toy_method")
    monkeypatch.setitem(sys.modules, "toy_method", module)

    def run(command: str, *arguments: object) -> int:
        made = ["--model=toy_method.Bicubic", "--data=data.SRData", "--data.num_workers=0", "--trainer.accelerator=cpu"]
        quiet = ["--trainer.enable_progress_bar=false", f"--runs={tmp_path / 'runs'}"]
        return main([command, *made, *quiet, *map(str, arguments)])

    return run


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that is not hidden."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestPredict:
    def test_an_output_among_the_inputs_is_refused(self, isr: Any, tmp_path: Path, capsys: Any) -> None:
        for name in ("p/a.png", "p/sub/b.png"):
            save(tmp_path / name)
        before = content(tmp_path / "p")
        for output, reason in (("p", "is read as predict="), ("p/upscaled", "lies in "), (".", "holds ")):
            assert isr("predict", "--data.predict", tmp_path / "p", "--output", tmp_path / output) == 1
            error = capsys.readouterr().err
            assert f"output={tmp_path / output} {reason}" in error
            assert "give an output folder apart from the input" in error
        assert content(tmp_path / "p") == before

    def test_a_run_folder_within_the_input_is_refused(self, isr: Any, tmp_path: Path, capsys: Any) -> None:
        save(tmp_path / "a.png")
        assert isr("predict", "--data.predict", tmp_path) == 1
        assert "/predict lies in " in capsys.readouterr().err

    def test_a_link_in_the_output_that_leads_into_the_input_is_refused(self, isr: Any, tmp_path: Path) -> None:
        save(tmp_path / "p" / "sub" / "a.jpg")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "sub").symlink_to(tmp_path / "p" / "sub")
        assert isr("predict", "--data.predict", tmp_path / "p", "--output", tmp_path / "out") == 1
        assert list(content(tmp_path / "p")) == ["sub/a.jpg"]

    def test_only_its_own_files_are_overwritten(self, isr: Any, tmp_path: Path, capsys: Any) -> None:
        for name in ("one/a.png", "one/a.jpg", "two/a.png", "two/A.png"):
            save(tmp_path / "p" / name)
        out = tmp_path / "out"
        arguments = ["predict", "--data.predict", tmp_path / "p", "--output", out]
        assert isr(*arguments) == 0
        made = content(out)
        assert set(made) == {"one/a.png.png", "one/a.jpg.png", "two/a.png", "two/A.png"}
        assert isr(*arguments) == 0
        (out / "two" / "a.png").write_bytes(b"retouched")
        (out / "one" / "a.jpg.png").unlink()
        assert isr(*arguments) == 1
        assert f"not overwritten, as isr has not made them as they are now: {out}/two/a.png;" in capsys.readouterr().err
        assert not (out / "one" / "a.jpg.png").exists(), "refused before the work"
        assert isr(*arguments, "--skip_existing=true") == 0
        assert content(out) == {**made, "two/a.png": b"retouched"}

    def test_one_file_in_one_file_out(self, isr: Any, tmp_path: Path, capsys: Any) -> None:
        photo = save(tmp_path / "a.jpg")
        for target in (tmp_path / "b.png", tmp_path / "new" / "b.TIF"):
            assert isr("predict", "--data.predict", photo, "--output", target) == 0
            with Image.open(target) as image:
                assert (image.size, image.format) == ((16, 16), {".png": "PNG", ".tif": "TIFF"}[target.suffix.lower()])
        before = content(tmp_path)
        assert isr("predict", "--data.predict", tmp_path / "b.png", "--output", tmp_path / "b.png") == 1
        assert "is an image of predict=" in capsys.readouterr().err
        assert isr("predict", "--data.predict", photo, "--output", tmp_path / "b.png") == 1
        assert "b.png; give another output, or --skip_existing" in capsys.readouterr().err
        assert isr("predict", "--data.predict", photo, "--output", tmp_path / "c.jpg") == 2
        assert "c.jpg is of a kind that is not written; end it in .png, .tif or .tiff" in capsys.readouterr().err
        assert {name: data for name, data in content(tmp_path).items() if not name.startswith("runs/")} == {
            name: data for name, data in before.items() if not name.startswith("runs/")
        }

    def test_several_files_and_one_name_is_refused(self, isr: Any, tmp_path: Path, capsys: Any) -> None:
        for name in "ab":
            save(tmp_path / "p" / f"{name}.png")
        assert isr("predict", "--data.predict", tmp_path / "p", "--output", tmp_path / "out.png") == 1
        assert "out.png is one file, and predict has 2 images; give a folder" in capsys.readouterr().err
        assert not (tmp_path / "out.png").exists()
        (tmp_path / "p" / "b.png").unlink()
        assert isr("predict", "--data.predict", tmp_path / "p", "--output", tmp_path / "p" / "out.png") == 1
        assert "lies in " in capsys.readouterr().err
        (tmp_path / "folder.png").mkdir()
        assert isr("predict", "--data.predict", tmp_path / "p", "--output", tmp_path / "folder.png") == 0
        assert list(content(tmp_path / "folder.png")) == ["a.png"]

    def test_says_what_it_found_and_names_what_it_does_not_use(self, isr: Any, tmp_path: Path, capsys: Any) -> None:
        save(tmp_path / "p" / "a.png")
        (tmp_path / "p" / "b.heic").write_bytes(b"x")
        (tmp_path / "p" / "c.png").write_bytes(b"no image")
        out = tmp_path / "out"
        assert isr("predict", "--data.predict", tmp_path / "p", "--output", out) == 0
        lines = capsys.readouterr().out.splitlines()
        first = f"isr: predict={tmp_path}/p: 1 image (a folder of images without references); not used: 2 files"
        assert f"{first} (1 .heic, 1 .png), named in {out}/skipped.csv" in lines
        assert [Path(row["file"]).name for row in rows(out / "skipped.csv")] == ["b.heic", "c.png"]


class TestTest:
    def benchmark(self, folder: Path, count: int = 3) -> Path:
        for i in range(count):
            save(folder / "test_LR" / f"{i}.png")
            save(folder / "test_HR" / f"{i}.png", 16, level=90)
        return folder

    def test_keeps_what_was_scored_when_it_ends_early(self, isr: Any, tmp_path: Path, capsys: Any) -> None:
        folder = self.benchmark(tmp_path / "set")
        (tmp_path / "prompts").mkdir()
        for i, text in enumerate(("", "", "stop")):
            (tmp_path / "prompts" / f"{i}.txt").write_text(text or "a cat")
        assert isr("test", "--data.test", folder, "--data.prompts", tmp_path / "prompts") == 1
        (table,) = (tmp_path / "runs").rglob("metrics.unfinished.csv")
        assert [(row["image"], row["value"]) for row in rows(table)] == [("0", "28.130775"), ("1", "28.130775")]
        assert f"{table} keeps the scores of 2 images" in capsys.readouterr().err
        assert not list((tmp_path / "runs").rglob("metrics.csv"))

    def test_its_own_images_are_no_test_set(self, isr: Any, tmp_path: Path, capsys: Any) -> None:
        save(tmp_path / "photos" / "a.png", 64)
        fit = ("fit", "--data.train", tmp_path / "photos", "--data.crop_size=32", "--trainer.max_steps=1")
        assert isr(*fit, "--data.batch_size=1") == 0
        assert isr("test", "--data.test", self.benchmark(tmp_path / "set")) == 0  # of the fit's last checkpoint
        (results,) = (tmp_path / "runs").rglob("version_0/test/set")
        before = content(results)
        assert isr("test", "--data.test", results) == 1
        assert "holds " in capsys.readouterr().err
        assert content(results) == before

    def test_a_test_and_a_prediction_leave_only_their_own_files_in_a_run(self, isr: Any, tmp_path: Path) -> None:
        save(tmp_path / "photos" / "a.png", 64)
        fit = ("fit", "--data.train", tmp_path / "photos", "--data.crop_size=32", "--trainer.max_steps=1")
        assert isr(*fit, "--data.batch_size=1") == 0
        (run,) = (tmp_path / "runs").rglob("version_0")
        before = {path.relative_to(run) for path in run.rglob("*")}
        photo = tmp_path / "photos" / "a.png"
        assert isr("predict", "--data.predict", photo, "--output", tmp_path / "upscaled.png") == 0
        after = {path.relative_to(run) for path in run.rglob("*")} - before
        assert {path.name.partition(".out.")[0] for path in after} <= {"events"}  # Lightning opens TensorBoard's file
        assert isr("test", "--data.test", self.benchmark(tmp_path / "set")) == 0
        after = {path.relative_to(run) for path in run.iterdir()} - {path for path in before if len(path.parts) == 1}
        assert {path.name.partition(".out.")[0] for path in after} == {"test", "events"}

    def test_a_training_set_around_the_runs_is_refused(self, isr: Any, tmp_path: Path, capsys: Any) -> None:
        save(tmp_path / "a.png", 64)
        fit = ("fit", "--data.train", tmp_path, "--data.crop_size=32", "--trainer.max_steps=1")
        assert isr(*fit) == 1
        assert "lies in " in capsys.readouterr().err


def test_a_fit_names_photos_that_turn_out_to_be_unreadable(isr: Any, tmp_path: Path, capsys: Any) -> None:
    save(tmp_path / "p" / "a.png", 64)
    for name in "bcd":
        (tmp_path / "p" / f"{name}.png").write_bytes(b"no image")
    (tmp_path / "p" / "e.jxl").write_bytes(b"x")
    batch = ("--data.crop_size=32", "--data.batch_size=4", "--trainer.max_steps=2")
    assert isr("fit", "--data.train", tmp_path / "p", *batch) == 0
    (table,) = (tmp_path / "runs").rglob("skipped.csv")
    assert sorted(Path(row["file"]).name for row in rows(table)) == ["b.png", "c.png", "d.png", "e.jxl"]
    said = capsys.readouterr().out
    assert f"isr: train={tmp_path}/p: 4 images (photos to degrade); not used: 1 file (1 .jxl), named in {table}" in said
    assert f"isr: not used: 4 files by now, named in {table}" in said
