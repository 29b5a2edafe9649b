"""`isr demo`: train and test every demo configuration on the embedded photos in one process, and write the report."""

from __future__ import annotations

import argparse
import importlib
import importlib.resources
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import held
from launch.errors import UsageError
from launch.signals import Stopped

if TYPE_CHECKING:
    from data.datamodules import Photos
    from launch.comparison import Comparison

_ORDER = re.compile(r"^\d+_")
METRICS = ("psnr_y", "ssim_y", "psnr_rgb", "torchmetrics:vif", "sharpness", "neutrality")
"""What the report measures: no weights, no extra, whatever is installed."""
_NOTE = (
    "This shows that everything runs, on a toy scale: tiny networks, trained for minutes on a few photos. It does not "
    "rank the papers' methods."
)


@dataclass(frozen=True)
class Row:
    """A demo configuration: `papers/<paper>/configs/demo/NN_<name>.yaml`."""

    paper: str
    name: str
    config: Path

    @property
    def restores(self) -> bool:
        """Whether it is a method that restores images; else it is a stage that a later row of its paper builds on."""
        import yaml

        from launch.comparison.methods import restores

        return restores(yaml.safe_load(self.config.read_text())["model"]["class_path"])

    @property
    def trains(self) -> bool:
        """Whether there is anything to fit; a row of `max_steps: 0` is tested as its configuration has it."""
        import yaml

        steps = (yaml.safe_load(self.config.read_text()).get("trainer") or {}).get("max_steps")
        return bool(steps != 0)

    @property
    def label(self) -> str:
        """How the row is called in the report."""
        return f"{self.paper}/{self.name}"

    @property
    def run_name(self) -> str:
        """Name of the row's run folder."""
        return f"demo-{self.name}"


@dataclass
class Outcome:
    """What became of a row; `failure` says what failed, `run` and `checkpoint` are there once the fit is done."""

    row: Row
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

    def said(self) -> str:
        """What became of the row, in a line."""
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


def find_rows(only: Sequence[str] = (), papers: Path | None = None) -> list[Row]:
    """All demo configurations, papers by name and each paper's by file name.

    Args:
        only: Keep the rows whose label holds one of these texts; all where it is empty.
        papers: Folder of the papers; default: the installed package.

    Raises:
        UsageError: Nothing is left.
    """
    root = papers or Path(str(importlib.resources.files("papers")))
    found = sorted(root.glob("*/configs/demo/*.yaml"), key=lambda path: (path.parents[2].name, path.name))
    rows = [Row(path.parents[2].name, _ORDER.sub("", path.stem), path) for path in found]
    kept = [row for row in rows if not only or any(text in row.label for text in only)]
    if not kept:
        asked = f"--only {' '.join(only)} matches none of the rows" if only else "there are no demo configurations"
        raise UsageError(f"{asked}; rows: {', '.join(row.label for row in rows) or f'none under {root}'}")
    return kept


def run(command: str, argv: list[str]) -> int:
    """Run `isr demo` with these arguments.

    Returns:
        0; 1 where a row failed. The report is written in both cases.

    Raises:
        InUseError: Another demo is under way in the same folder of runs.
        Stopped: A signal ends it; rows that are done are kept.
        UsageError: The arguments select nothing.
    """
    options = _parser(command).parse_args(argv)
    rows, runs = find_rows(options.only), Path(options.runs)
    with held(runs / "demo"):
        return _run(rows, runs, options.max_steps)


def _run(rows: Sequence[Row], runs: Path, max_steps: int | None) -> int:
    start = time.perf_counter()
    importlib.import_module("launch.lightning_cli")  # some seconds, which are not the first row's
    data, failed_early = _open_data(rows)
    setup_seconds = time.perf_counter() - start
    print(f"demo: {len(rows)} row{'s' if len(rows) > 1 else ''}, set-up {setup_seconds:.0f} s", flush=True)
    outcomes: list[Outcome] = []
    try:
        for number, row in enumerate(rows, 1):
            print(f"demo: row {number} of {len(rows)}: {row.label}", flush=True)
            outcome = failed_early.get(row.label) or _fit_and_test(row, runs, max_steps)
            outcomes.append(outcome)
            print(f"demo: row {row.label} {outcome.said()}", flush=True)
    except Stopped:
        _say_what_is_kept(rows, outcomes, runs)
        raise
    if data is None:
        print("demo: no row's data can be had, so there is no report")
        return 1
    return _report(rows, outcomes, data, runs, max_steps, setup_seconds)


