"""Values of several processes brought together."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def gathered(mine: list[T], processes: int) -> list[T]:
    """The lists of all processes, one after the other; a collective operation among several.

    Args:
        mine: This process's list.
        processes: Number of processes.
    """
    if processes == 1:
        return mine
    parts: list[list[T]] = [[] for _ in range(processes)]
    torch.distributed.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def reduce(value: Tensor, operation: Literal["MIN", "MAX"]) -> None:
    """Make a tensor, in place, the smallest or largest of all processes; a collective operation among several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value, op=getattr(torch.distributed.ReduceOp, operation))
