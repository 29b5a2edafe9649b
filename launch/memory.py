"""Memory of training a configuration, counted on the meta device: `isr parameters CONFIG --memory`.

Activations are not counted: how many there are depends on crop and batch, and docs/performance.md has measured peaks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from common.training import TrainingModule
from launch.errors import UsageError
from launch.parameters import build, readable

LEFT_OUT = "not counted: activations (gradient_checkpointing saves them), workspaces of kernels, models of rewards"


def memory_plan(model: TrainingModule) -> dict[str, int]:
    """Bytes that training holds all the time, by part; each parameter counts once.

    Args:
        model: A model from `launch.parameters.build`, on the meta device.
    """
    trained = {id(parameter): parameter for parameter in model.all_trainable().values()}
    frozen: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if id(parameter) not in trained:
            frozen[parameter.dtype] += parameter.nbytes
    plan = {f"frozen weights, {str(dtype).removeprefix('torch.')}": size for dtype, size in frozen.items()}
    plan["trained weights"] = sum(parameter.nbytes for parameter in trained.values())
    turns = [sum(p.nbytes for p in model.trainable_parameters(name)) for name in model.trainable_patterns()]
    plan["gradients"] = sum(turns) if model.accumulate > 1 else max(turns, default=0)  # else freed after each turn
    plan["optimisers' states"] = sum(_state_bytes(optimizer) for optimizer in _optimizers(model))
    plan["average of the trained weights"] = 0 if model.ema is None else 4 * sum(p.numel() for p in trained.values())
    return plan


def text_encoder_bytes(model: TrainingModule) -> int:
    """Bytes of the text encoders, in float32 but for rows that say otherwise, while they are loaded."""
    return sum(row.total * row.bytes_each for row in model.parameter_rows() if row.kind == "text")


def _optimizers(model: TrainingModule) -> list[torch.optim.Optimizer]:
    """The optimisers that a fit would make."""
    configured: Any = model.configure_optimizers()
    found = configured[0] if isinstance(configured, tuple) else configured
    return list(found) if isinstance(found, list | tuple) else [found]


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimiser's state, which a step on the meta device makes."""
    for group in optimizer.param_groups:
        group["fused"] = group["foreach"] = False  # there are no such kernels on the meta device
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.ndim)


def report(model: LightningModule, configs: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plan of a model from `launch.parameters.build`, and what its settings save.

    Args:
        model: The model.
        configs: The YAML files that it was built from.
        overrides: Its further arguments, `--model.ARG=VALUE`.

    Returns:
        `memory`: bytes by part; `total`: their sum; `text_encoders`: bytes of those, while they are loaded;
        `saves`: bytes that a setting saves against its opposite, whichever of them the configuration has.

    Raises:
        UsageError: The model is no training stage of this repository.
    """
    if not isinstance(model, TrainingModule):
        raise UsageError(f"--memory: {type(model).__name__} is not a TrainingModule; leave --memory out")
    plan = memory_plan(model)
    other = "float32" if model.frozen_dtype == "bfloat16" else "bfloat16"
    saves = {}
    changed = build(configs, [*overrides, f"--model.frozen_dtype={other}"])
    assert isinstance(changed, TrainingModule)
    difference = sum(memory_plan(changed).values()) - sum(plan.values())
    if difference:
        saves["frozen_dtype=bfloat16 instead of float32"] = abs(difference)
    if plan["average of the trained weights"]:
        saves["ema_decay=null"] = plan["average of the trained weights"]
    return {
        "memory": plan,
        "total": sum(plan.values()),
        "text_encoders": text_encoder_bytes(model),
        "saves": saves,
    }


def table(found: dict[str, Any]) -> str:
    """Lay a `report` out for reading."""
    lines = [*found["memory"].items(), ("held all the time", found["total"])]
    if found["text_encoders"]:
        lines.append(("text encoders, while they are loaded (not in the sum)", found["text_encoders"]))
    lines += [(f"saved by {setting}", size) for setting, size in found["saves"].items()]
    width, digits = max(len(name) for name, _ in lines), len(f"{max(size for _, size in lines):,}")
    rows = [f"{name:<{width}}  {size:>{digits},} bytes  {readable(size):>9}" for name, size in lines]
    return "\n".join(["memory of training", *rows, LEFT_OUT])
