"""GAN losses on logits; D = sigmoid(logit) is the probability of "real".

| kind         | generator             | discriminator                                |
|--------------|-----------------------|----------------------------------------------|
| `bce`        | softplus(-f)          | softplus(-r) + softplus(f)                   |
| `bce_smooth` | BCE(f, 0.8)           | 0.5 (BCE(r, 0.8) + BCE(f, 0))                |
| `hinge`      | -f                    | 0.5 (relu(1 - r) + relu(1 + f))              |

`bce` is the non-saturating -log D(fake) of DFOSD; `bce_smooth` is minimal for the generator at f = ln 4. In the
discriminator step the caller detaches the images behind the fake logits.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AdversarialKind = Literal["bce", "bce_smooth", "hinge"]
Levels = Literal["sum", "mean"]
Logits = Tensor | Sequence[Tensor]

_REAL_LABEL = 0.8  # of `bce_smooth`, in both steps


def generator_loss(kind: AdversarialKind, logits_fake: Logits, levels: Levels = "sum") -> Tensor:
    """Loss of the generator.

    Args:
        kind: Row of the table above.
        logits_fake: Logits of generated images, (B, ...), or one such tensor per level of the discriminator.
        levels: Reduction over levels, after the mean over each image's positions.

    Returns:
        Loss per image, (B,), fp32.

    Raises:
        ValueError: `kind` or `levels` is unknown, or there is no level.
    """
    return _join([_generator_level(kind, fake.float()).mean(1) for fake in _flat_levels(logits_fake)], levels)


def discriminator_loss(
    kind: AdversarialKind, logits_real: Logits, logits_fake: Logits, levels: Levels = "sum"
) -> Tensor:
    """Loss of the discriminator.

    Args:
        kind: Row of the table above.
        logits_real: Logits of real images, (B, ...), or one such tensor per level.
        logits_fake: Logits of generated images, (B, ...), or one such tensor per level.
        levels: Reduction over levels, after the mean over each image's positions.

    Returns:
        Loss per image, (B,), fp32.

    Raises:
        ValueError: `kind` or `levels` is unknown, there is no level, or the numbers of levels or images differ.
    """
    reals, fakes = _flat_levels(logits_real), _flat_levels(logits_fake)
    if [len(real) for real in reals] != [len(fake) for fake in fakes]:
        sizes = [[len(level) for level in levels] for levels in (reals, fakes)]
        raise ValueError(f"logits_real has {sizes[0]} images per level, logits_fake {sizes[1]}; pass as many of each.")
    pairs = zip(reals, fakes, strict=True)
    return _join([_discriminator_level(kind, real.float(), fake.float()) for real, fake in pairs], levels)


def _generator_level(kind: AdversarialKind, fake: Tensor) -> Tensor:
    if kind == "bce":
        return F.softplus(-fake)
    if kind == "bce_smooth":
        return _bce(fake, _REAL_LABEL)
    if kind == "hinge":
        return -fake
    raise ValueError(f"kind={kind!r} is unknown; use 'bce', 'bce_smooth' or 'hinge'.")


def _discriminator_level(kind: AdversarialKind, real: Tensor, fake: Tensor) -> Tensor:
    if kind == "bce":
        return F.softplus(-real).mean(1) + F.softplus(fake).mean(1)
    if kind == "bce_smooth":
        return 0.5 * (_bce(real, _REAL_LABEL).mean(1) + _bce(fake, 0.0).mean(1))
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1))
    raise ValueError(f"kind={kind!r} is unknown; use 'bce', 'bce_smooth' or 'hinge'.")


def _bce(logits: Tensor, target: float) -> Tensor:
    """-target log D - (1 - target) log(1 - D), element by element."""
    return target * F.softplus(-logits) + (1 - target) * F.softplus(logits)


def _flat_levels(logits: Logits) -> list[Tensor]:
    """One (B, positions) tensor per level."""
    levels = [logits] if isinstance(logits, Tensor) else list(logits)
    if not levels:
        raise ValueError("logits holds no level; pass a tensor or a list of at least one.")
    return [level.reshape(len(level), -1) for level in levels]


def _join(losses: list[Tensor], levels: Levels) -> Tensor:
    stacked = torch.stack(losses)  # (levels, B)
    if levels == "sum":
        return stacked.sum(0)
    if levels == "mean":
        return stacked.mean(0)
    raise ValueError(f"levels={levels!r} is unknown; use 'sum' or 'mean'.")
