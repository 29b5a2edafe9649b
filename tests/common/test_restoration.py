"""The promises that every method inherits, held by a method of one convolution and two optimisers."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import evaluation, metrics
from common.draws import Draws
from common.guard import NonFiniteLossError
from common.images import bicubic_upsample, write_png
from common.made import RECORD
from common.pyiqa import MetricUnavailableError
from common.restoration import Inference, RestorationModule
from common.training import Batch

PLAIN = Inference(color_fix="none", tile=None)


class Toy(RestorationModule):
    """An up-sampler and a critic of one convolution each, beside something frozen."""

    trainable = {"generator": ("net.*",), "critic": ("critic.*",)}  # noqa: RUF012 - as in the base

    def __init__(
        self, lr: float = 0.1, critic_lr: float = 0.05, optimizer: Any = torch.optim.SGD, **kwargs: Any
    ) -> None:
        super().__init__(**{"inference": PLAIN, "clip": None, **kwargs})
        self.save_hyperparameters(ignore=["inference", "optimizer"])
        self.lr, self.critic_lr, self.optimizer = lr, critic_lr, optimizer
        self.losses: list[float] = []
        self.seen: list[dict[str, Any]] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Conv2d(3, 3, 3, padding=1)
            self.critic = nn.Conv2d(3, 1, 3)
            self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> Tensor:
        return x_lq.mean()

    def restore(self, x_lq: Tensor, conditions: Tensor) -> Tensor:
        return bicubic_upsample(x_lq, self.scale) + 0 * conditions

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        noise = self.draws(batch).normal("noise", batch["lq"].shape[1:])
        with self.optimizer_turn("generator") as update:
            sr = self.net(self.frozen(batch["lq"] + 0.1 * noise))
            loss = (sr - batch["lq"]).square().mean() - 0.1 * self.critic(sr).mean()
            update(loss)
        self.losses.append(float(loss.detach()))
        with self.optimizer_turn("critic") as update:
            sr = self.net(self.frozen(batch["lq"]))  # not detached: toggling alone keeps the gradient from the net
            loss = (self.critic(sr).mean() - 1).square() + self.critic(batch["lq"]).mean().square()
            required = [name for name, p in self.named_parameters() if p.requires_grad]
            self.seen.append({"net": grad(self.net), "critic": grad(self.critic), "required": required})
            update(loss)
            self.seen[-1]["net after"] = grad(self.net)

    def configure_optimizers(self) -> Any:
        rates = {"generator": self.lr, "critic": self.critic_lr}
        return [self.optimizer(self.trainable_parameters(name), lr=rate) for name, rate in rates.items()]


def grad(module: nn.Module) -> Tensor | None:
    gradient = next(module.parameters()).grad
    return None if gradient is None else gradient.clone()


class KilledError(RuntimeError):
    """As if the process had died."""


class Sharpened(Toy):
    """A toy that really changes its tiles, by its prompt too, and counts them."""

    tiles, stop_after = 0, None

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> Any:
        return (torch.tensor([float(len(prompts[0]))]), None)

    def restore(self, x_lq: Tensor, conditions: Any) -> Tensor:
        if self.tiles == self.stop_after:
            raise KilledError
        self.tiles += 1
        return bicubic_upsample(x_lq + 0.3 * self.net(x_lq), self.scale) + 0.01 * conditions[0]


def samples(n: int, size: tuple[int, int] = (8, 8), hq: bool = True, name: str = "img") -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    h, w = size
    made = []
    for i in range(n):
        sample = {
            "lq": torch.randint(0, 256, (3, h, w), generator=g, dtype=torch.uint8),
            "prompt": "",
            "name": f"{name}{i}",
            "index": i,
        }
        if hq:
            sample["hq"] = torch.randint(0, 256, (3, 4 * h, 4 * w), generator=g, dtype=torch.uint8)
        made.append(sample)
    return made


def loader(n: int, batch_size: int = 2, **kwargs: Any) -> DataLoader:
    return DataLoader(samples(n, **kwargs), batch_size=batch_size)  # type: ignore[arg-type]


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    return partial(
        Trainer,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        max_epochs=1,
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], names: Iterable[str] | None = None) -> None:
    for name in names or a:
        assert torch.equal(a[name], b[name]), name


class TestTraining:
    def test_global_step_counts_updates_of_the_first_optimiser_alone(self, trainer: Any) -> None:
        toy, t = Toy(), trainer(max_steps=3)
        t.fit(toy, loader(20))
        assert t.global_step == 3
        assert int(toy.train_step) == 3
        assert len(toy.losses) == 3

    def test_both_optimisers_step_and_nothing_frozen_moves(self, trainer: Any) -> None:
        toy = Toy()
        before = weights(toy)
        trainer(max_steps=1).fit(toy, loader(2))
        after = weights(toy)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"net.weight", "net.bias", "critic.weight", "critic.bias"}

    def test_an_update_is_that_of_plain_gradient_descent(self, trainer: Any) -> None:
        toy, twin = Toy(), Toy()
        trainer(max_steps=1).fit(toy, loader(2))
        batch = {k: torch.stack([s[k] for s in samples(2)]).float() / 255 for k in ("lq", "hq")}
        twin._trainer = None
        noise = Draws(0, torch.arange(2)).normal("noise", (3, 8, 8))
        sr = twin.net(twin.frozen(batch["lq"] + 0.1 * noise))
        loss = (sr - batch["lq"]).square().mean() - 0.1 * twin.critic(sr).mean()
        gradient = torch.autograd.grad(loss, list(twin.net.parameters()))
        expected = [p - 0.1 * g for p, g in zip(twin.net.parameters(), gradient, strict=True)]
        for p, e in zip(toy.net.parameters(), expected, strict=True):
            torch.testing.assert_close(p, e, rtol=1e-6, atol=1e-7)

    def test_in_one_turn_the_other_optimisers_parameters_get_no_gradient(self, trainer: Any) -> None:
        toy = Toy()
        trainer(max_steps=2).fit(toy, loader(4))
        for seen in toy.seen:
            assert seen["net"] is None
            assert seen["net after"] is None
            assert seen["critic"] is None, "the generator's loss went through the critic"
            assert seen["required"] == ["critic.weight", "critic.bias"]
        assert [n for n, p in toy.named_parameters() if p.requires_grad] == [
            n for n in weights(toy) if "frozen" not in n
        ]

    def test_a_fit_goes_on_after_a_test_and_keeps_its_average(self, trainer: Any) -> None:
        """A test runs in inference mode, in which the averages take the weights' place."""
        toy, twin = (Toy(ema_decay=0.5) for _ in range(2))
        trainer(max_steps=1).fit(toy, loader(20))
        trainer().test(toy, loader(2), verbose=False)
        trainer(max_steps=1).fit(toy, loader(20))
        for _ in range(2):
            trainer(max_steps=1).fit(twin, loader(20))
        assert_equal(weights(twin), weights(toy))
        assert twin.ema is not None
        assert toy.ema is not None
        assert toy.ema.updates == 2
        assert_equal(twin.ema.average, toy.ema.average)

    def test_without_previews_a_validation_ends(self, trainer: Any) -> None:
        toy = Toy(inference=Inference(color_fix="none", tile=None, preview=0, metrics=["psnr_rgb"]))
        (scores,) = trainer().validate(toy, loader(2), verbose=False)
        assert len(scores) == 1

    def test_updates_are_counted_beside_batches(self) -> None:
        toy = Toy(accumulate=3)
        numbers = []
        for _ in range(7):
            toy._steps += 1
            numbers.append(toy.update_step)
        assert numbers == [1, 1, 1, 2, 2, 2, 3]

    def test_a_checkpoint_of_a_python_program_holds_no_object(
        self, trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        toy = Toy()
        toy.save_hyperparameters({"network": nn.Linear(2, 2), "made": torch.optim.SGD, "sizes": [1, {"a": 2.5}]})
        t = trainer(max_steps=1)
        t.fit(toy, loader(2))
        t.save_checkpoint(tmp_path / "a.ckpt")
        kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
        assert kept == {"lr": 0.1, "critic_lr": 0.05, "sizes": [1, {"a": 2.5}]}
        assert "objects are not in the checkpoint: made, network" in caplog.text

    @pytest.mark.parametrize("clip", [None, 0.01])
    def test_two_accumulated_batches_are_one_twice_as_large(self, trainer: Any, clip: float | None) -> None:
        """The critic's loss squares a mean over the batch, so it is left out by its learning rate."""
        whole, parts = Toy(critic_lr=0, clip=clip), Toy(critic_lr=0, clip=clip, accumulate=2)
        t = trainer(max_steps=3)
        trainer(max_steps=3).fit(whole, loader(12, 4))
        t.fit(parts, loader(12, 2))
        assert t.global_step == 3
        assert int(parts.train_step) == 6
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(parts)[name], value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(weights(Toy())["net.weight"], weights(whole)["net.weight"])

    def test_the_gradient_is_clipped_to_its_norm_over_all_parameters_of_an_optimiser(self, trainer: Any) -> None:
        toy, before = Toy(clip=1e-3), weights(Toy())
        trainer(max_steps=1).fit(toy, loader(2))
        for name, lr in (("net", 0.1), ("critic", 0.05)):
            moved = [(weights(toy)[k] - before[k]).flatten() for k in before if k.startswith(name)]
            assert float(torch.cat(moved).norm()) == pytest.approx(lr * 1e-3, rel=1e-3)

    def test_a_scaled_gradient_is_clipped_after_it_is_unscaled(self, trainer: Any, tmp_path: Path) -> None:
        """Clipped before, the step would be 1024 times shorter."""
        toy, before = Toy(clip=1e-2), weights(Toy())
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer(max_steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]).fit(toy, loader(2))
        moved = torch.cat([(weights(toy)[k] - before[k]).flatten() for k in before if k.startswith("net")])
        assert float(moved.norm()) == pytest.approx(0.1 * 1e-2, rel=1e-2)

    def test_schedulers_advance_once_an_update_of_their_own_optimiser(self, trainer: Any) -> None:
        class Scheduled(Toy):
            def configure_optimizers(self) -> Any:
                optimizers = super().configure_optimizers()
                return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizers[0], lambda step: 0.5**step)]

        toy = Scheduled(accumulate=2)
        t = trainer(max_steps=3)
        t.fit(toy, loader(12))
        assert t.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
        assert t.optimizers[1].param_groups[0]["lr"] == 0.05

    def test_a_foreign_data_module_without_index_draws_by_its_place_in_the_run(self, trainer: Any) -> None:
        with_index, without = Toy(), Toy()
        bare = [{k: v for k, v in sample.items() if k != "index"} for sample in samples(4)]
        trainer().fit(with_index, loader(4))
        trainer().fit(without, DataLoader(bare, batch_size=2))  # type: ignore[arg-type]
        assert with_index.losses == without.losses

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite_saves_its_batch_and_changes_no_weight(
        self, trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
    ) -> None:
        class Broken(Toy):
            def training_step(self, batch: Batch, batch_idx: int) -> None:
                if batch_idx == 1:
                    batch["lq"] = batch["lq"] * value
                    self.before = weights(self)
                super().training_step(batch, batch_idx)

        monkeypatch.chdir(tmp_path)
        toy = Broken(ema_decay=0.5)
        with pytest.raises(
            NonFiniteLossError, match=r"generator loss is (nan|inf).*train step 2.*nonfinite_step2_rank0\.pt"
        ) as e:
            trainer().fit(toy, loader(6))
        assert "\n" not in str(e.value)
        assert_equal(toy.before, weights(toy))
        assert toy.ema is not None
        assert toy.ema.updates == 1
        (path,) = tmp_path.rglob("nonfinite_*.pt")
        batch = torch.load(path, weights_only=True)
        assert batch["name"] == ["img2", "img3"]

    @pytest.mark.parametrize(
        "wrong", [{"accumulate": 0}, {"inference": Inference(tile=130)}, {"inference": Inference(tile=64, overlap=64)}]
    )
    def test_arguments_out_of_range_are_named_with_their_value(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"(accumulate=0|inference\.tile=(130|64))"):
            Toy(**wrong)


