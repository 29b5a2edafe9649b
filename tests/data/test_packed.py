"""Long lists in little memory: what they hold is what a list of objects would, in a bounded number of bytes."""

from __future__ import annotations

import gc
import os
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.files import plain_name
from data.datamodules import SRData
from data.datasets import DegradedCrops, HQImages, LQImages
from data.packed import Lookup, Packed, Picked, digests, numbered
from data.prompts import Prompts
from data.sources import Entry, Part, Window, list_entries, unique_names
from data.textfiles import read_csv, read_lines

ODD = ["", "a", "\x00", "\udcff.png", "\ud800", "\u7167\u7247", "a\nb", "a", "\U0001f600"]
IMAGES, WINDOWS = 400, 10
PROMPT = "A photograph number {} of a street with many houses."


def test_packed_texts_are_those_of_a_list() -> None:
    packed = Packed(ODD)
    assert packed == ODD
    assert list(packed) == ODD
    assert (packed[-1], packed[3:1:-1]) == (ODD[-1], ODD[3:1:-1])
    assert packed != ODD[:-1]
    assert pickle.loads(pickle.dumps(packed)) == ODD  # what a spawned worker gets
    assert Picked(packed, np.array([2, -1, 2])) == ["\x00", None, "\x00"]
    with pytest.raises(IndexError):
        packed[len(ODD)]


def test_numbers_go_by_first_appearance_and_places_by_text() -> None:
    first, number = numbered(digests(ODD))
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 6, 8]
    assert number.tolist() == [0, 1, 2, 3, 4, 5, 6, 1, 7]
    assert Lookup(ODD).places(["\ud800", "b", ""]).tolist() == [4, -1, 0]
    assert Lookup(()).places(["a"]).tolist() == [-1]


def test_names_are_those_that_pathlib_makes() -> None:
    files = [
        "/x/a.png",
        "/x/a.jpg",
        "/x/.png",
        "/x/..png",
        "/x/b.",
        "/x/y/b.v2.png",
        "/x/y/b.v2",
        "/x/z/b",
        "/x/\n.gif",
    ]
    paths = list(map(Path, files))
    relative = [path.relative_to("/x") for path in paths]
    stems = [path.with_suffix("").as_posix() for path in relative]
    count = Counter(stems)
    expected = [path.as_posix() if count[stem] > 1 else stem for path, stem in zip(relative, stems, strict=True)]
    assert len(set(expected)) == len(expected)
    assert unique_names(paths) == unique_names(paths, Path("/x")) == list(map(plain_name, expected))
    assert unique_names(paths[3:6]) == [plain_name(path.stem) for path in paths[3:6]]


def photos(root: Path, count: int, size: tuple[int, int] = (8, 8)) -> list[str]:
    """Links to one photo."""
    names = [f"photos/{i // 100:03d}/{i:05d}.png" for i in range(count)]
    root.mkdir(exist_ok=True)
    Image.new("RGB", size).save(root / "photo.png")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(root / "photo.png", root / name)
    return names


def held(kind: str, root: Path, images: int) -> tuple[float, float]:
    """Bytes that an open set of a kind holds, and those of its texts, a row."""
    names = photos(root, images)
    if kind == "windows":
        lines = (f'{names[i // WINDOWS]},{i % 3},0,4,"{PROMPT.format(i)}"\n' for i in range(images * WINDOWS))
        (root / "set.csv").write_text("image_path,top,left,side,prompt\n" + "".join(lines))
        rows, text = images * WINDOWS, len(str(root / names[0])) / WINDOWS + len(PROMPT)
    else:
        rows, text = len(names), len(str(root / names[0])) + len(PROMPT) * (kind == "prompts")
    (root / "texts.csv").write_text("name,prompt\n" + "".join(f"{Path(n).stem},{PROMPT}\n" for n in names))
    source = str(root / ("set.csv" if kind == "windows" else "photos"))
    tracemalloc.start()
    data = SRData(
        source,
        val=source if kind == "val" else None,
        crop_size=4,
        scale=2,
        prompts=str(root / "texts.csv") if kind == "prompts" else None,
    )
    stage = "validate" if kind == "val" else "fit"
    data.setup(stage)
    data.check_apart(stage, root / "out")
    data.has_prompts("val" if kind == "val" else "train")
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return taken / rows, text


