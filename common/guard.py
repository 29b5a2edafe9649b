"""Numbers that training must not have, NaN and infinity, found on the device without making the host wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

_NEVER = 2**62


class Later:
    """Sends a tensor from the device to the host, which receives it with the next send and does not wait."""

    def __init__(self) -> None:
        self._sent: tuple[Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, value: Tensor) -> Tensor | None:
        """Send a tensor and return the one sent before it, on the CPU; None at the first call.

        On a CUDA device this waits only for what was queued before the previous call. Other devices copy at once.
        """
        before = self._sent
        event = None
        if value.is_cuda:
            copy = value.to("cpu", non_blocking=True)  # into pinned memory
            event = torch.cuda.Event()
            event.record()
        else:
            copy = value.detach().clone().cpu()
        self._sent = copy, event
        if before is None:
            return None
        if before[1] is not None:
            before[1].synchronize()
        return before[0]


class Guard:
    """Remembers the first loss or gradient that is not finite, as a number on the device.

    A finding is a code, an integer that grows with time; the smallest one stays.
    """

    def __init__(self, device: torch.device) -> None:
        self.first = torch.full((), _NEVER, dtype=torch.long, device=device)
        self.value = torch.zeros((), device=device)
        self._later = Later()

    def note(self, value: Tensor, code: int, unless: Tensor | None = None) -> None:
        """Check a loss or a norm.

        Args:
            value: Scalar tensor that must be finite.
            code: Code to remember if it is not.
            unless: True where it may be infinite or NaN.
        """
        value = value.detach().float().to(self.first.device)  # the norm of no gradients is on the CPU
        bad = ~torch.isfinite(value) if unless is None else ~(torch.isfinite(value) | unless)
        self.value = torch.where(bad & ~self.found, value, self.value)
        self.first = torch.where(bad, self.first.clamp(max=code), self.first)

    @property
    def found(self) -> Tensor:
        """True on the device once there is a finding."""
        return self.first < _NEVER

    def reduce(self) -> None:
        """Agree with all other processes on the first finding; a collective operation where there are several."""
        reduce(self.first, "MIN")

    def exchange(self) -> int | None:
        """Send the finding to the host and return the code that was sent before, if it was one; waits for nothing."""
        before = self._later.exchange(self.first)
        return None if before is None else _code(before)

    def now(self) -> int | None:
        """The code of the finding; waits for the device and is a collective operation."""
        self.reduce()
        return _code(self.first)


def reduce(value: Tensor, operation: Literal["MIN", "MAX"]) -> None:
    """Make a tensor, in place, the smallest or largest of all processes; a collective operation among several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value, op=getattr(torch.distributed.ReduceOp, operation))


def _code(first: Tensor) -> int | None:
    code = int(first)
    return code if code < _NEVER else None


def save_batch(batch: dict[str, Any], path: Path) -> None:
    """Save a batch of training so that `torch.load(path, weights_only=True)` reads it.

    Args:
        batch: Tensors, numbers, texts and lists of them; anything else is saved as the text that Python prints for it.
        path: File to write; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(_plain(batch), path)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or type(value) in (str, int, float, bool) else str(value)
