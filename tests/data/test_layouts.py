"""Contract of data.layouts: pairs are found in the layouts that published sets have, and nowhere else.

The files of each layout below are named as the set's release names them; pictures are small and drawn here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from data import SRData
from data.datasets import DegradedCrops, LQImages
from data.layouts import PairFolders, find_layout
from data.pairing import Pairs
from data.test_sets import load_test_set


def scene(seed: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Blobs of a scene of its own, (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, seed: int, factor: int = 1) -> None:
    """A scene at 1/factor of its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(scene(seed))
    image.resize((48 // factor, 32 // factor), Image.Resampling.BOX).save(path)


def make(root: Path, files: dict[str, tuple[int, int]]) -> Path:
    """File -> (scene, factor)."""
    for name, (seed, factor) in files.items():
        save(root / name, seed, factor)
    return root


def two(lq: str, hq: str, lq_name: str = "{}.png", hq_name: str = "{}.png") -> dict[str, tuple[int, int]]:
    """Two scenes in two folders, as pairs of factor 4."""
    names = ("0801", "0802")
    return {
        **{(Path(lq) / lq_name.format(name)).as_posix(): (seed, 4) for seed, name in enumerate(names)},
        **{(Path(hq) / hq_name.format(name)).as_posix(): (seed, 1) for seed, name in enumerate(names)},
    }


LAYOUTS: dict[str, dict[str, tuple[int, int]]] = {
    "StableSR": two("test_LR", "test_HR", "Canon_{}_LR4.png", "Canon_{}_LR4.png"),
    "LR and HR": two("LR", "HR"),
    "lq and gt": two("lq", "gt"),
    "mixed case": two("Lr", "hR", "{}.PNG", "{}.Bmp"),
    "lr_x4 and hr": two("lr_x4", "hr"),
    "LRx4 and HRx4": two("LRx4", "HRx4"),
    "sub-folders": two("lq/s1", "gt/s1"),
    "my_lr and gt": two("my_lr", "gt"),
    "SeeSR": {**two("lr", "gt"), **{f"sr_bicubic/080{i}.png": (i - 1, 1) for i in (1, 2)}},
    "Set5 of BasicSR": {
        **two("LRbicx4", "GTmod12"),
        **{f"{side}/080{i + 1}.png": (i, f) for i in (0, 1) for side, f in (("LRbicx2", 2), ("original", 1))},
    },
    "EDSR's benchmark": {
        **two("LR_bicubic/X4", "HR", "{}x4.png"),
        **{f"LR_bicubic/X2/080{i + 1}x2.png": (i, 2) for i in (0, 1)},
    },
    "DIV2K": two("DIV2K_valid_LR_bicubic/X4", "DIV2K_valid_HR", "{}x4.png"),
    "DIV2K mild": two("DIV2K_valid_LR_mild", "DIV2K_valid_HR", "{}x4m.png"),
    "DIV2K whole": {
        **two("DIV2K_valid_LR_bicubic/X4", "DIV2K_valid_HR", "{}x4.png"),
        **{f"DIV2K_train_HR/000{i}.png": (9, 1) for i in (1, 2, 3)},
        **{f"DIV2K_train_LR_bicubic/X4/000{i}x4.png": (9, 4) for i in (1, 2, 3)},
    },
    "RealSR v3": {
        **two("4", "4", "Canon_{}_LR4.png", "Canon_{}_HR.png"),
        **{f"2/Canon_080{i + 1}_{end}.png": (i, f) for i in (0, 1) for end, f in (("LR2", 2), ("HR", 1))},
    },
    "RealSR v3, one folder": two(".", ".", "Canon_{}_LR4.png", "Canon_{}_HR.png"),
    "RealSR by factor": {
        **two("test/x4/LR", "test/x4/HR"),
        "test/x2/LR/0801.png": (0, 2),
        "test/x2/HR/0801.png": (0, 1),
    },
    "DRealSR": two("Test_x4/test_LR", "Test_x4/test_HR", "P{}_x4.png", "P{}_x1.png"),
    "SelfExSR": two("image_SRF_4", "image_SRF_4", "img_{}_SRF_4_LR.png", "img_{}_SRF_4_HR.png"),
    "x4 beside its image": two(".", ".", "{}x4.png", "{}.png"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_its_pairs_in_test_and_validation(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "set", LAYOUTS[name])
    for argument in ("test", "val", "pairs"):
        images = load_test_set(folder, 4, argument=argument).images
        assert isinstance(images, Pairs)
        assert len(images) == 2
        assert len(images.layout) > len("pairs in ")
        for seed in range(2):  # each LQ image is the mean of its own scene's pixels, whatever files are called
            sample = images[seed]
            hq = sample["hq"].permute(1, 2, 0).numpy().astype(float)
            np.testing.assert_allclose(hq, scene(seed), atol=0)
            blocks = hq.reshape(8, 4, 12, 4, 3).mean((1, 3))
            np.testing.assert_allclose(sample["lq"].permute(1, 2, 0).numpy(), blocks, atol=1)


def test_of_several_splits_and_factors_the_one_asked_for_is_taken(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", LAYOUTS["DIV2K whole"])
    train = find_layout(folder, 4, "train")
    assert train is not None
    assert (train.lq, train.hq) == (folder / "DIV2K_train_LR_bicubic/X4", folder / "DIV2K_train_HR")
    folder = make(tmp_path / "benchmark", LAYOUTS["EDSR's benchmark"])
    found = [find_layout(folder, scale, "test") for scale in (2, 4)]
    assert [layout and layout.lq.name for layout in found] == ["X2", "X4"]


@pytest.mark.parametrize("name", ["LR and HR", "RealSR v3, one folder", "DIV2K"])
def test_training_takes_the_hq_side_and_prediction_the_lq_side(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "set", LAYOUTS[name])
    module = SRData(train=str(folder), predict=str(folder), crop_size=16, num_workers=0, batch_size=2)
    module.setup("fit")
    module.setup("predict")
    assert module.train_images is not None
    files = {file for file, (_, factor) in LAYOUTS[name].items() if factor == 1}
    assert {path.relative_to(folder).as_posix() for path in module.train_images.paths} == files
    (train,) = module.inventories("fit")
    assert train.images == 2
    assert "HQ images alone of pairs" in str(train)
    assert "not used: 2 files" in str(train)
    (loader,) = module.predict_dataloader()
    assert {tuple(batch["lq"].shape) for batch in loader} == {(1, 3, 8, 12)}
    assert "LQ images alone of pairs" in str(module.inventories("predict")[0])


def test_a_prediction_takes_low_quality_images_that_have_no_references(tmp_path: Path) -> None:
    module = SRData(predict=str(make(tmp_path, {"test_LR/a.png": (0, 4), "b.png": (1, 4)})), num_workers=0)
    module.setup("predict")
    assert [batch["name"] for batch in module.predict_dataloader()[0]] == [["b"], ["test_LR/a"]]


def test_validation_degrades_photos_and_never_pairs(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", LAYOUTS["lq and gt"])
    module = SRData(val=[str(folder), str(folder / "gt")], crop_size=16, num_workers=0)
    module.setup("validate")
    kinds = [type(loader.dataset) for loader in module.val_dataloader()]
    assert kinds == [Pairs, DegradedCrops]
    assert module.dataset_names["val"] == ["set", "gt"]


@pytest.mark.parametrize("argument", ["train", "val", "test", "pairs", "predict"])
@pytest.mark.parametrize(
    "tree",
    [
        {f"{year}/IMG_000{i}.jpg": (7 * k + i, k + 1) for k, year in enumerate(("2019", "2020")) for i in range(3)},
        {"a.png": (0, 1), "holiday/a.png": (1, 2), "holiday/HR/a.png": (2, 4), "b/c/a.png": (3, 1)},  # HR: Croatia
        {"Ford GT/IMG_1.jpg": (0, 1), "LR exports/IMG_1.jpg": (1, 1)},
        {"Ford GT/a.jpg": (0, 1), "LR/b.jpg": (0, 4)},
        {f"{kind}/{i}.png": (i, 1) for kind in ("raw", "edited") for i in range(3)},  # the same at one size
        {f"class_{kind}/{i}.png": (10 * kind + i, 1 + kind % 2) for kind in range(9) for i in range(2)},
        {"max2.png": (0, 1), "Canon_1_HR.png": (1, 1), "b_LR4.png": (2, 4), "c.png": (3, 1), "0801x4.png": (4, 4)},
        {"photo.png": (0, 4), "photo_x4.png": (0, 1)},  # an image and its enlargement
        {f"{i:04}x4.png": (i, 4) for i in range(3)},
        {"originals/a.png": (0, 1), "originals/b.png": (1, 1), "cover/a.png": (5, 4)},
    ],
)
def test_a_photo_tree_is_never_refused(tmp_path: Path, tree: dict[str, tuple[int, int]], argument: str) -> None:
    assert find_layout(make(tmp_path, tree), 4, argument) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            two("small", "large"),
            r"looks like 2 pairs of an unknown layout: small/0801\.png .* {lq: .*small, hq: .*large}",
        ),
        (two("set/in", "set/out"), r"looks like 2 pairs .* {lq: .*set/in, hq: .*set/out}"),
        (two(".", ".", "{}_before.png", "{}_after.png"), r"looks like 2 pairs .* csv: a table with"),
        (two("LR", "."), r"looks like 2 pairs .*: LR/0801\.png shows the same as 0801\.png at 1/4"),
        (two("a", "a/HR"), r"looks like 2 pairs .*: a/0801\.png shows the same as a/HR/0801\.png at 1/4"),
        (
            {
                f"Canon/{split}/4/{i}_{end}": (i, f)
                for i in (0, 1)
                for end, f in (("LR4.png", 4), ("HR.png", 1))
                for split in ("Train", "Test")
            },
            r"holds pairs of several splits: Canon/Test/4, Canon/Train/4; name",
        ),
        (
            {**two("LR/train", "HR/train"), **two("LR/valid", "HR/valid")},
            r"holds pairs of several splits: HR/train, HR/v",
        ),
        (two("LR", "HR", "a{}.png", "b{}.png"), r"holds LR and HR, but no name .* fits .* {lq: .*LR, hq: .*HR}"),
        (
            {**two("A/LR", "A/HR"), **two("B/lq", "B/gt")},
            r"holds 2 sets of pairs: A/LR with A/HR, B/lq with B/gt; name",
        ),
        ({**two("p/LR", "p/HR"), "q/a.png": (5, 1)}, r"holds pairs \(p/LR with p/HR\) and 1 other images: q/a\.png"),
        (
            {**two("LR_bicubic", "HR"), **two("LR_wild", "HR")},
            r"holds several folders of one side .*LR_bicubic, LR_wild",
        ),
        ({"LRx2/a.png": (0, 2), "HR/a.png": (0, 1)}, r"holds LRx2, none of scale=4; set scale"),
        ({"a_LR2.png": (0, 2), "a_HR.png": (0, 1)}, r"holds pairs of scale \[2\], none of scale=4"),
    ],
)
def test_what_looks_paired_and_is_not_understood_is_refused(
    tmp_path: Path, files: dict[str, tuple[int, int]], message: str
) -> None:
    folder = make(tmp_path / "set", files)
    with pytest.raises(ValueError, match=rf"test={folder} {message}"):
        load_test_set(folder, 4)
    with pytest.raises(ValueError, match=rf"train={folder} "):
        find_layout(folder, 4, "train")


def test_two_folders_given_as_such_are_pairs_whatever_they_are_called(tmp_path: Path) -> None:
    make(tmp_path / "set", two("small", "large", "{}.png", "b{}.png"))
    (tmp_path / "pairs.csv").write_text("lq,hq\n0802.png,b0802.png\n0801.png,b0801.png\n")
    source = PairFolders(str(tmp_path / "set/small"), str(tmp_path / "set/large"), str(tmp_path / "pairs.csv"))
    plain = PairFolders(*(str(make(tmp_path / "other", LAYOUTS["LR and HR"]) / side) for side in ("LR", "HR")))
    module = SRData(val=source, test=[source, plain], crop_size=16, num_workers=0)
    for stage, sets in (("validate", module.val_dataloader), ("test", module.test_dataloader)):
        module.setup(stage)
        loader: DataLoader[Any] = sets()[0]
        assert [batch["name"] for batch in loader] == [["0802"], ["0801"]]
        assert "hq" in next(iter(loader))
    assert module.dataset_names == {"val": ["set"], "test": ["set", "other"]}
    with pytest.raises(ValueError, match=r"small, hq_dir=.*: 4 files do not pair up"):
        SRData(test=PairFolders(source.lq, source.hq)).setup("test")


def test_skip_reaches_the_pairs_and_is_asked_for(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", two("LR", "HR"))
    save(folder / "LR/alone.png", 5, 4)
    save(folder / "LR/wrong.png", 6, 2)
    save(folder / "HR/wrong.png", 6)
    (folder / "LR/broken.png").write_text("no image")
    save(folder / "HR/broken.png", 7)
    for split in ("val", "test"):
        arguments: dict[str, Any] = {split: str(folder), "num_workers": 0, "crop_size": 16}
        with pytest.raises(ValueError, match=rf"1 files do not pair up: .*alone.*{split} to {{lq.*skip there"):
            SRData(**arguments).setup("validate" if split == "val" else "test")
        module = SRData(**arguments, on_error="skip")
        module.setup("validate" if split == "val" else "test")
        images = (module.val_dataloader() if split == "val" else module.test_dataloader())[0].dataset
        assert isinstance(images, Pairs)
        assert [pair.name for pair in images.pairs] == ["0801", "0802"]
        (inventory,) = module.inventories("validate" if split == "val" else "test")
        assert {path.name for path in inventory.unused} == {"alone.png", "wrong.png", "broken.png"}


def test_pairs_of_another_factor_are_named_with_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "set", {"LR/a.png": (0, 2), "HR/a.png": (0, 1)})
    source = PairFolders(str(folder / "LR"), str(folder / "HR"))
    for one in (str(folder), source):
        with pytest.raises(ValueError, match=r"scale=4 does not fit .* 24x16, .* 48x32; set scale .*, which is 2"):
            load_test_set(one, 4)
        assert isinstance(load_test_set(one, 2).images, Pairs)
    assert isinstance(load_test_set(folder / "LR", 4).images, LQImages)
