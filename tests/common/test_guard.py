"""A loss or a gradient that is not finite changes no weight and no average, in memory or on disk, and ends the fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.guard import Later, NonFiniteLossError, save_batch
from common.training import Batch, TrainingModule

from .. import second_device

ADAMW = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
OPTIMIZERS = {
    "adamw": ADAMW,
    "fused adamw": partial(ADAMW, fused=True),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "fused sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
}


class Toy(TrainingModule):
    """Two layers; a batch whose `trap` is 0 has a finite loss with a gradient of 0 times infinity in one of them."""

    trainable: ClassVar = {"net": ("net.*",), "critic": ("critic.*",)}

    def __init__(self, optimizer: Callable[..., Any] = ADAMW, trapped: str = "net", **kwargs: Any) -> None:
        super().__init__(**{"ema_decay": 0.5, **kwargs})
        self.optimizer, self.trapped = optimizer, trapped

    def configure_networks(self) -> None:
        torch.manual_seed(0)
        self.net, self.critic = nn.Linear(3, 3), nn.Linear(3, 3)

    def configure_optimizers(self) -> Any:
        return [self.optimizer(self.trainable_parameters(name)) for name in self.trainable]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.update_step >= 1  # without a look at the device
        for name, network in (("net", self.net), ("critic", self.critic)):
            with self.optimizer_turn(name) as update:
                trap = batch["trap"].mean() if name == self.trapped else torch.ones_like(batch["trap"]).mean()
                loss = network(batch["lq"]).square().mean() + (trap * network.weight.square().sum()).sqrt()
                update(loss + batch["constant"].mean())


class Watch(Callback):
    """Notes weights and averages after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.after.append(state_of(pl_module))


def state_of(module: Toy) -> dict[str, Tensor]:
    assert module.ema is not None
    weights = {name: value.detach().clone() for name, value in module.all_trainable().items()}
    return weights | {f"average {name}": value.clone() for name, value in module.ema.average.items()}


def batches(count: int, bad: int | None = None, key: str = "trap", value: float = 0.0) -> DataLoader[Any]:
    made = [{"lq": torch.randn(3), "trap": torch.ones(()), "constant": torch.zeros(())} for _ in range(count)]
    for number, batch in enumerate(made):
        batch["index"] = torch.tensor(number)
    if bad is not None:
        made[bad][key] = torch.tensor(value)
    return DataLoader([{**batch, "name": f"image {i}"} for i, batch in enumerate(made)])  # type: ignore[arg-type]


