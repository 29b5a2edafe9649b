"""What is there and not used is counted and named, whatever the data set."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.datamodules import Photos, SRData
from data.datasets import DegradedCrops, HQImages, LQImages
from data.inventory import Inventory, write_unused
from data.pairing import Pairs
from data.prompts import Prompts
from data.test_sets import load_test_set


def save(path: Path, height: int = 8, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 100, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, eight broken ones, six of kinds that are not read, and what else lies about."""
    for name in ("a.png", "sub/b.png"):
        save(tmp_path / "in" / name)
    root = tmp_path / "in"
    for i in range(8):
        (root / f"broken{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    for kind in ("heic", "heif", "jxl", "jp2", "jpe", "tga"):
        (root / "sub" / f"photo.{kind}").write_bytes(b"something")
    (root / ".git").mkdir()
    (root / ".git" / "index").write_bytes(b"")
    (root / "._a.png").write_bytes(b"")
    (root / "a.txt").write_text("a cat")
    (root / "round").symlink_to(root, target_is_directory=True)
    return root


def names(inventory: Inventory, root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): reason for path, reason in inventory.unused.items()}


def test_every_file_that_is_not_used_is_named_with_its_reason(folder: Path, tmp_path: Path) -> None:
    inventory = LQImages(folder, on_error="skip").inventory("predict")
    unused = names(inventory, folder)
    assert inventory.images == 2
    assert {name for name in unused if "broken" in name} == {f"broken{i}.png" for i in range(8)}
    assert all(unused[f"broken{i}.png"].startswith(f"cannot read image {folder}/broken{i}.png: ") for i in range(8))
    kinds = {f"sub/photo.{kind}" for kind in ("heic", "heif", "jxl", "jp2", "jpe", "tga")}
    assert {name for name, reason in unused.items() if reason == "no image of a kind that is read"} == {*kinds, "a.txt"}
    assert {name for name, reason in unused.items() if reason == "hidden"} == {".git", "._a.png"}
    assert len(unused) == 17
    assert str(inventory) == (
        f"predict={folder}: 2 images (a folder of images without references); not used: 17 files "
        "(9 .png, 1 without extension, 1 .txt, 1 .heic, 5 others)"
    )
    assert write_unused(tmp_path / "skipped.csv", [inventory])
    with (tmp_path / "skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["argument"], row["file"]) for row in rows} == {("predict", str(path)) for path in inventory.unused}


def test_prompts_beside_the_images_are_used(folder: Path) -> None:
    for path in folder.glob("broken*"):
        path.unlink()
    (folder / "sub" / "b.txt").write_text("a dog")
    unused = names(LQImages(folder, Prompts(folder)).inventory("predict"), folder)
    assert not [name for name in unused if name.endswith(".txt")]
    assert "sub/photo.heic" in unused


def test_training_photos_found_unreadable_on_the_way(folder: Path) -> None:
    photos = HQImages(folder, crop_size=8)
    assert photos.inventory("train").images == 10
    for index in range(10):
        photos[0, index, 0]
    unused = names(photos.inventory("train"), folder)
    assert photos.inventory("train").images == 2
    assert all(unused[f"broken{i}.png"].startswith("cannot read image ") for i in range(8))


def test_crops_name_photos_that_are_too_small(tmp_path: Path) -> None:
    save(tmp_path / "large.png", 32, 16)
    save(tmp_path / "small.png", 8, 8)
    inventory = DegradedCrops(tmp_path, 16, [0], None, on_error="skip").inventory("val")
    assert str(inventory) == (f"val={tmp_path}: 1 image (photos cut to 2 crops of 16 px); not used: 1 file (1 .png)")
    assert "smaller than crop_size=16" in inventory.unused[tmp_path / "small.png"]


def test_a_benchmark_names_images_without_partner_and_other_folders(tmp_path: Path) -> None:
    for name in ("test_LR/a.png", "test_LR/alone.png", "test_bicubic/a.png"):
        save(tmp_path / name)
    save(tmp_path / "test_HR" / "a.png", 32, 32)
    inventory = load_test_set(tmp_path, 4, on_error="skip").images.inventory("test")
    assert (inventory.images, inventory.layout) == (1, "pairs in test_LR and test_HR")
    reason = "is in no pair"
    assert names(inventory, tmp_path) == {"test_LR/alone.png": reason, "test_bicubic/a.png": reason}


def test_a_pair_names_the_half_that_is_broken(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "lq" / f"{name}.png")
        save(tmp_path / "hq" / f"{name}.png", 32, 32)
    (tmp_path / "hq" / "b.png").write_bytes(b"no image")
    inventory = Pairs(tmp_path / "lq", tmp_path / "hq", on_error="skip").inventory("test")
    unused = names(inventory, tmp_path)
    assert unused["lq/b.png"] == "is in no pair"
    assert unused["hq/b.png"].startswith("cannot read image ")


def test_a_list_names_what_it_lists_and_no_more(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("in/a.png\nin/broken0.png\n")
    inventory = LQImages(tmp_path / "list.txt", on_error="skip").inventory("predict")
    assert inventory.images == 1
    assert list(inventory.unused) == [folder / "broken0.png"]


def test_nothing_unused_writes_nothing_but_empties_an_older_table(tmp_path: Path) -> None:
    inventory = Inventory("predict", "x", 1, "a folder")
    table = tmp_path / "skipped.csv"
    assert not write_unused(table, [inventory])
    assert not table.exists()
    write_unused(table, [Inventory("predict", "x", 1, "a folder", {Path("b\udcff.heic"): "why"})])
    assert "b\\xff.heic,why" in table.read_text()
    write_unused(table, [inventory])
    assert table.read_text() == "argument,file,reason\n"


def test_a_stage_says_what_its_sets_hold(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "val" / "v.png", 16, 16)
    data = SRData(train=str(folder), val=str(tmp_path / "val"), predict=str(folder), crop_size=8, eval_crop_size=8)
    data.setup("fit")
    assert [(one.argument, one.images) for one in data.inventories("fit")] == [("train", 10), ("val", 1)]
    data.setup("predict")
    assert [(one.argument, one.images) for one in data.inventories("predict")] == [("predict", 2)]
    embedded = Photos(val_crops=2)
    embedded.setup("fit")
    assert [str(one).partition(":")[0] for one in embedded.inventories("fit")] == [
        "train=embedded photos",
        "val=embedded photos",
    ]


@pytest.mark.parametrize(
    ("source", "output", "reason"),
    [
        ("p", "p", "output=p is read as predict=p"),
        ("p", "p/upscaled", "output=p/upscaled lies in .*/p, which is read as predict=p"),
        ("p", ".", "output=. holds .*/p, where images of predict=p lie"),
        ("p", "link", "output=link is read"),  # a link to p
        ("p", "linked/new", "output=linked/new lies in .*/linked, "),  # p holds a link to linked
        ("l.txt", "p", "output=p holds .*/p, where images of predict=l.txt lie"),
        ("m.csv", "p", "output=p holds "),
        ("p/a.png", "p", "output=p holds "),
        ("p/a.png", "p/a.png", "output=p/a.png is an image of predict=p/a.png, which would be lost"),
        ("q", "p", "output=p holds "),  # q holds links to the files of p
    ],
)
def test_an_output_among_the_inputs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, output: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p/a.png", "p/sub/b.png", "linked/c.png"):
        save(tmp_path / name)
    (tmp_path / "link").symlink_to("p")
    (tmp_path / "p" / "linked").symlink_to(tmp_path / "linked")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "a.png").symlink_to(tmp_path / "p" / "a.png")
    (tmp_path / "l.txt").write_text("p/a.png\n")
    (tmp_path / "m.csv").write_text("image_path\np/a.png\n")
    inventory = LQImages(source).inventory("predict")
    with pytest.raises(ValueError, match=f"^{reason}"):
        inventory.check_apart(Path(output))
    for apart in ("out", "pp", "q/../out"):
        inventory.check_apart(Path(apart))
    if source == "p/a.png":
        inventory.check_apart(Path("p/b.png"), within=True)
