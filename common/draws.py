"""Random numbers of training: each depends on (seed, stream, sample) alone.

A sample's index is its place in the whole run's data order, train step times global batch plus the place in it. So a
resumed run draws what the uninterrupted one would have drawn, and two processes, or two accumulated micro-batches, draw
what one process with the whole batch draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, stream: str, index: int) -> torch.Generator:
    """The CPU generator of one sample (or step) and one purpose.

    Args:
        seed: The run's seed.
        stream: Name of the draw, e.g. "generator/noise"; streams are independent of each other.
        index: Index of the sample in the run's data order, or of the step for draws that a batch shares.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Draws:
    """The draws of one batch.

    Args:
        seed: The run's seed.
        index: Places of the batch's samples in the run's data order, (B,).
        device: Device of the results. They are drawn on the CPU, so that all devices get the same values.
    """

    def __init__(self, seed: int, index: Tensor, device: torch.device | str = "cpu") -> None:
        self.seed, self.index, self.device = seed, [int(i) for i in index], device

    @property
    def on_host(self) -> Draws:
        """The same draws on the CPU, for numbers that Python reads: a GPU's make it wait."""
        return Draws(self.seed, torch.tensor(self.index), "cpu")

    def normal(self, stream: str, shape: Sequence[int]) -> Tensor:
        """Standard normal, (B, *shape), float32."""
        return self._stack(stream, lambda g: torch.randn(tuple(shape), generator=g, device="cpu"))

    def integers(self, stream: str, low: int, high: int) -> Tensor:
        """Uniform over low .. high, both included, (B,), int64."""
        return self._stack(stream, lambda g: torch.randint(low, high + 1, (), generator=g, device="cpu"))

    def uniform(self, stream: str) -> Tensor:
        """Uniform over [0, 1), (B,), float32."""
        return self._stack(stream, lambda g: torch.rand((), generator=g, device="cpu"))

    def _stack(self, stream: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        drawn = torch.stack([draw(generator(self.seed, stream, index)) for index in self.index])
        return drawn.to(self.device, non_blocking=True)  # from memory that is not pinned CUDA takes a copy at once


def places(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The samples' places in the data, `index`, of a batch that has them."""
    return {"index": batch["index"]} if "index" in batch else {}


def counted_index(size: int, batches: int, processes: int, rank: int) -> Tensor:
    """Places in the run's data order, (size,), of a batch that has no `index`, as of a foreign data module.

    Args:
        size: Size of the batch.
        batches: Batches that each process has had before.
        processes: Number of processes.
        rank: Number of this process.
    """
    first = (batches * processes + rank) * size
    return torch.arange(first, first + size)


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Run under seed 0 and put Python's, numpy's and torch's random states (CPU, `device`) back afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