class TestAverage:
    def test_it_follows_the_first_optimisers_updates(self, trainer: Any) -> None:
        toy = Toy(ema_decay=0.9, accumulate=2)
        trainer(max_steps=3).fit(toy, loader(12))
        assert toy.ema is not None
        assert toy.ema.updates == 3
        assert set(toy.ema.average) == {"net.weight", "net.bias", "critic.weight", "critic.bias"}

    def test_validation_sees_the_average_and_training_and_checkpoints_do_not(
        self, trainer: Any, tmp_path: Path
    ) -> None:
        at_validation: list[dict[str, Tensor]] = []
        at_checkpoint: list[dict[str, Tensor]] = []

        class Looking(Toy):
            def validation_step(self, *args: Any, **kwargs: Any) -> None:
                at_validation.append(weights(self))
                super().validation_step(*args, **kwargs)

        class Look(Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
                at_checkpoint.append(weights(pl_module))

        toy = Looking(ema_decay=0.5)
        save = ModelCheckpoint(tmp_path / "c", every_n_epochs=1, monitor="val/val0/psnr_rgb", mode="max")
        t = trainer(callbacks=[save, Look()], enable_checkpointing=True)
        t.fit(toy, loader(6), loader(1, 1))
        assert len(at_validation) == 1
        last = at_checkpoint[-1]
        assert not torch.equal(at_validation[0]["net.weight"], last["net.weight"])
        assert_equal(weights(toy), last)
        saved = torch.load(save.best_model_path, weights_only=True)
        names = {"net.weight", "net.bias", "critic.weight", "critic.bias"}
        assert set(saved["state_dict"]) == {*names, "train_step"}
        assert_equal(saved["state_dict"], last, names)
        assert_equal(saved["ema"]["average"], at_validation[0], names)

    def test_a_checkpoint_without_an_average_says_what_to_set(self, trainer: Any, tmp_path: Path) -> None:
        t = trainer(max_steps=1)
        t.fit(Toy(), loader(2))
        t.save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"ema_decay.*model\.ema_decay=null"):
            trainer().test(Toy(ema_decay=0.5), loader(1, 1), ckpt_path=tmp_path / "a.ckpt", weights_only=True)

    def test_a_resumed_run_equals_the_uninterrupted_one(self, trainer: Any, tmp_path: Path) -> None:
        made = partial(Toy, ema_decay=0.9, optimizer=torch.optim.Adam, lr=1e-2)
        whole, first, second = made(), made(), made()
        trainer(max_epochs=2).fit(whole, loader(4))
        t = trainer(max_epochs=1)
        t.fit(first, loader(4))
        t.save_checkpoint(tmp_path / "a.ckpt")
        trainer(max_epochs=2).fit(second, loader(4), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        assert_equal(weights(whole), weights(second))
        assert first.losses + second.losses == whole.losses
        assert whole.ema is not None
        assert second.ema is not None
        assert whole.ema.updates == second.ema.updates == 4
        assert_equal(whole.ema.average, second.ema.average)

    def test_a_checkpoint_of_another_model_is_refused_by_name(self, trainer: Any, tmp_path: Path) -> None:
        t = trainer(max_steps=1)
        t.fit(Toy(), loader(2))
        t.save_checkpoint(tmp_path / "a.ckpt")

        class Wider(Toy):
            def __init__(self) -> None:
                super().__init__()
                self.critic = nn.Conv2d(3, 2, 3)

        with pytest.raises(ValueError, match=r"critic\.weight is \(1, 3, 3, 3\) there and \(2, 3, 3, 3\) here"):
            trainer().fit(Wider(), loader(2), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


class TestImages:
    @pytest.mark.parametrize("size", [(1, 1), (7, 13), (16, 16), (33, 5)])
    @pytest.mark.parametrize("tile", [None, 32])
    def test_the_output_is_exactly_four_times_the_input(self, size: tuple[int, int], tile: int | None) -> None:
        toy = Toy(inference=Inference(color_fix="wavelet", tile=tile, overlap=8))
        toy.size_multiple = 4
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        sr, raw = toy.upscale(x, [""])
        assert sr.shape == raw.shape == (1, 3, 4 * size[0], 4 * size[1])
        assert float(sr.min()) >= 0
        assert float(sr.max()) <= 1

    def test_padding_does_not_reach_the_picture(self) -> None:
        toy = Toy()
        toy.size_multiple = 8
        x = torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(toy.upscale(x, [""]).sr, bicubic_upsample(x, 4))

    def test_tiles_give_what_the_whole_gives_away_from_their_borders(self) -> None:
        x = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        seen: list[tuple[int, ...]] = []

        class Looking(Toy):
            def restore(self, x_lq: Tensor, conditions: Tensor) -> Tensor:
                seen.append((*x_lq.shape, round(float(conditions), 6)))  # type: ignore[arg-type]
                return x_lq.repeat_interleave(4, -1).repeat_interleave(4, -2)

        whole = Looking().upscale(x, [""]).sr
        tiled = Looking(inference=Inference(color_fix="none", tile=48, overlap=16)).upscale(x, [""]).sr
        torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-6)
        assert seen[0][2:4] == (24, 24)
        assert {shape[2:4] for shape in seen[1:]} == {(12, 12)}
        assert {shape[4] for shape in seen} == {round(float(x.mean()), 6)}, "conditions come from the whole image"

    def test_a_tile_that_does_not_fit_the_network_stops_the_fit_before_its_first_step(self, trainer: Any) -> None:
        toy = Toy(inference=Inference(tile=100, overlap=4))
        toy.size_multiple = 8
        with pytest.raises(ValueError, match=r"inference\.tile=100 must be a multiple of 32.*inference\.tile=96"):
            trainer().fit(toy, loader(2))
        assert toy.losses == []

    def test_predict_writes_files_named_after_the_inputs_and_keeps_nothing(self, trainer: Any, tmp_path: Path) -> None:
        toy = Toy()
        toy.output.folder = tmp_path / "out"
        kept = trainer().predict(toy, loader(3, 1, size=(5, 7), hq=False, name="sub/photo.x"))
        assert kept is None or not any(value is not None for value in kept)
        found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
        files = [f"sub/photo.x{i}.png" for i in range(3)]
        assert found == [RECORD, *files]
        from PIL import Image

        with Image.open(tmp_path / "out" / files[1]) as image:
            assert image.size == (28, 20)
            got = torch.tensor(list(image.getdata())).view(20, 28, 3)
        x = samples(3, (5, 7), hq=False)[1]["lq"][None].float() / 255
        expected = (bicubic_upsample(x, 4)[0] * 255).round().permute(1, 2, 0)
        assert float((got - expected).abs().max()) <= 1

    def test_large_images_come_from_tiles_on_disk_and_are_what_memory_makes(self, trainer: Any, tmp_path: Path) -> None:
        data = [{"lq": torch.rand(3, 21, 30), "prompt": "", "name": "a", "index": 0}]
        tiles = {"color_fix": "adain", "tile": 32, "overlap": 8}
        for kind, settings in {
            "disk": {"large": 1e-3},
            "memory": {},
            "tif": {"large": 1e-3, "file_type": "tif"},
        }.items():
            toy = Sharpened(inference=Inference(**tiles, **settings))
            toy.output.folder = tmp_path / kind
            trainer().predict(toy, DataLoader(data))
            assert toy.tiles == 4 * 5
        (disk,), (memory,), (tif,) = ([*(tmp_path / kind).rglob("[!.]*")] for kind in ("disk", "memory", "tif"))
        assert (disk.name, memory.name, tif.name) == ("a.png", "a.png", "a.tif")
        pixels = [cv2.imread(str(path)).astype(int) for path in (disk, memory, tif)]
        assert abs(pixels[0] - pixels[1]).max() <= 1  # sums in another order
        assert (pixels[0] == pixels[2]).all()
        assert pixels[0].std() > 10

    def test_a_large_image_goes_on_with_its_tiles_unless_weights_or_prompt_changed(
        self, trainer: Any, tmp_path: Path
    ) -> None:
        data = [{"lq": torch.rand(3, 21, 30), "prompt": "", "name": "a", "index": 0}]

        def predict(stop_after: int | None = None, change: float = 0.0, prompt: str = "") -> int:
            toy = Sharpened(inference=Inference(color_fix="none", tile=32, overlap=8, large=1e-3))
            toy.stop_after, toy.output.folder = stop_after, tmp_path
            with torch.no_grad():
                toy.net.weight += change
            data[0]["prompt"] = prompt
            with pytest.raises(KilledError) if stop_after else nullcontext():
                trainer().predict(toy, DataLoader(data))
            return toy.tiles

        assert predict(stop_after=7) == 7
        assert not (tmp_path / "a.png").exists()
        assert predict() == 20 - 7
        assert predict(stop_after=7) == 7
        assert predict(change=0.1) == 20, "tiles of other weights are thrown away"
        assert predict(stop_after=7) == 7
        assert predict(prompt="a cat") == 20, "and tiles of another condition"
        assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "a.png"]

    @pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("trained_in", ["32-true", "bf16-mixed"])
    def test_validation_test_prediction_and_upscale_compute_in_test_precision(
        self, trainer: Any, tmp_path: Path, precision: str, trained_in: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[torch.dtype] = []
        said: list[str] = []
        monkeypatch.setattr("common.precision.rank_zero_info", said.append)

        class Watched(Sharpened):
            def restore(self, x_lq: Tensor, conditions: Any) -> Tensor:
                seen.append(self.net(x_lq).dtype)
                return super().restore(x_lq, conditions)

            def training_step(self, batch: Batch, batch_idx: int) -> None:
                trained.append(self.net(batch["lq"]).dtype)
                super().training_step(batch, batch_idx)

        settings = {"color_fix": "none", "tile": 32, "overlap": 8, "test_precision": precision}
        toy, expected, trained = Watched(inference=Inference(**settings)), getattr(torch, precision), []
        toy.output.folder = tmp_path
        fits = trainer(precision=trained_in, max_steps=1, val_check_interval=1)
        fits.fit(toy, loader(2), loader(2))
        fits.test(toy, loader(2))
        trainer(precision=trained_in).predict(toy, loader(1, hq=False))
        toy.inference.large = 1e-6
        trainer(precision=trained_in).predict(toy, loader(1, hq=False, name="big"))
        toy.upscale(torch.rand(1, 3, 8, 8), [""])
        assert set(seen) == {expected}
        assert len(seen) == 5
        assert bool(said) == (trained_in == "bf16-mixed")
        assert all("bf16-mixed holds for training steps" in line and line.endswith(precision) for line in said)
        assert trained == [torch.float32 if trained_in == "32-true" else torch.bfloat16]

    def test_tiles_of_another_test_precision_are_thrown_away(self, trainer: Any, tmp_path: Path) -> None:
        data = [{"lq": torch.rand(3, 21, 30), "prompt": "", "name": "a", "index": 0}]
        counts = []
        for precision, stop_after in (("float32", 7), ("bfloat16", None)):
            settings = {"color_fix": "none", "tile": 32, "overlap": 8, "large": 1e-3, "test_precision": precision}
            toy = Sharpened(inference=Inference(**settings))
            toy.stop_after, toy.output.folder = stop_after, tmp_path
            with pytest.raises(KilledError) if stop_after else nullcontext():
                trainer().predict(toy, DataLoader(data))
            counts.append(toy.tiles)
        assert counts == [7, 20]

    def test_images_that_are_there_are_left_alone_where_that_is_asked_for(
        self, trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "photo.x1.png").write_bytes(b"somebody's")
        toy = Sharpened()
        toy.output.folder, toy.output.skip_existing = tmp_path, True
        trainer().predict(toy, loader(3, 1, size=(5, 7), hq=False, name="sub/photo.x"))
        assert toy.tiles == 2
        assert (tmp_path / "sub" / "photo.x1.png").read_bytes() == b"somebody's"
        assert "1 images were there already" in caplog.text
        toy.output.skip_existing = False
        with pytest.raises(FileExistsError, match=r"not overwritten.*photo\.x1\.png; move it away"):
            trainer().predict(toy, loader(3, 1, size=(5, 7), hq=False, name="sub/photo.x"))
        assert (tmp_path / "sub" / "photo.x1.png").read_bytes() == b"somebody's"
        (tmp_path / "sub" / "photo.x1.png").unlink()
        toy.tiles = 0
        trainer().predict(toy, loader(3, 1, size=(5, 7), hq=False, name="sub/photo.x"))
        assert toy.tiles == 3

    def test_an_image_is_large_by_its_output_and_only_where_there_are_tiles(self) -> None:
        x = torch.empty(1, 3, 250, 500)  # 2 megapixels at x4
        assert not Toy(inference=Inference(tile=128, large=2.0)).is_large(x)
        assert Toy(inference=Inference(tile=128, large=1.99)).is_large(x)
        assert not Toy(inference=Inference(tile=None, large=0.1)).is_large(x)
        assert not Toy(inference=Inference(tile=128, large=None)).is_large(x)

    def test_a_full_disk_is_said_with_the_file_and_leaves_no_half_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from PIL import Image

        def full(self: Any, path: Path, **kwargs: Any) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match=r"cannot write .*a\.png \(No space left on device\)") as error:
            write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
        assert "\n" not in str(error.value)
        assert list(tmp_path.iterdir()) == []


