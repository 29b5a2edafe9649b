"""Callbacks that belong to the command line, not to a method."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from common.checkpoints import load_trained_weights
from common.training import TrainingModule

_PACKAGES = (
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "peft",
    "torchmetrics",
    "opencv-python-headless",
    "numpy",
)


class RunInfo(Callback):
    """Writes versions, git commit, machine and command line beside a fit's config."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write run.json before anything can fail."""
        log_dir = trainer.log_dir  # asking for it is a broadcast: all processes must, and equally often
        if stage != "fit" or log_dir is None or not trainer.is_global_zero:
            return
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(run_info(), indent=1) + "\n")


def run_info() -> dict[str, Any]:
    """What one needs to repeat a run besides its config."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": sys.argv,
    }


def _git(*arguments: str) -> str | None:
    """Output of git on this source tree; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class InitFrom(Callback):
    """Starts a fit from the trained weights of a checkpoint, with a new optimiser and step 0.

    Args:
        path: The checkpoint.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load before the first step; the networks exist by now."""
        if not isinstance(pl_module, TrainingModule):
            raise ValueError(f"init_from={self.path}: {type(pl_module).__name__} is no method of papers/")
        load_trained_weights(pl_module, self.path, pl_module.checkpoint_keys())
