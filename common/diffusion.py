"""The noise schedule and every conversion between noise, clean latent and velocity.

With abar = alpha_bar[t], the cumulated signal power, and eps ~ N(0, I):

    z_t = sqrt(abar) z_0 + sqrt(1 - abar) eps        (DDPM, arXiv:2006.11239, Eq. 4)
    v   = sqrt(abar) eps - sqrt(1 - abar) z_0        (progressive distillation, arXiv:2202.00512, App. D)

The pair (z_t, v) is the pair (z_0, eps) turned by an angle, so each of the four follows from two others.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class NoiseSchedule(nn.Module):
    """The forward process of a diffusion model with discrete timesteps 0 .. T - 1.

    Coefficients are computed in float64 with numpy and kept outside of the module's buffers: neither `.to(bfloat16)`
    nor a meta device nor `to_empty()` can harm them. Results have the latents' dtype, but float32 at least; at
    t = 999 of SD's schedule eps is amplified 14.6 times on the way to x0, which bfloat16 would not survive.

    Args:
        config: A scheduler's config as diffusers writes it: `num_train_timesteps`, `beta_start`, `beta_end`,
            `beta_schedule` (`linear` or `scaled_linear`) and `prediction_type` (default `epsilon`).

    Raises:
        ValueError: The config lacks one of them, or asks for betas of another kind.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        missing = [
            key for key in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule") if key not in config
        ]
        if missing:
            raise ValueError(f"the scheduler config lacks {missing}; it must be that of a diffusion (not flow) model.")
        for key in ("trained_betas", "rescale_betas_zero_snr"):
            if config.get(key):
                raise ValueError(f"the scheduler config sets {key}={config[key]!r}, which NoiseSchedule does not know.")
        self.num_timesteps: int = config["num_train_timesteps"]
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        start, end, steps = config["beta_start"], config["beta_end"], self.num_timesteps
        match config["beta_schedule"]:
            case "linear":
                betas = np.linspace(start, end, steps)
            case "scaled_linear":
                betas = np.linspace(start**0.5, end**0.5, steps) ** 2
            case other:
                raise ValueError(f"beta_schedule='{other}' is not known; it must be 'linear' or 'scaled_linear'.")
        self._alpha_bar = np.cumprod(1.0 - betas)  # float64, (T,)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def alpha_bar(self) -> Tensor:
        """Signal power at each timestep, (T,), float64, on the CPU."""
        return torch.from_numpy(self._alpha_bar.copy())

    def coefficients(self, t: int | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Look up sqrt(abar[t]) and sqrt(1 - abar[t]).

        Args:
            t: Timesteps, a number or int64 (B,) or ().
            like: Tensor (B, ...) the coefficients are for.

        Returns:
            Both on `like`'s device, in its dtype (float32 at least), as (B, 1, ..., 1) or (1, ..., 1).

        Raises:
            ValueError: t is not integer, is out of 0 .. T - 1 (not checked for tensors on an accelerator, where it
                would wait for the device), or its length is neither 1 nor B.
        """
        table = self._table(like.device, torch.promote_types(like.dtype, torch.float32))
        last = self.num_timesteps - 1
        if isinstance(t, int):
            if not 0 <= t <= last:
                raise ValueError(f"t={t} leaves the schedule's range 0 .. {last}.")
            rows = table[:, t]
        else:
            if t.is_floating_point():
                raise ValueError(f"t has dtype {t.dtype}; timesteps are integers.")
            if t.numel() not in (1, len(like)):
                raise ValueError(f"t has {t.numel()} timesteps for a batch of {len(like)}; give one, or one for each.")
            if t.device.type == "cpu" and (t.min() < 0 or t.max() > last):
                raise ValueError(f"t={t.tolist()} leaves the schedule's range 0 .. {last}.")
            rows = table[:, t.to(like.device).flatten()]
        signal, sigma = rows.reshape(2, -1, *[1] * (like.ndim - 1))
        return signal, sigma

    def add_noise(self, z0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """z_t = sqrt(abar) z_0 + sqrt(1 - abar) eps."""
        signal, sigma = self.coefficients(t, z0)
        return signal * z0 + sigma * noise

    def x0_from_eps(self, z_t: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """z_0 = (z_t - sqrt(1 - abar) eps) / sqrt(abar)."""
        signal, sigma = self.coefficients(t, z_t)
        return (z_t - sigma * eps) / signal

    def eps_from_x0(self, z_t: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        """Eps = (z_t - sqrt(abar) z_0) / sqrt(1 - abar)."""
        signal, sigma = self.coefficients(t, z_t)
        return (z_t - signal * x0) / sigma

    def v_from_eps_x0(self, eps: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        """V = sqrt(abar) eps - sqrt(1 - abar) z_0."""
        signal, sigma = self.coefficients(t, x0)
        return signal * eps - sigma * x0

    def eps_from_v(self, z_t: Tensor, v: Tensor, t: int | Tensor) -> Tensor:
        """Eps = sqrt(abar) v + sqrt(1 - abar) z_t."""
        signal, sigma = self.coefficients(t, z_t)
        return signal * v + sigma * z_t

    def x0_from_v(self, z_t: Tensor, v: Tensor, t: int | Tensor) -> Tensor:
        """z_0 = sqrt(abar) z_t - sqrt(1 - abar) v."""
        signal, sigma = self.coefficients(t, z_t)
        return signal * z_t - sigma * v

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """sqrt(abar) and sqrt(1 - abar) as (2, T), made once for each device and dtype."""
        if (device, dtype) not in self._tables:
            both = np.stack([np.sqrt(self._alpha_bar), np.sqrt(1.0 - self._alpha_bar)])
            with torch.inference_mode(False):  # the first use may be in validation, and training needs the tensor, too
                self._tables[device, dtype] = torch.from_numpy(both).to(dtype).to(device)
        return self._tables[device, dtype]


def flow_noise(z: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
    """Rectified flow's forward process (arXiv:2209.03003), z_t = (1 - t) z + t eps; t in [0, 1], a number or (B,)."""
    t = _time(t, z)
    return (1 - t) * z + t * eps


def flow_clean(z_t: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """The clean latent by a velocity: z = z_t - t v, as v = eps - z."""
    return z_t - _time(t, z_t) * v


def flow_velocity(z_t: Tensor, z: Tensor, t: float | Tensor) -> Tensor:
    """The velocity by which `flow_clean` gives z: v = (z_t - z) / t, for t > 0."""
    return (z_t - z) / _time(t, z_t)


def _time(t: float | Tensor, like: Tensor) -> float | Tensor:
    return t.to(like).reshape(-1, *[1] * (like.ndim - 1)) if isinstance(t, Tensor) else t
