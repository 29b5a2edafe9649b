"""Record of an earlier stage in a later stage's checkpoint, so that the checkpoint stays the model that was trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.parameters import is_lora


class Stage(NamedTuple):
    """An earlier stage, as a later one opened it."""

    path: str
    """Its checkpoint, resolved."""
    digest: str
    """Digest of all its weights that the later stage builds on."""
    weights: dict[str, Tensor]
    """Those weights that the later stage's checkpoint holds; empty where they are too large, and only checked."""
    settings: dict[str, Any]
    """Settings for building networks that fit the weights."""

    def record(self) -> dict[str, Any]:
        """As a checkpoint holds it; with its place below the runs' folder, where it is a run's checkpoint."""
        return {**self._asdict(), "run": place_in_runs(self.path)}


def recorded(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Stage]:
    """The stages that a checkpoint holds, by the argument that named them."""
    return {name: Stage(*(stage[field] for field in Stage._fields)) for name, stage in stages.items()}


def digest(state: Mapping[str, Tensor]) -> str:
    """Digest of named weights: names, types, shapes and values."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def fingerprint(network: nn.Module) -> str:
    """Digest of a network's own parameters in their order, without adapters; the same in float32 and in bfloat16."""
    own = (value for name, value in network.named_parameters() if not is_lora(name))
    return digest({f"{place:06}": value.bfloat16() for place, value in enumerate(own)})


def place_in_runs(path: str | Path) -> str | None:
    """`<paper>/<name>/version_N/checkpoints/<file>` of a checkpoint in a folder of runs; None of any other file."""
    parts = Path(path).parts[-5:]
    is_run = len(parts) == 5 and parts[2].startswith("version_") and parts[3] == "checkpoints"
    return Path(*parts).as_posix() if is_run else None
