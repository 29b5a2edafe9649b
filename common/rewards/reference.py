"""Rewards that compare with the high-quality image: distances with their sign changed, 0 for a perfect restoration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from common.losses.dists import DISTS
from common.losses.lpips import LPIPS
from common.rewards.base import Reward


class NegatedDistance(Reward):
    """-d(x, hq), so that higher is better as for every reward; called as `reward(x_01, prompts, hq_01)`.

    In `group_rewards` its `lower_better` is False: the sign is here.
    """

    differentiable = True
    referenced: ClassVar[bool] = True

    @abstractmethod
    def _distance(self, x: Tensor, hq: Tensor) -> Tensor:
        """Distance of clamped images from theirs, (B, 3, H, W) each; (B,)."""

    def _score(self, x: Tensor, prompts: Sequence[str], hq: Tensor | None) -> Tensor:
        assert hq is not None  # `forward` has checked
        return -self._distance(x, hq)


class NegatedMSE(NegatedDistance):
    """-mean (x - hq)^2 over an image's values in [0, 1]; within [-1, 0]. The reward without weights, for the demo."""

    name = "neg_mse"

    def _distance(self, x: Tensor, hq: Tensor) -> Tensor:
        return (x - hq).square().mean((1, 2, 3))


class NegatedLPIPS(NegatedDistance):
    """-LPIPS, by default on AlexNet as in DNF-SR's tables.

    Args:
        weights: `pretrained`, `random` or a path, as for `common.losses.lpips.LPIPS`.
        width: Factor on the number of channels; other than 1 only with `random` weights.
        seed: Seed of the `random` weights.
        net: Trunk, `alexnet` (images of at least 35 px a side) or `vgg16` (16 px).
    """

    name = "neg_lpips"

    def __init__(
        self,
        weights: str = "pretrained",
        width: float = 1.0,
        seed: int = 0,
        net: Literal["vgg16", "alexnet"] = "alexnet",
    ) -> None:
        super().__init__()
        self.lpips = LPIPS(weights, width, seed, net)
        self.requires_grad_(False).train(False)

    def _distance(self, x: Tensor, hq: Tensor) -> Tensor:
        return self.lpips(x, hq)


class NegatedDISTS(NegatedDistance):
    """-DISTS; alpha and beta are constants, which pyiqa's would train.

    Args:
        weights: `pretrained`, `random` or a path, as for `common.losses.dists.DISTS`.
        width: Factor on the number of channels; other than 1 only with `random` weights.
        seed: Seed of the `random` weights.
    """

    name = "neg_dists"

    def __init__(self, weights: str = "pretrained", width: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.dists = DISTS(weights, width, seed)
        self.requires_grad_(False).train(False)

    def _distance(self, x: Tensor, hq: Tensor) -> Tensor:
        return self.dists(x, hq)
