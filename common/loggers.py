"""Images for the loggers of a run, of which each has its own call and some have none; numbers for the progress bar."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from common.images import write_png
from common.metrics import to_uint8

log = logging.getLogger(__name__)


class BarNumbers:
    """Training's numbers in the progress bar, which they reach when they are logged.

    Lightning itself reads the bar's numbers in each step, for which the host waits for the device.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()

    def taken(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `LightningModule.log` for a number; training's are means over all processes, without the bar."""
        if not name.startswith("train/"):
            return arguments
        if arguments.get("prog_bar"):
            self._names.add(name)
        return {**arguments, "sync_dist": True, "prog_bar": False}

    def update(self, trainer: Any) -> None:
        """Bring the present step's numbers into the bar if it is one that logs, each `trainer.log_every_n_steps`."""
        connector = trainer._logger_connector
        if self._names and connector.should_update_logs:
            values = trainer.callback_metrics
            shown = {name: float(values[name]) for name in sorted(self._names) if name in values}
            connector._progress_bar_metrics.update(shown)


def show_image(trainer: Any, name: str, image: Tensor, folder: Path) -> None:
    """Give an image to every logger of a run that takes images; not in the sanity check.

    Args:
        trainer: The trainer.
        name: Name of the image.
        image: (3, H, W), RGB, [0, 1].
        folder: Folder into which the image is written where no logger takes images.
    """
    if trainer.sanity_checking or not trainer.is_global_zero:
        return
    step = trainer.global_step
    shown = [show(logger, name, image, step) for logger in trainer.loggers]
    if shown and not any(shown):
        pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
        write_png(folder / f"{file_name(name)}_step{step}.png", pixels)


def show(logger: Any, name: str, image: Tensor, step: int) -> bool:
    """Send an image to a Lightning logger: TensorBoard, W&B, MLflow, Comet, or one with the same call as one of them.

    If a logger fails to take it, a log line names the logger, and the run continues.

    Args:
        logger: The logger.
        name: Name of the image.
        image: (3, H, W), RGB, [0, 1].
        step: Train step.

    Returns:
        True if the logger has taken it.
    """
    pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    try:
        if hasattr(logger, "log_image"):  # W&B
            logger.log_image(key=name, images=[pixels], step=step)
            return True
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_image"):  # TensorBoard
            experiment.add_image(name, image, step)
            return True
        if hasattr(experiment, "log_image"):
            if getattr(logger, "run_id", None) is not None:  # MLflow
                experiment.log_image(logger.run_id, pixels, f"{file_name(name)}_step{step}.png")
            else:  # Comet
                experiment.log_image(pixels, name=name, step=step)
            return True
    except Exception as error:
        log.warning("%s does not take the image %s: %s", type(logger).__name__, name, error)
    return False


def file_name(name: str) -> str:
    """An image's name as part of a file's: `val/photos: lq | sr` -> `val_photos_lq_sr`."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "image"
