"""Section 4.4: several denoising steps, with the noise that the encoder's latent was split into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from common.denoisers.unet import Prediction
from common.diffusion import NoiseSchedule

MultistepNoise = Literal["first", "latest"]


def timestep_at(t_hat: Tensor, step: int, num_steps: int) -> Tensor:
    """t_k = round(t_hat (N - k) / N), (B,), int64: timesteps fall linearly from the predicted one.

    Args:
        t_hat: Timesteps of the first step, (B,), float.
        step: Step k, 0 .. N - 1.
        num_steps: Number of steps, N.
    """
    return (t_hat * (num_steps - step) / num_steps).round().long()


def denoise(
    predict: Callable[[Tensor, Tensor], Prediction],
    x_sr: Tensor,
    t_hat: Tensor,
    schedule: NoiseSchedule,
    num_steps: int = 1,
    noise: MultistepNoise = "first",
) -> Prediction:
    """Split X_SR into noise and image (equation 2), and refine the image in N - 1 further deterministic steps.

    At each further step X_k = sqrt(abar_k) Z + sqrt(1 - abar_k) eps. The paper reuses the first step's eps ("the same
    estimated noise"); `latest` takes the newest one, which is plain DDIM.

    Args:
        predict: The frozen denoiser, called as `predict(x_t, t)`; N times.
        x_sr: The encoder's output, (B,C,h,w), scaled latents.
        t_hat: Its timesteps, (B,), float.
        schedule: The denoiser's noise schedule.
        num_steps: Number of steps, N.
        noise: Step whose eps is added again.

    Returns:
        eps_SR of the first step and Z_SR of the last.
    """
    first = latest = predict(x_sr, timestep_at(t_hat, 0, num_steps))
    for step in range(1, num_steps):
        t = timestep_at(t_hat, step, num_steps)
        eps = first.eps if noise == "first" else latest.eps
        latest = predict(schedule.add_noise(latest.x0, eps, t), t)
    return Prediction(first.eps, latest.x0)
