"""The foundation's crops: training photos only, each item a function of (seed, item)."""

import numpy as np
import torch

from data.crops import CleanCrops, GridCrops, PhotoCrops, _jitter
from data.photos import PHOTOS


def test_no_photo_has_two_roles() -> None:
    files = [photo.file for photos in PHOTOS.values() for photo in photos]
    assert len(set(files)) == len(files)


def test_training_crops_come_from_training_photos_alone() -> None:
    assert set(CleanCrops("train", 64, 1).names) == {photo.name for photo in PHOTOS["train"]}
    assert {item["name"] for item in GridCrops("val", 128)} == {"astronaut", "coffee"}


def test_an_item_depends_on_seed_and_place_alone() -> None:
    a, b, other = CleanCrops("train", 32, 9), CleanCrops("train", 32, 99), CleanCrops("train", 32, 9, seed=1)
    assert torch.equal(a[7]["hq"], b[7]["hq"])
    assert not torch.equal(a[7]["hq"], a[6]["hq"])
    assert not torch.equal(a[7]["hq"], other[7]["hq"])


def test_grid_crops_are_the_photo_itself() -> None:
    items = GridCrops("val", 128)
    assert len(items) == 16 + 12  # astronaut 512x512, coffee 600x400
    assert torch.equal(items[0]["hq"], items[0]["hq"].mul(255).round() / 255)


def test_jitter_none_changes_nothing_gain_keeps_grey_ratios_and_colour_tints_grey() -> None:
    grey = np.repeat(np.linspace(20, 200, 64, dtype=np.float32).reshape(8, 8, 1), 3, axis=2)
    assert _jitter(grey, "none", np.random.default_rng(0)) is grey
    gained = _jitter(grey, "gain", np.random.default_rng(0))
    ratio = gained[..., 0] / grey[..., 0]
    assert np.allclose(ratio, ratio.flat[0])
    tinted = [_jitter(grey, "colour", np.random.default_rng(seed)) for seed in range(10)]
    ratios = [(t[..., 0] / t[..., 2]).std() for t in tinted]
    assert 4 <= sum(r > 1e-3 for r in ratios) <= 10


def test_the_data_module_makes_its_epoch_of_steps() -> None:
    data = PhotoCrops(crop_size=32, batch_size=2, steps=3)
    batches = list(data.train_dataloader())
    assert [tuple(batch["hq"].shape) for batch in batches] == [(2, 3, 32, 32)] * 3
    assert batches[2]["index"].tolist() == [4, 5]
