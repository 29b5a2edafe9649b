"""The demo's rows: the configurations in `papers/*/configs/demo`, and how each is fitted and tested."""

from __future__ import annotations

import importlib.resources
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import one_line
from launch.errors import UsageError

if TYPE_CHECKING:
    from data.datamodules import Photos

METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "torchmetrics:vif", "sharpness", "neutrality")
"""Metrics of the report; they need no weights and no extra, so they are the same on every installation."""
_ORDER = re.compile(r"^\d+_")


@dataclass(frozen=True)
class DemoRow:
    """A demo configuration: `papers/<paper>/configs/demo/NN_<name>.yaml`."""

    paper: str
    name: str
    config: Path

    @property
    def restores(self) -> bool:
        """True for a method that restores images; other rows are stages that a later row of the paper builds on."""
        import yaml

        from launch.comparison.methods import restores

        return restores(yaml.safe_load(self.config.read_text())["model"]["class_path"])

    @property
    def trains(self) -> bool:
        """True where there is something to fit; a row with `max_steps: 0` is tested as configured."""
        import yaml

        steps = (yaml.safe_load(self.config.read_text()).get("trainer") or {}).get("max_steps")
        return bool(steps != 0)

    @property
    def label(self) -> str:
        """Name of the row in the report."""
        return f"{self.paper}/{self.name}"

    @property
    def run_name(self) -> str:
        """Name of the row's run folder."""
        return f"demo-{self.name}"


@dataclass
class Outcome:
    """Result of a row; `failure` names the error, `run` and `checkpoint` are set once the fit is done."""

    row: DemoRow
    run: Path | None = None
    checkpoint: Path | None = None
    steps: int = 0
    fit_seconds: float = 0.0
    test_seconds: float = 0.0
    failure: str = ""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        if self.run is None:
            raise RuntimeError(f"{self.row.label} has no run folder: {self.failure}")
        return self.run

    @property
    def model(self) -> dict[str, Any]:
        """The model's class and settings, from the run's saved configuration."""
        import yaml

        settings: dict[str, Any] = yaml.safe_load((self.folder / "config.yaml").read_text())["model"]
        return settings

    def summary(self) -> str:
        """Result of the row in one line."""
        if self.failure:
            return f"FAILED in {self.failure}"
        return f"done: {self.steps} train steps, fit {self.fit_seconds:.0f} s, test {self.test_seconds:.0f} s"

    def again(self) -> str:
        """Arguments of `isr` that repeat what failed."""
        config = f"-c {_shown(self.row.config)}"
        if self.checkpoint is not None:
            return f"test {config} --ckpt_path {self.checkpoint}"
        return f"fit {config}" if self.row.trains else f"test {config}"

    def source(self) -> str:
        """A line for the report: where the row comes from."""
        return (
            f"{self.row.label}: {_shown(self.row.config)}, {self.steps} train steps, fit {self.fit_seconds:.0f} s, "
            f"test {self.test_seconds:.0f} s, run folder {self.folder}"
        )


def find_rows(only: Sequence[str] = (), papers: Path | None = None) -> list[DemoRow]:
    """All demo configurations, papers by name and each paper's by file name.

    Args:
        only: Keep the rows whose label holds one of these texts; all where it is empty.
        papers: Folder of the papers; default: the installed package.

    Raises:
        UsageError: Nothing is left.
    """
    root = papers or Path(str(importlib.resources.files("papers")))
    found = sorted(root.glob("*/configs/demo/*.yaml"), key=lambda path: (path.parents[2].name, path.name))
    rows = [DemoRow(path.parents[2].name, _ORDER.sub("", path.stem), path) for path in found]
    kept = [row for row in rows if not only or any(text in row.label for text in only)]
    if not kept:
        asked = f"--only {' '.join(only)} matches none of the rows" if only else "there are no demo configurations"
        raise UsageError(f"{asked}; rows: {', '.join(row.label for row in rows) or f'none under {root}'}")
    return kept


def open_data(rows: Sequence[DemoRow]) -> tuple[Photos | None, dict[str, Outcome]]:
    """The data module of the rows, and the rows that fail: data unreadable, or other test images than the rest."""
    import yaml
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    from data.datamodules import Photos

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    common: Photos | None = None
    failures: dict[str, Outcome] = {}
    for row in rows:
        try:
            config = {"data": yaml.safe_load(row.config.read_text())["data"]}
            data = parser.instantiate(parser.parse_object(config)).data
            if not isinstance(data, Photos) or data.test or data.val:
                raise ValueError(
                    f"data: {type(data).__name__} as configured does not validate and test on the embedded photos; set "
                    "class_path data.Photos and leave val and test null in demo rows"
                )
            common = common or data
            if _test_set(data) != _test_set(common):
                raise ValueError(
                    f"data: its test images are {_test_set(data)}, those of the first row {_test_set(common)}; "
                    "give all demo rows the same"
                )
        except Exception as error:  # one row's mistake must not stop the others
            failures[row.label] = Outcome(row, failure=f"set-up: {_named_error(error)}")
    return common, failures


