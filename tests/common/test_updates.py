"""Options of an update: a step that does not count, and a gradient that waits for the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.training import Batch, TrainingModule

LR = 0.1


class Rounds(TrainingModule):
    """Three losses a batch, as one update of their sum or as three updates, of which the last one counts."""

    trainable: ClassVar = {"net": ("net.*",), "other": ("other.*",)}

    def __init__(self, each: bool) -> None:
        super().__init__(clip=None)
        self.each = each
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net, self.other = nn.Linear(2, 1), nn.Linear(2, 1)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.trainable_parameters(name), lr=LR) for name in self.trainable]

    def loss(self, network: nn.Linear, x: Tensor, factor: int) -> Tensor:
        return (network(x) - factor).square().mean()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        with self.optimizer_turn("net") as update:
            for factor in (1, 2, 3):
                loss = self.loss(self.net, batch["lq"], factor)
                if self.each:
                    update(loss, count=factor == 3)
                else:
                    update(loss, step=factor == 3)
        with self.optimizer_turn("other") as update:
            update(self.loss(self.other, batch["lq"], 1))


def x_of(count: int) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(1))


def fit(model: Rounds, folder: Path, steps: int = 2) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=steps,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    data: Any = DataLoader([{"lq": x} for x in x_of(6)], batch_size=3)  # type: ignore[arg-type]
    trainer.fit(model, data)
    return trainer


def by_hand(each: bool) -> nn.Linear:
    """Plain gradient descent."""
    network = Rounds(each).net
    for x in x_of(6).split(3):
        gradients = [torch.zeros_like(p) for p in network.parameters()]
        for factor in (1, 2, 3):
            loss = (network(x) - factor).square().mean()
            new = torch.autograd.grad(loss, list(network.parameters()))
            gradients = [g + n for g, n in zip(gradients, new, strict=True)]
            if each or factor == 3:
                with torch.no_grad():
                    for p, g in zip(network.parameters(), gradients, strict=True):
                        p -= LR * g
                gradients = [torch.zeros_like(p) for p in network.parameters()]
    return network


@pytest.mark.parametrize("each", [False, True])
def test_a_round_of_losses_is_one_train_step_and_plain_descent(each: bool, tmp_path: Path) -> None:
    model = Rounds(each)
    trainer = fit(model, tmp_path)
    assert trainer.global_step == 2
    assert int(model.train_step) == 2
    for found, expected in zip(model.net.parameters(), by_hand(each).parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.net.weight, by_hand(not each).weight)


def test_only_gradients_that_wait_are_not_synchronised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, log, blocked = Rounds(each=False), list[bool](), [False]
    backward = model.manual_backward

    @contextmanager
    def block() -> Iterator[None]:
        blocked[0] = True
        yield
        blocked[0] = False

    def seen(loss: Tensor) -> None:
        log.append(blocked[0])
        monkeypatch.setattr(model.trainer.strategy, "block_backward_sync", block, raising=False)
        backward(loss)

    monkeypatch.setattr(model, "manual_backward", seen)
    fit(model, tmp_path)
    assert log[-4:] == [True, True, False, False]  # three losses of the first optimiser, one of the second


def test_a_loss_that_waits_is_guarded_too(tmp_path: Path) -> None:
    class Broken(Rounds):
        def loss(self, network: nn.Linear, x: Tensor, factor: int) -> Tensor:
            return super().loss(network, x, factor) * (float("nan") if factor == 1 and network is self.net else 1)

    model = Broken(each=False)
    with pytest.raises(RuntimeError, match="the net loss is nan at train step 1;"):
        fit(model, tmp_path)
    assert torch.equal(model.net.weight, Rounds(each=False).net.weight)
