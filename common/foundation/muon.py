"""Muon, with Adam for parameters that are not matrices; the tiny VAE learns with it in a third of the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as in torch.optim.Muon
_SMALLEST = 8  # side of a matrix that is worth it
_RMS = 0.2  # of an update: Adam's usual one, so that both share a learning rate (arXiv:2502.16982)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal for weights that are matrices, convolutions among them; Adam for all others.

    `torch.optim.Muon` takes 2-D parameters alone; a convolution here is the matrix (out, in x kh x kw). On 2-D weights
    the two agree (`adjust_lr_fn="match_rms_adamw"`), but for bfloat16, which this one does not use.

    Args:
        parameters: Parameters to train.
        lr: Learning rate of both.
        momentum: Momentum of the matrices' gradients, in Nesterov's form.
        betas: Betas of Adam.
        eps: Epsilon of Adam.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 2e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= _SMALLEST]
        held = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in held]
        groups: list[dict[str, Any]] = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's overloads
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (self._muon if group["muon"] else self._adam)(parameter, parameter.grad, group)
        return loss

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(momentum, group["momentum"]).flatten(1)
        update = orthogonal(matrix) * _RMS * max(matrix.shape) ** 0.5
        parameter.add_(update.view(parameter.shape), alpha=-group["lr"])

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        first, second = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - first)
        square = state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, scale, value=-group["lr"] / (1 - first ** state["step"]))


def muon_or_adamw(
    name: Literal["adamw", "muon"], parameters: Iterable[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """The foundation's optimiser by its name; AdamW with Muon's betas and no decay, so that the two compare."""
    if name == "muon":
        return Muon(parameters, lr=lr)
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push a matrix's singular values towards 1 by Newton-Schulz steps; they end between 0.7 and 1.2.

    Args:
        matrix: (m, n).
        steps: Number of steps.
    """
    a, b, c = _COEFFICIENTS
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
