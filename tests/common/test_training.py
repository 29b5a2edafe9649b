"""What only training needs is built where a fit comes, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoints import load_trained_weights
from common.training import Batch, TrainingModule

BATCH = {"lq": torch.ones(3, 2, 2), "name": "a", "index": 0}


class Critic(nn.Module):
    """Spectral normalisation keeps buffers beside its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))


class Toy(TrainingModule):
    """A trained and a frozen layer, a critic and a teacher."""

    trainable: ClassVar = {"net": ("net.*",), "critic": ("critic.*",)}
    training_only = ("critic",)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(clip=None, **kwargs)
        self.built: list[str] = []

    def configure_networks(self) -> None:
        self.built.append("networks")
        self.net, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)

    def configure_training(self) -> None:
        self.built.append("training")
        self.critic, self.teacher = Critic(), nn.Linear(3, 3).requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.trainable_parameters(name), lr=0.1) for name in self.trainable]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x = batch["lq"].mean((2, 3))
        for name, network in (("net", self.net), ("critic", self.critic.layer)):
            with self.optimizer_turn(name) as update:
                update(network(x).square().mean())

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.net(batch["lq"].mean((2, 3)))

    test_step = predict_step = validation_step


def trainer(folder: Path, steps: int = 2) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        max_steps=steps,
        enable_checkpointing=False,
    )


def loader() -> DataLoader:
    return DataLoader([BATCH] * 2)  # type: ignore[arg-type]


@pytest.fixture(params=[None, 0.5], ids=["plain", "averaged"])
def make(request: pytest.FixtureRequest) -> Callable[[], Toy]:
    return partial(Toy, ema_decay=request.param)


@pytest.fixture
def trained(make: Callable[[], Toy], tmp_path: Path) -> tuple[Toy, Path]:
    torch.manual_seed(0)
    model, runner = make(), trainer(tmp_path)
    runner.fit(model, loader())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    return model, tmp_path / "a.ckpt"


def looks(folder: Path) -> list[Callable[..., Any]]:
    return [getattr(trainer(folder), name) for name in ("validate", "test", "predict")]


@pytest.mark.parametrize("which", range(3), ids=["validate", "test", "predict"])
def test_looking_at_a_checkpoint_builds_and_loads_nothing_that_only_training_needs(
    make: Callable[[], Toy], trained: tuple[Toy, Path], tmp_path: Path, which: int
) -> None:
    source, path = trained
    model = make()
    looks(tmp_path)[which](model, loader(), ckpt_path=str(path), weights_only=True)
    assert model.built == ["networks"]
    assert dict(model.named_children()).keys() == {"net", "frozen"}
    assert set(model.all_trainable()) == {"net.weight", "net.bias"}
    assert torch.equal(model.net.weight, source.net.weight)
    if model.ema is not None:
        assert source.ema is not None
        assert model.ema.average.keys() == {"net.weight", "net.bias"}
        assert all(torch.equal(value, source.ema.average[name]) for name, value in model.ema.average.items())


def test_a_checkpoint_holds_both_and_a_fit_wants_both(
    make: Callable[[], Toy], trained: tuple[Toy, Path], tmp_path: Path
) -> None:
    _, path = trained
    checkpoint = torch.load(path, weights_only=True)
    assert {"critic.layer.parametrizations.weight.0._u", "net.weight"} <= checkpoint["state_dict"].keys()
    assert not any(key.startswith(("frozen.", "teacher.")) for key in checkpoint["state_dict"])
    lean = {**checkpoint, "state_dict": {k: v for k, v in checkpoint["state_dict"].items() if "critic" not in k}}
    torch.save(lean, tmp_path / "lean.ckpt")
    with pytest.raises(ValueError, match=r"4 trained keys missing \['critic\.layer\."):
        trainer(tmp_path).fit(make(), loader(), ckpt_path=str(tmp_path / "lean.ckpt"), weights_only=True)


