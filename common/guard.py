"""Numbers that training must not have, NaN and infinity, found on the device without making the host wait."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.processes import reduce

_NEVER = 2**62


class NonFiniteLossError(RuntimeError):
    """A loss or its gradient became NaN or infinite; its batch was saved and changed no weight and no average."""


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


class StepGuard:
    """Stops a fit after a train step whose loss or gradient is not finite, and saves the step's batch.

    Attributes:
        folder: Folder for saved batches.
    """

    def __init__(self) -> None:
        self._guard: Guard | None = None
        self._optimizers: Sequence[str] = ()
        self._batches: deque[tuple[int, dict[str, Any]]] = deque(maxlen=2)  # the last ones, with their train steps
        self._step = 0
        self.folder, self._rank = Path("."), 0

    def start(self, optimizers: Sequence[str], folder: Path, rank: int) -> None:
        """Start a fit: forget what an earlier one found.

        Args:
            optimizers: Names of the optimisers, in the same order in all processes.
            folder: Folder for saved batches.
            rank: Number of this process, for the names of saved batches.
        """
        self._guard, self._optimizers, self.folder, self._rank = None, list(optimizers), folder, rank

    def begin(self, step: int, batch: dict[str, Any]) -> None:
        """Begin a train step, whose batch is kept until the end of the next step."""
        self._step = step
        self._batches.append((step, batch))

    def check_loss(self, optimizer: str, loss: Tensor) -> None:
        """Note on the device if an optimiser's loss is not finite."""
        self._note(loss, optimizer, 0)

    def check_gradient(self, optimizer: str, norm: Tensor, scale: Tensor | None) -> None:
        """Note on the device if an optimiser's gradient is not finite.

        Args:
            optimizer: Name of the optimiser.
            norm: Norm of its gradient.
            scale: Scale of a gradient scaler. While it can still go down, an infinite gradient is an overflow.
        """
        self._note(norm, optimizer, 1, unless=None if scale is None else scale > 1)

    def _note(self, value: Tensor, optimizer: str, kind: int, unless: Tensor | None = None) -> None:
        """A finding's code holds the train step, the place of the optimiser, and 0 for its loss, 1 for its gradient."""
        if self._guard is None:
            self._guard = Guard(value.device)
        place = self._step * len(self._optimizers) + self._optimizers.index(optimizer)
        self._guard.note(value, 2 * place + kind, unless)

    def found(self) -> Tensor:
        """True on the device if there is a finding in any process; a collective operation."""
        assert self._guard is not None
        self._guard.reduce()
        return self._guard.found

    def end(self, agreed: bool) -> None:
        """Stop if the step before this one was not finite: the device has done that one and may still do this one.

        Args:
            agreed: False if no `found` has followed this step's checks.

        Raises:
            NonFiniteLossError: It was not.
        """
        if self._guard is None:
            return
        if not agreed:
            self._guard.reduce()
        self._stop(self._guard.exchange())

    def stop_if_found(self) -> None:
        """Stop if any step was not finite; waits for the device and is a collective operation.

        Raises:
            NonFiniteLossError: One was not.
        """
        if self._guard is not None:
            self._stop(self._guard.now())

    def _stop(self, code: int | None) -> None:
        """Save the batch of a finding and raise, in every process alike."""
        if code is None:
            return
        assert self._guard is not None
        place, kind = divmod(code, 2)
        step, which = divmod(place, len(self._optimizers))
        path = self.save_batch("nonfinite", step)
        value = float(self._guard.value)
        found = "not finite in another process" if math.isfinite(value) else str(value)
        raise NonFiniteLossError(
            f"the {self._optimizers[which]} {('loss', 'gradient norm')[kind]} is {found} at train step {step}; the "
            f"batch is in {path}, no weight and no average was changed by it, and the last checkpoint is of a step "
            "before it: lower the learning rate, or look at that batch"
        )

    def save_batch(self, name: str, step: int) -> Path:
        """Save this process's batch of a train step, one of the last two.

        Args:
            name: Start of the file's name.
            step: The train step.

        Returns:
            The file, which holds plain tensors, texts and numbers.
        """
        path = self.folder / f"{name}_step{step}_rank{self._rank}.pt"
        save_batch(dict(self._batches)[step], path)
        return path


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