def _say_what_is_kept(rows: Sequence[Row], outcomes: Sequence[Outcome], runs: Path) -> None:
    """A line about a demo that a signal ends."""
    done = [outcome.row.label for outcome in outcomes if not outcome.failure]
    last = rows[min(len(outcomes), len(rows) - 1)].label
    kept = f"{len(done)} of {len(rows)} rows are done and kept under {runs}: {', '.join(done) or 'none'}"
    print(f"demo: ended in row {last}, without a report; {kept}", flush=True)


def _report(
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    data: Photos,
    runs: Path,
    max_steps: int | None,
    setup_seconds: float,
) -> int:
    """Write the report and say where it is and what it took."""
    from launch.comparison.outputs import means_table

    failed = [outcome for outcome in outcomes if outcome.failure]
    start = time.perf_counter()
    made = _write_report(data, outcomes, runs, max_steps)
    report_seconds = time.perf_counter() - start
    for dataset in made.data["datasets"]:
        print(f"\n{means_table(made.data, dataset)}\n")
    fit, test = sum(o.fit_seconds for o in outcomes), sum(o.test_seconds for o in outcomes)
    times = f"set-up {setup_seconds:.0f} s, fit {fit:.0f} s, test {test:.0f} s, report {report_seconds:.0f} s"
    print(f"demo: {len(outcomes) - len(failed)} of {len(rows)} rows done; {times}")
    for outcome in failed:
        print(f"demo: row {outcome.row.label} {outcome.said()}")
        print(f"demo: alone, with its traceback: isr {outcome.again()} --debug")
    print(f"demo: report: {made.page}")
    print(f"demo: the same as text: {made.markdown}")
    print(f"demo: curves and images: tensorboard --logdir {runs}", flush=True)
    return 1 if failed else 0


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"isr {command}", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only rows whose name holds a TEXT")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--max-steps", type=_positive, help="steps of every fit, instead of its own number")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is out of range; give 1 or more")
    return value


def _open_data(rows: Sequence[Row]) -> tuple[Photos | None, dict[str, Outcome]]:
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
            failures[row.label] = Outcome(row, failure=f"set-up: {_one_line(error)}")
    return common, failures


def _test_set(data: Photos) -> dict[str, Any]:
    """What decides a data module's test images."""
    return {
        "scale": data.scale,
        "eval_crop_size": data.eval_crop_size,
        "test_seeds": data.test_seeds,
        "test_crops": data.test_crops,
        "degradation": data.degradation.config if data.degradation else "bicubic",
    }


def _fit_and_test(row: Row, runs: Path, max_steps: int | None) -> Outcome:
    from common.checkpoints import read_checkpoint
    from launch.lightning_cli import run as lightning
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
        outcome.failure = f"{stage}: {_one_line(error)}"
    setattr(outcome, f"{stage}_seconds", time.perf_counter() - start)
    return outcome


def _quick(max_steps: int | None) -> list[str]:
    if max_steps is None:
        return []
    shorter = [f"--trainer.max_steps={max_steps}", f"--checkpoint.every_n_train_steps={max_steps}"]
    return [*shorter, "--trainer.log_every_n_steps=1"]


def ready(rows: Sequence[Row], runs: Path, max_steps: int | None = None) -> dict[str, Path]:
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
    from launch.lightning_cli import run as lightning

    trained = [row for row in rows if row.trains]
    for row in trained:
        if newest_checkpoint(runs / row.paper / row.run_name) is None:
            _must_succeed(lightning("fit", ["-c", str(row.config), "--runs", str(runs), *_quick(max_steps)]))
    return {row.label: runs / row.paper / row.run_name for row in trained if row.restores}


def _test_as_it_is(row: Row, runs: Path) -> Outcome:
    from launch.lightning_cli import run as lightning

    outcome, start, before = Outcome(row), time.perf_counter(), set((runs / row.paper / row.run_name).glob("version_*"))
    try:
        _must_succeed(lightning("test", ["-c", str(row.config), "--runs", str(runs), "--ckpt_path", "null"]))
        (outcome.run,) = set((runs / row.paper / row.run_name).glob("version_*")) - before
    except (Exception, SystemExit) as error:  # as above
        outcome.failure = f"test: {_one_line(error)}"
    outcome.test_seconds = time.perf_counter() - start
    return outcome


