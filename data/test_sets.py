"""Test sets: folders of pairs in one of the known layouts, or low-quality images alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from common.files import plain_name
from data.datasets import LQImages, OnError
from data.layouts import Layout, PairFolders, find_layout
from data.pairing import Pairs
from data.prompts import GivenPrompts


@dataclass(frozen=True)
class LoadedSet:
    """A set's name (its folder's) and images: Pairs with references, or LQImages without."""

    name: str
    images: Pairs | LQImages


def load_test_set(
    source: str | Path | PairFolders,
    scale: int,
    prompts: GivenPrompts = None,
    on_error: OnError = "raise",
    argument: str = "test",
) -> LoadedSet:
    """Open a test set.

    Args:
        source: A folder of pairs in one of the layouts of `data.layouts`, a folder of LQ images, or two folders.
        scale: Super-resolution factor.
        prompts: Prompts of the LQ images; without it they are empty.
        on_error: "raise" or "skip" what is unreadable or unmatched, and name it.
        argument: Name of the user's argument, for messages.

    Returns:
        Its name, and Pairs or LQImages.

    Raises:
        FileNotFoundError: The folder does not exist, or has only one of `test_LR` and `test_HR`.
        ValueError: Its files do not pair up or do not fit the scale, it holds no images, or it looks paired but its
            layout is unknown.
    """
    pairs = load_pairs(source, scale, prompts, on_error, argument)
    if pairs is not None:
        return pairs
    assert not isinstance(source, PairFolders)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{argument}={source} is not a folder; give one with test_LR and test_HR, or one of LQ images"
        )
    return LoadedSet(_name(folder), LQImages(folder, prompts, on_error, argument))


def load_pairs(
    source: str | Path | PairFolders, scale: int, prompts: GivenPrompts, on_error: OnError, argument: str
) -> LoadedSet | None:
    """Open a test set that holds pairs; None if the source holds none. Arguments, errors: see `load_test_set`."""
    if isinstance(source, PairFolders):
        return LoadedSet(
            _name(source.place), Pairs(source.lq, source.hq, scale, source.csv, prompts, on_error, argument)
        )
    folder = Path(source).expanduser()
    layout = folder_layout(folder, scale, argument)
    if layout is None:
        return None
    pairs = Pairs(layout.lq, layout.hq, scale, None, prompts, on_error, argument)
    pairs.sources, pairs.layout = [folder], layout.name
    return LoadedSet(_name(folder), pairs)


def folder_layout(folder: Path, scale: int, argument: str) -> Layout | None:
    """The layout of the pairs in a folder; None for anything else. Arguments and errors as for `find_layout`.

    Raises:
        FileNotFoundError: The folder has only one of `test_LR` and `test_HR`.
    """
    if not folder.is_dir():
        return None
    lq_dir, hq_dir = folder / "test_LR", folder / "test_HR"
    for present, absent in ((lq_dir, hq_dir), (hq_dir, lq_dir)):
        if present.is_dir() and not absent.is_dir() and argument not in {"train", "predict"}:
            raise FileNotFoundError(
                f"{argument}={folder} has {present.name} but no {absent.name}; add it, "
                f"or give {lq_dir} for a run without references"
            )
    return find_layout(folder, scale, argument)


def _name(folder: Path) -> str:
    return plain_name(os.path.basename(os.path.abspath(folder)))
