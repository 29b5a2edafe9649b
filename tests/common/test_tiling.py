"""Tiles cover everything, the last one ends at the border, and where tiles agree the seam is exact."""

import math
import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from common.tiling import blend_window, feather_window, gaussian_window, pad_to_multiple, plan_tiles, tiled


def nearest(scale: int):
    return lambda x: F.interpolate(x, scale_factor=scale, mode="nearest")


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


class TestPlanTiles:
    def test_hand_values(self):
        assert plan_tiles(10, 4, 1) == [0, 3, 6]
        assert plan_tiles(11, 4, 1) == [0, 3, 6, 7]
        assert plan_tiles(4, 4, 1) == [0]
        assert plan_tiles(3, 4, 1) == [0]
        assert plan_tiles(8, 4, 0) == [0, 4]
        assert plan_tiles(9, 4, 0) == [0, 4, 5]

    def test_every_pixel_is_covered_neighbours_share_the_overlap_and_the_last_tile_ends_at_the_border(self):
        rng = random.Random(0)
        for _ in range(300):
            length, tile = rng.randint(1, 200), rng.randint(1, 64)
            overlap = rng.randrange(tile)
            starts = plan_tiles(length, tile, overlap)
            covered = {pixel for start in starts for pixel in range(start, min(start + tile, length))}
            assert covered == set(range(length))
            assert starts[0] == 0
            assert starts[-1] + min(tile, length) == length
            steps = [after - before for before, after in pairwise(starts)]
            assert all(step == tile - overlap for step in steps[:-1])
            assert all(0 < step <= tile - overlap for step in steps)

    def test_bad_numbers_are_named(self):
        with pytest.raises(ValueError, match="overlap is 4 and tile is 4; pass an overlap from 0 to 3"):
            plan_tiles(10, 4, 4)
        with pytest.raises(ValueError, match="overlap is -1"):
            plan_tiles(10, 4, -1)
        with pytest.raises(ValueError, match="tile is 0"):
            plan_tiles(10, 0, 0)
        with pytest.raises(ValueError, match="length is 0"):
            plan_tiles(0, 4, 0)


class TestFeatherWindow:
    def test_hand_values(self):
        assert_close(feather_window(6, 2), torch.tensor([1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]))
        assert_close(feather_window(3, 0), torch.ones(3))

    @pytest.mark.parametrize(("length", "overlap"), [(1, 0), (8, 4), (8, 7), (5, 3), (96, 32)])
    def test_is_positive_and_symmetric(self, length, overlap):
        window = feather_window(length, overlap)
        assert window.min() > 0
        assert window.max() <= 1
        assert torch.equal(window, window.flip(0))

    @pytest.mark.parametrize(("length", "overlap"), [(8, 4), (8, 3), (96, 32)])
    def test_fall_and_next_rise_sum_to_one(self, length, overlap):
        window = feather_window(length, overlap)
        assert_close(window[-overlap:] + window[:overlap], torch.ones(overlap))


class TestBlendWindow:
    def test_hand_values(self):
        assert torch.equal(blend_window((2, 3), 1, "average"), torch.ones(2, 3))
        assert_close(blend_window((2, 3), 1, "feather"), torch.tensor([[0.25, 0.5, 0.25]] * 2))
        middle = blend_window((4, 5), 1, "gaussian")[:, 2]
        assert_close(middle, gaussian_window(4))

    def test_another_blend_is_named(self):
        with pytest.raises(ValueError, match="blend is 'gauss'; use average, feather or gaussian"):
            blend_window((2, 3), 1, "gauss")


