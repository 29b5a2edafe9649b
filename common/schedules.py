"""Learning-rate schedules whose length must be that of the run."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Trainer

log = logging.getLogger(__name__)

_LENGTHS = {torch.optim.lr_scheduler.OneCycleLR: "total_steps", torch.optim.lr_scheduler.CosineAnnealingLR: "T_max"}
"""Schedules with a length. Beyond it the first fails, and the rate of the second rises again."""


def check_schedules(trainer: Trainer) -> None:
    """Refuse a schedule that fails before the run ends, and warn of one of another length than the run.

    Call it after a checkpoint has been restored, which brings its schedule's length.

    Args:
        trainer: Trainer of a fit that begins.

    Raises:
        ValueError: The run goes on after the end of a `OneCycleLR`, which fails there.
    """
    updates = trainer.max_steps
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        name = next((name for kind, name in _LENGTHS.items() if isinstance(scheduler, kind)), None)
        length = getattr(scheduler, name) if name is not None else updates
        if updates < 0 or length == updates:
            continue
        found = f"trainer.max_steps={updates} and {name}={length} of {type(scheduler).__name__}"
        remedy = "set both alike (a resumed run brings its schedule; --init_from begins a new one)"
        if length > updates:
            log.warning("%s: the learning rate does not come to its end; %s", found, remedy)
        elif isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR):
            raise ValueError(f"{found}: the schedule ends before the run; {remedy}")
        else:
            log.warning("%s: the learning rate rises again after step %d; %s", found, length, remedy)
