"""Stages are found after the folder of all runs has moved, and a resumed or moved run keeps its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.stages import digest, place_in_runs
from launch.runs import find_stage, stored_model

PLACE = "dm_sr/first/version_{}/checkpoints/last.ckpt"


def checkpoint(runs: Path, version: int = 0) -> Path:
    path = runs / PLACE.format(version)
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_name_is_the_newest_of_that_run_or_the_one_that_was_trained_on(tmp_path: Path) -> None:
    old, new = (checkpoint(tmp_path / "a", version) for version in (0, 1))
    roots = [tmp_path / "none", tmp_path / "a"]
    assert find_stage("runs/dm_sr/first", None, roots) == str(new)
    assert find_stage("runs/dm_sr/first", str(old), roots) == str(old)
    assert find_stage("runs/dm_sr/first", str(tmp_path / "gone" / PLACE.format(0)), roots) == str(new)
    assert find_stage("runs/dm_sr/other", str(old), roots) == "runs/dm_sr/other"


def test_a_file_that_is_gone_is_looked_for_below_the_moved_runs(tmp_path: Path) -> None:
    here = checkpoint(tmp_path / "moved")
    gone = f"/elsewhere/runs/{PLACE.format(0)}"
    assert find_stage(gone, None, [tmp_path, tmp_path / "moved"]) == str(here)
    other = checkpoint(tmp_path / "kept")
    assert find_stage(str(other), None, [tmp_path / "moved"]) == str(other), "it is there"
    assert find_stage("/elsewhere/x.ckpt", None, [tmp_path / "moved"]) == "/elsewhere/x.ckpt"
    assert find_stage(f"/elsewhere/{PLACE.format(3)}", None, [tmp_path]) == f"/elsewhere/{PLACE.format(3)}"


def test_a_checkpoints_settings_name_the_stage_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved, copied, and from another folder; the setting was relative to the folder of the first command."""
    first = checkpoint(tmp_path / "runs")
    second = tmp_path / "runs/dm_sr/second/version_2/checkpoints/last.ckpt"
    second.parent.mkdir(parents=True)
    settings = {"_class_path": "papers.dm_sr.DMSR", "estimator": f"runs/{PLACE.format(0)}", "prompt": "runs"}
    torch.save({"state_dict": {}, "hyper_parameters": settings}, second)
    monkeypatch.chdir(tmp_path)
    stored = stored_model(second)
    assert stored is not None
    assert stored["init_args"]["estimator"] == f"runs/{PLACE.format(0)}"
    (tmp_path / "runs").rename(tmp_path / "all")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    stored = stored_model(Path("../all") / second.relative_to(tmp_path / "runs"))
    assert stored is not None
    assert Path(stored["init_args"]["estimator"]).samefile(tmp_path / "all" / first.relative_to(tmp_path / "runs"))
    assert stored["init_args"]["prompt"] == "runs"


def test_a_place_in_runs_is_that_of_a_version_alone() -> None:
    assert place_in_runs(f"/x/y/{PLACE.format(12)}") == PLACE.format(12)
    assert place_in_runs("last.ckpt") is None
    assert place_in_runs("/a/b/c/d/e/last.ckpt") is None


def test_a_digest_is_of_names_types_shapes_and_values() -> None:
    one = {"b": torch.tensor([1.0, 2.0]), "a": torch.zeros(2, 1)}
    assert digest(one) == digest({"a": torch.zeros(2, 1), "b": torch.tensor([1.0, 2.0])})
    assert len(digest({"a": torch.zeros((), dtype=torch.long), "b": torch.ones(3, dtype=torch.bfloat16)})) == 32
    for change in (
        {"b": torch.tensor([1.0, 2.5])},
        {"c": torch.zeros(1)},
        {"a": torch.zeros(1, 2)},
        {"a": torch.zeros(2, 1, dtype=torch.float64)},
    ):
        assert digest(one | change) != digest(one)
