"""Contract of data.sampler.

- The stream is one seeded permutation of the data after the other, cut into batches without loss.
- It depends on (seed, position) only: it can be taken up anywhere and shared out among ranks.
"""

from __future__ import annotations

import itertools

import pytest

from data.sampler import RankShare, StreamSampler


def flat(batches: list[list[tuple[int, int, int]]]) -> list[tuple[int, int, int]]:
    return list(itertools.chain.from_iterable(batches))


class TestStream:
    def test_each_pass_is_a_permutation_and_passes_differ(self) -> None:
        keys = flat(list(StreamSampler(10, 4, seed=3, batches_per_epoch=10)))
        assert [position for _, _, position in keys] == list(range(40))
        passes = [[index for epoch, index, _ in keys if epoch == e] for e in range(4)]
        assert all(sorted(indices) == list(range(10)) for indices in passes)
        assert len({tuple(indices) for indices in passes}) == 4
        assert all(epoch == position // 10 for epoch, _, position in keys)

    def test_seed_changes_the_order_and_nothing_else_does(self) -> None:
        first = list(StreamSampler(50, 5, seed=1, batches_per_epoch=10))
        assert first == list(StreamSampler(50, 5, seed=1, batches_per_epoch=10))
        assert first != list(StreamSampler(50, 5, seed=2, batches_per_epoch=10))

    def test_dataset_smaller_than_a_batch_is_gone_through_again(self) -> None:
        (batch,) = StreamSampler(3, 8, batches_per_epoch=1)
        assert [epoch for epoch, _, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]
        assert sorted(index for _, index, _ in batch[3:6]) == [0, 1, 2]

    def test_keys_can_be_asked_in_any_order(self) -> None:
        sampler = StreamSampler(7, 2, seed=5)
        forwards = [sampler.key(position) for position in range(30)]
        assert [sampler.key(position) for position in reversed(range(30))] == forwards[::-1]


class TestRanks:
    @pytest.mark.parametrize(("batch_size", "world_size"), [(2, 2), (1, 4)])
    def test_ranks_together_see_what_one_rank_sees(self, batch_size: int, world_size: int) -> None:
        alone = list(StreamSampler(11, batch_size * world_size, seed=4, batches_per_epoch=9))
        ranks = [
            list(StreamSampler(11, batch_size, 4, world_size, rank, batches_per_epoch=9)) for rank in range(world_size)
        ]
        assert [flat(list(parts)) for parts in zip(*ranks, strict=True)] == alone

    def test_shares_of_evaluation_are_equal_and_complete(self) -> None:
        shares = [list(RankShare(5, 2, rank)) for rank in range(2)]
        assert shares == [[0, 2, 4], [1, 3, 0]]
        assert [len(RankShare(5, 2, rank)) for rank in range(2)] == [3, 3]
        assert [list(RankShare(1, 3, rank)) for rank in range(3)] == [[0], [0], [0]]


class TestResume:
    def test_epochs_go_on_in_the_stream(self) -> None:
        taken = 0
        sampler = StreamSampler(7, 3, seed=2, batches_per_epoch=4, start_batch=lambda: taken)
        seen = []
        for _ in range(3):
            batches = list(sampler)
            taken += len(batches)
            seen += batches
        assert seen == list(StreamSampler(7, 3, seed=2, batches_per_epoch=12))

    def test_in_mid_epoch_only_the_rest_is_yielded(self) -> None:
        whole = list(StreamSampler(7, 3, seed=2, batches_per_epoch=8))
        resumed = StreamSampler(7, 3, seed=2, batches_per_epoch=4, start_batch=6)
        assert list(resumed) == whole[6:]
        assert len(resumed) == 4

    def test_at_an_epochs_end_the_next_one_is_whole(self) -> None:
        assert len(list(StreamSampler(7, 3, batches_per_epoch=4, start_batch=8))) == 4

    def test_start_is_asked_when_iteration_starts_not_at_its_first_batch(self) -> None:
        taken = 2
        batches = iter(StreamSampler(7, 3, batches_per_epoch=4, start_batch=lambda: taken))
        taken = 3
        assert len(list(batches)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_size": 0}, "dataset_size=0 is out of range; set dataset_size >= 1"),
        ({"batch_size": 0}, "batch_size=0 is out of range; set batch_size >= 1"),
        ({"batches_per_epoch": 0}, "batches_per_epoch=0 is out of range; set batches_per_epoch >= 1"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not one of 2 ranks; set 0 <= rank < 2"),
        ({"seed": -1}, "seed=-1 is negative; set seed >= 0"),
    ],
)
def test_errors_name_argument_value_and_fix(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamSampler(**{"dataset_size": 4, "batch_size": 2, **arguments})