def _write_report(data: Photos, outcomes: Sequence[Outcome], runs: Path, max_steps: int | None) -> Comparison:
    """Choose the blurs on the validation photos and put everything side by side."""
    from launch import baselines
    from launch.comparison import compare

    done = [outcome for outcome in outcomes if not outcome.failure]
    methods = [outcome for outcome in done if outcome.row.restores]
    data.val_crops = None  # rows may look at few crops while they train; the blurs are chosen on all
    data.setup("validate")
    (val,) = data.val_dataloader()
    choice = [val.dataset[i] for i in range(len(val.dataset))]  # type: ignore[arg-type]  # it has a length
    sigmas = baselines.choose_sigmas(choice)
    chosen = ", ".join(f"{baselines.CHOSEN_FOR[metric]} at sigma {sigma:g} px" for metric, sigma in sigmas.items())
    tried = f"sigma {baselines.SIGMAS[0]:g} to {baselines.SIGMAS[-1]:g} px"
    notes = [
        *(
            [f"A quick look: every fit ran {max_steps} steps instead of its configuration's number."]
            if max_steps
            else []
        ),
        *(f"The row {o.row.label} is left out, it failed in {o.failure}" for o in outcomes if o.failure),
        _NOTE,
        *_random_parts(done),
        *_toy_conditions(done),
        f"The blurs were chosen on {len(choice)} crops of the validation photos, among {tried}: {chosen}. A method "
        "above bicubic but not above the blurs has removed noise and restored no detail that these metrics see.",
    ]
    return compare(
        runs={outcome.row.label: outcome.checkpoint or outcome.folder for outcome in methods},
        images={outcome.row.label: outcome.folder / "test" for outcome in methods},
        blurs=baselines.blur_names(sigmas),
        data=data,
        output=runs / "demo" / "report",
        metrics=METRICS,
        figures=_figures(done),
        notes=notes,
        sources=[
            *(outcome.source() for outcome in done),
            "A run folder holds the whole configuration, config.yaml, and of a fit versions and git commit, run.json.",
        ],
        title="Demo: the methods side by side",
        device="cpu",
        progress=False,
    )


def _must_succeed(code: int) -> None:
    if code:
        raise RuntimeError(f"exit code {code}")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _figures(outcomes: Sequence[Outcome]) -> list[Any]:
    """Plots that the rows left in their run folders, row by row, by file name."""
    from launch.comparison.pictures import NamedFigure

    return [
        NamedFigure(outcome.row.label, path)
        for outcome in outcomes
        for path in sorted((outcome.folder / "test" / "figures").glob("*.png"))
    ]


def _random_parts(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each setting by which a row's model has random weights, from the runs' saved configurations."""
    rows: dict[str, list[str]] = {}
    for outcome in outcomes:
        for setting in _random_settings(outcome.model, "model"):
            rows.setdefault(setting, []).append(outcome.row.label)
    return [f"Random weights instead of trained ones: {setting} ({', '.join(rows[setting])})." for setting in rows]


def _toy_conditions(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each condition of the embedded foundation that rows use, from the runs' saved configurations."""
    rows: dict[str, list[str]] = {}
    for outcome in outcomes:
        settings = outcome.model.get("init_args", {})
        if settings.get("condition") == "features" and settings.get("features") == "tiny":
            toy = "image features come from a two-layer ViT with random weights"
        elif settings.get("pretrained") == "tiny":
            toy = "texts go through an encoder that has read seventeen captions"
        else:
            continue
        rows.setdefault(toy, []).append(outcome.row.label)
    return [f"Toy condition: {toy} ({', '.join(rows[toy])})." for toy in rows]


def _random_settings(tree: Mapping[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key, value in tree.items():
        path = prefix if key == "init_args" else f"{prefix}.{key}"
        if isinstance(value, Mapping):
            found += _random_settings(value, path)
        elif isinstance(value, str) and (value == "random" or value.startswith("random:")):
            width = tree.get(key.replace("weights", "width"))
            found.append(f"{path}={value}" + (f", width {width:g}" if isinstance(width, float) else ""))
    return found


def _shown(path: Path) -> str:
    """A path as one types it: from here where it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
