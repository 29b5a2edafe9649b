"""Exponential moving average of the trained parameters only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """fp32 averages of named parameters; Lightning's own copies the frozen base too, and misses updates (README).

    Args:
        decay: Share of the old average kept at each update.
        warmup: Use min(decay, (1 + n) / (10 + n)) at update n, so that the first weights are soon forgotten.
    """

    def __init__(self, decay: float, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay={decay} is out of range; set a number between 0 and 1, or null for no average")
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Start the averages at the parameters as they are before any update."""
        self.average = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], unless: Tensor | None = None) -> None:
        """Move the average towards the parameters; without a start the first call copies them.

        Args:
            parameters: The parameters by name.
            unless: True, on their device, where the average stays as it is; the host does not read it.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        if not self.average:
            self.start(parameters)
            return
        weight: Any = 1 - decay if unless is None else torch.where(unless, 0.0, 1 - decay)
        for name, parameter in parameters.items():
            # a checkpoint is read before the parameters are brought to their device
            average = self.average[name] = self.average[name].to(parameter.device)
            average.lerp_(parameter.detach().float(), weight)

    @contextmanager
    def swapped(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within this context the parameters hold their averages; before the first update nothing changes."""
        self.swap(parameters)
        try:
            yield
        finally:
            self.swap(parameters)

    @torch.no_grad()
    def swap(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Exchange parameters and averages; a second call undoes it exactly."""
        for name, average in self.average.items():
            parameter = parameters[name]
            held = parameter.detach().clone()
            parameter.copy_(average)
            # exact for float32 parameters, the only ones trained here; in place, since a test runs in inference mode,
            # where every new tensor is one that no later update may change
            average.copy_(held)

    def state_dict(self) -> dict[str, object]:
        """Averages and their count, plain enough for torch.load's safe default."""
        return {"updates": self.updates, "average": self.average}

    def load_checkpoint(self, checkpoint: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
        """Continue from a checkpoint's average.

        Raises:
            ValueError: It holds none, or averages other parameters than these.
        """
        if "ema" not in checkpoint:
            raise ValueError("ema_decay is set and the checkpoint holds no average; set model.ema_decay=null")
        self.load_state_dict(checkpoint["ema"], parameters)

    def load_state_dict(self, state: Mapping[str, object], parameters: Mapping[str, nn.Parameter]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: It averages other parameters than these.
        """
        average = state["average"]
        assert isinstance(average, dict)
        if average and average.keys() != parameters.keys():
            different = sorted(average.keys() ^ parameters.keys())
            raise ValueError(f"the checkpoint's EMA differs in {len(different)} parameters, e.g. {different[:3]}")
        self.updates = int(str(state["updates"]))
        self.average = {name: value.to(parameters[name].device).clone() for name, value in average.items()}
