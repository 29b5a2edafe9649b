"""Restored images as files: whole ones, and large ones tile by tile on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from common.images import write_png
from common.large import upscale_large, write_tiff_rows
from common.metrics import to_uint8


def write_images(paths: list[Path], x_01: Tensor) -> None:
    """Write images (B,3,H,W), [0,1], to PNG or TIFF files."""
    for path, image in zip(paths, to_uint8(x_01).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        if path.suffix.lower() == ".png":
            write_png(path, image)
        else:
            write_tiff_rows(path, [image], *image.shape[:2])


def upscale_to_file(module: Any, target: Path, x_lq: Tensor, prompt: str) -> None:
    """Restore an image into a file, in memory that does not grow with it; see `common.large`.

    Args:
        module: A `RestorationModule`, in a prediction.
        target: The file, PNG or TIFF.
        x_lq: The image, (1,3,h,w), [0,1].
        prompt: Its text.
    """
    inference, scale = module.inference, module.scale
    conditions = module.prepare(x_lq, [prompt])
    with _tile_bar(module.trainer, target.name) as progress:
        upscale_large(
            lambda tile: module.restore(tile, conditions),
            x_lq,
            target,
            scale=scale,
            tile=(inference.tile or 0) // scale,
            overlap=inference.overlap // scale,
            blend=inference.blend,
            color_fix=inference.color_fix,
            size_multiple=module.size_multiple,
            key=_digest(module, conditions),
            progress=progress,
        )


def _digest(module: Any, conditions: Any) -> str:
    """Digest of what determines a tile's pixels, except its input: settings, trained weights, conditions."""
    settings = {key: value for key, value in module.hparams.items() if key != "inference"}
    stages = {argument: stage.digest for argument, stage in module.stages.items()}
    digest = hashlib.blake2b(
        f"{type(module).__name__} {module.trainer.precision} {module.test_precision} {settings} {stages}".encode()
    )
    for tensor in [*module.all_trainable().values(), *_tensors(conditions)]:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]


def _tensors(tree: Any) -> list[Tensor]:
    """All tensors of what `prepare` gave: nothing, one, or (named) tuples of them."""
    if isinstance(tree, Tensor):
        return [tree]
    return [tensor for part in tree for tensor in _tensors(part)] if isinstance(tree, tuple) else []


@contextmanager
def _tile_bar(trainer: Any, name: str) -> Iterator[Callable[[int, int], None] | None]:
    """A line of one image's tiles in the progress bar, where Lightning shows its rich one."""
    bar: Any = getattr(trainer.progress_bar_callback, "progress", None)
    if bar is None:
        yield None
        return
    task = bar.add_task(name)
    try:
        yield lambda done, in_all: bar.update(task, completed=done, total=in_all, refresh=True)
    finally:
        bar.remove_task(task)
