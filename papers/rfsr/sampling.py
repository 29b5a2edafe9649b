"""Samplers of the base models, from diffusers, and the choice of the trained steps (RFSR, sections 3.3 and 4.1).

Steps are numbered 1 .. S as in the paper; step st works at `timesteps[st - 1]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler
from torch import Tensor

Sampler = Literal["ddpm", "ddim", "unipc"]
Spacing = Literal["leading", "linspace", "trailing"]
Band = Literal["early", "late"]

_CLASSES: dict[str, Any] = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "unipc": UniPCMultistepScheduler}


def make_sampler(config: Mapping[str, Any], kind: Sampler, steps: int, spacing: Spacing = "leading") -> Any:
    """Make a sampler at its first step. UniPC's sampler keeps its past steps, so make one for each run.

    Args:
        config: Settings of the noise schedule, as in `scheduler_config.json`.
        kind: `ddpm` (ancestral), `ddim` (eta 0) or `unipc` (order 2).
        steps: Number of sampling steps, S.
        spacing: Spacing of the timesteps; `leading` has an offset of 1 as in Stable Diffusion. UniPC's `leading`, in
            diffusers, is T // (S + 1): use `linspace` there, as PASD does.

    Returns:
        The scheduler of diffusers.

    Raises:
        ValueError: S is out of range, or does not divide the schedule's length, which `leading` cannot do.
    """
    length = config["num_train_timesteps"]
    if not 1 <= steps <= length:
        raise ValueError(f"steps={steps} is out of range; set 1 .. {length}")
    if spacing == "leading" and length % steps:  # diffusers would not take the steps that it names
        raise ValueError(f"steps={steps} does not divide {length}; choose one that does, or spacing: linspace")
    known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    settings = {key: config[key] for key in known if key in config} | {"timestep_spacing": spacing, "steps_offset": 1}
    if kind != "unipc":
        settings["clip_sample"] = False
    if kind == "ddpm":
        settings["variance_type"] = "fixed_small"
    sampler = _CLASSES[kind](**settings)
    sampler.set_timesteps(steps)
    return sampler


def advance(sampler: Any, eps: Tensor, t: int, z: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One step of a sampler from z_t; each sample's noise, where there is any, comes from its own generator."""
    noise = {"generator": list(generators)} if isinstance(sampler, DDPMScheduler) else {}
    z_next: Tensor = sampler.step(eps, t, z, **noise).prev_sample
    return z_next


def bands(t: int, early_min: int, late_max: int) -> tuple[Band, ...]:
    """Losses of a timestep: `early` from `early_min` on, `late` up to `late_max`; both where the bands overlap."""
    early: tuple[Band, ...] = ("early",) if t >= early_min else ()
    late: tuple[Band, ...] = ("late",) if t <= late_max else ()
    return early + late


def trained_steps(timesteps: Sequence[int], early_min: int, late_max: int) -> list[int]:
    """Numbers of the steps that are trained.

    Raises:
        ValueError: There are none.
    """
    found = [st for st, t in enumerate(timesteps, 1) if bands(t, early_min, late_max)]
    if not found:
        raise ValueError(
            f"t_early_min={early_min} and t_late_max={late_max} hold none of the sampler's timesteps "
            f"{list(timesteps)}; widen the bands or take more steps"
        )
    return found