class TestTiled:
    @pytest.mark.parametrize("blend", ["average", "feather", "gaussian"])
    def test_an_identity_model_stitches_to_the_input_exactly(self, blend):
        rng = random.Random(1)
        for trial in range(40):
            tile = rng.randint(1, 12)
            overlap, scale = rng.randrange(tile), rng.choice([1, 2, 4])
            x = picture(rng.randint(1, 40), rng.randint(1, 40), seed=trial)
            assert torch.equal(tiled(nearest(scale), x, tile, overlap, scale, blend), nearest(scale)(x))

    @pytest.mark.parametrize("blend", ["average", "feather", "gaussian"])
    @pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 16), (3, 5)])
    def test_one_tile_is_the_untiled_call_itself(self, blend, height, width):
        calls = []

        def model(x: torch.Tensor) -> torch.Tensor:
            calls.append(x.shape)
            return nearest(2)(x).double() * 3 - x.mean()

        x = picture(height, width)
        whole = model(x)
        assert torch.equal(tiled(model, x, 16, 4, 2, blend), whole)
        assert calls[1:] == [x.shape]

    @pytest.mark.parametrize("blend", ["average", "feather"])
    def test_a_local_model_tiles_to_its_untiled_result_away_from_seams_and_borders(self, blend):
        # a 3 x 3 blur sees one pixel beyond the tile, so only rows next to a tile's edge may differ
        kernel = torch.full((3, 1, 3, 3), 1 / 9)

        def blur(x: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, kernel, padding=1, groups=3)

        x = picture(20, 12)
        difference = (tiled(blur, x, 12, 4, 1, blend) - blur(x)).abs().amax((0, 1, 3))
        edges = {row for row in range(20) if difference[row] > 1e-6}
        assert edges == {8, 11}  # first row of the tile at 8, last row of the tile at 0

    @pytest.mark.parametrize("overlap", [1, 4, 7])
    @pytest.mark.parametrize("blend", ["average", "feather", "gaussian"])
    def test_overlaps_are_the_weighted_mean_of_the_tiles(self, overlap, blend):
        scale, tile, x = 2, 8, picture(19, 27)
        counter = iter(range(1, 1000))
        joined = tiled(lambda t: nearest(scale)(t) + next(counter), x, tile, overlap, scale, blend)
        total, weight = torch.zeros(2, 3, 38, 54, dtype=torch.float64), torch.zeros(38, 54, dtype=torch.float64)
        side = [min(i + 1, 16 - i, scale * overlap + 1) if blend == "feather" else 1 for i in range(16)]
        if blend == "gaussian":  # InvSR's: exp(-(i - middle)^2 / (2 x 0.01 x side^2))
            side = [math.exp(-((i - 7.5) ** 2) / (2 * 0.01 * 16**2)) for i in range(16)]
        window = torch.tensor([[a * b for b in side] for a in side], dtype=torch.float64)
        number = 0
        for top in plan_tiles(19, tile, overlap):
            for left in plan_tiles(27, tile, overlap):
                number += 1
                area = (..., slice(2 * top, 2 * top + 16), slice(2 * left, 2 * left + 16))
                total[area] += window * (nearest(scale)(x)[area].double() + number)
                weight[area] += window
        assert_close(joined.double(), total / weight, atol=1e-5, rtol=1e-6)

    @pytest.mark.parametrize("blend", ["average", "feather", "gaussian"])
    def test_the_tiles_shares_are_positive_and_sum_to_one(self, blend):
        x = picture(11, 17)
        tiles = len(plan_tiles(11, 6, 2)) * len(plan_tiles(17, 6, 2))
        shares = []
        for chosen in range(tiles):
            numbers = iter(range(tiles))
            shares.append(
                tiled(lambda t, n=numbers, c=chosen: torch.full_like(t, float(next(n) == c)), x, 6, 2, 1, blend)
            )
        stacked = torch.stack(shares)
        assert_close(stacked.sum(0), torch.ones_like(x))
        assert all((share > 0).sum() == 2 * 3 * 36 for share in stacked)

    def test_feathering_has_no_jump_where_averaging_has_one(self):
        def model_of(numbers):
            return lambda t: torch.full_like(t, float(next(numbers)))

        x = picture(8, 12)
        averaged = tiled(model_of(iter((0, 1))), x, 8, 4, 1, "average")[0, 0, 0]
        feathered = tiled(model_of(iter((0, 1))), x, 8, 4, 1, "feather")[0, 0, 0]
        assert_close(averaged, torch.tensor([0.0] * 4 + [0.5] * 4 + [1.0] * 4))
        assert_close(feathered, torch.tensor([0.0] * 4 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 4))

    def test_tiles_come_in_the_size_asked_for_and_progress_counts_them(self):
        sizes, seen = set(), []

        def model(x: torch.Tensor) -> torch.Tensor:
            sizes.add(tuple(x.shape[-2:]))
            return x

        tiled(model, picture(21, 5), 8, 2, 1, progress=lambda done, of: seen.append((done, of)))
        assert sizes == {(8, 5)}
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def test_half_precision_is_joined_in_float32_and_comes_back_as_it_was(self):
        numbers = iter((1.0, 1.0078125, 1.0078125))  # neighbours in bfloat16, whose running mean would stay at 1
        joined = tiled(lambda t: torch.full_like(t, next(numbers)), picture(4, 6).bfloat16(), 4, 3, 1)
        assert joined.dtype == torch.bfloat16
        assert joined[0, 0, 0, 3] == 1.0078125  # 1.0052 to the nearest

    def test_the_model_may_change_the_number_of_channels(self):
        assert tiled(lambda t: t[:, :1], picture(9, 9), 4, 1, 1).shape == (2, 1, 9, 9)

    def test_bad_arguments_are_named(self):
        x = picture(9, 9)
        with pytest.raises(ValueError, match="overlap is 4 and tile is 4"):
            tiled(nearest(1), x, 4, 4, 1)
        with pytest.raises(ValueError, match="scale is 0"):
            tiled(nearest(1), x, 4, 1, 0)
        with pytest.raises(ValueError, match="blend is 'gauss'; use average, feather or gaussian"):
            tiled(nearest(1), x, 4, 1, 1, "gauss")
        with pytest.raises(ValueError, match=r"x_lq is of shape \(3, 9, 9\)"):
            tiled(nearest(1), x[0], 4, 1, 1)
        with pytest.raises(ValueError, match=r"made \(2, 3, 8, 8\) of a tile \(2, 3, 4, 4\); scale=4 asks for 16 x 16"):
            tiled(nearest(2), x, 4, 1, 4)


