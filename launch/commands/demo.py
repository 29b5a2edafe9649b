"""`isr demo`: train and test every demo configuration on the embedded photos in one process, and write the report."""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import held
from launch import demo, usage
from launch.demo import DemoRow, Outcome
from launch.demo_report import write_report
from launch.signals import Stopped

if TYPE_CHECKING:
    from data.datamodules import Photos


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
    rows, runs = demo.find_rows(options.only), Path(options.runs)
    with held(runs / "demo"):
        return _run(rows, runs, options.max_steps)


def _run(rows: Sequence[DemoRow], runs: Path, max_steps: int | None) -> int:
    start = time.perf_counter()
    importlib.import_module("launch.lightning_cli")  # some seconds, which are not the first row's
    data, failed_early = demo.open_data(rows)
    setup_seconds = time.perf_counter() - start
    print(f"demo: {len(rows)} row{'s' if len(rows) > 1 else ''}, set-up {setup_seconds:.0f} s", flush=True)
    outcomes: list[Outcome] = []
    try:
        for number, row in enumerate(rows, 1):
            print(f"demo: row {number} of {len(rows)}: {row.label}", flush=True)
            outcome = failed_early.get(row.label) or demo.fit_and_test(row, runs, max_steps)
            outcomes.append(outcome)
            print(f"demo: row {row.label} {outcome.summary()}", flush=True)
    except Stopped:
        _print_kept(rows, outcomes, runs)
        raise
    if data is None:
        print("demo: no row's data can be had, so there is no report")
        return 1
    return _report(rows, outcomes, data, runs, max_steps, setup_seconds)


def _print_kept(rows: Sequence[DemoRow], outcomes: Sequence[Outcome], runs: Path) -> None:
    """Print the rows that are kept when a signal ends the demo."""
    done = [outcome.row.label for outcome in outcomes if not outcome.failure]
    last = rows[min(len(outcomes), len(rows) - 1)].label
    kept = f"{len(done)} of {len(rows)} rows are done and kept under {runs}: {', '.join(done) or 'none'}"
    print(f"demo: ended in row {last}, without a report; {kept}", flush=True)


def _report(
    rows: Sequence[DemoRow],
    outcomes: Sequence[Outcome],
    data: Photos,
    runs: Path,
    max_steps: int | None,
    setup_seconds: float,
) -> int:
    """Write the report, and print its path and the times."""
    from launch.comparison.tables import means_table

    failed = [outcome for outcome in outcomes if outcome.failure]
    start = time.perf_counter()
    made = write_report(data, outcomes, runs, max_steps)
    report_seconds = time.perf_counter() - start
    for dataset in made.data.datasets:
        print(f"\n{means_table(made.data, dataset)}\n")
    fit, test = sum(o.fit_seconds for o in outcomes), sum(o.test_seconds for o in outcomes)
    times = f"set-up {setup_seconds:.0f} s, fit {fit:.0f} s, test {test:.0f} s, report {report_seconds:.0f} s"
    print(f"demo: {len(outcomes) - len(failed)} of {len(rows)} rows done; {times}")
    for outcome in failed:
        print(f"demo: row {outcome.row.label} {outcome.summary()}")
        print(f"demo: alone, with its traceback: isr {outcome.again()} --debug")
    print(f"demo: report: {made.page}")
    print(f"demo: the same as text: {made.markdown}")
    print(f"demo: curves and images: tensorboard --logdir {runs}", flush=True)
    return 1 if failed else 0


def _parser(command: str) -> argparse.ArgumentParser:
    parser = usage.parser(command, __doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="only rows whose name holds a TEXT")
    parser.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    parser.add_argument("--max-steps", type=_positive, help="steps of every fit, instead of its own number")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is out of range; give 1 or more")
    return value