@pytest.mark.parametrize("key", ["net.bias", "other.bias"], ids=["missing", "unknown"])
def test_what_inference_needs_is_checked_as_ever(
    make: Callable[[], Toy], trained: tuple[Toy, Path], tmp_path: Path, key: str
) -> None:
    checkpoint = torch.load(trained[1], weights_only=True)
    state = checkpoint["state_dict"]
    state.pop(key) if key in state else state.update({key: torch.zeros(3)})
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=key):
        trainer(tmp_path).test(make(), loader(), ckpt_path=str(tmp_path / "b.ckpt"), weights_only=True)


def test_a_fit_after_a_look_builds_the_rest_and_nothing_twice(make: Callable[[], Toy], tmp_path: Path) -> None:
    model = make()
    for look in looks(tmp_path):
        look(model, loader())
    net = model.net
    trainer(tmp_path).fit(model, loader())
    assert model.built == ["networks", "training"]
    assert model.net is net
    trainer(tmp_path).test(model, loader())
    assert model.built == ["networks", "training"]
    assert set(model.all_trainable()) > {"net.weight", "net.bias"}


def test_without_a_trainer_everything_is_built_unless_told_otherwise(
    make: Callable[[], Toy], trained: tuple[Toy, Path]
) -> None:
    model = make()
    model.configure_model()
    assert model.built == ["networks", "training"]
    lean = make()
    lean.inference_only = True
    lean.configure_model()
    assert lean.built == ["networks"]
    source, path = trained
    load_trained_weights(lean, path, lean.checkpoint_keys(), lean.left_out)
    average = source.net.weight if source.ema is None else source.ema.average["net.weight"]
    assert torch.equal(lean.net.weight, average)
    with pytest.raises(ValueError, match=r"4 unknown \['critic\."):
        load_trained_weights(lean, path, lean.checkpoint_keys())


def test_cudnn_attention_is_off_once_networks_are_built(make: Callable[[], Toy]) -> None:
    """Its backward pass gives NaN for some shapes; tests/papers/test_cuda.py trains in bf16 where there is a GPU."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    make().configure_model()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


class TestSchedule:
    """A run of two updates."""

    @staticmethod
    def fit(folder: Path, schedule: Callable[..., Any], steps: int = 2, ckpt_path: Path | None = None) -> Trainer:
        class Scheduled(Toy):
            def configure_optimizers(self) -> Any:
                optimizers = super().configure_optimizers()
                return optimizers, [schedule(optimizers[0])]

        runner = trainer(folder, steps)
        runner.fit(Scheduled(), loader(), ckpt_path=ckpt_path, weights_only=True)
        return runner

    ONE_CYCLE = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)
    COSINE = torch.optim.lr_scheduler.CosineAnnealingLR

    @pytest.mark.parametrize("make", [partial(COSINE, T_max=2), partial(ONE_CYCLE, total_steps=2)])
    def test_of_the_runs_length_it_runs_to_its_end(
        self, make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert self.fit(tmp_path, make).global_step == 2
        assert "the learning rate" not in caplog.text

    def test_one_that_would_fail_in_the_run_is_refused_before_the_first_step(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"trainer\.max_steps=2 and total_steps=1 of .*before the run; set both alike"
        ):
            self.fit(tmp_path, partial(self.ONE_CYCLE, total_steps=1))

    def test_a_shorter_cosine_is_warned_of(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.fit(tmp_path, partial(self.COSINE, T_max=1))
        assert "trainer.max_steps=2 and T_max=1 of CosineAnnealingLR: the learning rate rises again" in caplog.text

    @pytest.mark.parametrize("make", [partial(COSINE, T_max=3), partial(ONE_CYCLE, total_steps=3)])
    def test_a_longer_one_is_warned_of(self, make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert self.fit(tmp_path, make).global_step == 2
        assert caplog.text.count("the learning rate does not come to its end") == 1

    def test_a_resumed_run_has_the_checkpoints(self, tmp_path: Path) -> None:
        """Whatever its configuration says: torch's schedules restore their length."""
        self.fit(tmp_path, partial(self.ONE_CYCLE, total_steps=2)).save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"trainer\.max_steps=4 and total_steps=2 .*--init_from begins a new one"):
            self.fit(tmp_path, partial(self.ONE_CYCLE, total_steps=4), 4, tmp_path / "a.ckpt")
