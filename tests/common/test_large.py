"""A photo done by tiles on disk and bands of rows is the photo done whole, whenever it was killed, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from common import large
from common.color import adain, wavelet
from common.files import InUseError, held
from common.images import bicubic_upsample
from common.large import TileStore, bicubic_band, plan_bands, upscale_large, write_png_rows, write_tiff_rows
from common.metrics import to_uint8
from common.restoration import Inference, RestorationModule
from common.tiling import tiled

ROOT = Path(__file__).resolve().parents[2]
WRITERS = {".png": write_png_rows, ".tif": write_tiff_rows}


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth, with a cast and some grain, (1, 3, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    smooth = bicubic_upsample(torch.rand(1, 3, 4, 5, generator=generator), 32)[..., :height, :width]
    return (0.8 * smooth + 0.1 * torch.rand(1, 3, height, width, generator=generator)).clamp(0, 1)


def restore(tile: Tensor, scale: int = 4) -> Tensor:
    """Pixels repeated, brighter or darker by a number that is each tile's own, and beyond [0, 1] here and there."""
    x = tile.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return 1.2 * x + 0.2 * torch.sin(40 * tile.mean()) * torch.tensor([1.0, -0.5, 0.3]).view(3, 1, 1)


class Method(RestorationModule):
    """The rule that large photos are held to: what validation and small photos get."""

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> None:
        return None

    def restore(self, x_lq: Tensor, conditions: Any) -> Tensor:
        return restore(x_lq, self.scale)


