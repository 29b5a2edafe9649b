"""`isr metrics`: the record is what the metrics give, and nothing is fetched unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.pyiqa import MetricUnavailableError
from launch.cli import main
from launch.comparison import measures


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    """Nothing was ever downloaded, and nothing can be."""
    import huggingface_hub.constants

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))


def test_the_doctor_finds_every_recorded_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "doctor"]) == 0
    said = capsys.readouterr().out
    assert "0 of 14 differ" in said
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert set(measures.WEIGHTLESS) <= lines.keys()
    assert all(lines[name].endswith("ok") for name in measures.WEIGHTLESS if not name.startswith("pyiqa:"))


def test_the_doctor_sees_a_metric_that_went_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sr, hq = measures.fixed_pair()
    monkeypatch.setattr(measures, "fixed_pair", lambda: (sr // 2, hq))
    assert main(["metrics", "doctor"]) == 1
    assert "psnr_y" in capsys.readouterr().out.splitlines()[-1]


def test_the_list_says_licence_reference_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == measures.KNOWN.keys()
    assert "no weights" in lines["psnr_y"]
    assert "0 of 2 files here" in lines["pyiqa:lpips"]
    assert "no reference" in lines["pyiqa:musiq"]
    assert all("PolyForm-Noncommercial" in line for name, line in lines.items() if name.startswith("pyiqa:"))
    file = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "hf/models--q-future--one-align/snapshots/abc").mkdir(parents=True)
    assert main(["metrics", "list"]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 files here" in said
    assert not measures.KNOWN["pyiqa:qalign"].weights[0].present  # an empty snapshot
    (tmp_path / "hf/models--q-future--one-align/snapshots/abc/config.json").touch()
    assert measures.KNOWN["pyiqa:qalign"].weights[0].present


def test_fetch_names_what_from_where_and_does_nothing_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "fetch", "lpips", "psnr"]) == 0
    said = capsys.readouterr().out
    url = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/LPIPS_v0.1_alex-df73285e.pth"
    assert f"pyiqa:lpips: {url} -> " in said
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in said
    assert "nothing was fetched; --yes does not ask" in said
    assert "psnr" not in said
    assert main(["metrics", "fetch", "psnr"]) == 0
    assert "nothing to fetch" in capsys.readouterr().out


def test_what_cannot_be_fetched_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise measures.MetricUnavailableError(f"{name}: no network")

    monkeypatch.setattr(measures, "build_metric", refuse)
    assert main(["metrics", "fetch", "musiq", "--yes"]) == 1
    assert "pyiqa:musiq: not fetched: pyiqa:musiq: no network" in capsys.readouterr().out


def test_an_unknown_name_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "fetch", "lpisp"]) == 2
    assert "metrics=lpisp is unknown; isr metrics list names all" in capsys.readouterr().err


DEMO = str(Path(__file__).resolve().parents[3] / "papers/dfosd/configs/demo/01_dfosd.yaml")
LITTLE = ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--model.inference.metrics=[psnr_y]"]


def _score(command: str, runs: Path) -> int:
    return main([command, "-c", DEMO, f"--runs={runs}", "--ckpt_path=null", *LITTLE])


@pytest.mark.parametrize("command", ["validate", "test"])
def test_without_any_metric_nothing_is_restored_and_the_command_fails(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MetricUnavailableError("no such library here")

    monkeypatch.setattr("common.evaluation.build_metric", refuse)
    assert _score(command, tmp_path) == 1
    message = "model.inference.metrics=['psnr_y']: none of them can be computed: no such library here"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_command_fails_where_no_image_has_a_number(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.evaluation.measured", lambda *_: (None, "not computed: it is too dark"))
    assert _score(command, tmp_path) == 1
    assert "it is too dark" in capsys.readouterr().err.splitlines()[-1]
    assert len(list(tmp_path.rglob("metrics.csv"))) == (command == "test")
