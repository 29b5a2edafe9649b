"""Runs on disk: their names, folders, versions and checkpoints, `<runs>/<paper>/<name>/version_N/checkpoints`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.checkpoints import newest_checkpoint, read_checkpoint
from common.stages import place_in_runs
from launch.errors import UsageError
from launch.moved import current

_RUN = re.compile(r"runs/[\w.-]+/[\w.-]+")
_DEMO_ROW = re.compile(r"^\d+_")
_VERSION = re.compile(r"version_\d+")
_LONGEST = 120
"""Characters of a name that is made from configs and flags; folders with longer ones are hard to handle."""


@dataclass
class Given:
    """The parts of a command's arguments that name its run, read before they are parsed.

    Args:
        args: The command and its arguments.
    """

    args: Sequence[str]
    configs: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    """Config files with what they hold, in order."""
    flags: dict[str, str] = field(default_factory=dict)
    """Model settings that are given as flags, by their dotted name without `model` and `init_args`."""
    ckpt_path: str | None = None
    """The last one given, by a flag or in a config; "null" only from a flag."""
    name: str | None = None
    """The last one given, by a flag or in a config of the user's; a run's own config is named by its folder."""

    def __post_init__(self) -> None:
        for option, value in options(self.args):
            if option in ("-c", "--config"):
                self._read(Path(value))
            elif option == "--ckpt_path":
                self.ckpt_path = value
            elif option == "--name":
                self.name = value
            elif option.partition(".")[0] in ("--model", "--model+"):
                key = [part for part in option.rstrip("+").split(".")[1:] if part not in ("init_args", "class_path")]
                if key[:1] != ["inference"]:
                    self.flags[".".join(key)] = value

    def _read(self, path: Path) -> None:
        config = _content(path)
        self.configs.append((path, config))
        self.ckpt_path = config.get("ckpt_path") or self.ckpt_path
        if own_run(path) is None:
            self.name = config.get("name") or self.name

    def run_name(self) -> str:
        """The name that is given; else what makes the model: the first config with one, overlays on it, and flags.

        Raises:
            UsageError: The name is no name of one folder, or too long to be made from what is given.
        """
        if self.name:
            if Path(self.name).name != self.name or self.name == "..":
                raise UsageError(f"name={self.name} is not the name of one folder; leave out what makes it a path")
            return self.name
        name = run_name_of(self.configs, self.flags)
        if len(name) > _LONGEST:
            raise UsageError(f"name is not given, and would be {name[:60]}... by the model's settings; set --name")
        return name

    def own_version(self) -> Path | None:
        """The version of a run of which the config is given and nothing else that touches the model; else None."""
        makers = [path for path, config in self.configs if touches_model(config)]
        alone = len(makers) == 1 and not self.flags and not self.name
        return own_run(makers[0]) if alone else None


def options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options and their values among arguments, `--a=b` or `--a b`."""
    for arg, after in zip(args, [*args[1:], ""], strict=True):
        if arg.startswith("-"):
            option, equals, value = arg.partition("=")
            yield option, value if equals else "" if after.startswith("--") else after


def _content(path: Path) -> dict[str, Any]:
    """Content of a config file; empty where it cannot be read, which the parser explains."""
    try:
        content = current(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def touches_model(config: Mapping[str, Any]) -> bool:
    """True where a config sets anything of the model that its weights depend on: anything but `inference`."""
    model = config.get("model", {})
    settings = model.get("init_args", model) if isinstance(model, dict) and "class_path" not in model else None
    dotted = [key.replace("init_args.", "") for key in config if key.startswith("model.")]
    return any(not key.startswith("model.inference") for key in dotted) or (
        "model" in config and (settings is None or any(key.partition(".")[0] != "inference" for key in settings))
    )


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


def own_run(config: Path) -> Path | None:
    """The version of a run whose own config this is, `<runs>/<paper>/<name>/version_N/config.yaml`; else None."""
    folder = config.absolute().parent
    return folder if config.name == "config.yaml" and _VERSION.fullmatch(folder.name) else None


def config_run_name(path: Path) -> str:
    """Name of the run that a config file makes.

    It is the file's stem; `demo-<row>` for `demo/NN_<row>.yaml`; the run's own for the config in a run's folder.
    """
    path = path.absolute()
    if (version := own_run(path)) is not None:
        return version.parent.name
    if path.parent.name == "demo":
        return "demo-" + _DEMO_ROW.sub("", path.stem)
    return path.stem


def run_name_of(configs: Sequence[tuple[Path, Mapping[str, Any]]], flags: Mapping[str, str]) -> str:
    """Name of the run that configs and flags make: all that touch the model, joined.

    Args:
        configs: Files and what they hold. Where none has a model, the first one names the run.
        flags: Settings of the model, by their dotted name.
    """
    makers = [path for path, config in configs if touches_model(config)] or [path for path, _ in configs[:1]]
    parts = [config_run_name(path) for path in makers]
    parts += ["_".join(re.findall(r"[\w.-]+", f"{key} {value}")) for key, value in flags.items()]
    return "-".join(parts) or "default"


def best_checkpoint(version: Path) -> Path | None:
    """The checkpoint of a run's version that its monitored score calls the best; None where nothing was monitored."""
    kept: dict[str, Any] = read_checkpoint(version / "checkpoints" / "last.ckpt").get("callbacks", {})
    found = [
        Path(state["best_model_path"]).name  # its folder may have moved
        for name, state in kept.items()
        if "Checkpoint{" in name and state.get("monitor") and state.get("best_model_path")
    ]
    path = version / "checkpoints" / found[0] if found else None
    return path if path is not None and path.is_file() else None


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
    return current({"class_path": stored.pop("_class_path"), "init_args": stored})


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The single settings of nested ones by their dotted names, without `init_args`."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, prefix if key == "init_args" else f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), tree


def differing_versions(run: Path) -> list[str]:
    """The trained versions of a run whose model or data differ from the newest's, each with the first differences."""
    newest = newest_checkpoint(run)
    if newest is None:
        return []
    taken, found = _model_and_data(newest.parents[1]), []
    for checkpoint in sorted(run.glob("version_*/checkpoints/last.ckpt")):
        other = _model_and_data(checkpoint.parents[1])
        differing = sorted(key for key in taken.keys() | other.keys() if taken.get(key) != other.get(key))
        if taken and other and differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            first = ", ".join(f"{key}={other.get(key)}" for key in differing[:3])
            found.append(f"{checkpoint.parents[1].name} has {first}{more}")
    return found


def _model_and_data(version: Path) -> dict[str, Any]:
    config = _content(version / "config.yaml")
    return dict(leaves({key: config[key] for key in ("model", "data") if key in config}))
