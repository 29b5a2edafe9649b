"""What SeeSR is told of an image: tags, and DAPE's tokens of it (SeeSR, arXiv:2311.16518, section 3.2).

DAPE (RAM's Swin-L with LoRA) is not part of this repository: its answers come from files, or from a class of yours.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import replacing
from common.metrics import to_uint8


class Seen(NamedTuple):
    """Texts of B images, such as comma-separated tags, and image tokens, (B,N,E), where there are any."""

    texts: list[str]
    e_img: Tensor | None


class Tagger(ABC):
    """Anything that looks at low-quality images; derive from it to run DAPE itself."""

    @abstractmethod
    def __call__(self, x_lq: Tensor) -> Seen:
        """Look at whole images, (B,3,h,w), [0,1], before they are enlarged: tags, and tokens (DAPE's are 145 x 512)."""


class TagFiles(Tagger):
    """Tags and tokens from a folder, one file an image, named by `fingerprint` and written by `write_tags`.

    For training, write them of the crops that the run will see: low-quality images that were made beforehand.

    Args:
        folder: The files' folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, x_lq: Tensor) -> Seen:
        """Find the files of these images.

        Raises:
            FileNotFoundError: An image has none.
        """
        tags, tokens = [], []
        for name in map(fingerprint, x_lq):
            path = self.folder / f"{name}.safetensors"
            if not path.is_file():
                raise FileNotFoundError(
                    f"tagger.folder={self.folder} has no {path.name} for an image of {x_lq.shape[-1]} x "
                    f"{x_lq.shape[-2]} px; write DAPE's answers for these images with papers.rfsr.write_tags"
                )
            with safe_open(path, "pt") as file:
                tokens.append(file.get_tensor("e_img"))
                tags.append((file.metadata() or {}).get("tags", ""))
        return Seen(tags, torch.stack(tokens).to(x_lq.device))


class Untagged(Tagger):
    """No tags and zeros for tokens: to measure speed and memory, and to see what the tagger is worth.

    Args:
        tokens: N.
        width: E.
    """

    def __init__(self, tokens: int = 145, width: int = 512) -> None:
        self.tokens, self.width = tokens, width

    def __call__(self, x_lq: Tensor) -> Seen:
        """Nothing about any image."""
        return Seen([""] * len(x_lq), x_lq.new_zeros(len(x_lq), self.tokens, self.width))


def fingerprint(image: Tensor) -> str:
    """Name of an image (3,h,w) in [0,1] by its size and its pixels in 8 bits."""
    pixels = to_uint8(image).cpu().contiguous()
    return hashlib.blake2b(f"{tuple(pixels.shape)}".encode() + pixels.numpy().tobytes(), digest_size=16).hexdigest()


def write_tags(folder: str | Path, x_lq: Tensor, tags: Sequence[str], e_img: Tensor) -> list[Path]:
    """Write what a tagger said of images, for `TagFiles`.

    Args:
        folder: Target; made where missing.
        x_lq: The images it saw, (B,3,h,w), [0,1].
        tags: Comma-separated, B strings.
        e_img: Tokens, (B,N,E).

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