def whole(x: Tensor, size_multiple: int = 1, scale: int = 4, **kwargs: Any) -> np.ndarray:
    method = Method(scale, inference=Inference(**{"tile": 16 * scale, "overlap": 4 * scale, **kwargs}))
    method.size_multiple = size_multiple
    return to_uint8(method.upscale(x, [""], conditions=()).sr)[0].permute(1, 2, 0).numpy()


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def by_tiles(x: Tensor, path: Path, function: Callable[[Tensor], Tensor] = restore, **kwargs: Any) -> np.ndarray:
    upscale_large(function, x, path, **{"scale": 4, "tile": 16, "overlap": 4, **kwargs})
    return read(path)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 7 rows, which begin and end anywhere within pixels of the input and within tiles."""
    monkeypatch.setattr(large, "BAND_PIXELS", 1)
    monkeypatch.setattr(large, "_MIN_ROWS", 7)


@pytest.mark.usefixtures("narrow")
class TestUpscaleLarge:
    @pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
    @pytest.mark.parametrize("blend", ["average", "feather", "gaussian"])
    @pytest.mark.parametrize(("size", "multiple"), [((37, 53), 1), ((37, 53), 8), ((9, 40), 4), ((5, 7), 8)])
    def test_is_what_the_whole_image_gives(
        self, tmp_path: Path, color_fix: str, blend: str, size: tuple[int, int], multiple: int
    ) -> None:
        x = picture(*size)
        got = by_tiles(x, tmp_path / "a.png", blend=blend, color_fix=color_fix, size_multiple=multiple)
        expected = whole(x, multiple, blend=blend, color_fix=color_fix)
        assert got.shape == expected.shape == (4 * size[0], 4 * size[1], 3)
        difference = np.abs(got.astype(int) - expected)
        if color_fix == "adain":  # its means are summed in another order
            assert difference.max() <= 1
            assert (difference > 0).mean() < 1e-3
        else:
            assert difference.max() == 0

    def test_other_scales_and_kinds_of_file_and_folders_yet_to_be_made(self, tmp_path: Path) -> None:
        x = picture(33, 21)
        expected = whole(x, scale=3, color_fix="wavelet")
        for path in (tmp_path / "x/y.tif", tmp_path / "x/z.TIFF", tmp_path / "x/a b.c.png"):
            got = by_tiles(x, path, lambda tile: restore(tile, 3), scale=3, color_fix="wavelet")
            assert np.abs(got.astype(int) - expected).max() <= 1
        assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["a b.c.png", "y.tif", "z.TIFF"]

    def test_half_precision_stays_within_one_grey_level(self, tmp_path: Path) -> None:
        x = picture(37, 53)
        got = by_tiles(x, tmp_path / "a.png", lambda tile: restore(tile).bfloat16(), color_fix="none")
        assert np.abs(got.astype(int) - whole(x, color_fix="none")).max() <= 1

    def test_progress_counts_tiles_and_bands_to_the_end(self, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        by_tiles(picture(14, 30), tmp_path / "a.png", progress=lambda done, of: seen.append((done, of)))
        in_all = 3 + 2 * 8  # tiles at 0, 12 and 14; 56 rows in bands of 7, twice for adain
        assert seen == [(done, in_all) for done in range(1, in_all + 1)]

    def test_gradients_are_not_kept(self, tmp_path: Path) -> None:
        weight, made = torch.ones((), requires_grad=True), []

        def function(tile: Tensor) -> Tensor:
            made.append((tile, restore(tile) * weight))
            return made[-1][1]

        by_tiles(picture(20, 20).requires_grad_(), tmp_path / "a.png", function)
        assert len(made) == 4
        assert not any(x.grad_fn or y.requires_grad for x, y in made)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"color_fix": "hist"}, "color_fix is 'hist'; use adain, wavelet or none"),
            ({"blend": "gauss"}, "blend is 'gauss'; use average, feather or gaussian"),
            ({"overlap": 16}, "overlap is 16 and tile is 16"),
            ({"scale": 0}, "scale is 0"),
            ({"target": "a.jpg"}, r"target=a\.jpg .* end its name in \.png, \.tif, \.tiff"),
            ({"x_lq": torch.zeros(2, 3, 8, 8)}, r"x_lq is torch.float32 of shape \(2, 3, 8, 8\)"),
            ({"x_lq": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, "x_lq is torch.uint8"),
        ],
    )
    def test_bad_arguments_are_named_before_anything_is_restored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        settings: dict[str, Any] = {"x_lq": picture(20, 20), "target": "a.png", "scale": 4, "tile": 16, "overlap": 4}
        with pytest.raises(ValueError, match=message):
            upscale_large(lambda tile: pytest.fail("restored"), **{**settings, **wrong})
        assert list(tmp_path.iterdir()) == []

    def test_what_restore_gets_wrong_is_named_with_its_tile_and_not_kept(self, tmp_path: Path) -> None:
        x = picture(20, 16)
        with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\) of the tile at row 0, column 0; scale=4 asks for"):
            by_tiles(x, tmp_path / "a.png", lambda tile: restore(tile, 2))
        with pytest.raises(ValueError, match="not finite of the tile at row 0, column 0"):
            by_tiles(x, tmp_path / "a.png", lambda tile: restore(tile) / 0)
        assert [path.name for path in tmp_path.rglob("*")] == ["a.png.part", "fingerprint.json"]


class TestPasses:
    @pytest.mark.parametrize("scale", [1, 2, 3, 4])
    def test_bands_of_the_reference_are_those_of_the_whole(self, scale: int) -> None:
        x = picture(23, 11)
        expected = bicubic_upsample(x, scale)
        exact = scale != 3  # coordinates in thirds round differently from other origins
        for first in range(23 * scale):
            for last in (first + 1, first + 2, first + 13, 23 * scale):
                if last <= 23 * scale:
                    got = bicubic_band(x, scale, (first, last))
                    assert_close(got, expected[..., first:last, :], rtol=0, atol=0 if exact else 1e-5)

    @pytest.mark.parametrize("blend", ["average", "feather", "gaussian"])
    def test_bands_of_the_tiles_are_those_of_the_tiled_image_to_the_bit(self, tmp_path: Path, blend: Any) -> None:
        x = picture(37, 53)
        store = TileStore(tmp_path, (37, 53), 16, 7, 4, blend)
        for top, left in reversed(store.places):  # written in any order
            store.write(top, left, restore(x[..., top : top + 16, left : left + 16]))
        expected = tiled(restore, x, 16, 7, 4, blend)
        for first, last in ((0, 148), (0, 1), (147, 148), (35, 37), (60, 101)):
            assert torch.equal(store.band((first, last)), expected[..., first:last, :])

    @pytest.mark.usefixtures("narrow")
    def test_adain_and_wavelet_by_bands_are_those_of_the_whole(self) -> None:
        sr, reference = picture(101, 64), picture(101, 64, seed=1)
        bands = plan_bands(101, 64)

        def rows_of(x: Tensor) -> Callable[[tuple[int, int]], Tensor]:
            return lambda band: x[..., slice(*band), :]

        fixed = large._adain(rows_of(sr), rows_of(reference), bands, lambda: None)
        assert_close(torch.cat([fixed(band) for band in bands], 2), adain(sr, reference), rtol=0, atol=1e-5)
        fixed = large._wavelet(rows_of(sr), rows_of(reference), 101)
        assert_close(torch.cat([fixed(band) for band in bands], 2), wavelet(sr, reference), rtol=0, atol=1e-6)

    def test_adain_of_a_flat_image_is_finite_and_exact(self) -> None:
        sr, reference = torch.full((1, 3, 64, 64), 0.7), torch.full((1, 3, 64, 64), 0.3)
        fixed = large._adain(lambda band: sr, lambda band: reference, [(0, 64)], lambda: None)
        assert_close(fixed((0, 64)), reference, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("size", [(1, 1), (63, 9), (5000, 700), (16000, 12000), (40, 300000)])
    def test_bands_cover_all_rows_once_and_are_of_bounded_size(self, size: tuple[int, int]) -> None:
        bands = plan_bands(*size)
        assert [row for band in bands for row in range(*band)] == list(range(size[0]))
        assert all((last - first) * size[1] <= max(2**18, 64 * size[1]) for first, last in bands)


class TestContinuing:
    def some(self, path: Path, tiles: int, **kwargs: Any) -> None:
        """A run that ends before this tile."""
        numbers = iter(range(tiles))

        def broken(tile: Tensor) -> Tensor:
            if next(numbers, None) is None:
                raise KeyboardInterrupt
            return restore(tile)

        with pytest.raises(KeyboardInterrupt):
            by_tiles(picture(30, 30), path, broken, **kwargs)

    def restored(self, path: Path, x: Tensor | None = None, **kwargs: Any) -> tuple[int, bytes]:
        """Tiles that a run restores, and the file it makes."""
        calls: list[Tensor] = []

        def counting(tile: Tensor) -> Tensor:
            calls.append(tile)
            return restore(tile)

        by_tiles(picture(30, 30) if x is None else x, path, counting, **kwargs)
        return len(calls), path.read_bytes()

    def test_only_the_missing_tiles_are_restored(self, tmp_path: Path) -> None:
        in_one_go = self.restored(tmp_path / "whole.png")
        self.some(tmp_path / "a.png", 4)
        assert in_one_go[0] == 9
        assert self.restored(tmp_path / "a.png") == (5, in_one_go[1])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "whole.png"]

    def test_no_second_process_restores_into_the_same_target(self, tmp_path: Path) -> None:
        target = tmp_path / "x.png"
        with held(tmp_path / "x.png.part"), pytest.raises(InUseError, match=r"x\.png\.part is in use by process"):
            by_tiles(picture(20, 20), target)
        by_tiles(picture(20, 20), target)
        assert [path.name for path in tmp_path.iterdir()] == ["x.png"]

    def test_other_blend_and_colours_keep_the_tiles(self, tmp_path: Path) -> None:
        other = {"blend": "gaussian", "color_fix": "wavelet"}
        expected = self.restored(tmp_path / "whole.png", **other)[1]
        self.some(tmp_path / "a.png", 4)
        assert self.restored(tmp_path / "a.png", **other) == (5, expected)

    @pytest.mark.parametrize(
        ("other", "name"),
        [
            ({"key": "other weights"}, "key"),
            ({"overlap": 5}, "overlap"),
            ({"tile": 20}, "tile"),
            ({"size_multiple": 2}, "size_multiple"),
            ({"x": picture(30, 30, seed=1)}, "pixels"),
            ({"x": picture(30, 31)}, "size, pixels"),
        ],
    )
    def test_what_else_decides_the_tiles_starts_afresh_and_says_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, other: dict[str, Any], name: str
    ) -> None:
        in_one_go = self.restored(tmp_path / "whole.png", **other)
        self.some(tmp_path / "a.png", 4)
        assert caplog.messages == []
        assert self.restored(tmp_path / "a.png", **other) == in_one_go
        assert caplog.messages == [f"{tmp_path / 'a.png.part'} holds tiles of another {name}; starting afresh"]

    def test_tiles_that_nobody_vouches_for_are_not_taken_and_foreign_files_not_touched(self, tmp_path: Path) -> None:
        in_one_go = self.restored(tmp_path / "whole.png")
        self.some(tmp_path / "a.png", 4)
        (tmp_path / "a.png.part" / "fingerprint.json").unlink()
        (tmp_path / "a.png.part" / "diary.txt").write_text("mine")
        assert self.restored(tmp_path / "a.png") == in_one_go
        assert [path.name for path in (tmp_path / "a.png.part").iterdir()] == ["diary.txt"]

    @pytest.mark.parametrize("full_at", [0, 3, 10])
    def test_a_full_disk_names_the_file_and_costs_one_tile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
    ) -> None:
        in_one_go = self.restored(tmp_path / "whole.png")
        names = ["fingerprint.json", *["tile_"] * 9, "a.png"]
        written = iter(range(99))

        def full(file: int) -> None:
            if next(written) == full_at:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            message = rf"cannot write .*{names[full_at]}.* \(No space left on device\)"
            with pytest.raises(OSError, match=message) as error:
                self.restored(tmp_path / "a.png")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "a.png").exists()
        assert list(tmp_path.rglob("*.tmp")) == []
        assert self.restored(tmp_path / "a.png") == (9 - max(full_at - 1, 0), in_one_go[1])

    def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(self, tmp_path: Path) -> None:
        events, continued = run_script(KILLED, tmp_path)
        safe = ["fsync", "replace"]
        assert events == [*safe, *["restore", *safe] * 6, *safe], "a tile has its name once it is on disk"
        assert len(continued) == len(events)
        for killed_before, (restored, same) in enumerate(continued):
            kept = max(events[:killed_before].count("replace") - 1, 0)
            assert (killed_before, restored, same) == (killed_before, 6 - kept, True)


KILLED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from common.large import upscale_large

events, die_at = [], None

def event(name, function):
    def call(*args):
        if len(events) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        events.append(name)
        return function(*args)
    return call

os.fsync, os.replace = event("fsync", os.fsync), event("replace", os.replace)
restore = event("restore", lambda t: t.repeat_interleave(2, -1).repeat_interleave(2, -2) + t.mean() / 9)

def run(name):
    x = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    upscale_large(restore, x, name, scale=2, tile=12, overlap=3, blend="gaussian")
    with open(name, "rb") as file:
        return file.read()

expected = run("whole.png")
uninterrupted, continued = list(events), []
for die_at in range(len(uninterrupted)):
    events.clear()
    child = os.fork()
    if child == 0:
        run("a.png")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    die_at = None
    same = run("a.png") == expected and sorted(os.listdir()) == ["a.png", "whole.png"]
    continued.append((events.count("restore"), same))
    os.unlink("a.png")
json.dump((uninterrupted, continued), sys.stdout)
"""

