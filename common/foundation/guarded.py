"""The foundation's trainers limit the gradient and stop at numbers that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from common.guard import Guard, NonFiniteLossError, save_batch


class GuardedModule(LightningModule):
    """Clips the gradient's norm and stops before a loss or a gradient that is NaN or infinite changes a weight.

    The host waits for the device once an update, as `TrainingModule` does for optimisers that are not fused.
    """

    clip: float
    """Gradient norm limit; set by the trainer."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keep the batch, to save it if its loss is not finite."""
        self._batch = batch

    def on_before_backward(self, loss: Tensor) -> None:
        """Keep the loss until its gradient is there."""
        self._loss = loss.detach()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop at a loss or gradient that is not finite; a gradient scaler takes care of its gradients itself.

        Raises:
            NonFiniteLossError: There is one, in this process or another.
        """
        guard = Guard(self._loss.device)
        guard.note(self._loss, 0)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            guard.note(nn.utils.get_total_norm(gradients), 1)
        code = guard.now()
        if code is None:
            return
        step = self.trainer.global_step + 1
        path = Path(self.trainer.log_dir or ".") / f"nonfinite_step{step}_rank{self.global_rank}.pt"
        save_batch(self._batch, path)
        raise NonFiniteLossError(
            f"the {('loss', 'gradient norm')[code]} is not finite at train step {step}; the batch is in {path}, and no "
            "weight was changed by it: lower model.lr, or look at that batch"
        )

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip the gradient's norm."""
        self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
