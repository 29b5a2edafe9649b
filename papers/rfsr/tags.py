"""Conditions of SeeSR: an image's tags and its tokens from DAPE (SeeSR, arXiv:2311.16518, section 3.2)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.conditioning.ram import RamTagger
from common.files import replacing
from common.metrics import to_uint8


class Seen(NamedTuple):
    """Texts of B images, such as comma-separated tags, and image tokens, (B,N,E), or None."""

    texts: list[str]
    e_img: Tensor | None


class Tagger(ABC):
    """Interface of a tagger of low-quality images."""

    @abstractmethod
    def __call__(self, x_lq: Tensor) -> Seen:
        """Tags and tokens (DAPE's are 145 x 512) of whole images, (B,3,h,w), [0,1], before they are enlarged."""


class DAPE(Tagger):
    """SeeSR's tagger, run on each image, in training too; frozen, and without a part in checkpoints.

    Args:
        folder: Folder of its weights and tag list, see `common.conditioning.ram.RamTagger`; SeeSR's `preset/models`.
    """

    def __init__(self, folder: str = "preset/models") -> None:
        self._tagger = RamTagger(folder)

    def __call__(self, x_lq: Tensor) -> Seen:
        """Tags and tokens by DAPE."""
        return Seen(*self._tagger.to(x_lq.device).tag(x_lq))


class TagFiles(Tagger):
    """Tags and tokens from a folder: one file for each image, named by `fingerprint` and written by `write_tags`.

    For training, write them for the low-quality crops of the run, which must be made beforehand.

    Args:
        folder: Folder of the files.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, x_lq: Tensor) -> Seen:
        """Read the files of these images.

        Raises:
            FileNotFoundError: An image has no file.
        """
        tags, tokens = [], []
        for path in map(self._file, x_lq):
            if not path.is_file():
                raise FileNotFoundError(
                    f"tagger.folder={self.folder} has no {path.name} for an image of {x_lq.shape[-1]} x "
                    f"{x_lq.shape[-2]} px; write DAPE's outputs for these images with papers.rfsr.write_tags"
                )
            with safe_open(path, "pt") as file:
                tokens.append(file.get_tensor("e_img"))
                tags.append((file.metadata() or {}).get("tags", ""))
        return Seen(tags, torch.stack(tokens).to(x_lq.device))

    def _file(self, image: Tensor) -> Path:
        return self.folder / f"{fingerprint(image)}.safetensors"

    def check(self, images: Iterable[tuple[str, Tensor]]) -> None:
        """Refuse a folder that does not cover images.

        Args:
            images: Name and low-quality image (3,h,w), [0,1].

        Raises:
            FileNotFoundError: Some have no file; the first five are named.
        """
        names = [(name, self._file(image).is_file()) for name, image in images]
        lacking = [name for name, there in names if not there]
        if lacking:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            raise FileNotFoundError(
                f"tagger.folder={self.folder} has no file for {len(lacking)} of {len(names)} validation images: "
                f"{', '.join(lacking[:5])}{more}; write DAPE's answers for these images with papers.rfsr.write_tags"
            )


class Untagged(Tagger):
    """A tagger that gives no tags and zeros for tokens, to measure speed, memory and the tagger's effect.

    Args:
        tokens: Number of tokens, N.
        width: Width of a token, E.
    """

    def __init__(self, tokens: int = 145, width: int = 512) -> None:
        self.tokens, self.width = tokens, width

    def __call__(self, x_lq: Tensor) -> Seen:
        """Empty tags and zero tokens."""
        return Seen([""] * len(x_lq), x_lq.new_zeros(len(x_lq), self.tokens, self.width))


def fingerprint(image: Tensor) -> str:
    """Name of an image (3,h,w) in [0,1] by its size and its pixels in 8 bits."""
    pixels = to_uint8(image).cpu().contiguous()
    return hashlib.blake2b(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes(), digest_size=16).hexdigest()


def write_tags(folder: str | Path, x_lq: Tensor, tags: Sequence[str], e_img: Tensor) -> list[Path]:
    """Write a tagger's outputs for images, to be read by `TagFiles`.

    Args:
        folder: Folder to write; it is made if it does not exist.
        x_lq: The tagged images, (B,3,h,w), [0,1].
        tags: Comma-separated tags, B strings.
        e_img: Image tokens, (B,N,E).

    Returns:
        The files.
    """
    paths = []
    for image, text, tokens in zip(x_lq, tags, e_img, strict=True):
        path = Path(folder) / f"{fingerprint(image)}.safetensors"
        with replacing(path) as temporary:
            save_file({"e_img": tokens.detach().cpu().contiguous()}, temporary, {"tags": text})
        paths.append(path)
    return paths
