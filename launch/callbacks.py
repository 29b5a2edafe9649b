"""Callbacks that belong to the command line, not to a method."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn

from common.files import held
from common.output import Output
from common.restoration import RestorationModule
from common.training import TrainingModule
from data.inventory import Inventory, write_unused
from launch import signals

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


class HoldFolder(Callback):
    """Keeps other processes out of the run's folder while a fit writes there; out of `test` or `predict` in it else."""

    def __init__(self) -> None:
        self._holding = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the folder before anything is written; the first process does, for all of its run.

        Raises:
            InUseError: Another process has it.
        """
        log_dir = trainer.log_dir  # asking for it is a broadcast: all processes must, and equally often
        name = TrainerFn(stage).value  # Path would take the member's own name
        output = pl_module.output if isinstance(pl_module, TrainingModule) else Output()
        foreign = name == "predict" and (output.folder is not None or output.file is not None)
        if trainer.is_global_zero and log_dir and name != "validate" and not foreign:
            self._holding.enter_context(held(Path(log_dir) if name == "fit" else Path(log_dir, name)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go."""
        self._holding.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go."""
        self._holding.close()


class EndOnSignal(Callback):
    """Lets a fit that gets a signal finish its step, writes `last.ckpt` and ends; ends other commands at once.

    Validation within a fit ends at once too: the weights are the averages then, which are no checkpoint's.
    """

    def __init__(self) -> None:
        self._ending: int | None = None  # the signal that all processes know of
        self._saved: int | None = None  # the same, once last.ckpt is written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let all processes agree on the step, in the place of Lightning's own exchange, which only asks the first."""
        if stage == "fit" and trainer.world_size > 1:
            loop = trainer.fit_loop.epoch_loop
            loop._broadcast_sigterm_tensor = partial(self._agree, trainer)  # type: ignore[method-assign]

    def _agree(self, trainer: Trainer) -> None:
        number = torch.tensor(signals.received() or 0, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        self._ending = self._ending or int(number) or None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a signal waits for the step."""
        signals.install()  # Lightning has put its own handler of SIGTERM in their place
        signals.hold_back(True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write `last.ckpt` where a signal has come and the step is an update of the weights."""
        number = self._ending if trainer.world_size > 1 else signals.received()
        if number is None or self._saved is not None:
            return
        if isinstance(pl_module, TrainingModule) and int(pl_module.train_step) % pl_module.accumulate:
            return
        self._saved = number
        writers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        if writers:
            path = Path(str(writers[0].dirpath), "last.ckpt")
            trainer.save_checkpoint(path, weights_only=False)
            if trainer.is_global_zero:
                print(f"isr: {path} is of step {trainer.global_step}; go on with --ckpt_path {path}", file=sys.stderr)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End here, where the last step's numbers have been logged.

        Raises:
            Stopped: A signal has come.
        """
        if self._saved is not None:
            raise signals.Stopped(self._saved)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal ends validation at once.

        Raises:
            Stopped: A signal has come.
        """
        signals.install()
        signals.hold_back(False)
        if self._saved is not None:
            raise signals.Stopped(self._saved)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The fit goes on, if it is one."""
        signals.hold_back(trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A signal ends a test or a prediction at once."""
        signals.install()

    on_predict_start = on_test_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There is no step to wait for any more."""
        signals.hold_back(False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the processes that this one has started: they would wait for it."""
        signals.hold_back(False)
        launcher = trainer.strategy.launcher
        if isinstance(exception, signals.Stopped) and isinstance(launcher, _SubprocessScriptLauncher):
            for process in launcher.procs:
                process.terminate()


class RunInfo(Callback):
    """Writes versions, git commit, machine, command line and random seeds beside a fit's config."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write run.json before anything can fail."""
        log_dir = trainer.log_dir  # asking for it is a broadcast: all processes must, and equally often
        if stage != "fit" or log_dir is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        set_aside(folder / "run.json")
        (folder / "run.json").write_text(json.dumps(run_info() | {"seeds": _seeds(trainer)}, indent=1) + "\n")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the random seeds, by which a resumed fit goes on."""
        checkpoint["seeds"] = _seeds(trainer)


def _seeds(trainer: Trainer) -> dict[str, int | None]:
    """The random seeds that a run uses; None where there is none."""
    parts: dict[str, Any] = {"model": trainer.lightning_module, "data": getattr(trainer, "datamodule", None)}
    given = os.environ.get("PL_GLOBAL_SEED")
    used = {"seed_everything": int(given) if given else None}
    return used | {name: getattr(part, "seed", None) for name, part in parts.items()}


class SayInputs(Callback):
    """Says what the data sets hold before the work, and writes the names of unused files to `skipped.csv`."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._unused = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print a line for each data set."""
        self._path = _skipped_csv(trainer, pl_module, TrainerFn(stage).value)
        inventories = self._inventories(trainer, TrainerFn(stage).value)
        self._unused = sum(len(inventory.unused) for inventory in inventories)
        if trainer.is_global_zero:
            for inventory in inventories:
                named = f", named in {self._path}" if inventory.unused and self._path is not None else ""
                print(f"isr: {inventory}{named}", flush=True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the names; not earlier, since only now the output folder is known to be apart from the input."""
        assert trainer.state.fn is not None
        self._write(trainer, trainer.state.fn.value)

    on_test_start = on_predict_start = on_fit_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the names, where validation is the command."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, "validate")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the names again, with the photos that turned out to be unreadable on the way."""
        self._write(trainer, "fit", pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same, of this process."""
        if trainer.state.fn == TrainerFn.FITTING and trainer.training:
            self._write(trainer, "fit")

    def _write(self, trainer: Trainer, stage: str, pl_module: LightningModule | None = None) -> None:
        inventories = self._inventories(trainer, stage)
        if isinstance(pl_module, TrainingModule):
            inventories = pl_module.gathered([replace(one, used=()) for one in inventories])  # unused files alone
        if self._path is None or not trainer.is_global_zero:
            return
        count = write_unused(self._path, inventories)
        if count > self._unused:
            print(f"isr: not used: {count} files by now, named in {self._path}", flush=True)
        self._unused = count

    @staticmethod
    def _inventories(trainer: Trainer, stage: str) -> list[Inventory]:
        inventories = getattr(getattr(trainer, "datamodule", None), "inventories", None)
        return [] if inventories is None else list(inventories(stage))


def _skipped_csv(trainer: Trainer, pl_module: LightningModule, stage: str) -> Path | None:
    """`skipped.csv` of the run or output folder; None where there is neither."""
    has_folder = trainer.loggers or getattr(trainer, "run_logger", None) is not None
    log_dir = trainer.log_dir if has_folder else None  # asking for it is a broadcast: all processes must
    if isinstance(pl_module, TrainingModule) and pl_module.output.folder is not None and stage in ("test", "predict"):
        return pl_module.output_folder(stage) / "skipped.csv"
    if log_dir is None:
        return None
    return Path(log_dir, *([stage] if stage != "fit" else []), "skipped.csv")


class KeepScores(Callback):
    """Keeps the scores of a test that an error or a signal ends."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note where they go; later, asking would wait for processes that have ended."""
        if isinstance(pl_module, RestorationModule) and stage == "test":
            self._path = pl_module.output_folder(stage) / "metrics.unfinished.csv"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what this process has scored."""
        if trainer.state.fn != TrainerFn.TESTING or self._path is None or not isinstance(pl_module, RestorationModule):
            return
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self._path.with_stem(self._path.stem + rank)
        if images := pl_module.scores.keep(path):
            print(f"isr: the test ended early; {path} keeps the scores of {images} images", file=sys.stderr)


def set_aside(path: Path) -> None:
    """Rename a file that is there, `run.json` to the first free one of `run.1.json`, `run.2.json` ..."""
    if path.exists():
        names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def run_info() -> dict[str, Any]:
    """Versions, machine, git commit and command line: with the config they allow one to repeat a run."""
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
        pl_module.start_from(self.path)