@pytest.mark.parametrize("kind", ["windows", "photos", "prompts", "val"])
def test_a_row_takes_its_text_and_few_integers(kind: str, tmp_path: Path) -> None:
    held(kind, tmp_path / "warm", 10)  # imports and caches
    taken, text = held(kind, tmp_path / "set", IMAGES)
    assert taken < text + 150 + 50 * (kind == "prompts")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Windows and whole photos, some twice, rows of one photo apart."""
    photos(tmp_path, 3, (40, 24))
    rows = [
        "photos/000/00002.png,0,0,16,two",
        "photos/000/00000.png,,,,all",
        "photos/000/00002.png,4,8,20,more",
        "photos/000/00000.png,8,0,8,small",
        "photos/000/00002.png,0,0,16,again",
        "photos/000/00001.png,,,,",
    ]
    (tmp_path / "m.csv").write_text("image_path,top,left,side,prompt\n" + "\n".join(rows) + "\n")
    return tmp_path / "m.csv"


def test_entries_are_the_rows(manifest: Path) -> None:
    zero, one, two = (manifest.parent / f"photos/000/0000{i}.png" for i in range(3))
    rows = [
        Entry(two, "two", Window(0, 0, 16)),
        Entry(zero, "all"),
        Entry(two, "more", Window(4, 8, 20)),
        Entry(zero, "small", Window(8, 0, 8)),
        Entry(two, "again", Window(0, 0, 16)),
        Entry(one, ""),
    ]
    entries = list_entries(manifest)
    assert entries == rows
    assert entries.files == [two, zero, one]
    assert entries.distinct() == [rows[0]._replace(prompt="again"), *rows[1:4], rows[5]]
    part = Part(str(manifest), first=2, weight=2)
    assert list_entries([part, zero]) == [row for row in rows[:5] for _ in range(2)] + [Entry(zero)]
    images = HQImages(manifest, crop_size=8)
    assert pickle.loads(pickle.dumps(images.entries)) == rows
    assert list(images.texts) == [row.prompt for row in rows]
    assert images.names == ["00002", "00000", "00002", "00000", "00002", "00001"]


@pytest.mark.parametrize("most", [None, 1, 5, 99])
def test_crops_of_the_grid_are_those_of_a_list(manifest: Path, most: int | None) -> None:
    crops = DegradedCrops(manifest, 8, [0, 5], None, max_crops=most)
    cut = [
        ("00002_0_0_16", 16, 16),
        ("00000", 24, 40),
        ("00002_4_8_20", 20, 20),
        ("00000_8_0_8", 8, 8),
        ("00001", 24, 40),
    ]
    grid = [
        f"{name}_r{row}c{column}_s{seed}"
        for name, height, width in cut
        for row in range(height // 8)
        for column in range(width // 8)
        for seed in (0, 5)
    ]
    keep = len(grid) if most is None else min(most, len(grid))
    assert crops.sample_names == [grid[i * len(grid) // keep] for i in range(keep)]
    assert [crops[i]["name"] for i in range(keep)] == crops.sample_names
    assert crops[0]["prompt"] == "again"


def test_an_image_twice_for_prediction_is_named(tmp_path: Path) -> None:
    photos(tmp_path, 2)
    (tmp_path / "l.txt").write_text("photos/000/00001.png\nphotos/000/00000.png\n./photos//000/00001.png\n")
    with pytest.raises(ValueError, match=r"lists \S+/00001\.png more than once"):
        LQImages(tmp_path / "l.txt")


def test_prompts_of_a_table_and_a_folder_are_found_alike(tmp_path: Path) -> None:
    (tmp_path / "t" / "x").mkdir(parents=True)
    (tmp_path / "t" / "x" / "a.txt").write_text(" of x\n")
    (tmp_path / "t" / "b.txt").write_text("of b")
    (tmp_path / "t.csv").write_text("name,prompt\nx/a.png,of x\nb,of b\nb.jpg,of b\n")
    for source in (tmp_path / "t", tmp_path / "t.csv"):
        prompts = Prompts(source)
        assert (prompts["x/a"], prompts["y/b.png"], prompts["b"]) == ("of x", "of b", "of b")
        with pytest.raises(KeyError):
            prompts["a"]
        with pytest.raises(ValueError, match="no prompt for 2 of 4 images: a, c"):
            prompts.require(["x/a", "a", "b.png", "c"])
        with pytest.raises(ValueError, match=r"images of one name in different folders: y/b, z/b;"):
            prompts.require(["y/b", "z/b", "y/b", "x/a"])


def test_a_long_text_is_read_by_lines_in_its_encoding(tmp_path: Path) -> None:
    body = "\u7167" * 600_000  # more than a block without a zero byte
    (tmp_path / "l.txt").write_bytes(f"{body}\nbc\n".encode("utf-16-le"))
    assert list(read_lines(tmp_path / "l.txt", "train")) == [body, "bc"]
    (tmp_path / "t.csv").write_bytes(b"a,b\n" + (b"1," + b"2" * 1000 + b"\n") * 1100 + b"\xe9,2\n")
    rows = read_csv(tmp_path / "t.csv", "train")
    assert next(rows) == {"a": "1", "b": "2" * 1000}
    with pytest.raises(ValueError, match=r"t\.csv: line 1102 is not UTF-8 \(byte 0xe9"):
        list(rows)
