"""Checkpoints of what is trained: parameters that a method declares trainable, and the buffers beside them.

The frozen base (often gigabytes) is never written; it comes from `pretrained` again. Loading is therefore not strict in
torch's sense. It is stricter for trained parameters: every trainable key must be present, and no key may be unknown.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

_PARAMETRISATION = re.compile(r"(\.parametrizations\.\w+)\.\d+$")


def matching(module: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Parameter]:
    """A module's parameters whose dotted names fit one of the patterns (as in file names: `unet.*lora_*`).

    Raises:
        ValueError: A pattern fits no parameter.
    """
    patterns = tuple(patterns)
    named = dict(module.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(f"trainable pattern {pattern!r} fits no parameter of {type(module).__name__}")
    return {name: value for name, value in named.items() if any(fnmatchcase(name, p) for p in patterns)}


def kept_keys(module: nn.Module, trainable: Iterable[str]) -> set[str]:
    """State-dict keys of a checkpoint: the trainable parameters, and the persistent buffers of the modules they are in.

    Args:
        module: The whole method.
        trainable: Names of its trainable parameters.
    """
    trainable = set(trainable)
    state = module.state_dict(keep_vars=True)
    buffers = {name for name, value in state.items() if not isinstance(value, nn.Parameter)}
    holders = {name.rpartition(".")[0] for name in trainable} | {""}  # "" holds the method's own counters
    # spectral normalisation keeps its vectors one level below the weight: conv.parametrizations.weight.0._u
    held = {b for b in buffers if _PARAMETRISATION.sub(r"\1", b.rpartition(".")[0]) in holders}
    return {name for name in state if name in trainable} | held


def check_keys(expected: set[str], found: set[str], source: str) -> None:
    """Refuse a checkpoint that lacks a trainable parameter or brings an unknown one.

    Raises:
        ValueError: Naming how many keys, the first of them, and what to do.
    """
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise ValueError(
            f"{source} does not fit this model: {len(missing)} trained keys missing {missing[:2]}, {len(unknown)} "
            f"unknown {unknown[:2]}; use the configuration it was trained with (config.yaml beside its checkpoints)"
        )


def check_shapes(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights of other shapes than the module's.

    Raises:
        ValueError: Naming how many, the first of them, and what to do.
    """
    here = module.state_dict(keep_vars=True)
    wrong = [name for name, value in state.items() if name in here and here[name].shape != value.shape]
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{source} does not fit this model: {len(wrong)} trained weights have other shapes, {first} is "
            f"{tuple(state[first].shape)} there and {tuple(here[first].shape)} here; use the configuration it was "
            "trained with (config.yaml beside its checkpoints)"
        )


def read_tensors(path: str | Path, mapped: bool = False) -> Any:
    """Read a file of weights, .safetensors or torch's, without running anything that it holds.

    Args:
        path: The file.
        mapped: Leave the tensors of torch's file on the disk until they are read. Clone the tensors that are kept, as
            the file may be replaced.

    Raises:
        ValueError: The file is not of these types, or holds more than tensors and plain values.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        mapped = mapped and zipfile.is_zipfile(path)  # torch's layout before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file fails in many ways
        why = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(
            f"{path} cannot be read as tensors ({why}); files that could run code are not read, give .safetensors"
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's dict with torch's safe loader; its tensors are mapped, see `read_tensors`.

    Raises:
        FileNotFoundError: There is no such file; the checkpoints beside it are named.
        ValueError: The file is not a checkpoint, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        nearest = next((parent for parent in path.parents if parent.is_dir()), Path("."))
        others = ", ".join(sorted(str(p.relative_to(nearest)) for p in nearest.rglob("*.ckpt"))[:5]) or "none"
        raise FileNotFoundError(f"ckpt_path={path}: no such file; checkpoints under {nearest}: {others}")
    try:
        checkpoint: dict[str, Any] = read_tensors(path, mapped=True)
    except ValueError as error:
        why = f"{type(error.__cause__).__name__}: {error.__cause__}".splitlines()[0][:120]
        raise ValueError(
            f"ckpt_path={path} cannot be read as a checkpoint ({why}); give a file that isr fit wrote"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"ckpt_path={path} holds no state_dict; give a .ckpt file that isr fit wrote")
    return checkpoint


def newest_checkpoint(run: Path) -> Path | None:
    """`last.ckpt` of a run's newest version that has one: `<run>/version_N/checkpoints/last.ckpt`; None if none has."""
    found = run.glob("version_*/checkpoints/last.ckpt")
    return max(found, key=lambda path: int(path.parents[1].name.removeprefix("version_")), default=None)


