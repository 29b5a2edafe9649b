"""Order of samples: an endless stream for training, equal shares for evaluation.

The order of a run is a function of (seed, position) and can be continued anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

SampleKey = tuple[int, int, int]
"""(epoch, index, position): pass over the data, place in the dataset, place in the whole run's order."""

_ORDER = 0x07DE7  # sets the order's random stream apart from those of the samples


class StreamSampler(Sampler[list[SampleKey]]):
    """Batches from an endless row of seeded permutations of a dataset, one permutation after the other.

    Global batch k covers the positions [k*B*W, (k+1)*B*W) for B samples a rank and W ranks; rank r takes the r-th B of
    them. So W ranks with B together see exactly what one rank with B*W sees, and a batch may reach over the end of a
    permutation: no sample is dropped, and a dataset smaller than a batch works.

    Args:
        dataset_size: Samples in the dataset, at least 1.
        batch_size: Samples of one rank's batch.
        seed: Seed of the permutations.
        world_size: Number of ranks.
        rank: This rank, from 0.
        batches_per_epoch: Value of `len()`; an iteration ends at the next multiple of it.
        start_batch: Batches already taken in the run, or a function for them that is called at the start of each
            iteration. After a resume in mid-epoch only the rest of that epoch is yielded.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        batches_per_epoch: int = 1,
        start_batch: int | Callable[[], int] = 0,
    ) -> None:
        for name, value in {
            "dataset_size": dataset_size,
            "batch_size": batch_size,
            "world_size": world_size,
            "batches_per_epoch": batches_per_epoch,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value} is out of range; set {name} >= 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not one of {world_size} ranks; set 0 <= rank < {world_size}")
        if seed < 0:
            raise ValueError(f"seed={seed} is negative; set seed >= 0")
        self.dataset_size, self.batch_size, self.seed = dataset_size, batch_size, seed
        self.world_size, self.rank = world_size, rank
        self.batches_per_epoch, self.start_batch = batches_per_epoch, start_batch
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        start = self.start_batch() if callable(self.start_batch) else self.start_batch
        end = (start // self.batches_per_epoch + 1) * self.batches_per_epoch
        return (self.batch(k) for k in range(start, end))  # start is read now, not at the first batch

    def batch(self, k: int) -> list[SampleKey]:
        """This rank's part of global batch k."""
        first = (k * self.world_size + self.rank) * self.batch_size
        return [self.key(position) for position in range(first, first + self.batch_size)]

    def key(self, position: int) -> SampleKey:
        """(epoch, index, position) of a place in the stream."""
        epoch, place = divmod(position, self.dataset_size)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((_ORDER, self.seed, epoch)).permutation(self.dataset_size)
        return epoch, int(self._order[1][place]), position


class RankShare(Sampler[int]):
    """Every world_size-th item, beginning with the rank; the last round is filled up with the first items.

    All ranks get equally many, so none waits for another at the end; rows are made unique by name when gathered.

    Args:
        dataset_size: Items in the dataset, at least 1.
        world_size: Number of ranks.
        rank: This rank, from 0.
    """

    def __init__(self, dataset_size: int, world_size: int = 1, rank: int = 0) -> None:
        self.dataset_size, self.world_size, self.rank = dataset_size, world_size, rank

    def __len__(self) -> int:
        return -(-self.dataset_size // self.world_size)

    def __iter__(self) -> Iterator[int]:
        return ((i * self.world_size + self.rank) % self.dataset_size for i in range(len(self)))