def _test_set(data: Photos) -> dict[str, Any]:
    """Settings that a data module's test images depend on."""
    return {
        "scale": data.scale,
        "eval_crop_size": data.eval_crop_size,
        "test_seeds": data.test_seeds,
        "test_crops": data.test_crops,
        "degradation": data.degradation.config if data.degradation else "bicubic",
    }


def fit_and_test(row: DemoRow, runs: Path, max_steps: int | None) -> Outcome:
    """Fit a row and test its last checkpoint; an error of the row is its outcome.

    Args:
        row: The row.
        runs: Folder of all runs.
        max_steps: Steps of the fit; None takes the row's own number.
    """
    from common.checkpoints import read_checkpoint
    from launch.commands.fit import run as lightning
    from launch.runs import last_run

    if not row.trains:
        return _test_as_it_is(row, runs)
    outcome, stage, start = Outcome(row), "fit", time.perf_counter()
    common = ["-c", str(row.config), "--runs", str(runs)]
    before = set((runs / row.paper / row.run_name).glob("version_*"))
    try:
        _must_succeed(lightning("fit", [*common, *_quick(max_steps)]))
        folder = last_run(runs, row.paper, row.run_name)
        if folder in before:
            raise FileNotFoundError(
                f"the fit left no checkpoints/last.ckpt; the newest one is an earlier run's, {folder}"
            )
        checkpoint = folder / "checkpoints" / "last.ckpt"
        outcome.steps = int(read_checkpoint(checkpoint)["global_step"])
        outcome.run, outcome.checkpoint, outcome.fit_seconds = folder, checkpoint, time.perf_counter() - start
        stage, start = "test", time.perf_counter()
        _must_succeed(lightning("test", [*common, "--ckpt_path", str(checkpoint)]))
    except (Exception, SystemExit) as error:  # the other rows still run, and the report names this one
        outcome.failure = f"{stage}: {_named_error(error)}"
    setattr(outcome, f"{stage}_seconds", time.perf_counter() - start)
    return outcome


def _quick(max_steps: int | None) -> list[str]:
    if max_steps is None:
        return []
    shorter = [f"--trainer.max_steps={max_steps}", f"--checkpoint.every_n_train_steps={max_steps}"]
    return [*shorter, "--trainer.log_every_n_steps=1"]


def ready(rows: Sequence[DemoRow], runs: Path, max_steps: int | None = None) -> dict[str, Path]:
    """The runs of the rows that train a method, newest of each; a row that has none is fitted first.

    Args:
        rows: In the order in which they build on each other.
        runs: Folder of all runs.
        max_steps: Steps of these fits, instead of each row's own number.

    Returns:
        Label -> the run's folder.

    Raises:
        RuntimeError: A fit ended early.
    """
    from common.checkpoints import newest_checkpoint
    from launch.commands.fit import run as lightning

    trained = [row for row in rows if row.trains]
    for row in trained:
        if newest_checkpoint(runs / row.paper / row.run_name) is None:
            _must_succeed(lightning("fit", ["-c", str(row.config), "--runs", str(runs), *_quick(max_steps)]))
    return {row.label: runs / row.paper / row.run_name for row in trained if row.restores}


def _test_as_it_is(row: DemoRow, runs: Path) -> Outcome:
    from launch.commands.fit import run as lightning

    outcome, start, before = Outcome(row), time.perf_counter(), set((runs / row.paper / row.run_name).glob("version_*"))
    try:
        _must_succeed(lightning("test", ["-c", str(row.config), "--runs", str(runs), "--ckpt_path", "null"]))
        (outcome.run,) = set((runs / row.paper / row.run_name).glob("version_*")) - before
    except (Exception, SystemExit) as error:  # as above
        outcome.failure = f"test: {_named_error(error)}"
    outcome.test_seconds = time.perf_counter() - start
    return outcome


def _shown(path: Path) -> str:
    """A path as one types it: from here where it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _must_succeed(code: int) -> None:
    if code:
        raise RuntimeError(f"exit code {code}")


def _named_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
