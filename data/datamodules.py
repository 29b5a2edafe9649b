"""The DataModules a config names: photos and benchmarks of the user's own, or the embedded photos."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from common.files import distinct_names
from data.datasets import (
    DegradedCrops,
    Flips,
    HQImages,
    ImageSample,
    LQImages,
    OnError,
    check_crop_size,
    check_on_error,
)
from data.degradations.config import DegradationConfig, preset
from data.degradations.realesrgan import Degradation
from data.inventory import Inventory
from data.layouts import Layout, PairFolders
from data.pairing import match_pairs
from data.photos import CAPTIONS, PHOTOS, photo_paths
from data.prompts import GivenPrompts, Prompts
from data.sampler import RankShare, StreamSampler
from data.sources import Part
from data.test_sets import folder_layout, load_pairs, load_test_set

NamedSet = tuple[str, Dataset[ImageSample]]
PairSource = str | PairFolders

_SPLITS = ("train", "val", "test", "predict")
_DRAWS = 10  # entries in the training list for a photo of weight 1


T = TypeVar("T", str | Part, PairSource)


def _as_list(source: T | list[T] | None) -> list[T]:
    return list(source) if isinstance(source, list) else [] if source is None else [source]


def _single_thread(_worker: int) -> None:
    """Keep a data worker to its own core."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _distinct(sets: Sequence[NamedSet], sources: Sequence[PairSource]) -> list[NamedSet]:
    """Give sets of the same name distinct names.

    Raises:
        ValueError: A set is given twice.
    """
    same = {source if isinstance(source, PairFolders) else Path(source).expanduser().resolve() for source in sources}
    if len(same) < len(sources):
        listed = ", ".join(map(str, sources))
        raise ValueError(f"sets {listed} would share the names of a set that is given twice; remove one")
    places = [source.place if isinstance(source, PairFolders) else source for source in sources]
    named = distinct_names([name for name, _ in sets], places)
    return [(name, images) for name, (_, images) in zip(named, sets, strict=True)]


def _side(layout: Layout, side: str, scale: int) -> list[str]:
    """The folder of one side, `lq` or `hq`, of a folder's pairs; its files where both sides lie in one folder."""
    if layout.lq != layout.hq:
        return [str(getattr(layout, side))]
    return [str(pair[side == "hq"]) for pair in match_pairs(layout.lq, layout.hq, scale)[0]]


def _hq_side(source: str | Part, scale: int) -> tuple[list[str | Part], Layout | None]:
    """The images of a source of good photos: all, or the HQ images of a folder of pairs and their layout."""
    part = source if isinstance(source, Part) else Part(source)
    layout = folder_layout(Path(part.source).expanduser(), scale, "train")
    if layout is None:
        return [source], None
    files = _side(layout, "hq", scale)
    if len(files) == 1:
        return [replace(part, source=files[0])], layout
    return [Part(file, None, part.weight) for file in files[: part.first]], layout