class TestPadToMultiple:
    @pytest.mark.parametrize("height", [1, 4, 5, 8, 9, 15])
    @pytest.mark.parametrize("width", [1, 4, 8, 13])
    def test_sides_become_multiples_and_the_image_stays_top_left(self, height, width):
        x = picture(height, width)
        padded, size = pad_to_multiple(x, 8)
        assert padded.shape[-2:] == (-(-height // 8) * 8, -(-width // 8) * 8)
        assert size == (height, width)
        assert torch.equal(padded[..., :height, :width], x)

    def test_reflects_where_it_can(self):
        row = torch.arange(6.0).expand(1, 1, 8, 6)
        assert pad_to_multiple(row, 8)[0][0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]
        assert pad_to_multiple(row.mT, 8)[0][0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]

    def test_replicates_a_side_too_short_to_be_reflected(self):
        row = torch.arange(3.0).expand(1, 1, 8, 3)
        assert pad_to_multiple(row, 8)[0][0, 0, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
        assert pad_to_multiple(row.mT, 8)[0][0, 0, :, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]

    def test_nothing_missing_hands_back_the_same_tensor(self):
        x = picture(8, 16)
        assert pad_to_multiple(x, 8)[0] is x

    def test_refuses_a_multiple_of_zero(self):
        with pytest.raises(ValueError, match="multiple is 0"):
            pad_to_multiple(picture(8, 8), 0)
