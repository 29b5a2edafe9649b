"""The learning-rate schedule of the foundation's recipes."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Anneal(LambdaLR):
    """Warm up, stay constant, then decay log-linearly to a twentieth over the last `tail` of the steps.

    Args:
        optimizer: Optimiser to schedule.
        steps: Length of the whole run.
        warmup: Steps of the linear warm-up.
        tail: Share of the run that is annealed.
    """

    def __init__(self, optimizer: Optimizer, steps: int, warmup: int = 20, tail: float = 0.3) -> None:
        start = (1 - tail) * steps

        def factor(step: int) -> float:
            decay = 0.05 ** max(0.0, (step - start) / max(1.0, steps - start))  # tail 0: never
            return float(min(1.0, (step + 1) / warmup) * decay)

        super().__init__(optimizer, factor)


def anneal(optimizer: Optimizer, steps: int, tail: float) -> dict[str, Any]:
    """Return value of `configure_optimizers` for an optimiser that is annealed, see `Anneal`."""
    scheduler = Anneal(optimizer, steps, tail=tail)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
