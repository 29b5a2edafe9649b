"""Images drawn from a foundation model: DDIM (arXiv:2010.02502, Eq. 12 with sigma 0) with classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from common.denoisers.unet import UNetDenoiser


@torch.no_grad()
def sample(
    denoiser: UNetDenoiser, c: Tensor, null: Tensor, noise: Tensor, steps: int = 20, guidance: float = 7.5
) -> Tensor:
    """Denoise noise to latents in `steps` deterministic DDIM steps, evenly spaced from the last timestep on.

    diffusers' scheduler does the same if `steps` divides the number of timesteps. Otherwise it steps to other timesteps
    than those of its next call, and may end before the clean image.

    Args:
        denoiser: The foundation model, eps prediction.
        c: Condition, (B,N,D).
        null: Null condition, same shape.
        noise: Standard normal, (B,C,h,w).
        steps: Number of U-Net calls; each has the batch twice unless `guidance` is 0 or 1.
        guidance: e_null + guidance (e_c - e_null); 0 samples without a condition, 1 with it and without guidance.

    Returns:
        Scaled latents, (B,C,h,w).
    """
    schedule = denoiser.schedule
    times = [round(schedule.num_timesteps * left / steps) - 1 for left in range(steps, 0, -1)]
    z = noise
    for t, following in zip(times, [*times[1:], None], strict=True):
        if guidance in (0, 1):
            eps = denoiser(z, t, c if guidance else null).eps
        else:
            eps_null, eps_c = denoiser(torch.cat([z, z]), t, torch.cat([null, c])).eps.chunk(2)
            eps = eps_null + guidance * (eps_c - eps_null)
        x0 = schedule.x0_from_eps(z, eps, t)
        z = x0 if following is None else schedule.add_noise(x0, eps, following)
    return z