def trainer(folder: Path, **kwargs: Any) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
        "max_epochs": 1,
    }
    return Trainer(**{**settings, **kwargs})


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("trapped", ["net", "critic"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_moves_nothing_and_leaves_the_last_checkpoint(
    optimizer: str, accumulate: int, trapped: str, tmp_path: Path
) -> None:
    bad = 3 * accumulate  # the first batch of the fourth update
    model, watch = Toy(OPTIMIZERS[optimizer], trapped, accumulate=accumulate), Watch()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True, enable_version_counter=False)
    runner = trainer(tmp_path, callbacks=[watch, saving], enable_checkpointing=True)
    with pytest.raises(NonFiniteLossError, match=rf"the {trapped} gradient norm is nan at train step {bad + 1};"):
        runner.fit(model, batches(6 * accumulate, bad))
    before, now = watch.after[bad - 1], state_of(model)
    # `net` has its turn before `critic`, and the averages with it
    kept = {name for name in now if trapped == "net" or name.startswith("critic")}
    assert {name: value for name, value in now.items() if name in kept and not torch.equal(value, before[name])} == {}
    assert all(value.isfinite().all() for value in now.values())
    assert not torch.equal(watch.after[0]["net.weight"], before["net.weight"])
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert int(checkpoint["state_dict"]["train_step"]) == bad
    saved = {name: checkpoint["state_dict"][name] for name in model.all_trainable()}
    assert_same(saved | {f"average {k}": v for k, v in checkpoint["ema"]["average"].items()}, before)
    (path,) = tmp_path.rglob("nonfinite_*.pt")
    batch = torch.load(path, weights_only=True)
    assert (batch["name"], batch["index"].tolist()) == ([f"image {bad}"], [bad])


@pytest.mark.parametrize("bad", [1, 3], ids=["before the last step", "in the last step"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_a_loss_that_is_not_finite_under_finite_gradients_moves_nothing(
    optimizer: str, value: float, bad: int, tmp_path: Path
) -> None:
    model, watch = Toy(OPTIMIZERS[optimizer]), Watch()
    with pytest.raises(NonFiniteLossError, match=rf"the net loss is {value} at train step {bad + 1};"):
        trainer(tmp_path, callbacks=[watch]).fit(model, batches(4, bad, "constant", value))
    assert_same(state_of(model), watch.after[bad - 1])


class TestScaledGradients:
    """16-mixed lowers its scale where scaled gradients overflow; what stays NaN at a scale of 1 is no overflow."""

    def fit(self, tmp_path: Path, scale: float, model: Toy, data: DataLoader[Any]) -> tuple[Watch, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        watch = Watch()
        runner = trainer(tmp_path, callbacks=[watch], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        runner.fit(model, data)
        return watch, scaler

    @pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
    def test_an_overflow_only_costs_its_steps(self, optimizer: str, tmp_path: Path) -> None:
        model = Toy(OPTIMIZERS[optimizer])
        watch, scaler = self.fit(tmp_path, 2.0**24, model, batches(10))  # float16 ends below 2^16
        assert 1 < scaler.get_scale() < 2.0**20
        assert_same(watch.after[0], watch.after[1])
        assert not torch.equal(watch.after[0]["net.weight"], watch.after[-1]["net.weight"])
        assert all(value.isfinite().all() for value in watch.after[-1].values())

    @pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
    def test_clipping_sees_the_gradients_without_their_scale(self, optimizer: str, tmp_path: Path) -> None:
        scaled, plain = (Toy(partial(torch.optim.SGD, lr=0.1, fused="fused" in optimizer)) for _ in range(2))
        self.fit(tmp_path, 1024.0, scaled, batches(1))
        self.fit(tmp_path, 1.0, plain, batches(1))
        torch.testing.assert_close(scaled.net.weight, plain.net.weight, rtol=1e-4, atol=1e-6)

    def test_what_is_no_overflow_stops_the_fit(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        with pytest.raises(NonFiniteLossError, match="the net gradient norm is nan at train step 3;"):
            self.fit(tmp_path, 4.0, Toy(), DataLoader([batches(6, 0).dataset[0]] * 6))  # type: ignore[arg-type]


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts reads of the second device's numbers, in a list of one number."""
    count, computed = [0], second_device._computed

    def counting(func: Any, args: Any, kwargs: Any) -> Any:
        if func.overloadpacket is torch.ops.aten._local_scalar_dense and isinstance(args[0], second_device.Far):
            count[0] += 1
        return computed(func, args, kwargs)

    monkeypatch.setattr(second_device, "_computed", counting)
    return count


class OnDevice(torch.optim.SGD):
    """Reads `found_inf` as a fused optimiser does; the second device has no fused kernels."""

    _step_supports_amp_scaling = True
    found_inf: Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(torch.where(self.found_inf > 0, parameter, parameter - 0.1 * parameter.grad))


@pytest.mark.parametrize(("optimizer", "expected"), [(OnDevice, 0), (torch.optim.SGD, 2)], ids=["fused", "plain"])
def test_a_steady_step_reads_the_device_once_an_update_or_never(
    optimizer: Any, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = _reads(monkeypatch)
    seen: list[int] = []

    class Counting(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(count[0])

    with second_device.second_device() as settings:
        model = Toy(partial(optimizer, lr=0.1))
        data = batches(5)
        trainer(tmp_path, callbacks=[Counting()], log_every_n_steps=100, **settings).fit(model, data)
    assert [after - before for before, after in pairwise(seen)] == [expected] * 4


def test_processes_stop_together_when_one_of_them_has_a_bad_loss(tmp_path: Path) -> None:
    class Alone(Toy):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            if batch_idx == 2 and self.global_rank == 1:
                batch["constant"] = batch["constant"] + float("nan")
            try:
                super().training_step(batch, batch_idx)
            finally:
                torch.save(state_of(self), tmp_path / f"after{batch_idx}_rank{self.global_rank}.pt")

        def on_train_batch_end(self, *args: Any) -> None:
            try:
                super().on_train_batch_end(*args)
            except NonFiniteLossError as error:
                (tmp_path / f"error{self.global_rank}").write_text(str(error))
                raise

    settings = {"strategy": "ddp_fork_find_unused_parameters_true", "devices": 2, "use_distributed_sampler": False}
    with pytest.raises(Exception, match="NonFiniteLossError"):
        trainer(tmp_path, **settings).fit(Alone(), batches(6))
    told = [(tmp_path / f"error{rank}").read_text() for rank in range(2)]
    assert re.match("the net loss is not finite in another process at train step 3;", told[0])
    assert re.match("the net loss is nan at train step 3;", told[1])
    assert len(list(tmp_path.rglob("nonfinite_step3_rank?.pt"))) == 2
    states = {path.name: torch.load(path, weights_only=True) for path in tmp_path.glob("after*.pt")}
    for rank in range(2):
        assert_same(states[f"after3_rank{rank}.pt"], states["after1_rank0.pt"])


def test_a_batch_is_saved_as_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "below" / "batch.pt"
    save_batch({"lq": torch.ones(2), "name": ("a", "b"), "more": {1: Path("c")}, "n": 3, "none": None}, path)
    found = torch.load(path, weights_only=True)
    assert found.pop("lq").tolist() == [1, 1]
    assert found == {"name": ["a", "b"], "more": {"1": "c"}, "n": 3, "none": None}


def test_a_value_arrives_when_the_next_one_is_sent() -> None:
    later, value = Later(), torch.zeros(())
    assert later.exchange(value) is None
    value += 1  # after it was sent
    assert [later.exchange(value), later.exchange(value)] == [0, 1]
