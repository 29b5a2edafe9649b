"""DM-SR's equation 4, corrected and as printed; the other losses are in `common.losses`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from common.losses import discriminator_loss, generator_loss

GANLoss = Literal["bce", "hinge", "printed"]


def discriminator_objective(kind: GANLoss, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Loss of the discriminator, D = sigmoid(logit).

    `bce` is equation 4 with a minus before both of its terms: -log D(real) - log(1 - D(fake)). `printed` is the
    equation unchanged, log D(real) - log(1 - D(fake)): both terms are smallest at D = 0, so D learns to call both
    fake, and the loss has no lower bound. `hinge` is that of InvSR, which appendix A.2 refers to.

    Args:
        kind: Form of the loss.
        logits_real: Logits of real latents, (B, ...).
        logits_fake: Logits of restored latents, (B, ...).

    Returns:
        Loss per sample, (B,), fp32.
    """
    if kind == "printed":
        real, fake = logits_real.float().flatten(1), logits_fake.float().flatten(1)
        return -F.softplus(-real).mean(1) + F.softplus(fake).mean(1)
    return discriminator_loss(kind, logits_real, logits_fake)


def adversarial_loss(kind: GANLoss, logits_fake: Tensor) -> Tensor:
    """Equation 5, -log D(Z_SR); its hinge form for `hinge`. Per sample, (B,), fp32."""
    return generator_loss("hinge" if kind == "hinge" else "bce", logits_fake)
