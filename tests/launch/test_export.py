"""A trained model leaves as a diffusers folder that its base loads, and that restores as the run itself does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from torch.testing import assert_close

from common.checkpoints import read_checkpoint
from common.restoration import Inference
from launch.cli import main
from launch.export import load
from launch.runs import last_run
from papers.rfsr import BaseSR, ControlNet

FIT = ["--trainer.max_steps=2", "--checkpoint.every_n_train_steps=2", "--trainer.limit_val_batches=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of RFSR's demo."""
    runs = tmp_path_factory.mktemp("runs")
    quiet = ["--trainer.enable_progress_bar=false", "--data.batch_size=2"]
    assert (
        main(["fit", "-c", "papers/rfsr/configs/demo/02_rfsr.yaml", "--runs", str(runs), *FIT, *quiet, "--debug"]) == 0
    )
    return last_run(runs, "rfsr", "demo-rfsr")


def test_both_networks_are_there_with_the_averaged_weights(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run.parent), "-o", str(tmp_path / "out"), "--debug"]) == 0
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    average = checkpoint["ema"]["average"]
    controlnet = ControlNetModel.from_pretrained(tmp_path / "out" / "controlnet").state_dict()
    assert len(average) == len(controlnet)
    moved = 0
    for name, value in average.items():
        short = name.removeprefix("base.controlnet.")
        assert torch.equal(controlnet[short], value)
        moved += not torch.equal(checkpoint["state_dict"][name], value)
    assert moved  # the average is not the last step's weights
    base = BaseSR(ControlNet(networks=str(tmp_path / "out"), sampler="ddpm", steps=10), inference=Inference(tile=None))
    base.configure_model()
    trained = load(run / "checkpoints" / "last.ckpt")
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    c = trained.prepare(x, [""])
    with torch.no_grad():
        assert_close(base.restore(x, base.prepare(x, [""])), trained.restore(x, c), atol=1e-5, rtol=0)
        as_it_was = BaseSR(ControlNet(sampler="ddpm", steps=10))
        as_it_was.configure_model()
        assert (as_it_was.restore(x, c) - trained.restore(x, c)).abs().max() > 1e-4


def test_a_file_that_no_fit_wrote_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    assert main(["export", str(tmp_path / "a.ckpt"), "-o", str(tmp_path / "out")]) == 2
    assert "holds no settings of a model" in capsys.readouterr().err


def test_a_folder_that_holds_files_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "unet").mkdir(parents=True)
    (tmp_path / "out" / "unet" / "config.json").write_text("another run's")
    assert main(["export", str(tmp_path / "a.ckpt"), "-o", str(tmp_path / "out")]) == 1
    assert f"output={tmp_path}/out holds files that this command has not made" in capsys.readouterr().err
