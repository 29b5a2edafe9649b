"""The learning-rate schedule of the foundation's recipes."""

from __future__ import annotations

from typing import Any

import torch


def anneal(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 20, tail: float = 0.3) -> dict[str, Any]:
    """Warm up, stay constant, then decay log-linearly to a twentieth over the last `tail` of the steps.

    Args:
        optimizer: What to schedule.
        steps: Length of the whole run.
        warmup: Steps of the linear warm-up.
        tail: Share of the run that is annealed.

    Returns:
        What `configure_optimizers` returns.
    """

    def factor(step: int) -> float:
        start = (1 - tail) * steps
        decay = 0.05 ** max(0.0, (step - start) / max(1.0, steps - start))  # tail 0: never
        return float(min(1.0, (step + 1) / warmup) * decay)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
