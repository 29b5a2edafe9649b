"""Record of an earlier stage in a later stage's checkpoint, so that the checkpoint stays the model that was trained."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from common.parameters import is_lora

log = logging.getLogger(__name__)


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


class EarlierStages(dict[str, Stage]):
    """The earlier stages that a stage builds on, by the setting that names each one's file."""

    def __init__(self) -> None:
        super().__init__()
        self._missing: dict[str, FileNotFoundError] = {}

    def miss(self, argument: str, error: FileNotFoundError, awaited: bool) -> None:
        """Go on without the file of an earlier stage, as the checkpoint to come may hold what is needed of it.

        Args:
            argument: Setting that names the stage.
            error: Raised now where no checkpoint comes, else by `check`.
            awaited: False if no checkpoint comes.

        Raises:
            FileNotFoundError: No checkpoint comes.
        """
        if not awaited:
            raise error
        self._missing[argument] = error

    def check(self) -> None:
        """Refuse to run without an earlier stage.

        Raises:
            FileNotFoundError: Neither its file nor the checkpoint has it.
        """
        for error in self._missing.values():
            raise error

    def take(self, checkpoint: Mapping[str, Any], restore: Callable[[str, Stage], None]) -> None:
        """Use the earlier stages that a checkpoint was trained with, also if their files have changed.

        Args:
            checkpoint: A checkpoint of the later stage.
            restore: Puts the checkpoint's stage in the place of the file's, see `TrainingModule.restore_stage`.
        """
        kept = recorded(checkpoint.get("stages", {}))
        for argument in (*self, *self._missing):
            here, stage = self.get(argument), kept.get(argument)
            if stage is None and here is not None:
                log.warning(
                    "the checkpoint does not hold its earlier stage: %s=%s is used as it is", argument, here.path
                )
            elif stage is not None and (here is None or here.digest != stage.digest):
                if here is not None:
                    log.warning("%s=%s holds other weights than this checkpoint's run had", argument, here.path)
                restore(argument, stage)
                self[argument] = stage
                self._missing.pop(argument, None)

    def refuse(self, argument: str, stage: Stage) -> NoReturn:
        """Refuse a file that has changed, where the checkpoint holds only the digest of what it held.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{argument}={self[argument].path} holds other weights than the stage that this checkpoint was trained on "
            f"({stage.path}); restore those, or train this stage again"
        )

    def compare(self, checkpoint: Mapping[str, Any], path: str | Path) -> None:
        """Warn if a checkpoint that a fit starts from was trained with other earlier stages.

        Args:
            checkpoint: The checkpoint.
            path: Its path, for the message.
        """
        kept = recorded(checkpoint.get("stages", {}))
        for argument, stage in self.items():
            if argument in kept and kept[argument].digest != stage.digest:
                log.warning("init_from=%s was trained with another %s than %s", path, argument, stage.path)

    def record(self) -> dict[str, Any]:
        """The entry `stages` of a checkpoint; empty if there are none."""
        return {"stages": {argument: stage.record() for argument, stage in self.items()}} if self else {}


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
