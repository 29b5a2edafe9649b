"""Clean crops of the embedded photos, for the recipe of the tiny foundation (`make foundation`)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.decoding import Pixels, read_image
from data.inventory import Inventory
from data.photos import PHOTOS, Photo, Split

Jitter = Literal["none", "gain", "colour"]


def _load(photo: Photo, factor: float) -> Pixels:
    image = Image.fromarray(read_image(photo.path))
    size = (round(image.width * factor), round(image.height * factor))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS) if factor != 1 else image)


def _jitter(crop: NDArray[np.float32], kind: Jitter, rng: np.random.Generator) -> NDArray[np.float32]:
    """Vary the colours of a crop, so that the few photos span more of them.

    `gain` scales each channel; `colour` first tints most grey crops with two colours and permutes some crops' channels.
    """
    if kind == "none":
        return crop
    grey = bool(np.ptp(crop, axis=2).max() < 8)
    if kind == "colour" and grey and rng.random() < 0.7:
        dark, light = rng.uniform(0, 110, 3), rng.uniform(120, 255, 3)
        level = crop[..., :1] / 255
        crop = (dark + (light - dark) * level).astype(np.float32)
    elif kind == "colour" and not grey and rng.random() < 0.25:
        crop = crop[..., rng.permutation(3)]
    gain = rng.uniform(0.75, 1.15, 3).astype(np.float32)
    return np.clip(crop * gain, 0, 255)


class CleanCrops(Dataset[dict[str, Any]]):
    """Random crops, flips and transpositions of a split's photos; item i depends on (seed, i) alone.

    Args:
        split: Split of the photos.
        crop_size: Side of a crop in px.
        length: Items of an epoch.
        seed: First part of every item's random state.
        jitter: Variation of colours, see `_jitter`.
    """

    def __init__(self, split: Split, crop_size: int, length: int, seed: int = 0, jitter: Jitter = "colour") -> None:
        self.crop_size, self.length, self.seed, self.jitter = crop_size, length, seed, jitter
        entries = [(photo, factor) for photo in PHOTOS[split] for factor in photo.rescales]
        self.images = [_load(photo, factor) for photo, factor in entries]
        self.captions = [photo.caption for photo, _ in entries]
        self.names = [photo.name for photo, _ in entries]
        weights = np.array([photo.weight / len(photo.rescales) for photo, _ in entries])
        self.probabilities = weights / weights.sum()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, item))
        entry = int(rng.choice(len(self.images), p=self.probabilities))
        image, size = self.images[entry], self.crop_size
        top, left = (int(rng.integers(0, side - size + 1)) for side in image.shape[:2])
        crop = image[top : top + size, left : left + size].astype(np.float32)
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.5:
            crop = crop.transpose(1, 0, 2)
        crop = _jitter(crop, self.jitter, rng)
        hq = torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))) / 255
        return {"hq": hq, "prompt": self.captions[entry], "name": self.names[entry], "index": item}


class GridCrops(Dataset[dict[str, Any]]):
    """The non-overlapping crops of a split's photos, in order.

    Args:
        split: Split of the photos.
        crop_size: Side of a crop in px.
    """

    def __init__(self, split: Split, crop_size: int) -> None:
        self.items: list[dict[str, Any]] = []
        for photo in PHOTOS[split]:
            image = _load(photo, 1.0)
            for top in range(0, image.shape[0] - crop_size + 1, crop_size):
                for left in range(0, image.shape[1] - crop_size + 1, crop_size):
                    crop = image[top : top + crop_size, left : left + crop_size].transpose(2, 0, 1)
                    hq = torch.from_numpy(np.ascontiguousarray(crop)).float() / 255
                    self.items.append({"hq": hq, "prompt": photo.caption, "name": photo.name, "index": len(self.items)})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.items[item]


class PhotoCrops(LightningDataModule):
    """Clean crops for training and validating the tiny foundation's parts.

    Args:
        crop_size: Side of a training crop in px.
        val_crop_size: Side of a validation crop in px.
        batch_size: Crops a batch.
        steps: Batches of the one epoch that training takes.
        num_workers: Processes that make batches.
        seed: Random seed of the crops; null takes `--seed_everything`, 0 in Python.
        jitter: Variation of the training crops' colours: `none`, `gain` per channel, or `colour` (tints too).
    """

    def __init__(
        self,
        crop_size: int = 64,
        val_crop_size: int = 128,
        batch_size: int = 8,
        steps: int = 1000,
        num_workers: int = 0,
        seed: int | None = None,
        jitter: Jitter = "colour",
    ) -> None:
        super().__init__()
        self.crop_size, self.val_crop_size, self.batch_size = crop_size, val_crop_size, batch_size
        self.steps, self.num_workers, self.seed, self.jitter = steps, num_workers, seed or 0, jitter

    def inventories(self, stage: str) -> list[Inventory]:
        """Inventories of a stage's sets."""
        splits: tuple[Split, ...] = ("train", "val") if stage == "fit" else ("val",)
        return [Inventory(split, None, len(PHOTOS[split]), "photos to crop") for split in splits]

    def train_dataloader(self) -> DataLoader[Any]:
        """One epoch of `steps` batches."""
        crops = CleanCrops("train", self.crop_size, self.steps * self.batch_size, self.seed, self.jitter)
        return DataLoader(crops, self.batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation photos' crops."""
        return DataLoader(GridCrops("val", self.val_crop_size), self.batch_size)
