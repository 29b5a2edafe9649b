"""Rewards within a group of restorations of one image: DNF-SR's fusion of metrics, and DiffusionNFT's linear map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ZERO_STD = 1e-8


def group_rewards(raw: Tensor, lower_better: Sequence[bool]) -> Tensor:
    """Fuse M metrics of the K restorations of one image into one reward each (DNF-SR, arXiv:2609.15120, Algorithm 1).

    With s_i = -1 for metrics where lower is better and 1 else, mean and population standard deviation over K:

        r_i = Phi(s_i (m_i - mean m_i) / std m_i),   r = mean_i r_i

    Phi is the normal distribution function, so a metric's unit and offset do not matter and r_i lies within
    Phi(-sqrt(K - 1)) and Phi(sqrt(K - 1)). A metric with std < 1e-8 (1 + |mean|) prefers nothing: its r_i is 1/2.
    A group with a value that is not finite prefers nothing at all: its r are 1/2.

    Args:
        raw: The metrics m, (K, M), each in its own unit.
        lower_better: True for each of the M metrics where smaller is better.

    Returns:
        Rewards, (K,), within (0, 1), in `raw`'s type; 1/2 is "as good as the group".

    Raises:
        ValueError: `raw` is not (K, M) with M directions, or is empty.
    """
    if raw.ndim != 2 or raw.shape[1] != len(lower_better) or not raw.numel():
        raise ValueError(
            f"raw has shape {tuple(raw.shape)} and lower_better {len(lower_better)} entries; pass (K, M) and M of them."
        )
    scored = torch.where(raw.isfinite().all(), raw, 0)
    metrics = scored.double()  # values may differ by their last digit, and their mean has one more
    sign = torch.tensor([-1.0 if lower else 1.0 for lower in lower_better], dtype=metrics.dtype, device=raw.device)
    std, mean = torch.std_mean(metrics, 0, correction=0)
    flat = std < _ZERO_STD * (1 + mean.abs())
    standardised = torch.where(flat, 0, sign * (metrics - mean) / torch.where(flat, 1, std))
    return (0.5 * (1 + torch.erf(standardised / math.sqrt(2)))).mean(1).to(raw.dtype)


def clipped_rewards(advantages: Tensor, clip: float = 5.0) -> Tensor:
    """Map advantages linearly to rewards, clamp(A / clip, -1, 1) / 2 + 1/2, as DiffusionNFT (arXiv:2509.16117) does.

    Args:
        advantages: Standardised rewards A, any shape.
        clip: Advantage from which on the reward is 1, and below whose negative it is 0.

    Returns:
        Rewards, same shape, within [0, 1].

    Raises:
        ValueError: `clip` is not positive.
    """
    if clip <= 0:
        raise ValueError(f"clip={clip} must be positive; DiffusionNFT uses 5.")
    return (advantages / clip).clamp(-1, 1) / 2 + 0.5
