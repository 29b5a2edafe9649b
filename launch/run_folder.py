"""The folder of a run: its version, its configuration, and the trainer that writes into it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from launch.callbacks import set_aside


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration into a run's folder; a resumed run's earlier one stays beside it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A test of a checkpoint writes into the folder of that checkpoint's run, whose configuration stays."""
        if stage != "fit" and self.config.get("ckpt_path") is not None:
            return
        log_dir = trainer.log_dir  # asking for it is a broadcast: all processes must, and equally often
        if trainer.is_global_zero and log_dir is not None:
            set_aside(Path(log_dir, self.config_filename))
        self.config = self.config.clone()
        self.config["ckpt_path"] = None  # of the run as a whole; run.json has the command that resumed it
        super().setup(trainer, pl_module, stage)


class RunTrainer(Trainer):
    """A trainer whose folder is the run's, whichever loggers it has, none included."""

    run_logger: TensorBoardLogger | None = None
    """Knows the run's folder; it logs where no other logger is asked for."""

    @property
    def log_dir(self) -> str | None:
        """The run's folder. Asking for it is a broadcast: all processes must, and equally often."""
        if self.run_logger is None:
            return super().log_dir
        return str(self.strategy.broadcast(self.run_logger.log_dir))


class RunLogger(TensorBoardLogger):
    """TensorBoard in a version of the run that no other process takes, however many start at once."""

    def _get_next_version(self) -> int:
        number: int = super()._get_next_version()
        while getattr(rank_zero_only, "rank", 0) == 0:  # the other ranks of a fit get its folder from the first
            try:
                Path(self.root_dir, f"version_{number}").mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        return number
