"""`isr compare`: its arguments and its mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.comparison import WrittenReport, measures
from launch.comparison.report import Report


class TestCommand:
    """`isr compare` turns its arguments into those of `compare`."""

    @pytest.fixture
    def call(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
        import launch.comparison

        caught: dict[str, Any] = {}

        def fake(**arguments: Any) -> WrittenReport:
            caught.update(arguments)
            data = Report(missing={"m": "why"}, methods=[{"name": "x", "failures": [{"reason": "no"}]}])
            return WrittenReport(Path("page"), Path("markdown"), data)

        monkeypatch.setattr(launch.comparison, "compare", fake)
        monkeypatch.chdir(tmp_path)

        def run(*arguments: str) -> dict[str, Any]:
            assert main(["compare", *arguments, "--debug"]) == 0
            return caught

        return run

    def test_names_are_given_or_made(self, call: Callable[..., dict[str, Any]]) -> None:
        found = call(
            "--runs", "runs/dfosd/sd21", "mine=runs/a/b/version_3", "--results", "GAN=x", "--metrics", "a,b", "c"
        )
        assert found["runs"] == {"dfosd/sd21": Path("runs/dfosd/sd21"), "mine": Path("runs/a/b/version_3")}
        assert found["results"] == {"GAN": Path("x")}
        assert found["metrics"] == ["a", "b", "c"]
        checkpoint = "runs/dfosd/sd21/version_2/checkpoints/last.ckpt"
        assert list(call("--runs", checkpoint)["runs"]) == ["dfosd/sd21"]

    def test_the_defaults_are_all_runs_and_all_weightless_metrics(
        self, call: Callable[..., dict[str, Any]], run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("runs").symlink_to(run.parents[1])
        found = call()
        assert found["runs"] == {"dfosd/demo-dfosd": Path("runs/dfosd/demo-dfosd")}
        assert tuple(found["metrics"]) == measures.WEIGHTLESS
        assert (found["reference"], found["output"]) == ("bicubic", Path("runs/compare"))
        said = capsys.readouterr().out
        assert "x has no result of 1 images, e.g. no" in said
        assert "not computed: m: why" in said

    def test_a_name_that_lacks_or_is_there_twice_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compare", "--results", "folder"]) == 2
        assert "results=folder has no name; write results NAME=folder" in capsys.readouterr().err
        assert main(["compare", "--runs", "a=b", "a=c"]) == 2
        assert "runs: a is there twice" in capsys.readouterr().err
        assert main(["compare", "--runs", "runs/dfosd/x", "runs/dfosd/x"]) == 2
        assert "runs: dfosd/x is there twice" in capsys.readouterr().err

    def test_runs_of_one_name_get_what_tells_their_paths_apart(self, call: Callable[..., dict[str, Any]]) -> None:
        inside = "x/dfosd/sd21/version_1/checkpoints"
        paths = [f"{inside}/last.ckpt", f"{inside}/epoch=3.ckpt", "y/dfosd/sd21", "x/rfsr/sd21"]
        Path(inside).mkdir(parents=True)
        Path(paths[1]).touch()
        assert call("--runs", *paths)["runs"] == {
            "dfosd/sd21 (x/dfosd/sd21/version_1/checkpoints/last.ckpt)": Path(paths[0]),
            "dfosd/sd21 (x/dfosd/sd21/version_1/checkpoints/epoch=3.ckpt)": Path(paths[1]),
            "dfosd/sd21 (y/dfosd/sd21)": Path(paths[2]),
            "rfsr/sd21": Path(paths[3]),
        }
        assert list(call("--runs", "x/a/b/version_0", "x/a/b/version_1", "c=x/a/b")["runs"]) == [
            *("a/b (version_0)", "a/b (version_1)", "c")
        ]
