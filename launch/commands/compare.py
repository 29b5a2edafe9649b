"""`isr compare`: put runs, baselines, GANs and foreign results under one protocol and write the report.

Bicubic enlargement is always among the methods. OUTPUT keeps results and numbers: a killed comparison goes on where it
was, and a new method or metric computes only its own numbers. Nothing is downloaded: a metric whose weights are missing
is listed as not computed (isr metrics fetch downloads them).
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import usage
from launch.errors import UsageError


def run(command: str, argv: Sequence[str]) -> int:
    """Compare, and print the path of the report.

    Returns:
        0, also where a method fails on an image; the report names and counts these.

    Raises:
        UsageError: An argument names a file that does not exist or is of the wrong kind.
    """
    options = _parser(command).parse_args(list(argv))
    from launch.comparison import compare
    from launch.comparison.measures import WEIGHTLESS
    from launch.comparison.methods import find_runs

    runs = _named("runs", options.runs, optional=True)
    results, weights = _named("results", options.results), _named("weights", options.weights)
    if not runs and not results and not weights:
        runs = find_runs(Path("runs"))
    found = compare(
        runs=runs,
        results=results,
        weights=weights,
        pairs=options.pairs,
        data=options.data,
        output=options.output,
        metrics=[name for part in options.metrics for name in part.split(",") if name] or WEIGHTLESS,
        reference=options.reference,
        title=options.title,
        fid=options.fid,
        efficiency=not options.no_efficiency,
        embed=options.embed,
        device=options.device,
        scale=options.scale,
    )
    for method in found.data.methods:
        if method["failures"]:
            first = method["failures"][0]
            print(f"isr: {method['name']} has no result of {len(method['failures'])} images, e.g. {first['reason']}")
    missing = found.data.missing
    for reason in dict.fromkeys(missing.values()):
        metrics = ", ".join(metric for metric, why in missing.items() if why == reason)
        print(f"isr: not computed: {metrics}: {reason}")
    print(f"isr: report: {found.page}")
    return 0


def _parser(command: str) -> argparse.ArgumentParser:
    parser = usage.parser(command, __doc__, allow_abbrev=False)
    _add_methods(parser.add_argument_group("methods (default: every run under runs/)"))
    _add_images(parser.add_argument_group("images (default: the embedded photos)"))
    _add_measures(parser.add_argument_group("metrics and costs"))
    _add_report(parser.add_argument_group("report"))
    return parser


_SEVERAL: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}


def _add_methods(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--runs",
        **_SEVERAL,
        metavar="[NAME=]RUN",
        help="folder of a run, runs/PAPER/NAME, one of its versions, or a checkpoint",
    )
    group.add_argument(
        "--results",
        **_SEVERAL,
        metavar="NAME=DIR",
        help="images of another program, named like the low-quality ones; DIR may hold a folder for each test set",
    )
    group.add_argument(
        "--weights",
        **_SEVERAL,
        metavar="NAME=FILE",
        help="weights of a GAN or another network that spandrel knows (Real-ESRGAN, BSRGAN, SwinIR ...)",
    )
    group.add_argument("--reference", default="bicubic", help="method the others are compared with (%(default)s)")


def _add_images(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pairs",
        **_SEVERAL,
        type=Path,
        metavar="DIR",
        help="folder of pairs (test_LR and test_HR, LR and HR, lq and gt ...) or of low-quality images alone",
    )
    group.add_argument(
        "--data",
        **_SEVERAL,
        type=Path,
        metavar="CONFIG",
        help="configuration whose test sets are taken, e.g. data/configs/real_benchmarks.yaml",
    )
    group.add_argument("--scale", type=int, default=4, help="super-resolution factor of --pairs (%(default)s)")


def _add_measures(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="ID[,ID]",
        help="e.g. psnr,ssim,lpips,musiq (isr metrics list names all; default: those that need no weights)",
    )
    group.add_argument("--fid", action="store_true", help="compute FID too, where its weights are present")
    group.add_argument("--no-efficiency", action="store_true", help="skip times, memory and multiplications")
    group.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("runs/compare"),
        metavar="OUTPUT",
        help="folder of the report (%(default)s)",
    )
    group.add_argument("--title", default="Comparison", help="heading of the report (%(default)s)")
    group.add_argument("--embed", action="store_true", help="put the images into report.html, to send it as one file")


def _named(argument: str, texts: Sequence[str], optional: bool = False) -> dict[str, Path]:
    """`NAME=PATH` as a dict; where the name is optional, it comes from the path of a run.

    Raises:
        UsageError: A name is missing or there twice.
    """
    given: list[tuple[str, str]] = []
    for text in texts:
        name, equals, path = text.partition("=")
        if optional and (not equals or Path(text).exists()):
            name, path = "", text
        elif not equals or not name or not path:
            raise UsageError(f"{argument}={text} has no name; write {argument} NAME={path or name}")
        given.append((name, path))
    made = _run_names([Path(path).absolute() for name, path in given if not name])
    found: dict[str, Path] = {}
    for name, path in given:
        name = name or made[Path(path).absolute()]
        if name in found:
            raise UsageError(f"{argument}: {name} is there twice; give one another name, NAME=PATH")
        found[name] = Path(path)
    return found


def _run_names(runs: Sequence[Path]) -> dict[Path, str]:
    """Names of runs by their absolute paths; alike names get the rest of the path: `dfosd/sd21 (version_0)`."""
    names = {run: _run_name(run) for run in runs}
    for name, count in Counter(names.values()).items():
        if count > 1:
            alike = [run for run in names if names[run] == name]
            above = os.path.commonpath(alike)
            names |= {run: f"{name} ({run.relative_to(above)})" for run in alike if str(run) != above}
    return names


def _run_name(path: Path) -> str:
    """`runs/dfosd/sd21`, a version of it or a checkpoint in that -> `dfosd/sd21`; else the last part of the path."""
    folder = path
    if folder.suffix == ".ckpt":
        if folder.parent.name != "checkpoints":
            return folder.stem
        folder = folder.parents[1]
    if folder.name.startswith("version_"):
        folder = folder.parent
    return f"{folder.parent.name}/{folder.name}"