MEMORY = """
import json, os, sys
import torch
torch.set_num_threads(1)
from common import large
from common.large import upscale_large

large.BAND_PIXELS, large._MIN_ROWS = 2**16, 16  # or bands would be wider at one size, and hide what grows

def restore(tile):
    return tile.repeat_interleave(4, -1).repeat_interleave(4, -2)

def peak():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) / 1024

peaks = []
for color_fix in ("adain", "wavelet"):
    for side in (256, 704):
        read, write = os.pipe()
        if os.fork() == 0:
            x = torch.rand(1, 3, 8, 8).repeat(1, 1, side // 8, side // 8)
            upscale_large(restore, x, f"{side}.png", scale=4, tile=64, overlap=8, color_fix=color_fix)
            os.write(write, str(peak()).encode())
            os._exit(0)
        os.wait()
        peaks.append(float(os.read(read, 99)))
json.dump(peaks, sys.stdout)
"""


def run_script(script: str, folder: Path) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestMemory:
    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
    def test_seven_times_the_pixels_take_the_same_memory(self, tmp_path: Path) -> None:
        peaks = run_script(MEMORY, tmp_path)
        for small, big in (peaks[:2], peaks[2:]):
            assert big < 1.1 * small
            assert big - small < 40, "MB; the low-quality image is 6, the output 95 as float32"


