"""Benchmark folders: the StableSR layout (`test_LR`, `test_HR`) or low-quality images alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from data.datasets import GivenPrompts, LQImages, OnError, Pairs


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's name (its folder's) and images: Pairs with references, or LQImages without."""

    name: str
    images: Pairs | LQImages


def load_benchmark(
    directory: str | Path,
    scale: int,
    prompts: GivenPrompts = None,
    on_error: OnError = "raise",
    argument: str = "test",
) -> Benchmark:
    """Open a benchmark folder.

    Args:
        directory: A folder with `test_LR` and `test_HR` in it, or a folder of LQ images.
        scale: Super-resolution factor.
        prompts: Prompts of the LQ images; without it they are empty.
        on_error: "raise" or "skip" what is unreadable or unmatched, and name it.
        argument: Name of the user's argument, for messages.

    Returns:
        Its name, and Pairs or LQImages.

    Raises:
        FileNotFoundError: The folder does not exist, or has only one of `test_LR` and `test_HR`.
        ValueError: Its files do not pair up or do not fit the scale, or it holds no images.
    """
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{argument}={directory} is not a folder; give one with test_LR and test_HR, or one of LQ images"
        )
    name = os.path.basename(os.path.abspath(folder))
    lq_dir, hq_dir = folder / "test_LR", folder / "test_HR"
    if lq_dir.is_dir() and hq_dir.is_dir():
        pairs = Pairs(lq_dir, hq_dir, scale, prompts=prompts, on_error=on_error)
        pairs.sources, pairs.layout = [folder], "pairs in test_LR and test_HR"
        return Benchmark(name, pairs)
    for present, absent in ((lq_dir, hq_dir), (hq_dir, lq_dir)):
        if present.is_dir():
            raise FileNotFoundError(
                f"{argument}={directory} has {present.name} but no {absent.name}; add it, "
                f"or give {lq_dir} for a run without references"
            )
    return Benchmark(name, LQImages(folder, prompts, on_error, argument))
