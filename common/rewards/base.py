"""Base of all image rewards: a frozen network or formula that gives each image one number, higher for better."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses.checks import check_range_01


class Reward(nn.Module, ABC):
    """A score of images, higher for better, called as `reward(x_01, prompts)` or `reward(x_01, prompts, hq_01)`.

    A reward is always in eval mode, has no trainable parameters, and computes in fp32 (float64 for such images or
    weights), also under autocast. The gradient reaches `x_01` if `differentiable`; otherwise the score has none.

    A subclass writes `_score` and ends its `__init__` with `requires_grad_(False).train(False)` if it has weights.
    """

    name: str
    """Name in tables and logs."""
    differentiable: bool
    """True if the score has a gradient in the image."""
    prompted: ClassVar[bool] = False
    """True if the score depends on the prompts; other rewards ignore them."""
    referenced: ClassVar[bool] = False
    """True if the score compares with the high-quality image, which is then required; other rewards ignore it."""

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also when the parent module enters train mode."""
        return super().train(False)

    def load(self, device: torch.device | str = "cpu") -> None:
        """Fetch the files that the first call needs, so that a run fails before it starts.

        Args:
            device: Device of the images in that call.

        Raises:
            FileNotFoundError: A vocabulary is not there and cannot be fetched.
            MetricUnavailableError: pyiqa or its weights are not available.
        """

    def forward(self, x_01: Tensor, prompts: Sequence[str], hq_01: Tensor | None = None) -> Tensor:
        """Score images.

        Args:
            x_01: Images, (B, 3, H, W), RGB in [0, 1], of any floating type; clamped to that range, so pixels outside
                get no gradient.
            prompts: Description of each image, B strings; rewards that are not `prompted` ignore them.
            hq_01: The high-quality image of each, same shape, clamped to [0, 1], without gradient. Rewards that are not
                `referenced` ignore it.

        Returns:
            Raw score per image, (B,), fp32 (float64 for float64 images where there are no fp32 weights).

        Raises:
            ValueError: `x_01` is not a batch of images, prompts are not B, a `referenced` reward lacks `hq_01` of the
                same shape, or the module was cast to 16 bits.
        """
        x = self._images(x_01)
        if isinstance(prompts, str) or len(prompts) != len(x):
            found = "one string" if isinstance(prompts, str) else f"{len(prompts)} strings"
            raise ValueError(f"prompts is {found} for {len(x)} images; pass one string per image.")
        hq = self._reference(hq_01, x) if self.referenced else None
        with (
            torch.autocast(x.device.type, enabled=False),
            torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable),
        ):
            return self._score(x, prompts, hq)

    @abstractmethod
    def _score(self, x: Tensor, prompts: Sequence[str], hq: Tensor | None) -> Tensor:
        """Score clamped images in `_images`' type, outside autocast.

        Args:
            x: Images, (B, 3, H, W).
            prompts: B strings.
            hq: References, same shape and type, without a graph; None if and only if not `referenced`.

        Returns:
            Scores, (B,).
        """

    def _reference(self, hq_01: Tensor | None, x: Tensor) -> Tensor:
        """Check the references of the images `x`, and convert them in the same way."""
        if hq_01 is None or hq_01.shape != x.shape:
            found = "missing" if hq_01 is None else f"of shape {tuple(hq_01.shape)}"
            raise ValueError(
                f"hq_01 is {found} where reward {self.name!r} compares {tuple(x.shape)} with it; pass as many "
                "high-quality images, of that size."
            )
        return self._images(hq_01.detach(), "hq_01").to(x)

    def _images(self, x_01: Tensor, name: str = "x_01") -> Tensor:
        """Check images, cast them to the type to compute in and clamp them to [0, 1]."""
        if x_01.ndim != 4 or x_01.shape[1] != 3 or not x_01.is_floating_point():
            raise ValueError(
                f"{name} is {x_01.dtype} of shape {tuple(x_01.shape)}; pass floating (B, 3, H, W) in [0, 1]."
            )
        if os.environ.get("ISR_DEBUG") == "1":
            check_range_01(x_01, name)
        weight = next(self.parameters(), None)
        if weight is not None and weight.dtype.itemsize < 4:
            raise ValueError(
                f"reward {self.name!r} was cast to {weight.dtype}; train with precision 'bf16-mixed' or '32'."
            )
        dtype = weight.dtype if weight is not None else torch.promote_types(x_01.dtype, torch.float32)
        return x_01.to(dtype).clamp(0, 1)


def reward_loss(score: Tensor, hinge: float = 2.0) -> Tensor:
    """Turn scores into losses, relu(hinge - r), as ReFL (arXiv:2304.05977) does: nothing is gained beyond `hinge`.

    Args:
        score: Raw scores r, (B,), higher for better.
        hinge: Score from which on the loss and its gradient are 0; scores within [0, 1] never reach ReFL's 2.

    Returns:
        Loss per image, (B,).
    """
    return F.relu(hinge - score)
