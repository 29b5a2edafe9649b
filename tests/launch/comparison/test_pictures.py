"""Windows where results differ, and the grid."""

from __future__ import annotations

import numpy as np
import pytest

from data.decoding import Pixels
from launch.comparison.pictures import draw_grid, largest_differences, spread

from ..conftest import photo


def test_crops_are_where_results_differ_most() -> None:
    plain = photo(0, 128)
    changed = plain.copy()
    changed[64:96, 32:64] = 255 - changed[64:96, 32:64]
    changed[4:8, 100:104] = 0
    first, second = largest_differences([plain, plain, changed], 4)
    assert first == (32, 64, 32)
    assert second.x <= 100 < 104 <= second.x + second.size
    assert second.y <= 4 < 8 <= second.y + second.size
    assert largest_differences([plain]) == []
    assert largest_differences([plain, plain]) == []


CROPS = [f"{photo}_r0c{place}_s{seed}" for photo in ("cat", "hat") for place in range(4) for seed in range(3)]


def plain(value: int, side: int = 8) -> Pixels:
    return np.full((side, side, 3), value, np.uint8)


def test_the_grid_shows_each_image_twice_its_size_in_its_cell() -> None:
    gradient = np.arange(64, dtype=np.uint8).reshape(8, 8)[..., None].repeat(3, 2)
    pictures = {"cat": {"LQ": plain(10, 2), "net": gradient}, "hat": {"LQ": plain(20, 4), "net": None}}
    grid = draw_grid(pictures)
    pixels = np.asarray(grid)
    assert grid.width == 2 * (16 + 6) + 6
    head = grid.height - 2 * (18 + 16 + 6)
    assert head > 0
    top = head + 18
    np.testing.assert_array_equal(pixels[top : top + 16, 28:44], gradient.repeat(2, 0).repeat(2, 1))
    assert (pixels[top : top + 16, 6:22] == 10).all()
    assert (pixels[top + 40 : top + 56, 6:22] == 20).all()
    assert (pixels[top + 40 + 1, 29] == (211, 211, 211)).all()  # no image: light grey
    with pytest.raises(ValueError, match="pictures holds no image"):
        draw_grid({"cat": {"LQ": None}})


def test_a_long_title_is_wrapped_and_makes_the_head_higher() -> None:
    short, long = (draw_grid({"cat": {title: plain(0, 64)}}) for title in ("LQ", "bicubic and blur, sigma 2.5 px"))
    assert short.width == long.width
    assert (long.height - short.height) % 18 == 0
    assert long.height > short.height


def test_shown_images_are_spread_over_photos_places_and_seeds() -> None:
    chosen = spread(CROPS)
    assert len(set(chosen)) == 6
    assert [name[:3] for name in chosen] == ["cat"] * 3 + ["hat"] * 3
    assert {name[-2:] for name in chosen} == {"s0", "s1", "s2"}
    assert len({name[:8] for name in chosen}) == 6  # no place twice
    assert chosen == spread(list(reversed(CROPS)))
    assert spread(["b", "a"]) == ["a", "b"]
    assert len(spread([str(i) for i in range(100)], 4)) == 4