def resolved(path: str | Path) -> str:
    """The absolute path of the checkpoint that a stage's setting names: the file itself, or a run's newest."""
    return str((newest_checkpoint(Path(path)) or Path(path)).resolve())


def read_stage(path: str | Path, argument: str, class_path: str) -> dict[str, Any]:
    """Read an earlier stage's checkpoint; its tensors are mapped, see `read_tensors`.

    Args:
        path: The checkpoint, or the run's folder, of which the newest is taken.
        argument: Name of the user's argument, for messages.
        class_path: Class of the stage, `papers.<paper>.<Class>`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a checkpoint, or a checkpoint of another class.
    """
    paper, name = class_path.split(".")[1], class_path.rpartition(".")[2]
    path = newest_checkpoint(Path(path)) or Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument}={path}: no such checkpoint; train that stage first and give its checkpoint or its run, "
            f"runs/{paper}/<name>"
        )
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(str(error).replace("ckpt_path=", f"{argument}=", 1)) from error
    found = str(checkpoint.get("hyper_parameters", {}).get("_class_path", "nothing known"))
    if found.rpartition(".")[2] != name:
        raise ValueError(f"{argument}={path} is a checkpoint of {found}; give one of {class_path}")
    return checkpoint


def is_plain(value: Any) -> bool:
    """True for text, numbers, and lists or mappings of them: settings that a safe loader reads back."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(is_plain(inner) for inner in value)
    return value is None or type(value) in (bool, int, float, str)


def drop_objects(checkpoint: dict[str, Any]) -> None:
    """Take settings that are Python objects out of a checkpoint, which a safe loader could not read; with a warning.

    A Python program gives networks and functions.
    """
    settings = checkpoint.get("hyper_parameters", {})
    plain = {key: value for key, value in settings.items() if is_plain(value)}
    if len(plain) < len(settings):
        dropped = ", ".join(sorted(settings.keys() - plain.keys()))
        log.warning("settings that are Python objects are not in the checkpoint: %s", dropped)
        checkpoint["hyper_parameters"] = plain


def keep_only(checkpoint: dict[str, Any], keys: set[str]) -> None:
    """Drop the weights of a checkpoint whose keys are not among those to keep."""
    checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in keys}


def check_fit(module: nn.Module, checkpoint: Mapping[str, Any], expected: set[str], source: str) -> None:
    """Refuse a checkpoint whose weights do not fit.

    Args:
        module: The method, configured.
        checkpoint: The checkpoint.
        expected: Keys that it must hold, see `kept_keys`.
        source: Name of the checkpoint, for messages.

    Raises:
        ValueError: It lacks a trained parameter, brings an unknown one, or has other shapes.
    """
    check_keys(expected, set(checkpoint["state_dict"]), source)
    check_shapes(module, checkpoint["state_dict"], source)


def trained_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's `state_dict`, with the averages (EMA) in the place of the parameters that have one."""
    return {**checkpoint["state_dict"], **checkpoint.get("ema", {}).get("average", {})}


def without(checkpoint: Mapping[str, Any], left_out: Callable[[str], bool]) -> dict[str, Any]:
    """A checkpoint without the weights, and their averages (EMA), whose names are `left_out`."""
    kept = dict(checkpoint)
    kept["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if not left_out(name)}
    if "ema" in checkpoint:
        average = {name: value for name, value in checkpoint["ema"]["average"].items() if not left_out(name)}
        kept["ema"] = {**checkpoint["ema"], "average": average}
    return kept


def load_trained_weights(
    module: nn.Module, path: str | Path, expected: set[str], left_out: Callable[[str], bool] = lambda _: False
) -> None:
    """Load only a method's trained weights from a checkpoint (no step, no optimiser).

    Args:
        module: The method, configured.
        path: A checkpoint of the same configuration.
        expected: Keys that it must hold, see `kept_keys`; counters at the root are left as they are.
        left_out: Function that is true for a key of a part that the method has not built. Such keys are ignored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not fit.
    """
    checkpoint = without(read_checkpoint(path), left_out)
    check_fit(module, checkpoint, expected, f"init_from={path}")
    weights = {name: value for name, value in trained_state(checkpoint).items() if "." in name}
    module.load_state_dict(weights, strict=False)
