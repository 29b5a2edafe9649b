"""The rewards of stage 2: built when they are needed, loaded before a run, and computed together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.loading import is_architecture_only
from common.pyiqa import MetricUnavailableError
from common.rewards import Reward, build_reward
from common.training import Batch

log = logging.getLogger(__name__)


class Judges(nn.ModuleDict):
    """Rewards by name.

    Args:
        names: Their names, see `common.rewards.build_reward`.
        arguments: Further arguments of a reward, by its name.

    Raises:
        ValueError: There is no name, or an argument for a name that is not there.
    """

    def __init__(self, names: Sequence[str], arguments: Mapping[str, dict[str, Any]]) -> None:
        super().__init__()
        if not names:
            raise ValueError("rewards is empty; name at least one, e.g. [clipiqa, neg_lpips]")
        if set(arguments) - set(names):
            unknown = sorted(set(arguments) - set(names))
            raise ValueError(f"reward_args is for {unknown}, which are not in rewards={list(names)}")
        self.names, self._arguments = list(names), arguments

    def build(self) -> None:
        """Build all rewards anew, without their weights where those are loaded later."""
        for name in self.names:
            self[name] = self._built(name)

    def load(self, device: torch.device) -> None:
        """Load the weights of all rewards, and build those that are missing."""
        for name in self.names:
            self._load(name, device)

    def load_available(self, device: torch.device) -> None:
        """As `load`, but leave out, with a warning, rewards that cannot be loaded."""
        for name in self.names:
            try:
                self._load(name, device)
            except (MetricUnavailableError, FileNotFoundError) as error:
                log.warning("reward %s is not computed: %s", name, error)
                if name in self:
                    del self[name]

    def score(self, x_01: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Raw rewards of images (B,3,H,W) in [0,1] by name, each (B,); those with a reference need `hq`."""
        rewards = {name: reward for name, reward in self._rewards().items() if "hq" in batch or not reward.referenced}
        return {name: reward(x_01, batch["prompt"], batch.get("hq")) for name, reward in rewards.items()}

    def networks(self) -> dict[str, nn.Module]:
        """Those rewards that are networks; pyiqa's are when they are loaded."""
        return {f"reward {name}": reward for name, reward in self.items() if list(reward.parameters())}

    def _rewards(self) -> dict[str, Reward]:
        return {name: reward for name, reward in self.items() if isinstance(reward, Reward)}

    def _load(self, name: str, device: torch.device) -> None:
        if name not in self:
            self[name] = self._built(name).to(device)
        self._rewards()[name].load(device)

    def _built(self, name: str) -> Reward:
        arguments = self._arguments.get(name, {})
        if is_architecture_only() and name in ("neg_lpips", "neg_dists"):
            arguments = {**arguments, "weights": "random"}
        return build_reward(name, **arguments)
