"""Rewards of RFSR and DNF-SR: frozen functions that give each image one number, (B,), higher for better.

A reward is called as `reward(x_01, prompts)`, or as `reward(x_01, prompts, hq_01)` where it compares; see `Reward`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from common.rewards.base import Reward, reward_loss
from common.rewards.group import clipped_rewards, group_rewards
from common.rewards.imagereward import ImageReward, ImageRewardSize
from common.rewards.pyiqa_metrics import PyiqaReward
from common.rewards.reference import NegatedDistance, NegatedDISTS, NegatedLPIPS, NegatedMSE
from common.rewards.weightless import Colourfulness, Neutrality, Sharpness

__all__ = [
    "Colourfulness",
    "ImageReward",
    "ImageRewardSize",
    "NegatedDISTS",
    "NegatedDistance",
    "NegatedLPIPS",
    "NegatedMSE",
    "Neutrality",
    "PyiqaReward",
    "Reward",
    "Sharpness",
    "build_reward",
    "clipped_rewards",
    "group_rewards",
    "reward_loss",
]

_REWARDS: dict[str, Callable[..., Reward]] = {
    "clipiqa": partial(PyiqaReward, "clipiqa", differentiable=True),
    "imagereward": ImageReward,
    "laion": partial(PyiqaReward, "laion_aes"),
    "sharpness": Sharpness,
    "colourfulness": Colourfulness,
    "neutrality": Neutrality,
    "neg_mse": NegatedMSE,
    "neg_lpips": NegatedLPIPS,
    "neg_dists": NegatedDISTS,
}
_PYIQA = "pyiqa:"


def build_reward(name: str, **kwargs: Any) -> Reward:
    """Make a reward by name, to be called as `reward(x_01, prompts, hq_01)`; gives (B,).

    Args:
        name: `clipiqa`, `imagereward`, `laion` (the aesthetic predictor), `sharpness`,
            `colourfulness`, `neutrality`; `neg_mse`,
            `neg_lpips`, `neg_dists`, which need `hq_01`; or `pyiqa:` and pyiqa's name of a no-reference metric, e.g.
            `pyiqa:musiq`, `pyiqa:maniqa-pipal`.
        **kwargs: Further arguments of the reward's class.

    Returns:
        The reward; modules with weights have to be moved to the images' device.

    Raises:
        ValueError: `name` is unknown; the message lists the names.
    """
    if name.startswith(_PYIQA):
        return PyiqaReward(name.removeprefix(_PYIQA), **kwargs)
    if name in _REWARDS:
        return _REWARDS[name](**kwargs)
    raise ValueError(f"name={name!r} is not a reward; use one of {', '.join(_REWARDS)}, or {_PYIQA}<name>.")
