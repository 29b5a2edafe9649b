"""Losses that are given as gradients: the surrogate that carries a gradient, and DM-SR's two (eq. 6-8).

A method states dL/dz = g for a g that is not the gradient of a known function. `g` is computed without a graph
and handed to autograd as the slope of a linear function of z:

    z_sr = ...                                                          # with a graph
    g = distribution_matching_gradient(predict_eps, z_sr, z_hq, noise, t, schedule)
    loss = score_surrogate(g, x_sr).mean()                              # at z_sr, or at what z_sr was made from
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from common.diffusion import NoiseSchedule

PredictEps = Callable[[Tensor, Tensor], Tensor]
Sign = Literal["corrected", "printed"]


def score_surrogate(g: Tensor, z: Tensor) -> Tensor:
    """Mean over the elements of sg(g) z, whose batch mean has the gradient g / numel at z.

    The value has no meaning, may be negative and need not fall; log |g|. Same gradient as 0.5 mse(z, sg(z - g));
    without the 0.5, as in OSEDiff, it is twice as large.

    Args:
        g: Gradient at `z`, (B, ...); detached.
        z: Tensor that gets this gradient, same shape.

    Returns:
        Surrogate per sample, (B,), fp32 at least.

    Raises:
        ValueError: The shapes differ.
    """
    _check_shapes(g=g, z=z)
    dtype = torch.promote_types(z.dtype, torch.float32)
    return (g.detach().to(dtype) * z.to(dtype)).flatten(1).mean(1)


def distribution_matching_gradient(
    predict_eps: PredictEps, z: Tensor, h: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """DM-SR, eq. 6-7: g = mu(a z + s n, t) - mu(a h + s n, t), a = sqrt(abar[t]), s = sqrt(1 - abar[t]), one noise n.

    Exactly 0 at z = h because the noise is shared; elsewhere descent along +g pulls z to h. Nothing gets a gradient.

    Args:
        predict_eps: mu, called as `predict_eps(z_t, t)` once for z and once for h; the caller binds the text. It must
            give the same output for the same input (eval mode).
        z: Latents the method made, (B, C, h, w).
        h: Latents of the targets, same shape.
        noise: Standard normal, same shape.
        t: Timesteps, int64 (B,).
        schedule: Noise schedule of `predict_eps`.

    Returns:
        g, same shape, fp32 at least, without a graph.

    Raises:
        ValueError: The shapes differ, or t does not fit (see `NoiseSchedule.coefficients`).
    """
    _check_shapes(z=z, h=h, noise=noise)
    with torch.no_grad():
        z_t, h_t = (schedule.add_noise(latent, noise, t) for latent in (z, h))
        return predict_eps(z_t, t).to(z_t.dtype) - predict_eps(h_t, t).to(h_t.dtype)


def noise_gradient(
    predict_eps: PredictEps, h: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule, sign: Sign
) -> Tensor:
    """DM-SR, eq. 8: the gradient that makes eps a noise which denoises back to h.

    The goal is r = mu(a h + s eps, t) - eps = 0, with a and s as in eq. 6. The gradient of 0.5 |r|^2 with respect to
    eps is -(I - s J)^T r, J the Jacobian of mu, and I - s J = (abar / s^2) Cov(z_0 | z_t) >= 0 for an MMSE denoiser.
    So -r lowers |r|, and +r, as printed, raises it without bound.

    Args:
        predict_eps: mu, called as `predict_eps(z_t, t)` once; as for `distribution_matching_gradient`.
        h: Latents of the targets, (B, C, h, w).
        eps: Noise the method predicted, same shape; detached.
        t: Timesteps `eps` was predicted at, int64 (B,).
        schedule: Noise schedule of `predict_eps`.
        sign: `corrected` gives -r, `printed` gives +r.

    Returns:
        -r or +r, same shape, fp32 at least, without a graph.

    Raises:
        ValueError: `sign` is unknown, the shapes differ, or t does not fit.
    """
    if sign not in ("corrected", "printed"):
        raise ValueError(f"sign={sign!r} is unknown; use 'corrected' or 'printed'.")
    _check_shapes(h=h, eps=eps)
    with torch.no_grad():
        z_t = schedule.add_noise(h, eps, t)
        r = predict_eps(z_t, t).to(z_t.dtype) - eps
        return -r if sign == "corrected" else r


def _check_shapes(**tensors: Tensor) -> None:
    """Refuse tensors of different shapes, which arithmetic might broadcast."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {found}; pass tensors of one shape (B, ...).")