class SRData(LightningDataModule):
    """Good photos degraded on the fly for training; benchmarks for validation, test and prediction.

    The order of training samples and all random numbers in them depend on `seed` and the place in the run alone. A
    resumed run continues with the next sample, and neither workers nor the number of ranks change the samples. Run it
    under a Trainer with `use_distributed_sampler=False`: the samplers here divide the data among the ranks.

    Args:
        train: Good photos: folder (searched recursively), txt list, csv or parquet manifest (column image_path,
            optionally prompt, optionally top, left, side of a window in px, as isr caption writes them), or a list of
            these. `{source: FFHQ, first: 10000, weight: 2}` takes the first photos of one and draws each twice a pass.
            A folder of pairs gives its HQ images, which are degraded.
        val: One or more sets: folders of pairs (test_LR and test_HR, LR and HR, lq and gt, RealSR's names in one folder
            and other layouts of published sets), two folders as `{lq: A, hq: B}` (optionally `csv`, a table with the
            columns lq and hq), or good photos, or windows of them as for train, that are cut to a grid and degraded.
        test: One or more sets: pairs as for val, or folders of low-quality images without references.
        predict: Low-quality images: folder, image, txt list or manifest. A folder of pairs gives its LQ images.
        scale: Super-resolution factor.
        crop_size: Side of a training crop, HQ px.
        batch_size: Training crops of one process's batch; null is 4, or what `global_batch_size` gives.
        global_batch_size: Training crops of one update: those of a batch, times the processes, times the batches that
            `model.accumulate` makes an update of. A process's batch follows from it. Set this or batch_size.
        num_workers: Processes that make training batches on each rank; 0 makes them in the main process.
        degradation: osediff, omgsr, invsr, bicubic, or a DegradationConfig's fields.
        train_degradation: Degradation of training crops alone, with the same values; null is `degradation`.
        batches_per_epoch: Training batches that Lightning calls an epoch; null is one pass over the photos.
        eval_crop_size: Side of the crops that photos for validation are cut to, HQ px; null is crop_size.
        val_seeds: Number of degradations of each such crop.
        val_crops: Largest number of crops of each such set, spread evenly over it; null is all.
        seed: Random seed of order, crops, flips and degradations in training; null takes `--seed_everything`, 0 in
            Python. Validation and test degrade alike in all runs.
        flips: `horizontal` mirrors training crops left to right at random, `all` also turns them by 90, 180 or 270
            degrees, `none` leaves them upright.
        prompts: A folder of <image name>.txt or a csv with columns name and prompt, for all sets, or one for each of
            train, val, test and predict. Images whose manifest has a prompt keep that. null: prompts are empty.
        on_error: Action for images that are unreadable or, in pairs, do not fit: skip (counted and named) or raise.
            null: raise for pairs and test sets, as a mean over fewer images is another mean, else skip.

    Attributes:
        dataset_names: Names of the sets behind the loaders of "val" and "test", in order; known after `setup`.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        train: str | Part | list[str | Part] | None = None,
        val: PairSource | list[PairSource] | None = None,
        test: PairSource | list[PairSource] | None = None,
        predict: str | None = None,
        scale: int = 4,
        crop_size: int = 512,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        num_workers: int = 4,
        degradation: str | DegradationConfig = "osediff",
        train_degradation: str | DegradationConfig | None = None,
        batches_per_epoch: int | None = None,
        eval_crop_size: int | None = None,
        val_seeds: int = 1,
        val_crops: int | None = None,
        seed: int | None = None,
        flips: Flips = "all",
        prompts: str | dict[str, str] | None = None,
        on_error: OnError | None = None,
    ) -> None:
        super().__init__()
        check_crop_size(crop_size, scale)
        check_crop_size(eval_crop_size or crop_size, scale, "eval_crop_size")
        check_on_error(on_error or "raise")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("global_batch_size", global_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("batches_per_epoch", batches_per_epoch, 1),
            ("val_seeds", val_seeds, 1),
            ("val_crops", val_crops, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is out of range; set {name} >= {least}")
        if batch_size is not None and global_batch_size is not None:
            raise ValueError(
                f"batch_size={batch_size} and global_batch_size={global_batch_size} are both set; set one of them to "
                "null: batch_size counts the crops of one process, global_batch_size those of one update"
            )
        unknown = sorted(set(prompts) - set(_SPLITS)) if isinstance(prompts, dict) else []
        if unknown:
            raise ValueError(f"prompts has the keys {', '.join(unknown)}; use {', '.join(_SPLITS)}")
        self.train, self.val, self.test, self.predict = train, val, test, predict
        self.scale, self.crop_size, self.eval_crop_size = scale, crop_size, eval_crop_size or crop_size
        self.batch_size, self.global_batch_size = batch_size or global_batch_size or 4, global_batch_size
        self.num_workers, self.batches_per_epoch = num_workers, batches_per_epoch
        self.val_seeds, self.val_crops, self.seed, self.flips = val_seeds, val_crops, seed or 0, flips
        self.prompts, self.on_error = prompts, on_error or "skip"
        self.on_pair_error: OnError = on_error or "raise"
        self.degradation = self._degradation(degradation)
        self.train_degradation = self.degradation
        if train_degradation is not None:
            self.train_degradation = self._degradation(train_degradation, "train_degradation")
        self.dataset_names: dict[str, list[str]] = {"val": [], "test": []}
        self.train_images: HQImages | None = None
        self._sets: dict[str, list[Dataset[ImageSample]]] = {"val": [], "test": [], "predict": []}

    def _degradation(self, wanted: str | DegradationConfig, argument: str = "degradation") -> Degradation | None:
        """Degradation that makes LQ crops; None is bicubic. A preset uses the scale; own fields must name the same."""
        if wanted == "bicubic":
            return None
        if isinstance(wanted, str):
            return Degradation(replace(preset(wanted), scale=self.scale))
        if wanted.scale != self.scale:
            raise ValueError(f"{argument}.scale={wanted.scale} is not scale={self.scale}; set both to one value")
        return Degradation(wanted)

    def _prompts(self, split: str) -> GivenPrompts:
        source = self.prompts.get(split) if isinstance(self.prompts, dict) else self.prompts
        return None if source is None else Prompts(source)

    def _hq_images(self, source: Sequence[str | Part]) -> HQImages:
        return HQImages(
            source,
            self.scale,
            self.crop_size,
            self.train_degradation,
            self.seed,
            self._prompts("train"),
            self.on_error,
            self.flips,
            argument="train",
        )

    def _train_images(self) -> HQImages:
        if not self.train:
            raise ValueError("train=null leaves nothing to fit; set data.init_args.train to a folder of good photos")
        sources = _as_list(self.train)
        taken = [_hq_side(source, self.scale) for source in sources]
        layouts = [layout for _, layout in taken if layout is not None]
        images = self._hq_images([part for parts, _ in taken for part in parts])
        if layouts:
            images.source = sources
            images.layout = f"photos to degrade; HQ images alone of {', '.join(layout.name for layout in layouts)}"
        return images

    def _val_set(self, source: PairSource) -> NamedSet:
        pairs = load_pairs(source, self.scale, self._prompts("val"), self.on_pair_error, "val")
        if pairs is not None:
            return pairs.name, pairs.images
        folder = Path(str(source)).expanduser()
        crops = DegradedCrops(
            str(source),
            self.eval_crop_size,
            range(self.val_seeds),
            self.degradation,
            self.scale,
            self._prompts("val"),
            self.val_crops,
            self.on_error,
            "val",
        )
        return os.path.basename(os.path.abspath(folder.with_suffix("") if folder.is_file() else folder)), crops

    def _val_sets(self) -> list[NamedSet]:
        sources = _as_list(self.val)
        return _distinct([self._val_set(source) for source in sources], sources)

    def _test_sets(self) -> list[NamedSet]:
        sources = _as_list(self.test)
        if not sources:
            raise ValueError("test=null leaves nothing to test; set data.init_args.test to a benchmark folder")
        prompts = self._prompts("test")
        benchmarks = [load_test_set(source, self.scale, prompts, self.on_pair_error) for source in sources]
        return _distinct([(benchmark.name, benchmark.images) for benchmark in benchmarks], sources)

    def _predict_images(self) -> Dataset[ImageSample]:
        if self.predict is None:
            raise ValueError("predict=null leaves nothing to do; set data.init_args.predict to a folder of images")
        layout = folder_layout(Path(self.predict).expanduser(), self.scale, "predict")
        if layout is None:
            return LQImages(self.predict, self._prompts("predict"), self.on_error, "predict")
        lqs = _side(layout, "lq", self.scale)
        source: Any = Path(lqs[0]) if layout.lq != layout.hq else lqs
        images = LQImages(source, self._prompts("predict"), self.on_error, "predict")
        images.source, images.layout = self.predict, f"LQ images alone of {layout.name}"
        return images

    def setup(self, stage: str) -> None:
        """Find the files of a stage and check them.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            FileNotFoundError: A source does not exist.
            ValueError: The stage has no data, its files do not fit, the model has another scale, or the global batch
                has no equal parts.
        """
        model: Any = self.trainer.lightning_module if self.trainer is not None else None
        if getattr(model, "scale", self.scale) != self.scale:
            raise ValueError(f"data.scale={self.scale} is not model.scale={model.scale}; set both to one value")
        if stage == "fit":
            self.train_images = self._train_images()
        if stage in {"fit", "validate"}:
            self._take("val", self._val_sets())
        if stage == "fit":
            self._divide_batch()
        if stage == "test":
            self._take("test", self._test_sets())
        if stage == "predict":
            self._sets["predict"] = [self._predict_images()]

    def _take(self, split: str, sets: list[NamedSet]) -> None:
        self.dataset_names[split] = [name for name, _ in sets]
        self._sets[split] = [images for _, images in sets]

    def inventories(self, stage: str) -> list[Inventory]:
        """Inventories of a stage's sets, known after `setup(stage)`."""
        splits = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,))
        sets: dict[str, list[Any]] = {"train": [self.train_images] if self.train_images is not None else []}
        return [images.inventory(split) for split in splits for images in (sets | self._sets)[split]]

    def check_apart(self, stage: str, output: Path, within: bool = False) -> None:
        """Refuse an output folder that is, holds or lies in an input; see `Inventory.check_apart`.

        Args:
            stage: Stage whose inputs are checked; they are known after `setup(stage)`.
            output: The folder.
            within: Allow input files in the output folder.

        Raises:
            ValueError: It is, holds or lies in an input.
        """
        for inventory in self.inventories(stage):
            inventory.check_apart(output, within)

    def names_to_predict(self) -> list[str]:
        """Names of the images to predict and of their results; known after `setup("predict")`."""
        sets: list[Any] = self._sets["predict"]
        return [name for images in sets for name in images.sample_names]

    def texts(self) -> list[str]:
        """The distinct prompts of the training and validation sets, known after `setup`."""
        sets: list[Any] = [self.train_images, *self._sets["val"]]
        return list(dict.fromkeys(text for images in sets if images is not None for text in images.texts))

    def has_prompts(self, split: str) -> bool:
        """False where no image of a split has a prompt; known after `setup`.

        Args:
            split: `train`, `val`, `test` or `predict`.
        """
        sets: list[Any] = [self.train_images] if split == "train" else self._sets[split]
        return not sets or any(text for images in sets for text in images.texts)

    def _ranks(self) -> tuple[int, int]:
        """(number of ranks, this rank)."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _parts(self) -> tuple[int, int]:
        """(processes, batches that make an update), between which a global batch is shared out."""
        if self.trainer is None:
            return 1, 1
        model, accumulated = self.trainer.lightning_module, getattr(self.trainer, "accumulate_grad_batches", 1)
        return self.trainer.world_size, getattr(model, "accumulate", accumulated)

    def _divide_batch(self) -> None:
        """Set a process's batch to its part of the global one."""
        processes, accumulated = self._parts()
        parts, whole = processes * accumulated, self.global_batch_size
        if whole is not None and whole % parts:
            near = " or ".join(str(n) for n in (whole // parts * parts, (whole // parts + 1) * parts) if n)
            raise ValueError(
                f"global_batch_size={whole} has no equal parts for {processes} processes x {accumulated} accumulated "
                f"batches; set data.init_args.global_batch_size to {near}, or other trainer.devices or model.accumulate"
            )
        if whole is not None:
            self.batch_size = whole // parts

    def _epoch_batches(self, dataset_size: int, world_size: int) -> int:
        """Batches of an epoch, cut to the trainer's limit so that the sampler's epochs are Lightning's.

        Raises:
            ValueError: The trainer asks for a share of an epoch, or for a few batches over and over.
        """
        batches = self.batches_per_epoch or -(-dataset_size // (self.batch_size * world_size))
        if self.trainer is None:
            return batches
        limit = self.trainer.limit_train_batches
        overfit = getattr(self.trainer, "overfit_batches", 0)
        if overfit:
            raise ValueError(
                f"trainer.overfit_batches={overfit} cannot apply to an endless stream of "
                "crops; set data.init_args.train to the few photos instead"
            )
        if isinstance(limit, float) and limit != 1.0:
            raise ValueError(
                f"trainer.limit_train_batches={limit} is a share of an epoch; set it to a whole number, or set "
                "data.init_args.batches_per_epoch"
            )
        return batches if limit is None or isinstance(limit, float) else max(1, min(batches, limit))

    def _batches_taken(self) -> int:
        """Training batches the run has taken, over all resumes."""
        if self.trainer is None:
            return 0
        counted = getattr(self.trainer.lightning_module, "train_step", None)
        if counted is not None:
            return int(counted)
        total = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(getattr(total, "processed", total.completed))

    def train_dataloader(self) -> DataLoader[ImageSample]:
        """Batches of the stream, from the run's position on."""
        if self.train_images is None:
            raise RuntimeError("train_dataloader was asked before setup('fit'); call setup('fit') first")
        world_size, rank = self._ranks()
        if self.trainer is not None and rank == 0:
            processes, accumulated = self._parts()
            print(
                f"isr: global batch {self.batch_size * processes * accumulated} = {self.batch_size} x {processes} x "
                f"{accumulated} (batch of a process x processes x accumulated batches)",
                file=sys.stderr,
            )
        size = len(self.train_images)
        sampler = StreamSampler(
            size,
            self.batch_size,
            self.seed,
            world_size,
            rank,
            self._epoch_batches(size, world_size),
            self._batches_taken,
        )
        return DataLoader(
            self.train_images,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_single_thread,
            pin_memory=torch.cuda.is_available(),
        )

    def _eval_loader(self, images: Any) -> DataLoader[ImageSample]:
        return DataLoader(
            images,
            batch_size=1,  # sizes differ
            sampler=RankShare(len(images), *self._ranks()),
            num_workers=min(self.num_workers, 2),  # one image at a time is soon read
            worker_init_fn=_single_thread,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> list[DataLoader[ImageSample]]:
        """One loader a validation set, named by `dataset_names["val"]`; none without any."""
        return [self._eval_loader(images) for images in self._sets["val"]]

    def test_dataloader(self) -> list[DataLoader[ImageSample]]:
        """One loader a benchmark, named by `dataset_names["test"]`."""
        return [self._eval_loader(images) for images in self._sets["test"]]

    def predict_dataloader(self) -> list[DataLoader[ImageSample]]:
        """One loader over the images to restore."""
        return [self._eval_loader(images) for images in self._sets["predict"]]


class Photos(SRData):
    """SRData whose sets are the embedded photos unless others are named: no download, fixed roles.

    Args:
        crop_size: Side of a training crop, HQ px.
        eval_crop_size: Side of the crops that validation and test photos are cut to, HQ px.
        test_seeds: Number of degradations of each test crop.
        test_crops: Largest number of them, spread evenly; null keeps all.
        num_workers: Processes that make training batches on each rank; 0 makes them in the main process.
        **kwargs: Arguments of SRData. Sets that are null are the embedded photos; predict takes the test photos' crops.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        crop_size: int = 128,
        eval_crop_size: int = 128,
        test_seeds: int = 3,
        test_crops: int | None = None,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(crop_size=crop_size, eval_crop_size=eval_crop_size, num_workers=num_workers, **kwargs)
        if test_seeds < 1:
            raise ValueError(f"test_seeds={test_seeds} is out of range; set test_seeds >= 1")
        self.test_seeds, self.test_crops = test_seeds, test_crops

    def _train_images(self) -> HQImages:
        if self.train:
            return super()._train_images()
        photos = PHOTOS["train"]
        paths = photo_paths("train")
        draws = [
            paths[photo.name]
            for photo in photos
            for _ in range(max(1, round(_DRAWS * photo.weight / len(photo.rescales))))
        ]
        return HQImages(
            draws,
            self.scale,
            self.crop_size,
            self.train_degradation,
            self.seed,
            self._prompts("train") or CAPTIONS,
            self.on_error,
            self.flips,
            rescales={photo.path.stem: photo.rescales for photo in photos},
            cache=True,
        )

    def inventories(self, stage: str) -> list[Inventory]:
        """Inventories as for SRData; embedded photos have a layout of that name."""
        found = super().inventories(stage)
        return [replace(one, source=None) if one.argument == "train" and not self.train else one for one in found]

    def _crops(self, split: str, seeds: int, most: int | None) -> DegradedCrops:
        photos = photo_paths("val") if split == "val" else photo_paths("test")
        captions = self._prompts(split) or CAPTIONS
        return DegradedCrops(
            photos, self.eval_crop_size, range(seeds), self.degradation, self.scale, captions, most, "raise", split
        )

    def _val_sets(self) -> list[NamedSet]:
        return super()._val_sets() if self.val else [("photos", self._crops("val", self.val_seeds, self.val_crops))]

    def _test_sets(self) -> list[NamedSet]:
        if self.test:
            return super()._test_sets()
        return [("photos", self._crops("test", self.test_seeds, self.test_crops))]

    def _predict_images(self) -> Dataset[ImageSample]:
        return super()._predict_images() if self.predict else self._crops("test", 1, None)
