"""Runs that an earlier version wrote, when RFSR's modules were `base.py` and `bases.py`, open in every command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from launch.cli import main
from launch.moved import MOVED, current

ROOT = Path(__file__).resolve().parents[2]
EARLIER = {"papers.rfsr.BaseSR": "papers.rfsr.base.BaseSR", "papers.rfsr.ControlNet": "papers.rfsr.bases.ControlNet"}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a fit of one step, its class paths set to the earlier ones."""
    runs = tmp_path_factory.mktemp("old") / "runs"
    options = ["--data.batch_size=1", "--trainer.max_steps=1", "--model.base.init_args.steps=1"]
    config = str(ROOT / "papers/rfsr/configs/demo/01_base.yaml")
    assert main(["fit", "-c", config, "--runs", str(runs), "--name=old", *options, *QUIET, "--debug"]) == 0
    rename(runs / "rfsr/old/version_0", EARLIER)
    return runs


def rename(version: Path, names: dict[str, str]) -> None:
    """Give the classes of a run's checkpoint and configuration other paths."""
    file = version / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    settings = checkpoint["hyper_parameters"]
    settings["_class_path"] = names[settings["_class_path"]]
    settings["base"]["class_path"] = names[settings["base"]["class_path"]]
    torch.save(checkpoint, file)
    config = version / "config.yaml"
    text = config.read_text()
    for now, then in names.items():
        assert f"class_path: {now}\n" in text
        text = text.replace(f"class_path: {now}\n", f"class_path: {then}\n")
    config.write_text(text)


@pytest.fixture
def runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "export": lambda version, pairs: ["export", str(version.parent), "-o", "out"],
    "predict": lambda version, pairs: [
        *("predict", "-c", f"{version}/config.yaml", "--ckpt_path", f"{version}/checkpoints/last.ckpt"),
        *("--data=data.SRData", f"--data.predict={pairs}/test_LR", "--output=sr", QUIET[0]),
    ],
    "compare": lambda version, pairs: [
        *("compare", "--runs", str(version.parent), "--pairs", str(pairs), "--metrics=psnr", "--output=report"),
        *("--device=cpu", "--no-efficiency"),
    ],
    "parameters": lambda version, pairs: ["parameters", f"{version}/config.yaml"],
    "fit": lambda version, pairs: [
        *("fit", "-c", f"{version}/config.yaml", "--ckpt_path", f"{version}/checkpoints/last.ckpt"),
        *("--runs=runs", "--trainer.max_steps=2", *QUIET),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_earlier_run_opens(command: str, runs: Path, pairs: Path) -> None:
    assert main([*COMMANDS[command](runs / "rfsr/old/version_0", pairs), "--debug"]) == 0
    if command == "fit":
        newest = torch.load(
            max(runs.glob("rfsr/*/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime),
            map_location="cpu",
            weights_only=True,
        )
        assert newest["global_step"] == 2


def test_a_class_that_is_gone_is_refused_with_what_to_do(
    runs: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = runs / "rfsr/old/version_0"
    rename_to = {"papers.rfsr.base.BaseSR": "papers.rfsr.gone.BaseSR"}
    rename(version, rename_to | {"papers.rfsr.bases.ControlNet": "papers.rfsr.bases.ControlNet"})
    for command in ("export", "compare", "fit"):
        assert main(COMMANDS[command](version, pairs)) == 2
        error = capsys.readouterr().err
        assert "papers.rfsr.gone" in error
        assert "use the version that wrote" in error
        assert "run.json" in error


def test_every_earlier_name_is_gone_and_every_name_of_today_is_there() -> None:
    for earlier, today in MOVED.items():
        assert not (ROOT / f"{earlier.replace('.', '/')}.py").exists()
        assert (ROOT / f"{today.replace('.', '/')}.py").exists()


def test_other_texts_and_settings_stay() -> None:
    settings = yaml.safe_load(
        "{model: {class_path: papers.rfsr.base.BaseSR, init_args: {taggers: [papers.rfsr.bases.X], steps: 2}},"
        " text: papers.rfsr.base, place: runs/papers.rfsr.base.x, optimizer: torch.optim.AdamW, none: null}"
    )
    assert current(settings) == {
        "model": {
            "class_path": "papers.rfsr.pretraining.BaseSR",
            "init_args": {"taggers": ["papers.rfsr.base_models.X"], "steps": 2},
        },
        "text": "papers.rfsr.base",
        "place": "runs/papers.rfsr.base.x",
        "optimizer": "torch.optim.AdamW",
        "none": None,
    }
