"""Test sets of a comparison: folders of pairs or of low-quality images, a configuration's data, or embedded photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from common.datainfo import DataInfo
from common.files import distinct_names
from data.datamodules import Photos
from data.test_sets import load_test_set
from data.textfiles import read_text
from launch.errors import UsageError


@dataclass(frozen=True)
class ImageSet:
    """Low-quality images, with or without references.

    Args:
        name: Name in the tables.
        samples: Samples as `data.datasets` makes them: `lq`, perhaps `hq` (uint8 tensors), `prompt`, `name`.
        scale: Super-resolution factor.
    """

    name: str
    samples: Any
    scale: int


@dataclass(frozen=True)
class Item:
    """An image of a test set as files that hold its pixels.

    Args:
        dataset: Name of its test set.
        name: Name of the image.
        prompt: Text that prompted methods get.
        lq: PNG of the low-quality image.
        hq: PNG of the reference, if there is one.
        lq_key: Digest of the low-quality pixels.
        hq_key: Digest of the reference's pixels, empty without one.
        size: Height and width of a result, px.
        scale: Super-resolution factor.
    """

    dataset: str
    name: str
    prompt: str
    lq: Path
    hq: Path | None
    lq_key: str
    hq_key: str
    size: tuple[int, int]
    scale: int


def open_sets(
    pairs: Sequence[Path] = (), data: LightningDataModule | Sequence[Path] = (), scale: int = 4
) -> list[ImageSet]:
    """Open all test sets.

    Args:
        pairs: Folders of pairs in a layout of `data.layouts`, or folders of low-quality images.
        data: Configurations with a `data` section whose test sets are taken, or a data module; where neither is given,
            and no pairs, the embedded photos.
        scale: Super-resolution factor of `pairs`.

    Raises:
        FileNotFoundError: A folder or configuration is not there.
        UsageError: A configuration has no data section, or one folder is there twice.
        ValueError: A set's files do not pair up, cannot be read, or do not fit the scale.
    """
    sets = _benchmarks(pairs, scale)
    modules = [data] if isinstance(data, LightningDataModule) else [_data_module(path) for path in data]
    if not sets and not modules:
        modules = [Photos()]
    for module in modules:
        module.setup("test")
        loaders: Any = module.test_dataloader()
        names = DataInfo(module).dataset_names("test") or [f"test{i}" for i in range(len(loaders))]
        for name, loader in zip(names, loaders, strict=True):
            sets.append(ImageSet(str(name), loader.dataset, getattr(module, "scale", scale)))
    names = distinct_names([test_set.name for test_set in sets])
    return [replace(test_set, name=name) for test_set, name in zip(sets, names, strict=True)]


def _benchmarks(folders: Sequence[Path], scale: int) -> list[ImageSet]:
    """The sets of folders, by their folders' names.

    Raises:
        UsageError: One folder is there twice.
    """
    if len({folder.expanduser().resolve() for folder in folders}) < len(folders):
        raise UsageError(f"pairs={', '.join(map(str, folders))} names one folder twice; leave one")
    benchmarks = [load_test_set(folder, scale, argument="pairs") for folder in folders]
    names = distinct_names([benchmark.name for benchmark in benchmarks], folders)
    return [ImageSet(name, benchmark.images, scale) for name, benchmark in zip(names, benchmarks, strict=True)]


def _data_module(path: Path) -> LightningDataModule:
    if not path.is_file():
        raise FileNotFoundError(f"data={path}: no such file; give a configuration with a data section")
    section = (yaml.safe_load(read_text(path, "data")) or {}).get("data")
    if not section:
        raise UsageError(f"data={path} has no data section; give it data.class_path, as in data/configs")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    module: LightningDataModule = parser.instantiate(parser.parse_object({"data": section})).data
    return module