def blocks(image: np.ndarray, heights: tuple[int, ...]) -> Iterator[np.ndarray]:
    start = 0
    for height in heights:
        yield image[start : start + height]
        start += height


@pytest.mark.parametrize("kind", WRITERS)
class TestRows:
    @pytest.mark.parametrize("what", ["noise", "flat", "ramp"])
    @pytest.mark.parametrize(
        ("width", "heights"), [(1, (1,)), (7, (3, 1, 0, 5)), (301, (64, 64, 100, 2)), (90, (150,)), (33, (64, 64))]
    )
    def test_pillow_and_opencv_read_what_was_written(
        self, tmp_path: Path, kind: str, what: str, width: int, heights: tuple[int, ...]
    ) -> None:
        shape = (sum(heights), width, 3)
        ramp = np.add.outer(np.arange(shape[0]), np.arange(width))[..., None] * np.array([1, 2, 5])
        image = {
            "noise": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
            "flat": np.full(shape, 200, np.uint8),
            "ramp": ramp.astype(np.uint8),
        }[what]
        path = tmp_path / f"new/a{kind}"
        WRITERS[kind](path, blocks(image, heights), *shape[:2])
        assert np.array_equal(read(path), image)
        assert np.array_equal(cv2.imread(str(path))[..., ::-1], image)
        assert [path.name for path in path.parent.iterdir()] == [path.name]

    def test_a_photo_is_not_much_larger_than_pillow_makes_it(self, tmp_path: Path, kind: str) -> None:
        image = to_uint8(bicubic_upsample(picture(100, 150), 4))[0].permute(1, 2, 0).numpy()
        WRITERS[kind](tmp_path / f"a{kind}", iter([image]), *image.shape[:2])
        Image.fromarray(image).save(tmp_path / "b.png")
        assert (tmp_path / f"a{kind}").stat().st_size < 1.5 * (tmp_path / "b.png").stat().st_size

    @pytest.mark.parametrize("heights", [(8,), (5, 2), (5, 5, 5), (9, 1), (9, 0, 9)])
    def test_other_rows_than_announced_are_refused(self, tmp_path: Path, kind: str, heights: tuple[int, ...]) -> None:
        image = np.zeros((40, 6, 3), np.uint8)
        path = tmp_path / f"a{kind}"
        path.write_bytes(b"before")
        with pytest.raises(ValueError, match=rf"rows: got {sum(heights)} for .*a{kind}; height=9 asks for as many"):
            WRITERS[kind](path, blocks(image, heights), 9, 6)
        assert path.read_bytes() == b"before"
        assert len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("block", [np.zeros((9, 6, 3)), np.zeros((9, 5, 3), np.uint8), np.zeros((9, 6), np.uint8)])
    def test_other_arrays_are_refused(self, tmp_path: Path, kind: str, block: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"rows: got .* pass uint8 \(n, 6, 3\)"):
            WRITERS[kind](tmp_path / f"a{kind}", iter([block]), 9, 6)
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_is_said_with_the_file_and_leaves_what_was_there(
        self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(file: int) -> None:
            raise OSError(28, "No space left on device")

        path = tmp_path / f"a{kind}"
        path.write_bytes(b"before")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"cannot write .*a{kind} \(No space left on device\)") as error:
            WRITERS[kind](path, iter([np.zeros((9, 6, 3), np.uint8)]), 9, 6)
        assert "\n" not in str(error.value)
        assert path.read_bytes() == b"before"
        assert len(list(tmp_path.iterdir())) == 1
