"""`isr caption`: what it writes, that it survives being killed, and that its manifest trains."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

import common.conditioning.captions
import launch.commands.caption
from data.datamodules import SRData
from launch.cli import main

SMALL = ("--patch", "16", "--batch-size", "2")


def text(pixels: np.ndarray) -> str:
    """A caption that no other picture has, with what tables find hard."""
    return f'a "{zlib.crc32(np.ascontiguousarray(pixels).tobytes())}",\n\u00e9'


class Stub:
    """A captioner that says `text` of every image and fails at one of its batches, if wanted."""

    seen: list[str]
    sizes: list[int]
    made: list[tuple[str, str, int]]
    fail_at: int | None = None
    error: BaseException = KeyboardInterrupt()

    def __init__(self, model: str, instruction: str, max_new_tokens: int) -> None:
        self.made.append((model, instruction, max_new_tokens))

    def to(self, device: str) -> Stub:
        return self

    def __call__(self, x_01: Tensor) -> list[str]:
        if len(self.sizes) == self.fail_at:
            type(self).fail_at = None
            raise self.error
        images = (x_01 * 255).round().byte().permute(0, 2, 3, 1).numpy()
        captions = [text(image) for image in images]
        self.seen.extend(captions)
        self.sizes.append(len(captions))
        return captions


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    class Fresh(Stub):
        seen, sizes, made = [], [], []  # type: ignore[var-annotated]  # as in Stub

    monkeypatch.setattr(common.conditioning.captions, "Captioner", Fresh)
    return Fresh


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of 6, 3 and 1 patches of 16 px."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for seed, (name, height, width) in enumerate([("a.png", 24, 40), ("b.png", 16, 40), ("sub/c.png", 16, 16)]):
        Image.fromarray(noise(height, width, seed)).save(folder / name)
    return folder


def caption(source: object, output: Path, *options: str) -> int:
    return main(["caption", str(source), "-o", str(output), "--device", "cpu", *(options or SMALL)])


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def of(row: dict[str, Any], folder: Path) -> np.ndarray:
    """The pixels a row is of, by Pillow alone."""
    left, top, side = row["left"], row["top"], row["side"]
    return np.asarray(Image.open(folder / row["image_path"]).crop((left, top, left + side, top + side)))


class TestOutput:
    def test_every_patch_has_its_own_caption_and_photos_are_covered_to_their_borders(
        self, photos: Path, tmp_path: Path, stub: type[Stub]
    ) -> None:
        assert caption(photos, tmp_path / "captions.parquet") == 0
        rows = read(tmp_path / "captions.parquet")
        assert list(rows[0]) == ["image_path", "top", "left", "side", "prompt"]
        windows = [(row["image_path"], row["top"], row["left"], row["side"]) for row in rows]
        assert windows == [
            *(("photos/a.png", top, left, 16) for top in (0, 8) for left in (0, 16, 24)),
            *(("photos/b.png", 0, left, 16) for left in (0, 16, 24)),
            ("photos/sub/c.png", 0, 0, 16),
        ]
        assert [row["prompt"] for row in rows] == [text(of(row, tmp_path)) for row in rows]
        assert stub.sizes == [2, 2, 2, 2, 2]  # across photos
        assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.parquet", "photos"]

    def test_csv_says_the_same_and_images_elsewhere_have_full_paths(
        self, photos: Path, tmp_path: Path, stub: type[Stub]
    ) -> None:
        assert caption(photos, tmp_path / "captions.parquet") == 0
        assert caption(photos, tmp_path / "out" / "captions.csv") == 0
        with (tmp_path / "out" / "captions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        expected = [{key: str(value) for key, value in row.items()} for row in read(tmp_path / "captions.parquet")]
        assert rows == [{**row, "image_path": str(tmp_path / row["image_path"])} for row in expected]

    def test_whole_images_of_any_size_have_no_window(self, photos: Path, tmp_path: Path, stub: type[Stub]) -> None:
        Image.fromarray(noise(16, 40, 9)).save(photos / "b2.png")
        assert caption(photos, tmp_path / "c.parquet", "--whole", "--batch-size", "3") == 0
        rows = read(tmp_path / "c.parquet")
        assert {(row["top"], row["left"], row["side"]) for row in rows} == {(None, None, None)}
        assert [Path(row["image_path"]).name for row in rows] == ["a.png", "b.png", "b2.png", "c.png"]
        assert [row["prompt"] for row in rows] == [
            text(np.asarray(Image.open(tmp_path / row["image_path"]))) for row in rows
        ]
        assert stub.sizes == [1, 2, 1]  # images of one size share a batch

    def test_an_image_listed_twice_is_captioned_once_and_written_twice(
        self, photos: Path, tmp_path: Path, stub: type[Stub]
    ) -> None:
        (tmp_path / "list.txt").write_text("photos/b.png\nphotos/sub/c.png\nphotos/b.png\n")
        assert caption(tmp_path / "list.txt", tmp_path / "c.parquet") == 0
        names = [Path(row["image_path"]).name for row in read(tmp_path / "c.parquet")]
        assert names == ["b.png"] * 3 + ["c.png"] + ["b.png"] * 3
        assert sum(stub.sizes) == 4

    def test_corrupt_and_small_images_are_skipped_counted_and_named(
        self, photos: Path, tmp_path: Path, stub: type[Stub], capsys: pytest.CaptureFixture[str]
    ) -> None:
        Image.fromarray(noise(15, 99, 5)).save(photos / "small.png")
        (photos / "text.png").write_text("no image")
        Image.fromarray(noise(32, 32, 6)).save(photos / "cut.jpg")
        whole = (photos / "cut.jpg").read_bytes()
        (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # found out when its turn comes: its header is good
        assert caption(photos, tmp_path / "c.parquet") == 0
        assert {Path(row["image_path"]).name for row in read(tmp_path / "c.parquet")} == {"a.png", "b.png", "c.png"}
        said = capsys.readouterr()
        assert "10 captions of 3 images" in said.out
        assert "skipped 3 images: " in said.err
        assert f"{photos}/small.png is 99x15, smaller than patch=16" in said.err
        assert f"cannot read image {photos}/text.png" in said.err
        assert f"cannot read image {photos}/cut.jpg" in said.err

    def test_the_model_is_asked_as_told_and_florence_2_by_default(
        self, photos: Path, tmp_path: Path, stub: type[Stub]
    ) -> None:
        options = ("--model", "m", "--instruction", "what", "--max-new-tokens", "5")
        assert caption(photos, tmp_path / "c.csv", *SMALL, *options) == 0
        assert caption(photos, tmp_path / "d.csv", *SMALL) == 0
        assert stub.made == [
            ("m", "what", 5),
            ("florence-community/Florence-2-large", "<MORE_DETAILED_CAPTION>", 77),
        ]

    def test_progress_is_said_in_lines_where_there_is_no_terminal(
        self, photos: Path, tmp_path: Path, stub: type[Stub], capsys: pytest.CaptureFixture[str], monkeypatch: Any
    ) -> None:
        monkeypatch.setattr(launch.commands.caption, "LINE_EVERY", 0.0)
        assert caption(photos, tmp_path / "c.csv") == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("captioned")]
        assert [line.split(",")[0] for line in lines] == [f"captioned {done} of 10" for done in range(0, 11, 2)]
        assert lines[-1].endswith("/s, 0 images skipped")


class TestKilled:
    @pytest.mark.parametrize("name", ["c.parquet", "c.csv"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
    def test_the_same_command_goes_on_and_writes_the_same_bytes(
        self, photos: Path, tmp_path: Path, stub: type[Stub], name: str, error: BaseException
    ) -> None:
        assert caption(photos, tmp_path / name) == 0
        expected, seen = (tmp_path / name).read_bytes(), list(stub.seen)
        (tmp_path / name).unlink()
        stub.seen.clear(), stub.sizes.clear()
        stub.fail_at, stub.error = 3, error
        assert caption(photos, tmp_path / name) == (130 if isinstance(error, KeyboardInterrupt) else 1)
        assert not (tmp_path / name).exists()
        assert len(stub.seen) == 6
        assert caption(photos, tmp_path / name) == 0
        assert (tmp_path / name).read_bytes() == expected
        assert stub.seen == seen  # nothing twice
        assert not (tmp_path / f"{name}.part").exists()

    @pytest.mark.parametrize("cut", [1, 7])
    def test_a_torn_journal_costs_only_what_is_torn(
        self, photos: Path, tmp_path: Path, stub: type[Stub], cut: int
    ) -> None:
        assert caption(photos, tmp_path / "c.parquet") == 0
        expected = read(tmp_path / "c.parquet")
        (tmp_path / "c.parquet").unlink()
        stub.fail_at = len(stub.sizes) + 2
        caption(photos, tmp_path / "c.parquet")
        part = tmp_path / "c.parquet.part"
        lines = part.read_bytes().splitlines(keepends=True)
        assert len(lines) == 5
        lines[2] = b"\0" * len(lines[2][:-1]) + b"\n"
        part.write_bytes(b"".join(lines)[:-cut])  # as a power cut leaves it
        stub.seen.clear()
        stub.fail_at = len(stub.sizes) + 1  # what follows the torn line is read in its turn
        assert caption(photos, tmp_path / "c.parquet") == 130
        assert caption(photos, tmp_path / "c.parquet") == 0
        assert read(tmp_path / "c.parquet") == expected
        kept = [expected[0]["prompt"], expected[2]["prompt"]]
        assert stub.seen == [row["prompt"] for row in expected if row["prompt"] not in kept]

    def test_killed_while_the_journal_began_or_after_the_manifest_was_written(
        self, photos: Path, tmp_path: Path, stub: type[Stub], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        part = tmp_path / "c.csv.part"
        part.write_bytes(b'{"isr cap')
        monkeypatch.setattr("data.captions.Journal.remove", lambda _: exec("raise KeyboardInterrupt"))
        assert caption(photos, tmp_path / "c.csv") == 130
        expected, count = (tmp_path / "c.csv").read_bytes(), len(stub.seen)
        monkeypatch.undo()
        monkeypatch.setattr(common.conditioning.captions, "Captioner", stub)
        assert caption(photos, tmp_path / "c.csv") == 0
        assert (tmp_path / "c.csv").read_bytes() == expected
        assert len(stub.seen) == count
        assert not part.exists()

    @pytest.mark.long
    def test_a_killed_process_leaves_its_batches_on_the_disk(self, photos: Path, tmp_path: Path) -> None:
        code = (
            "import os, sys, common.conditioning.captions as module\n"
            "from launch.cli import main\n"
            "class Stub:\n"
            "    n = 0\n"
            "    def __init__(self, *_): pass\n"
            "    def to(self, _): return self\n"
            "    def __call__(self, x):\n"
            "        self.n += 1\n"
            "        return ['x'] * len(x) if self.n < 4 else os.kill(os.getpid(), 9)\n"
            "module.Captioner = Stub\n"
            "main(sys.argv[1:])"
        )
        arguments = ["caption", str(photos), "-o", str(tmp_path / "c.csv"), "--device", "cpu", *SMALL]
        done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True)
        assert done.returncode == -9
        lines = (tmp_path / "c.csv.part").read_text().splitlines()
        assert [json.loads(line)[1:3] for line in lines[1:]] == [[t, x] for t in (0, 8) for x in (0, 16, 24)]

    def test_new_photos_join_and_lost_ones_leave(self, photos: Path, tmp_path: Path, stub: type[Stub]) -> None:
        stub.fail_at = 4
        caption(photos, tmp_path / "c.parquet")
        (photos / "a.png").unlink()
        Image.fromarray(noise(16, 16, 8)).save(photos / "new.png")
        assert caption(photos, tmp_path / "c.parquet") == 0
        rows = read(tmp_path / "c.parquet")
        assert [Path(row["image_path"]).name for row in rows] == ["b.png"] * 3 + ["new.png", "c.png"]
        assert [row["prompt"] for row in rows] == [text(of(row, tmp_path)) for row in rows]


class TestSelection:
    def test_the_first_photos_and_a_few_patches_of_each(self, photos: Path, tmp_path: Path, stub: type[Stub]) -> None:
        assert caption(photos, tmp_path / "c.parquet", *SMALL, "--first", "2", "--per-photo", "2") == 0
        rows = read(tmp_path / "c.parquet")
        windows = [(Path(row["image_path"]).name, row["top"], row["left"]) for row in rows]
        assert windows == [("a.png", 0, 0), ("a.png", 8, 0), ("b.png", 0, 0), ("b.png", 0, 16)]
        assert [row["prompt"] for row in rows] == [text(of(row, tmp_path)) for row in rows]
        assert sum(stub.sizes) == 4

    def test_training_crops_of_a_whole_photo_have_its_caption(
        self, photos: Path, tmp_path: Path, stub: type[Stub]
    ) -> None:
        assert caption(photos, tmp_path / "c.csv", "--whole") == 0
        data = SRData(train=str(tmp_path / "c.csv"), crop_size=16, num_workers=0, degradation="bicubic")
        data.setup("fit")
        assert data.train_images is not None
        assert sum(stub.sizes) == 3
        for index, name in enumerate(("a.png", "b.png", "sub/c.png")):
            expected = text(np.asarray(Image.open(photos / name)))
            assert {data.train_images[epoch, index, 0]["prompt"] for epoch in range(3)} == {expected}


class TestSeveralProcesses:
    @pytest.fixture
    def expected(self, photos: Path, tmp_path: Path, stub: type[Stub]) -> bytes:
        """The manifest of one process; a photo that turns out to be unreadable is among them, and one is twice."""
        Image.fromarray(noise(32, 32, 6)).save(photos / "cut.jpg")
        whole = (photos / "cut.jpg").read_bytes()
        (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        names = ["b.png", "cut.jpg", "sub/c.png", "a.png", "b.png"]
        (tmp_path / "l.txt").write_text("".join(f"photos/{name}\n" for name in names))
        assert caption(tmp_path / "l.txt", tmp_path / "one.csv") == 0
        stub.seen.clear(), stub.sizes.clear()
        return (tmp_path / "one.csv").read_bytes()

    @pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
    def test_the_last_one_writes_the_manifest_of_one_process(
        self, photos: Path, tmp_path: Path, stub: type[Stub], expected: bytes, order: tuple[int, ...]
    ) -> None:
        for number in order:
            assert not (tmp_path / "c.csv").exists()
            assert caption(tmp_path / "l.txt", tmp_path / "c.csv", *SMALL, "--shard", f"{number}/3") == 0
        assert (tmp_path / "c.csv").read_bytes() == expected
        assert len(stub.seen) == len(set(stub.seen)) == 10
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c.csv", "l.txt", "one.csv", "photos"]

    def test_each_goes_on_after_it_was_killed_under_torchrun(
        self, photos: Path, tmp_path: Path, stub: type[Stub], expected: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank, at in ((0, 1), (1, 2)):
            monkeypatch.setenv("RANK", str(rank))
            stub.fail_at = len(stub.sizes) + at
            assert caption(tmp_path / "l.txt", tmp_path / "c.csv") == 130
        assert sorted(path.name for path in tmp_path.glob("*.part")) == ["c.csv.1-of-2.part", "c.csv.2-of-2.part"]
        for rank in (1, 0):
            monkeypatch.setenv("RANK", str(rank))
            assert caption(tmp_path / "l.txt", tmp_path / "c.csv") == 0
        assert (tmp_path / "c.csv").read_bytes() == expected
        assert len(stub.seen) == len(set(stub.seen)) == 10

    @pytest.mark.long
    def test_two_at_once_write_the_manifest_of_one(self, photos: Path, tmp_path: Path) -> None:
        code = (
            "import sys, common.conditioning.captions as module\n"
            "from launch.cli import main\n"
            "class Stub:\n"
            "    def __init__(self, *_): pass\n"
            "    def to(self, _): return self\n"
            "    def __call__(self, x): return [str(float(image.sum())) for image in x]\n"
            "module.Captioner = Stub\n"
            "sys.exit(main(sys.argv[1:]))"
        )

        def start(name: str, *options: str, **environment: str) -> subprocess.Popen[bytes]:
            arguments = ["caption", str(photos), "-o", str(tmp_path / name), "--device", "cpu", *SMALL, *options]
            return subprocess.Popen([sys.executable, "-c", code, *arguments], env=os.environ | environment)

        assert start("one.csv").wait() == 0
        both = [start("c.csv", WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank) for rank in "01"]
        assert [process.wait() for process in both] == [0, 0]
        assert (tmp_path / "c.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
        assert not list(tmp_path.glob("*.part"))

    def test_journals_of_another_number_are_named_and_kept(
        self, photos: Path, tmp_path: Path, stub: type[Stub], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert caption(photos, tmp_path / "c.csv", *SMALL, "--shard", "1/2") == 0
        for options in ((), ("--shard", "1/3")):
            assert caption(photos, tmp_path / "c.csv", *SMALL, *options) == 1
            assert "c.csv was begun in other parts: c.csv.1-of-2.part; go on with" in capsys.readouterr().err
        assert (tmp_path / "c.csv.1-of-2.part").exists()
        assert caption(photos, tmp_path / "c.csv2.csv") == 0  # another output


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--patch", "8"), "patch=8, stride=8, but {part} was begun with patch=16, stride=16; set it back"),
            (("--patch", "16", "--stride", "8"), "stride=8, but {part} was begun with stride=16; set it back"),
            (("--patch", "16", "--model", "m"), "model=m, but {part} was begun with model=florence-community/"),
            (("--patch", "16", "--instruction", "x"), "instruction=x, but {part} was begun with instruction=<MORE_"),
            (("--patch", "16", "--max-new-tokens", "9"), "max_new_tokens=9, but {part} was begun with max_new_tokens="),
            (("--patch", "16", "--first", "2"), "first=2, but {part} was begun with first=null; set it back"),
            (("--patch", "16", "--per-photo", "1"), "per_photo=1, but {part} was begun with per_photo=null; set it"),
            (("--whole",), "patch=null, stride=null, but {part} was begun with patch=16, stride=16; set it back"),
        ],
    )
    def test_changed_settings_are_named_and_cost_nothing(
        self,
        photos: Path,
        tmp_path: Path,
        stub: type[Stub],
        capsys: pytest.CaptureFixture[str],
        options: tuple[str, ...],
        message: str,
    ) -> None:
        stub.fail_at = 3
        caption(photos, tmp_path / "c.csv")
        part = tmp_path / "c.csv.part"
        before = part.read_bytes()
        assert caption(photos, tmp_path / "c.csv", *options) == 1
        said = capsys.readouterr().err
        assert message.format(part=part) in said
        assert f"or delete {part} to begin anew without its 6 captions" in said
        assert part.read_bytes() == before
        assert caption(photos, tmp_path / "c.csv", "--patch", "16", "--batch-size", "5") == 0  # no matter to captions
        assert len(stub.seen) == 10

    def test_another_source_leaves_the_captions_of_an_unfinished_one(
        self, photos: Path, tmp_path: Path, stub: type[Stub], capsys: pytest.CaptureFixture[str]
    ) -> None:
        stub.fail_at = 3
        caption(photos, tmp_path / "c.csv")
        before = (tmp_path / "c.csv.part").read_bytes()
        assert caption(photos / "b.png", tmp_path / "c.csv") == 1
        assert f"source={photos}/b.png, but {tmp_path}/c.csv.part was begun with source={photos};" in (
            capsys.readouterr().err
        )
        assert (tmp_path / "c.csv.part").read_bytes() == before

    def test_other_settings_may_begin_where_nothing_was_captioned(
        self, photos: Path, tmp_path: Path, stub: type[Stub], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert caption(photos, tmp_path / "c.csv", "--patch", "64") == 1
        said = capsys.readouterr().err
        assert f"source={photos} leaves nothing to caption: {photos}/a.png is 40x24, smaller than patch=64" in said
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]
        assert caption(photos, tmp_path / "c.csv") == 0

    def test_a_second_process_is_kept_away(
        self, photos: Path, tmp_path: Path, stub: type[Stub], capsys: pytest.CaptureFixture[str]
    ) -> None:
        from data.captions import Journal

        other = Journal(tmp_path / "c.csv.part", {})
        assert caption(photos, tmp_path / "c.csv") == 1
        assert f"c.csv.part is held by process {os.getpid()} that captions" in capsys.readouterr().err
        other.close()
        assert caption(photos, tmp_path / "c.csv") == 0

    def test_a_file_that_is_no_journal_stays_as_it_is(
        self, photos: Path, tmp_path: Path, stub: type[Stub], capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "c.csv.part").write_text("half a download")
        assert caption(photos, tmp_path / "c.csv") == 1
        assert "c.csv.part is not a journal of isr caption; delete it" in capsys.readouterr().err
        assert (tmp_path / "c.csv.part").read_text() == "half a download"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--patch", "0"), "--patch 0 is out of range; give 1 or more"),
            (("--batch-size", "0"), "--batch-size 0 is out of range; give 1 or more"),
            (("--max-new-tokens", "0"), "--max-new-tokens 0 is out of range; give 1 or more"),
            (("--patch", "16", "--stride", "17"), "--stride 17 leaves gaps between patches of --patch 16; give 16"),
            (("--first", "0"), "--first 0 is out of range; give 1 or more"),
            (("--per-photo", "0"), "--per-photo 0 is out of range; give 1 or more"),
            (("--shard", "3/2"), "argument --shard: 3/2 is no part; give I/N with 1 <= I <= N, e.g. 1/8"),
            (("--whole", "--per-photo", "2"), "--per-photo 2 has no effect with --whole; leave one of them out"),
            (("--whole", "--patch", "16"), "--patch 16 has no effect with --whole; leave one of them out"),
            (("--device", "abacus"), "--device abacus cannot be used"),
        ],
    )
    def test_arguments_are_refused_before_anything_is_written(
        self,
        photos: Path,
        tmp_path: Path,
        stub: type[Stub],
        capsys: pytest.CaptureFixture[str],
        options: tuple[str, ...],
        message: str,
    ) -> None:
        assert caption(photos, tmp_path / "c.csv", *options) == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]

    def test_outputs_that_could_not_be_written_in_the_end_are_refused_at_once(
        self, photos: Path, tmp_path: Path, stub: type[Stub], capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "c.csv").write_text("precious")
        assert caption(photos, tmp_path / "c.csv") == 2
        assert f"output={tmp_path}/c.csv is there already; delete it, or give another" in capsys.readouterr().err
        assert (tmp_path / "c.csv").read_text() == "precious"
        assert caption(photos, tmp_path / "c.txt") == 1
        assert "c.txt is of no known kind; give a .parquet or a .csv" in capsys.readouterr().err
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        assert caption(photos, tmp_path / "c.parquet") == 1
        assert "c.parquet: parquet needs pyarrow; pip install pyarrow" in capsys.readouterr().err
        assert not stub.seen


@pytest.mark.parametrize("name", ["c.parquet", "c.csv"])
def test_training_sees_the_captioned_patches_with_their_captions(
    photos: Path, tmp_path: Path, stub: type[Stub], name: str
) -> None:
    assert caption(photos, tmp_path / name) == 0
    data = SRData(
        train=str(tmp_path / name), crop_size=16, batch_size=5, num_workers=0, degradation="bicubic", flips="none"
    )
    data.setup("fit")
    samples = [
        (text(hq.permute(1, 2, 0).numpy()), prompt)
        for batch in data.train_dataloader()
        for hq, prompt in zip(batch["hq"], batch["prompt"], strict=True)
    ]
    assert all(expected == prompt for expected, prompt in samples)
    assert len({prompt for _, prompt in samples}) == len(samples) == 10


@pytest.fixture
def blip(tmp_path: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "mat", "hat", "red", "blue", "on", "the"]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = {**small, **tokens, "encoder_hidden_size": 32, "vocab_size": len(words), "max_position_embeddings": 32}
    vision = {**small, "image_size": 16, "patch_size": 8}
    model = BlipForConditionalGeneration(BlipConfig(text_config=config, vision_config=vision))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "blip")
    processor = BlipProcessor(
        BlipImageProcessor(size={"height": 16, "width": 16}),
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}),
    )
    processor.save_pretrained(tmp_path / "blip")
    return str(tmp_path / "blip")


def test_a_real_model_captions_each_patch_as_it_does_alone(photos: Path, tmp_path: Path, blip: str) -> None:
    assert caption(photos, tmp_path / "c.parquet", *SMALL, "--model", blip, "--max-new-tokens", "6") == 0
    rows = read(tmp_path / "c.parquet")
    alone: Callable[[Tensor], list[str]] = common.conditioning.captions.Captioner(blip, max_new_tokens=6)
    pixels = [torch.from_numpy(of(row, tmp_path).copy()).permute(2, 0, 1)[None] / 255 for row in rows]
    assert [row["prompt"] for row in rows] == [alone(patch)[0] for patch in pixels]
    assert len({row["prompt"] for row in rows}) > 1
