"""Runs on disk: their names, folders, versions and checkpoints, `<runs>/<paper>/<name>/version_N/checkpoints`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from common.checkpoints import newest_checkpoint, read_checkpoint
from common.stages import place_in_runs

_RUN = re.compile(r"runs/[\w.-]+/[\w.-]+")
_DEMO_ROW = re.compile(r"^\d+_")


def paper_of(class_path: str) -> str:
    """`papers.dfosd.DFOSD` -> `dfosd`; `common.foundation.autoencoder.X` -> `foundation`."""
    parts = class_path.split(".")
    if parts[0] in ("papers", "common") and len(parts) > 2:
        return parts[1]
    return parts[0] if len(parts) > 1 else parts[-1].lower()


def run_folder_of(ckpt_path: str | None) -> Path | None:
    """`<runs>/<paper>/<name>/version_N` of a checkpoint inside one, else None."""
    if not ckpt_path:
        return None
    folder = Path(ckpt_path).absolute().parent
    inside = folder.name == "checkpoints" and folder.parent.name.startswith("version_")
    return folder.parent if inside else None


def last_run(runs: Path, paper: str, name: str) -> Path:
    """The newest version of a run that has a checkpoint.

    Raises:
        FileNotFoundError: There is none.
    """
    folder = Path(runs) / paper / name
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has no version with checkpoints/last.ckpt; run isr fit first")
    return checkpoint.parent.parent


def config_run_name(path: Path) -> str:
    """Name of the run that a config file makes: its stem; `demo-<row>` for `demo/NN_<row>.yaml`."""
    if path.parent.name == "demo":
        return "demo-" + _DEMO_ROW.sub("", path.stem)
    return path.stem


def run_name_of(files: Sequence[Path]) -> str:
    """Name of the run that several configs make: that of the first with a model; data may come before it."""
    with_model = [file for file in files if "model" in (yaml.safe_load(file.read_text()) or {})]
    return next((config_run_name(file.absolute()) for file in (*with_model, *files)), "default")


def find_stage(value: str, kept: str | None, roots: Sequence[Path]) -> str:
    """The checkpoint that a model's setting means, if it means one of a run; else the setting as it is.

    Args:
        value: `runs/<paper>/<name>` for the newest of that run, or a run's checkpoint, whose folder may have moved.
        kept: The checkpoint that a later stage was trained on; of the named run it goes before newer ones.
        roots: Folders of runs, in the order in which they are searched.
    """
    if _RUN.fullmatch(value):
        run = value.partition("/")[2]
        if kept is not None and f"{place_in_runs(kept)}".startswith(f"{run}/") and Path(kept).is_file():
            return kept
        found = [newest_checkpoint(root / run) for root in roots]
        return next((str(path.absolute()) for path in found if path is not None), value)
    place = place_in_runs(value)
    if place is None or Path(value).exists():
        return value
    return next((str((root / place).absolute()) for root in roots if (root / place).is_file()), value)


def stored_model(path: str | Path) -> dict[str, Any] | None:
    """class_path and init_args of the model that a checkpoint is of; None if it was not made by `isr fit`."""
    stored = dict(read_checkpoint(path).get("hyper_parameters", {}))
    stored.pop("_instantiator", None)
    if "_class_path" not in stored:
        return None
    own = run_folder_of(str(path))
    for key, value in stored.items():
        if own is not None and isinstance(value, str):
            stored[key] = find_stage(value, None, [own.parents[2]])
    return {"class_path": stored.pop("_class_path"), "init_args": stored}
