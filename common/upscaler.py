"""Restoration of whole images of any size: in memory, or tile by tile on disk; one way to predict for all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from common.large import upscale_large, writer_of
from common.metrics import to_uint8
from common.tiling import pad_to_multiple, tiled

if TYPE_CHECKING:
    from common.restoration import RestorationModule


class Upscaled(NamedTuple):
    """An upscaled batch before and after the colour fix, both (B,3,s*h,s*w), clamped to [0,1]."""

    sr: Tensor
    raw: Tensor


def upscale(module: RestorationModule, x_lq: Tensor, prompts: list[str], conditions: Any = None) -> Upscaled:
    """Restore whole images in memory, tile by tile, and fix their colours; see `RestorationModule.upscale`."""
    inference, scale = module.inference, module.scale
    conditions = module.prepare(x_lq, prompts) if conditions is None else conditions
    padded, (height, width) = pad_to_multiple(x_lq, module.size_multiple)

    def restore(tile: Tensor) -> Tensor:
        return module.restore(tile, conditions)

    if inference.tile is None:
        raw = restore(padded)
    else:
        module.check_tile()
        tile, overlap = inference.tile // scale, inference.overlap // scale
        raw = tiled(restore, padded, tile, overlap, scale, inference.blend)
    raw = raw[..., : scale * height, : scale * width].float()
    return Upscaled(module.fix_colors(raw, x_lq), raw.clamp(0, 1))


def upscale_to_files(module: RestorationModule, batch: Mapping[str, Any], targets: Sequence[Path]) -> None:
    """Restore the images of a batch into files, large ones in memory that does not grow with them.

    Args:
        module: The method, in a prediction.
        batch: Its `lq` (B,3,h,w) in [0,1], and `prompt`.
        targets: The files, PNG or TIFF.
    """
    if not module.is_large(batch["lq"]):
        write_images(targets, module.upscale(batch["lq"], batch["prompt"]).sr)
        return
    module.check_tile()
    for x_lq, prompt, target in zip(batch["lq"].split(1), batch["prompt"], targets, strict=True):
        upscale_large_image(module, target, x_lq, prompt)


def write_images(paths: Sequence[Path], x_01: Tensor) -> None:
    """Write images (B,3,H,W), [0,1], to PNG or TIFF files."""
    for path, image in zip(paths, to_uint8(x_01).permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        writer_of(path)(path, [image], *image.shape[:2])


def upscale_large_image(module: RestorationModule, target: Path, x_lq: Tensor, prompt: str) -> None:
    """Restore an image into a file, in memory that does not grow with it; see `common.large`.

    Args:
        module: The method, in a prediction.
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


def _digest(module: RestorationModule, conditions: Any) -> str:
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
