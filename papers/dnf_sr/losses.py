"""NF2T's equations (arXiv:2609.15120, section 3.4 and Algorithm 1), and those of DiffusionNFT (arXiv:2509.16117).

B batch, K restorations of one image (a group), M rewards. v_old is the velocity of the policy that made the group, v
that of the trained policy; y is the velocity whose clean estimate is the restoration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.rewards import group_rewards

Std = Literal["population", "sample"]
Schedule = Literal["hard_copy", "type1", "type2"]


class Normalised(NamedTuple):
    """Rewards of B groups."""

    r: Tensor
    """(K, B), within (0, 1); 1/2 is the group's average."""
    flat: Tensor
    """Share of (group, metric) pairs without any spread, whose r_i is 1/2 throughout."""
    unscored: Tensor
    """(B,), true for groups with a raw reward that is not finite: they prefer nothing, r = 1/2."""


class Branches(NamedTuple):
    """Loss and gradient of the positive and the negative branch at v, without a graph."""

    loss: Tensor
    """r L+ + (1 - r) L-, mean over the batch."""
    gradient: Tensor
    """Gradient of the loss at v, of v's shape."""
    gap: Tensor
    """|x+ - x-|, mean over all values."""


def normalised_rewards(raw: Tensor, std: Std = "population") -> Normalised:
    """Algorithm 1, lines 8 to 10: r_i = Phi((r_i^raw - mean) / std) within each group, r = mean_i r_i.

    Args:
        raw: Raw rewards, higher for better, (M, K, B).
        std: Divide the variance by K (`population`) or K - 1 (`sample`), which shrinks Phi's argument by a constant.
    """
    num_metrics, size, batch = raw.shape
    unscored = ~raw.isfinite().flatten(0, 1).all(0)
    raw = torch.where(unscored, 0, raw)
    single = [[group_rewards(raw[i, :, b, None], [False]) for b in range(batch)] for i in range(num_metrics)]
    each = torch.stack([torch.stack(row, 1) for row in single])  # (M, K, B)
    flat = (each == 0.5).all(1).float().mean()
    if std == "sample":
        shrink = math.sqrt((size - 1) / size)
        each = torch.special.ndtr(shrink * torch.special.ndtri(each.double())).to(raw.dtype)
    return Normalised(each.mean(0), flat, unscored)


def implicit_velocities(v_old: Tensor, v: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Equation 6: v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v."""
    return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v


def two_branches(
    v: Tensor,
    v_old: Tensor,
    beta: float,
    r: Tensor,
    image_of: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor], Tensor],
) -> Branches:
    """Equations 7 to 9 in image and feature space, r L_rec(x+, x_hat) + (1 - r) L_rec(x-, x_hat).

    The branches are decoded and differentiated one after the other, so that one graph of the decoder is alive at a
    time. The caller applies the gradient, by `(v * gradient).sum()`.

    Args:
        v: Velocity of the trained policy, (B, C, h, w).
        v_old: Velocity of the old policy, without a graph.
        beta: Mixing weight; 1 / beta is the guidance strength.
        r: Rewards, (B,), in [0, 1].
        image_of: Decodes the clean estimate of a velocity.
        distance: L_rec of images to the restorations, (B,).
    """
    leaf = v.detach().requires_grad_()
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    images: list[Tensor] = []
    for which, share in enumerate((r, 1 - r)):
        with torch.enable_grad():
            image = image_of(implicit_velocities(v_old, leaf, beta)[which])
            loss = (share * distance(image)).mean()
        gradients += torch.autograd.grad(loss, leaf)
        losses.append(loss.detach())
        images.append(image.detach())
    return Branches(losses[0] + losses[1], gradients[0] + gradients[1], (images[0] - images[1]).abs().mean())


def on_policy_loss(distance: Tensor, r: Tensor, beta: float) -> Tensor:
    """A loss with `two_branches`' gradient at v = v_old: beta (2r - 1) L_rec(x, x_hat); (B,) in, (B,) out."""
    return beta * (2 * r - 1) * distance


def nft_loss(v: Tensor, v_old: Tensor, y: Tensor, r: Tensor, beta: float) -> Tensor:
    """DiffusionNFT's objective in velocity space, r |v+ - y|^2 + (1 - r) |v- - y|^2, mean over elements; (B,)."""
    plus, minus = implicit_velocities(v_old, v, beta)
    return r * (plus - y).square().mean((1, 2, 3)) + (1 - r) * (minus - y).square().mean((1, 2, 3))


def self_normalised_nft_loss(
    v: Tensor, v_old: Tensor, y: Tensor, r: Tensor, beta: float, t: float, factor: float
) -> Tensor:
    """`nft_loss` as DiffusionNFT's code has it.

    Each branch is the squared error e of the clean latent, e = t (v+- - y), over its own detached mean |e| (1e-5 at
    least); their sum is multiplied by factor / beta.

    Args:
        v: Velocity of the trained policy, (B, C, h, w).
        v_old: Velocity of the old policy.
        y: Velocity of the restoration.
        r: Rewards, (B,).
        beta: Mixing weight, as for `implicit_velocities`.
        t: Time of the step.
        factor: Factor on the loss; DiffusionNFT's code has 5 (`adv_clip_max`).

    Returns:
        Loss per image, (B,).
    """
    total = torch.zeros_like(r)
    for share, velocity in zip((r, 1 - r), implicit_velocities(v_old, v, beta), strict=True):
        error = t * (velocity - y)
        scale = error.detach().abs().mean((1, 2, 3)).clamp_min(1e-5)
        total = total + share * error.square().mean((1, 2, 3)) / scale
    return factor / beta * total


def old_share(schedule: Schedule, step: int) -> float:
    """Eta of the online update old <- eta old + (1 - eta) theta, after optimiser step `step` (from 1).

    `hard_copy` is DNF-SR's eta = 0 (Algorithm 1, line 24); `type1` = min(0.001 s, 0.5) and `type2` = 0 for s < 75, else
    min(0.0075 (s - 75), 0.999) are DiffusionNFT's.
    """
    if schedule == "type1":
        return min(0.001 * step, 0.5)
    if schedule == "type2":
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    return 0.0
