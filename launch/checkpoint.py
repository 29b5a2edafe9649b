"""The callback that writes a fit's checkpoints."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from common.guard import NonFiniteLossError


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose last.ckpt is the run's last step, and which keeps more than that one.

    `last.ckpt` is written at every saving point (`every_n_train_steps` or `train_time_interval`; without both, the end
    of validation and of an epoch) and when a fit ends. An error between two steps writes it as well where one process
    trains.

    Args:
        keep: Without a monitor: checkpoints kept in addition to last.ckpt, spread evenly over `trainer.max_steps`. With
            one, `save_top_k` is the number of the best that are kept; -1 keeps all saving points in both cases.
        **kwargs: As for Lightning's ModelCheckpoint.
    """

    def __init__(self, keep: int = 4, **kwargs: Any) -> None:
        if keep < 0:
            raise ValueError(f"checkpoint.keep={keep} is out of range; set 0 or more checkpoints")
        if kwargs.get("monitor") is None and kwargs.get("save_top_k", 1) == 1:
            kwargs["save_top_k"] = 0  # the newest one is last.ckpt
        super().__init__(**kwargs)
        self.keep = keep
        self._last_step = self._share = 0
        self._in_step = self._reported = False

    def _shares(self, trainer: Trainer) -> int:
        """Number of kept checkpoints that the run has passed."""
        if self.monitor is not None or self.save_top_k != 0 or trainer.max_steps < 1:
            return 0
        return min(self.keep, trainer.global_step * (self.keep + 1) // trainer.max_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run stands."""
        super().on_train_start(trainer, pl_module)
        self._last_step, self._share = trainer.global_step, self._shares(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that a step is not whole yet."""
        self._in_step = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save last.ckpt at a saving point, whatever else is saved there."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        every = self._every_n_train_steps
        if (every and trainer.global_step % every == 0) or self._is_time(trainer):
            self._save_last(trainer)
        self._in_step = False

    def _is_time(self, trainer: Trainer) -> bool:
        """True when `train_time_interval` is over, which Lightning leaves out where a module optimises by itself."""
        if self._train_time_interval is None:
            return False
        waited = time.monotonic() - (self._last_time_checked or 0.0)
        due: bool = trainer.strategy.broadcast(waited >= self._train_time_interval.total_seconds())
        self._last_time_checked = time.monotonic() if due else self._last_time_checked
        return due

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save last.ckpt where epochs are saving points."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._every_n_epochs and (trainer.current_epoch + 1) % self._every_n_epochs == 0:
            self._save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save last.ckpt, whether or not it is one of the best."""
        super().on_validation_end(trainer, pl_module)
        if self._every_n_epochs and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save last.ckpt."""
        self._save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save last.ckpt if an error came between two steps; within one the weights are half-way."""
        super().on_exception(trainer, pl_module, exception)
        between = trainer.training and not self._in_step and trainer.world_size == 1
        if between and isinstance(exception, Exception) and not isinstance(exception, NonFiniteLossError):
            self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        """Save this step as last.ckpt if it is not there."""
        if not getattr(trainer, "fast_dev_run", False) and trainer.global_step != self._last_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Keep the step, too, if the run has passed another share of its steps."""
        if (share := self._shares(trainer)) > self._share:
            self._share = share
            self._save_checkpoint(trainer, str(Path(str(self.dirpath)) / f"step={trainer.global_step}.ckpt"))
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._last_step = trainer.global_step

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero and not self._reported:
            print(f"isr: {self._plan(trainer, Path(filepath).stat().st_size / 1e6)}", file=sys.stderr)
        self._reported = True

    def _plan(self, trainer: Trainer, size: float) -> str:
        """A line on the checkpoints that are kept and their size, for checkpoints of `size` MB."""
        if self.save_top_k < 0:
            return f"a checkpoint has {size:.1f} MB; last.ckpt and every saving point are kept"
        kept, which = self.save_top_k, f"the {self.save_top_k} best by {self.monitor}"
        if self.monitor is None:
            kept = self.keep if trainer.max_steps > 0 else 0
            which = f"{kept} on the way (checkpoint.keep)"
        return f"a checkpoint has {size:.1f} MB; last.ckpt and {which} are kept, at most {(kept + 1) * size:.1f} MB"