class TestScores:
    def rows(self, folder: Path) -> list[dict[str, str]]:
        with (folder / "test" / "metrics.csv").open() as file:
            return list(csv.DictReader(file))

    def scored(self, trainer: Any, folder: Path, data: Any, **kwargs: Any) -> list[dict[str, str]]:
        toy = Toy(inference=Inference(**{"color_fix": "none", "tile": None, "metrics": ["psnr_rgb"], **kwargs}))
        toy.output.folder = folder
        trainer().test(toy, data)
        return self.rows(folder)

    def test_every_image_has_its_row_and_its_psnr(self, trainer: Any, tmp_path: Path) -> None:
        rows = self.scored(trainer, tmp_path, loader(3, 1))
        assert [row["image"] for row in rows] == ["img0", "img1", "img2"]
        for row, sample in zip(rows, samples(3), strict=True):
            sr = (bicubic_upsample(sample["lq"][None].float() / 255, 4)[0] * 255).round().double()
            psnr = -10 * ((sr - sample["hq"].double()).square().mean() / 255**2).log10()
            assert float(row["value"]) == pytest.approx(float(psnr), abs=1e-2)
            assert row["protocol"]
        assert (tmp_path / "test" / "test0" / "img2.png").is_file()

    def test_an_image_that_a_metric_refuses_has_its_reason_and_the_rest_its_numbers(
        self, trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(
            metrics._NATIVE, "sharpness", (*metrics._NATIVE["sharpness"][:4], lambda sr, hq: float("nan"))
        )
        data = DataLoader([*samples(2), *samples(1, size=(2, 2), name="tiny")])
        rows = self.scored(trainer, tmp_path, data, metrics=["ssim_y", "psnr_rgb", "sharpness"])
        values = {(row["image"], row["metric"]): row["value"] for row in rows}
        assert len(rows) == 9
        assert {key for key, value in values.items() if not value} == {
            ("tiny0", "ssim_y"),
            *((name, "sharpness") for name in ("img0", "img1", "tiny0")),
        }
        reason = "ssim needs 11 px per side and the image is 8 x 8 px"
        assert {row["protocol"] for row in rows if row["image"] == "tiny0" and row["metric"] == "ssim_y"} == {
            f"not computed: {reason}"
        }
        assert f"test: ssim_y of test0, Toy: not computed (1), {reason}" in caplog.text
        assert "test: sharpness of test0, Toy: not computed (3), its value is nan" in caplog.text

    def test_validation_too_goes_on_and_says_it_once(self, trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
        toy = Toy(inference=Inference(color_fix="none", tile=None, metrics=["ssim_y", "psnr_rgb"]))
        for _ in range(2):
            found = trainer().validate(toy, loader(1, 1, size=(2, 2)))
            assert list(found[0]) == ["val/val0/psnr_rgb"]
        assert caplog.text.count("val: ssim_y of val0, Toy: not computed (1), ssim needs") == 1

    def test_with_and_without_the_colour_fix_are_two_methods(self, trainer: Any, tmp_path: Path) -> None:
        rows = self.scored(trainer, tmp_path, loader(2, 1), color_fix="adain")
        assert {row["method"] for row in rows} == {"Toy", "Toy (raw)"}
        assert len(rows) == 4

    def test_a_set_without_references_gets_no_reference_scores_and_its_images(
        self, trainer: Any, tmp_path: Path
    ) -> None:
        toy = Toy(inference=Inference(color_fix="none", tile=None, metrics=["psnr_rgb"]))
        toy.output.folder = tmp_path
        trainer().test(toy, loader(2, 1, hq=False))
        assert not (tmp_path / "test" / "metrics.csv").exists()
        assert len(list((tmp_path / "test" / "test0").glob("*.png"))) == 2

    def test_an_image_that_two_processes_saw_counts_once(
        self, trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        toy = Toy()
        monkeypatch.setattr(Toy, "trainer", type("T", (), {"world_size": 2}))

        def gather(parts: list, mine: list) -> None:
            parts[:] = [mine, [score("b", 2.0), score("a", 1.0)]]

        def score(image: str, value: float) -> evaluation.Score:
            return evaluation.Score("m", "set", image, "psnr", value, "p")

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        toy.scores.rows = [score("c", 3.0), score("a", 1.0)]
        assert [(s.image, s.value) for s in toy.scores.take(toy.gathered)] == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
        assert toy.scores.rows == []

    @pytest.mark.parametrize(("checking", "shown"), [(False, [("a", 7)]), (True, [])])
    def test_images_go_to_a_logger_that_shows_them_but_not_in_the_sanity_check(
        self, monkeypatch: pytest.MonkeyPatch, checking: bool, shown: list[tuple[str, int]]
    ) -> None:
        calls: list[tuple[str, int]] = []
        tensorboard = SimpleNamespace(add_image=lambda name, image, step: calls.append((name, step)))
        for loggers in ([SimpleNamespace(experiment=tensorboard)], []):
            trainer = SimpleNamespace(loggers=loggers, sanity_checking=checking, global_step=7, is_global_zero=True)
            monkeypatch.setattr(Toy, "trainer", trainer)
            Toy().show_image("a", torch.zeros(3, 2, 2))
        assert calls == shown

    def test_a_metric_that_cannot_be_had_is_a_row_with_its_reason_and_no_zero(
        self, trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build = evaluation.build_metric
        asked = []

        def some(metric_id: str, **kwargs: Any) -> Any:
            asked.append(metric_id)
            if metric_id == "pyiqa:musiq":
                raise MetricUnavailableError("no weights here")
            return build(metric_id, **kwargs)

        monkeypatch.setattr(evaluation, "build_metric", some)
        rows = self.scored(trainer, tmp_path, loader(2, 1), metrics=["pyiqa:musiq", "psnr_rgb"])
        missing = [row for row in rows if row["metric"] == "pyiqa:musiq"]
        assert [(row["value"], row["protocol"]) for row in missing] == [("", "not computed: no weights here")] * 2
        assert all(float(row["value"]) > 0 for row in rows if row["metric"] == "psnr_rgb")
        assert asked == ["pyiqa:musiq", "psnr_rgb"], "the reason is found out once"
