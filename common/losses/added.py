"""Losses that a configuration adds to those of a method."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from common.loading import is_architecture_only
from common.losses import IMAGE_LOSSES, build_image_loss
from common.parameters import Row, count


class AddedLosses(nn.Module):
    """Image losses by name.

    Args:
        names: Names as for `common.losses.build_image_loss`.
        weights: Weights of the losses' networks: `pretrained`, `random` or a path; within `architecture_only()` random.

    Raises:
        ValueError: A name is unknown.
    """

    def __init__(self, names: Iterable[str], weights: str) -> None:
        super().__init__()
        weights = "random" if is_architecture_only() else weights
        self.losses = {name: build_image_loss(name, weights) for name in names}
        self.networks = nn.ModuleDict({name: loss for name, loss in self.losses.items() if isinstance(loss, nn.Module)})

    def forward(self, x_01: Tensor, y_01: Tensor) -> dict[str, Tensor]:
        """Compare restored images with their targets, both (B,3,H,W), [0,1].

        Returns:
            Name -> the loss's mean over the batch, unweighted.
        """
        return {name: loss(x_01, y_01).mean() for name, loss in self.losses.items()}

    def rows(self) -> list[Row]:
        """The row of the losses' networks in a table of parameters; none if they have no parameters."""
        total = count(self).total
        return [Row("networks of the added losses", "base", total, 0)] if total else []


def check_names(names: Iterable[str]) -> None:
    """Refuse losses that are unknown.

    Raises:
        ValueError: One is.
    """
    for name in names:
        if name not in IMAGE_LOSSES:
            raise ValueError(f"losses: {name} is not an image loss; use {', '.join(IMAGE_LOSSES)}")
