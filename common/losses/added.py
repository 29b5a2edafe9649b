"""Losses that a configuration adds to those of a method."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from common.losses import build_image_loss


class AddedLosses(nn.Module):
    """Image losses by name.

    Args:
        names: Names as for `common.losses.build_image_loss`.
        weights: Weights of the losses' networks: `pretrained`, `random` or a path.

    Raises:
        ValueError: A name is unknown.
    """

    def __init__(self, names: Iterable[str], weights: str) -> None:
        super().__init__()
        self.losses = {name: build_image_loss(name, weights) for name in names}
        self.networks = nn.ModuleDict({name: loss for name, loss in self.losses.items() if isinstance(loss, nn.Module)})

    def forward(self, x_01: Tensor, y_01: Tensor) -> dict[str, Tensor]:
        """Compare restored images with their targets, both (B,3,H,W), [0,1].

        Returns:
            Name -> the loss's mean over the batch, unweighted.
        """
        return {name: loss(x_01, y_01).mean() for name, loss in self.losses.items()}
