"""Datasets: photos degraded on the fly, low-quality images alone, and fixed degraded crops (pairs: `data.pairing`).

Every sample is a dict with `lq` (3, h, w) and, where there is one, `hq` (3, s*h, s*w), both uint8 RGB; `prompt` str;
`name` str; `index` int. Its random state comes from numbers of its own, never from the worker that makes it.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.files import first_five
from data.decoding import ImageError, Pixels, image_size, read_image, read_raster
from data.degradations.realesrgan import Degradation, bicubic_downsample, sample_rng
from data.inventory import Inventory, unused_files
from data.packed import Paths, Picked
from data.prompts import GivenPrompts, Texts
from data.rasters import Raster
from data.sampler import SampleKey
from data.sources import Entries, Entry, Source, Window, list_entries, unique_names, whole_entries

ImageSample = dict[str, Any]
OnError = Literal["skip", "raise"]
Flips = Literal["none", "horizontal", "all"]

log = logging.getLogger(__name__)


def to_tensor(image: Pixels) -> Tensor:
    """(H, W, 3) uint8 array to (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def check_on_error(on_error: str) -> None:
    """Refuse anything but "skip" and "raise".

    Raises:
        ValueError: It is another value.
    """
    if on_error not in {"skip", "raise"}:
        raise ValueError(f"on_error={on_error} is unknown; set on_error to skip or raise")


def check_crop_size(crop_size: int, scale: int, argument: str = "crop_size") -> None:
    """Refuse a crop whose LQ side would not be a whole number of px.

    Raises:
        ValueError: The scale is below 1, or the crop is not a positive multiple of it.
    """
    if scale < 1:
        raise ValueError(f"scale={scale} is out of range; set scale >= 1")
    if crop_size < scale or crop_size % scale:
        raise ValueError(
            f"{argument}={crop_size} is not a multiple of scale={scale}; "
            f"set {argument} to {max(1, crop_size // scale) * scale}"
        )


def degrade(hq: Pixels, degradation: Degradation | None, scale: int, rng: np.random.Generator) -> Pixels:
    """Make the low-quality image of a crop.

    Args:
        hq: (s*h, s*w, 3) uint8.
        degradation: Degradation, or None for bicubic down-sampling.
        scale: The factor s.
        rng: Source of its random numbers.

    Returns:
        (h, w, 3) uint8.

    Raises:
        ValueError: The degradation has another scale.
    """
    lq = bicubic_downsample(hq, scale) if degradation is None else degradation(hq, rng)
    if lq.shape[0] * scale != hq.shape[0] or lq.shape[1] * scale != hq.shape[1]:
        raise ValueError(
            f"degradation makes {lq.shape[1]}x{lq.shape[0]} of {hq.shape[1]}x{hq.shape[0]}, which is not "
            f"scale={scale}; set the degradation's scale to {scale}"
        )
    return lq


def resize_by(image: Pixels, factor: float) -> Pixels:
    """Resize by a factor, Lanczos going up and area averaging going down, sides rounded, at least 1 px."""
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    kernel = cv2.INTER_AREA if factor < 1 else cv2.INTER_LANCZOS4
    return np.asarray(cv2.resize(image, (width, height), interpolation=kernel), dtype=np.uint8)


def check_window(path: Path, window: Window, size: tuple[int, int], argument: str) -> None:
    """Refuse a window that reaches beyond its photo.

    Raises:
        ImageError: The window is too large; the message names the photo and the argument that lists the window.
    """
    height, width = size
    if window.top + window.side > height or window.left + window.side > width:
        raise ImageError(
            f"{path} is {width}x{height}, but {argument} has a window of it with top={window.top}, "
            f"left={window.left}, side={window.side}; put back the photo it was made for, or make it again"
        )


def _items(paths: Sequence[Path], factors: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Places of photos and the factors they are resized by, by stem: a row (place, factor) for each."""
    kind = np.dtype([("place", np.int32), ("factor", np.float64)])
    if factors:
        pairs = ((place, factor) for place, path in enumerate(paths) for factor in factors.get(path.stem, (1.0,)))
        return np.array(list(pairs), kind)
    items = np.ones(len(paths), kind)
    items["place"] = np.arange(len(paths))
    return items


class HQImages(Dataset[ImageSample]):
    """Random crops of good photos, or of windows of them, with their degraded versions; keys come from StreamSampler.

    A photo smaller than the crop is continued at its right and lower edge by reflection, as the field's loaders do.
    All random numbers of a sample depend on (seed, epoch, index) only. `layout` is the source's layout in the
    inventory.

    Args:
        source: Photos, see `data.sources.list_entries`. A manifest's row with a window (`top`, `left`, `side`) is that
            part of its photo, with that row's prompt; the crop is then taken within it.
        scale: Super-resolution factor.
        crop_size: Side of the HQ crop in px, a multiple of the scale, at most the side of every window.
        degradation: Degradation that makes the LQ crop; None is bicubic down-sampling.
        seed: First part of every sample's random state.
        prompts: Prompts of the images whose manifest gives none; without it theirs are empty.
        on_error: "skip" takes the next photo instead of an unreadable one, which is counted and named once; "raise"
            stops.
        flips: `horizontal` mirrors crops left to right at random, `all` also turns them (all eight positions of a
            square), `none` leaves them upright.
        rescales: Factors by stem; such a photo is there once for each factor, resized by it.
        cache: Keep decoded photos in memory; for small sets only.
        argument: Name of the user's argument, for messages.

    Raises:
        FileNotFoundError: The source, or a file it lists, does not exist.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        source: Source,
        scale: int = 4,
        crop_size: int = 512,
        degradation: Degradation | None = None,
        seed: int = 0,
        prompts: GivenPrompts = None,
        on_error: OnError = "skip",
        flips: Flips = "all",
        rescales: Mapping[str, Sequence[float]] | None = None,
        cache: bool = False,
        argument: str = "source",
    ) -> None:
        check_crop_size(crop_size, scale)
        check_on_error(on_error)
        if flips not in get_args(Flips):
            raise ValueError(f"flips={flips} is unknown; set flips to one of {', '.join(get_args(Flips))}")
        self.scale, self.crop_size, self.degradation, self.seed = scale, crop_size, degradation, seed
        self.on_error, self.flips, self.cache, self.argument = on_error, flips, cache, argument
        self.source, self.layout = source, "photos to degrade"
        self.entries = list_entries(source, argument)
        smallest = self.entries.smallest_side() or crop_size
        if smallest < crop_size:
            raise ValueError(
                f"crop_size={crop_size} does not fit into the windows of {argument}={source}, the smallest of which "
                f"has side {smallest}; set crop_size to {max(1, smallest // scale) * scale} or less"
            )
        self._files, self._file = self.entries.files, self.entries.file  # windows share a file
        self.paths = Picked(self._files, self._file)
        self.names = Picked(unique_names(self._files), self._file)
        self.texts = Texts(self.entries.prompts, self.names, prompts)
        self._items = _items(self.paths, rescales or {})
        self._unreadable = torch.zeros(len(self._files), dtype=torch.bool).share_memory_()  # seen by all workers
        self._cached: dict[tuple[Path, Window | None, float], Raster] = {}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def skipped(self) -> list[Path]:
        """The unreadable files that this process and its workers have found so far."""
        return [self._files[file] for file in torch.nonzero(self._unreadable).flatten().tolist()]

    def inventory(self, argument: str) -> Inventory:
        """Inventory of the source; unreadable files count as not used once they are found."""
        reasons = {}
        for file in torch.nonzero(self._unreadable).flatten().tolist():
            try:
                self._photo(int(np.flatnonzero(self._file[self._items["place"]] == file)[0]))
            except ImageError as error:
                reasons[self._files[file]] = str(error)
        used: Sequence[Path] = self._files
        if reasons:
            used = Paths(Picked(self._files.texts, np.flatnonzero([path not in reasons for path in self._files])))
        windows = 0 if self.entries.windows is None else len(np.unique(self.entries.keys(), axis=0))
        layout = f"{self.layout}, {windows} windows" if windows else self.layout
        unused = unused_files(self.source, [used, self.texts.files], reasons, "not used")
        return Inventory(argument, self.source, len(used), layout, unused, used)

    def _photo(self, item: int) -> Raster:
        place, factor = self._items[item].tolist()
        path, window = self.paths[place], self.entries.window(place)
        key = path, window, factor
        if key in self._cached:
            return self._cached[key]
        photo = read_raster(path)
        if window is not None:
            check_window(path, window, photo.size, self.argument)
            photo = photo.crop(window.top, window.left, window.side, window.side)
        if factor != 1:
            photo = Raster(resize_by(photo.rgb(), factor))
        if self.cache:
            self._cached[key] = photo
        return photo

    def _readable_photo(self, index: int) -> tuple[int, Raster]:
        """Photo of the key's item, or of the next that can be read, and that item."""
        for item in (*range(index, len(self._items)), *range(index)):
            file = int(self._file[self._items[item]["place"]])
            if self._unreadable[file]:
                continue
            try:
                return item, self._photo(item)
            except ImageError as error:
                if self.on_error == "raise":
                    raise
                self._unreadable[file] = True
                log.warning("skipped, %d so far: %s", len(self.skipped), error)
        raise ImageError(
            f"{self.argument}: none of the {len(self._files)} images can be read, among them "
            f"{first_five(self._files)}; replace the files"
        )

    def _crop(self, photo: Raster, rng: np.random.Generator) -> Pixels:
        size = self.crop_size
        top, left = (int(rng.integers(max(side, size) - size + 1)) for side in photo.size)
        crop = photo.crop(top, left, size, size).rgb()
        height, width = crop.shape[:2]
        if height < size or width < size:
            crop = np.pad(crop, ((0, size - height), (0, size - width), (0, 0)), mode="reflect")
        if self.flips != "none":
            mirrored = bool(rng.integers(2))
            turns = int(rng.integers(4)) if self.flips == "all" else 0
            crop = np.rot90(crop[:, ::-1] if mirrored else crop, turns)
        return np.ascontiguousarray(crop)

    def __getitem__(self, key: SampleKey) -> ImageSample:
        epoch, index, position = key
        item, photo = self._readable_photo(index)
        rng = sample_rng(self.seed, epoch, index)  # of the key, so a replacement is another crop than that item's own
        hq = self._crop(photo, rng)
        lq = degrade(hq, self.degradation, self.scale, rng)
        place = int(self._items[item]["place"])
        return {
            "lq": to_tensor(lq),
            "hq": to_tensor(hq),
            "prompt": self.texts[place],
            "name": self.names[place],
            "index": position,
        }


class LQImages(Dataset[ImageSample]):
    """Low-quality images without reference, whole; samples have no `hq`.

    Names are unique: the path below the folder without extension, or with it where two files differ in that alone.

    Args:
        source: Images, see `data.sources.list_images`.
        prompts: Prompts of the images whose manifest gives none; without it theirs are empty.
        on_error: "raise" stops at a file without a readable header, and at a damaged one when its turn comes; "skip"
            reads all files beforehand, names the unreadable ones and continues without them.
        argument: Name of the user's argument, for messages.

    Raises:
        FileNotFoundError: The source, or a file it lists, does not exist.
        ImageError: A file cannot be read, or none of them.
        ValueError: There are no images, one is listed twice, or the folder holds pairs (`test_LR` and `test_HR`).
    """

    def __init__(
        self,
        source: Source,
        prompts: GivenPrompts = None,
        on_error: OnError = "raise",
        argument: str = "source",
    ) -> None:
        check_on_error(on_error)
        root = Path(source).expanduser() if isinstance(source, str | Path) else None
        if root is not None and root.is_dir():
            references = next((path for path in sorted(root.rglob("test_HR")) if path.is_dir()), None)
            if references is not None:
                raise ValueError(
                    f"{argument}={source} holds references ({references}) and LQ images; "
                    f"give {references.with_name('test_LR')}"
                )
        else:
            root = None
        entries = whole_entries(source, argument)
        if len(entries.files) < len(entries):
            twice = np.flatnonzero(np.bincount(entries.file) > 1).tolist()
            named = first_five(entries.files[i] for i in twice)
            raise ValueError(f"{argument}={source} lists {named} more than once; keep one each")
        self.source, self._broken = source, dict[Path, str]()
        self.layout = "images without references" if root is None else "a folder of images without references"
        self.paths: Sequence[Path] = entries.files
        prompts_given: Sequence[str | None] = entries.prompts
        if on_error == "skip":
            readable = np.flatnonzero([self._can_be_read(path) for path in entries.files])
            if self.skipped:
                log.warning("%s=%s: skipped %d: %s", argument, source, len(self.skipped), first_five(self.skipped))
            if not len(readable):
                raise ImageError(f"{argument}={source}: none of its images can be read; {self.skipped[0]}")
            self.paths = Paths(Picked(entries.files.texts, readable))
            prompts_given = Picked(entries.prompts, readable)
        else:
            for path in entries.files:
                image_size(path)
        self.names = self.sample_names = unique_names(self.paths, root)
        self.texts = Texts(prompts_given, self.names, prompts)

    def _can_be_read(self, path: Path) -> bool:
        try:
            read_image(path)
        except ImageError as error:
            self._broken[path] = str(error)
            return False
        return True

    @property
    def skipped(self) -> list[str]:
        """Reasons for files that were left out."""
        return list(self._broken.values())

    def inventory(self, argument: str) -> Inventory:
        """Inventory of the source."""
        unused = unused_files(self.source, [self.paths, self.texts.files], self._broken, "not used")
        return Inventory(argument, self.source, len(self.paths), self.layout, unused, self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageSample:
        return {
            "lq": to_tensor(read_image(self.paths[index])),
            "prompt": self.texts[index],
            "name": self.names[index],
            "index": index,
        }


class DegradedCrops(Dataset[ImageSample]):
    """A fixed grid of crops of good photos, or of windows of them, each degraded under fixed seeds.

    The grid starts at the upper left; incomplete crops right and below are dropped. A crop's degradation depends
    on its name and its seed, so it stays the same when photos are added. For validation and test.

    Args:
        paths: Photos by name, or a source as in `data.sources.list_entries`. A manifest's row with a window (`top`,
            `left`, `side`) is that part of its photo, with that row's prompt.
        crop_size: Side of an HQ crop in px, a multiple of the scale.
        seeds: Seeds of the degradations; each crop appears once for each seed.
        degradation: Degradation that makes the LQ crop; None is bicubic down-sampling.
        scale: Super-resolution factor.
        prompts: Prompts of the photos whose manifest gives none; without it theirs are empty.
        max_crops: Largest number of crops, spread evenly over all; None keeps all.
        on_error: "raise", or "skip" for photos that cannot be read or are smaller than a crop; they are named.
        argument: Name of the user's argument, for messages.

    Raises:
        ValueError: An argument is out of range, or no crop is left.
    """

    def __init__(
        self,
        paths: Mapping[str, Path] | Source,
        crop_size: int,
        seeds: Sequence[int],
        degradation: Degradation | None,
        scale: int = 4,
        prompts: GivenPrompts = None,
        max_crops: int | None = None,
        on_error: OnError = "raise",
        argument: str = "paths",
    ) -> None:
        check_crop_size(crop_size, scale)
        check_on_error(on_error)
        if not seeds:
            raise ValueError(f"seeds={list(seeds)} leaves no crops; give at least one seed")
        if max_crops is not None and max_crops < 1:
            raise ValueError(f"max_crops={max_crops} leaves no crops; set max_crops >= 1 or null")
        self.crop_size, self.degradation, self.scale = crop_size, degradation, scale
        self.source: Source | None = None if isinstance(paths, Mapping) else paths
        self.argument = argument
        self._list(paths, prompts)
        self._broken: dict[Path, str] = {}
        sizes = self._sizes(on_error)
        rows, self._columns = (sizes // crop_size).T
        self._seeds = list(seeds)
        self._ends = np.cumsum(rows * self._columns * len(self._seeds))  # of each entry's crops, in a row of all
        if self.skipped:
            log.warning("%s: skipped %d: %s", argument, len(self.skipped), first_five(self.skipped))
        crops = int(self._ends[-1])
        if not crops:
            raise ValueError(f"{argument}: no photo holds a crop of crop_size={crop_size}; set a smaller crop_size")
        self._crops, self._keep = crops, crops if max_crops is None else min(max_crops, crops)
        self._last: tuple[Path, Raster] | None = None  # crops come photo by photo

    def _list(self, paths: Mapping[str, Path] | Source, prompts: GivenPrompts) -> None:
        """Entries, names and texts of the photos that are cut."""
        if isinstance(paths, Mapping):
            self.entries = Entries(map(Entry, paths.values()))
            self._photos: Sequence[str] = list(paths)
            self.texts = Texts([None] * len(self.entries), self._photos, prompts)
            return
        self.entries = list_entries(paths, self.argument).distinct()
        smallest = self.entries.smallest_side() or self.crop_size
        if smallest < self.crop_size:
            raise ValueError(
                f"crop_size={self.crop_size} does not fit into the windows of {self.argument}={paths}, the smallest of "
                f"which has side {smallest}; set it to {max(1, smallest // self.scale) * self.scale} or less"
            )
        self._photos = Picked(unique_names(self.entries.files), self.entries.file)
        self.texts = Texts(self.entries.prompts, self._photos, prompts)

    def _sizes(self, on_error: OnError) -> np.ndarray:
        """Height and width of each entry, (N, 2); zeros for one that is left out."""
        file, files = self.entries.file, self.entries.files
        by_file = np.argsort(file, kind="stable")
        ends = np.cumsum(np.bincount(file, minlength=len(files)))
        sizes = np.zeros((len(file), 2), np.int64)
        for path, start, end in zip(files, [0, *ends], ends, strict=False):
            places = by_file[start:end].tolist()
            windows = [self.entries.window(place) for place in places]
            size = self._size(path, windows, on_error)
            for place, window in zip(places, windows, strict=True):
                sizes[place] = size if window is None or path in self._broken else (window.side, window.side)
        return sizes

    def _size(self, path: Path, windows: Sequence[Window | None], on_error: OnError) -> tuple[int, int]:
        """Height and width of a photo that holds these windows of it, or a crop; (0, 0) for one that is left out."""
        try:
            height, width = image_size(path) if on_error == "raise" else read_image(path).shape[:2]
            for window in windows:
                if window is not None:
                    check_window(path, window, (height, width), self.argument)
                elif min(height, width) < self.crop_size:
                    raise ImageError(
                        f"{path} is {width}x{height}, smaller than crop_size={self.crop_size}; "
                        "set a smaller crop_size or take the photo out of the set"
                    )
        except ImageError as error:
            if on_error == "raise":
                raise
            self._broken[path] = str(error)
            return 0, 0
        return height, width

    def _place(self, index: int) -> tuple[int, int, int, int]:
        """Entry, row, column and seed of a sample."""
        crop = range(len(self))[index] * self._crops // self._keep
        entry = int(np.searchsorted(self._ends, crop, "right"))
        cell, seed = divmod(crop - (int(self._ends[entry - 1]) if entry else 0), len(self._seeds))
        return entry, *divmod(cell, int(self._columns[entry])), self._seeds[seed]

    def _name(self, entry: int, row: int, column: int) -> str:
        """A crop's name: its photo, its window and its place in it."""
        return "_".join(map(str, (self._photos[entry], *(self.entries.window(entry) or ()), f"r{row}c{column}")))

    @property
    def skipped(self) -> list[str]:
        """Reasons for photos that were left out."""
        return list(self._broken.values())

    def inventory(self, argument: str) -> Inventory:
        """Inventory of the source: photos, cut to crops."""
        good = np.fromiter((path not in self._broken for path in self.entries.files), bool)
        used = Paths(Picked(self.entries.files.texts, np.flatnonzero(good)))
        given = self.entries.windows
        windows = 0 if given is None else int((good[self.entries.file] & (given[:, 2] > 0)).sum())
        layout = f"photos{f', {windows} windows,' if windows else ''} cut to {len(self)} crops of {self.crop_size} px"
        if self.source is None:
            return Inventory(argument, None, len(used), layout)
        unused = unused_files(self.source, [used, self.texts.files], self._broken, "not used")
        return Inventory(argument, self.source, len(used), layout, unused, used)

    @property
    def sample_names(self) -> list[str]:
        """The names of all samples."""
        return [f"{self._name(*place)}_s{seed}" for *place, seed in map(self._place, range(len(self)))]

    def __len__(self) -> int:
        return self._keep

    def __getitem__(self, index: int) -> ImageSample:
        entry, row, column, seed = self._place(index)
        (path, _, window), size = self.entries[entry], self.crop_size
        if self._last is None or self._last[0] != path:
            self._last = path, read_raster(path)
        top, left = (window.top, window.left) if window is not None else (0, 0)
        hq = np.ascontiguousarray(self._last[1].crop(top + row * size, left + column * size, size, size).rgb())
        crop = self._name(entry, row, column)
        lq = degrade(hq, self.degradation, self.scale, sample_rng(seed, 0, zlib.crc32(crop.encode())))
        return {
            "lq": to_tensor(lq),
            "hq": to_tensor(hq),
            "prompt": self.texts[entry],
            "name": f"{crop}_s{seed}",
            "index": index,
        }
