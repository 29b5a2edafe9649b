"""Variational score distillation as OSEDiff does it (arXiv:2406.08177, cswry/OSEDiff): a gradient, and its surrogate.

z_hat = ...                                                         # with a graph
g = vsd_gradient(teacher, teacher_null, student, z_hat, noise, t, schedule)
loss = vsd_loss(g, z_hat).mean()                                    # into z_hat and what it was made from
"""

import torch
from torch import Tensor

from common.diffusion import NoiseSchedule
from common.losses.distribution_matching import PredictEps, score_surrogate


def vsd_gradient(
    teacher: PredictEps,
    teacher_null: PredictEps | None,
    student: PredictEps,
    z: Tensor,
    noise: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    cfg: float = 7.5,
    floor: float = 1e-6,
) -> Tensor:
    """VSD in x0 form, normalised as in DMD (arXiv:2311.18828, Eq. 8): g = (x0_reg - x0_fix) / m.

    With a = sqrt(abar[t]), s = sqrt(1 - abar[t]) and z_t = a z + s n:

        e_fix = e_null + cfg (e_cond - e_null)          x0 = (z_t - s e) / a          m = mean_{C,h,w} |z - x0_fix|

    Hence x0_reg - x0_fix = (s / a) (e_fix - e_reg), and descent along +g moves z from what the student (the
    regulariser) finds likely to what the teacher does. 0 where both agree. Nothing gets a gradient.

    Args:
        teacher: e_cond, the frozen prior; called as `teacher(z_t, t)` once. The caller binds its condition. It must
            give eps in eval mode, as the next two.
        teacher_null: e_null, the same with the null condition; called once, or not at all where `cfg` is 1.
        student: e_reg, trained on the generator's latents; called once, without guidance.
        z: Latents the generator made, (B, C, h, w).
        noise: Standard normal n, same shape.
        t: Timesteps, int64 (B,).
        schedule: Noise schedule of all three.
        cfg: Guidance of the teacher; 0 is the null branch alone, 1 the conditional one.
        floor: Least m, in units of z; OSEDiff has none and divides by 0 where z = x0_fix.

    Returns:
        g, same shape, fp32 at least, without a graph.

    Raises:
        ValueError: `teacher_null` is None and `cfg` is not 1, a shape is not that of z, or t does not fit (see
            `NoiseSchedule.coefficients`).
    """
    if cfg != 1 and teacher_null is None:
        raise ValueError(f"cfg={cfg} needs teacher_null; pass the teacher with its null condition, or cfg=1.")
    _check_shape("noise", noise, z)
    with torch.no_grad():
        z_t = schedule.add_noise(z, noise, t)
        eps_fix = _predict("teacher", teacher, z_t, t)
        if cfg != 1 and teacher_null is not None:
            eps_null = _predict("teacher_null", teacher_null, z_t, t)
            eps_fix = eps_null + cfg * (eps_fix - eps_null)
        x0_fix = schedule.x0_from_eps(z_t, eps_fix, t)
        x0_reg = schedule.x0_from_eps(z_t, _predict("student", student, z_t, t), t)
        m = (z - x0_fix).abs().mean(dim=tuple(range(1, z.ndim)), keepdim=True).clamp_min(floor)  # (B, 1, 1, 1)
        return (x0_reg - x0_fix) / m


def vsd_loss(g: Tensor, z: Tensor, scale: float = 2.0) -> Tensor:
    """Mean over the elements of scale sg(g) z, whose batch mean has the gradient scale g / numel at z.

    The value has no meaning, see `score_surrogate`; log |g| instead.

    Args:
        g: From `vsd_gradient`, (B, C, h, w); detached.
        z: The latents it was taken at, with their graph, same shape.
        scale: 2 gives the gradient of OSEDiff's mse_loss(z, sg(z - g)), 1 that of DMD's 0.5 mse.

    Returns:
        Surrogate per sample, (B,), fp32 at least.

    Raises:
        ValueError: The shapes differ.
    """
    return scale * score_surrogate(g, z)


def _predict(name: str, network: PredictEps, z_t: Tensor, t: Tensor) -> Tensor:
    """The network's eps in z_t's dtype, which is fp32 at least; of z_t's shape or refused."""
    eps = network(z_t, t)
    _check_shape(name, eps, z_t)
    return eps.to(z_t.dtype)


def _check_shape(name: str, found: Tensor, z: Tensor) -> None:
    if found.shape != z.shape:
        raise ValueError(f"{name} has shape {tuple(found.shape)} for z {tuple(z.shape)}; it must have z's shape.")
