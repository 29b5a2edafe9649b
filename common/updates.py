"""Updates of several optimisers in their turns: backward pass, clipping, the guard, step, schedule, average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from common.training import TrainingModule


class Update(Protocol):
    """Updates the parameters of the optimiser in turn by a loss."""

    def __call__(self, loss: Tensor, step: bool = True, count: bool = True) -> None:
        """Run the backward pass and, at the end of an accumulation window, step.

        Args:
            loss: Scalar loss.
            step: False to add the gradient to those of earlier calls, without synchronisation between processes; a
                later call of the same turn sends the sum and steps.
            count: False if the step does not count as Lightning's `global_step`.
        """


class Updates:
    """Makes the updates of a module's optimisers.

    Args:
        accumulate: Batches whose gradients make one update.

    Attributes:
        grad_norm: Norm of the gradient of the last step, before clipping.

    Raises:
        ValueError: `accumulate` is out of range.
    """

    def __init__(self, accumulate: int) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} is out of range; set 1 or more batches an update")
        self.accumulate, self.grad_norm = accumulate, torch.zeros(())
        self._skips: bool | Tensor = False  # True if the optimiser in turn leaves out its step

    @contextmanager
    def turn(self, module: TrainingModule, name: str) -> Iterator[Update]:
        """A context of the turn of a module's optimiser; see `TrainingModule.optimizer_turn`."""
        which = list(module.trainable_patterns()).index(name)
        optimizers = module.optimizers(use_pl_optimizer=True)
        optimizer: Any = optimizers[which] if isinstance(optimizers, list) else optimizers

        def update(loss: Tensor, step: bool = True, count: bool = True) -> None:
            module.guard.check_loss(name, loss)
            with nullcontext() if step else _unsynchronised(module.trainer.strategy):
                module.manual_backward(loss / self.accumulate)
            if not step:
                return
            if module.is_accumulating:
                _check_gradient(module, name, _norm(optimizer.optimizer))
                return
            with nullcontext() if count and which == 0 else _uncounted(optimizer):
                optimizer.step()
            # not in the hook: Lightning drops an epoch's first numbers when two hooks log by turns
            module.log(f"grad_norm/{name}", self.grad_norm)
            optimizer.zero_grad()
            _advance_schedulers(module.lr_schedulers(), optimizer.optimizer)
            if which == 0 and module.ema is not None and self._skips is not True:
                module.ema.update(module.all_trainable(), self._skips if isinstance(self._skips, Tensor) else None)

        with module.toggled_optimizer(optimizer):
            yield update

    def before_step(self, module: TrainingModule, optimizer: torch.optim.Optimizer) -> None:
        """Clip, after mixed precision has unscaled the gradients, and keep the optimiser from a bad step.

        Optimisers made with `fused=true` read that on the device. For all others, and under 16-mixed, whose gradient
        scaler waits for the device too, the host waits once an update: their gradients become None, since zeroed ones
        would still decay weights and move them by what they remember.
        """
        scaler = _scaler(module)
        if scaler is not None and _is_fused(optimizer):
            scaler.unscale_(optimizer)  # Lightning leaves it to the optimiser, and scaled gradients would be clipped
        parameters = _with_gradient(optimizer)
        limit = module.clip if module.clip is not None else float("inf")
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, limit)
        every: Any = module.optimizers(use_pl_optimizer=False)
        which = every.index(optimizer) if isinstance(every, list) else 0
        _check_gradient(module, list(module.trainable_patterns())[which], self.grad_norm)
        skips = module.guard.found() | ~torch.isfinite(self.grad_norm)
        if scaler is None and _is_fused(optimizer):
            self._skips = skips
            optimizer.grad_scale, optimizer.found_inf = None, skips.float()  # type: ignore[attr-defined]
            return
        self._skips = bool(skips)
        if self._skips:
            for parameter in parameters:
                parameter.grad = None


def _scaler(module: TrainingModule) -> Any:
    """The gradient scaler of 16-mixed, else None."""
    return getattr(module.trainer.precision_plugin, "scaler", None)


def _check_gradient(module: TrainingModule, name: str, norm: Tensor) -> None:
    """Note if an optimiser's gradient is not finite; a scaler that can still go down may overflow it."""
    scaler = _scaler(module)
    scale = None if scaler is None else scaler._get_scale_async()  # get_scale() waits for the device
    module.guard.check_gradient(name, norm, scale)


@contextmanager
def _uncounted(optimizer: Any) -> Iterator[None]:
    """A context in which a step does not count as Lightning's `global_step`."""
    hooks = optimizer._on_before_step, optimizer._on_after_step
    optimizer._on_before_step = optimizer._on_after_step = lambda: None
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = hooks


def _unsynchronised(strategy: Any) -> AbstractContextManager[None]:
    """A context without gradient synchronisation between processes."""
    block = getattr(strategy, "block_backward_sync", nullcontext)
    context: AbstractContextManager[None] = block()
    return context


def _advance_schedulers(schedulers: Any, optimizer: torch.optim.Optimizer) -> None:
    """Advance the schedulers of one optimiser.

    Args:
        schedulers: All of a module: a list, a single one, or None.
        optimizer: The optimiser.
    """
    every = schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []
    for scheduler in every:
        if getattr(scheduler, "optimizer", None) is optimizer:
            scheduler.step()


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """True if an optimiser reads on the device that it must skip its step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _with_gradient(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _norm(optimizer: torch.optim.Optimizer) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in _with_gradient(optimizer) if p.grad is not None])
