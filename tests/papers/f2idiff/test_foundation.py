"""Stage A: its loss by hand, dropout of its condition, training from scratch, and how stage B opens its checkpoints."""

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from lightning.pytorch import Callback, LightningDataModule, Trainer
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Dinov2Model

from common.checkpoints import newest_checkpoint
from common.conditioning.text import encode_prompts
from common.draws import Draws
from launch import lightning_cli
from launch.cli import main
from launch.lightning_cli import IsrCLI
from papers.f2idiff import F2IDiffSR, Foundation
from papers.f2idiff.conditions import FeatureCondition, drop
from papers.f2idiff.foundation import open_foundation

ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
STILL = partial(torch.optim.SGD, lr=0.0)
Batch = dict[str, Any]
Make = Callable[..., Foundation]


@pytest.fixture
def make(sd: str, dino: str, nano: str) -> Make:
    """Makes stage A with the small U-Net, configured."""

    def configured(**options: Any) -> Foundation:
        small: dict[str, Any] = {"features": dino, "optimizer": STILL, "clip": None, "ema_decay": None}
        model = Foundation(sd, nano, **{**small, **options})
        model.configure_model()
        assert model.denoiser is not None
        model.denoiser.unet.conv_out.weight.data *= 4  # so that it hears of its condition
        return model

    return configured


class Calls(Callback):
    """How often training asks which network and what it told the U-Net; the gradients before the update."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[tuple[Any, ...], Any]]] = {"dino": [], "encode": [], "decode": [], "unet": []}
        self.grads: dict[str, Tensor | None] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        networks = {"unet": pl_module.denoiser.unet, "encode": pl_module.codec.vae.encoder}
        networks["decode"] = pl_module.codec.vae.decoder
        if isinstance(pl_module.condition, FeatureCondition):
            networks["dino"] = pl_module.condition.features
        for name, network in networks.items():
            network.register_forward_hook(partial(self._write, name))

    def _write(self, name: str, network: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.seen[name].append((args, getattr(out, "sample", out).detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.grads = {name: None if p.grad is None else p.grad.clone() for name, p in pl_module.named_parameters()}


@dataclass
class Run:
    model: Foundation
    calls: Calls
    loss: float


def train(model: Foundation, batch: Batch, steps: int = 1) -> Run:
    calls, batches = Calls(), [batch] * steps
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[calls], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return Run(model, calls, float(trainer.callback_metrics.get("train/loss", math.nan)))


def high(batch: Batch) -> Tensor:
    return batch["hq"].float() / 255


class TestLoss:
    def test_is_the_error_in_the_noise_of_a_posterior_sample(self, make: Make, sd: str, batch: Batch) -> None:
        model, index = make(), torch.tensor([4, 9])
        x, c, t = high(batch), torch.randn(2, 5, 16), torch.tensor([60, 800])
        found = model.denoising_loss(x, c, t, Draws(3, index))
        draws = Draws(3, index)
        posterior, n = draws.normal("posterior", (4, 8, 8)), draws.normal("noise", (4, 8, 8))
        vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
        abar = torch.tensor(ABAR[t.numpy()]).float().view(2, 1, 1, 1)
        with torch.no_grad():
            given = vae.encode(2 * x - 1).latent_dist
            z_0 = 0.18215 * (given.mean + given.std * posterior)
            assert model.denoiser is not None
            eps = model.denoiser.unet(abar.sqrt() * z_0 + (1 - abar).sqrt() * n, t, c).sample
        assert_close(found, (n - eps).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
        assert float(found.detach().diff().abs()) > 1e-3
        assert float((given.std * posterior).abs().mean()) > 0.1

    def test_a_step_asks_each_network_once_and_logs_the_mean(self, make: Make, sd: str, batch: Batch) -> None:
        run = train(make(condition_dropout=0.0), batch, 2)  # Lightning forgets what the first step logs
        seen = run.calls.seen
        assert {name: len(calls) for name, calls in seen.items()} == {"dino": 2, "encode": 2, "decode": 0, "unet": 2}
        args, eps = seen["unet"][-1]
        n = Draws(0, batch["index"]).normal("noise", (4, 8, 8))
        assert run.loss == pytest.approx(float((eps - n).square().mean()), rel=1e-4)
        assert_close(seen["dino"][-1][0][0], high(batch))  # the very patch that is noised
        assert_close(seen["encode"][-1][0][0], 2 * high(batch) - 1)
        assert torch.equal(args[2], seen["dino"][-1][1])
        t = torch.cat([model_t for ((_, model_t, _), _) in seen["unet"]])
        assert t.dtype == torch.int64

    def test_timesteps_cover_the_whole_schedule(self, make: Make, batch: Batch, monkeypatch: Any) -> None:
        asked: dict[str, tuple[int, int]] = {}
        original = Draws.integers

        def integers(self: Draws, stream: str, low: int, high: int) -> Tensor:
            asked[stream] = (low, high)
            return original(self, stream, low, high)

        monkeypatch.setattr(Draws, "integers", integers)
        train(make(), batch)
        assert list(asked.values()) == [(0, 999)]

    def test_only_the_u_net_gets_a_gradient(self, make: Make, batch: Batch) -> None:
        grads = train(make(), batch).calls.grads
        assert {n for n, grad in grads.items() if grad is not None} == {n for n in grads if "denoiser.unet." in n}
        assert {name.partition(".")[0] for name in grads} == {"denoiser", "codec", "condition"}
        some = [grad for grad in grads.values() if grad is not None]
        assert all(bool(grad.any()) for grad in some)

    def test_text_is_told_by_its_prompt_and_dropped_to_the_empty_one(self, make: Make, sd: str, batch: Batch) -> None:
        for rate, prompts in ((0.0, batch["prompt"]), (1.0, ["", ""])):
            run = train(make(condition="text", condition_dropout=rate), batch)
            ((args, _),) = run.calls.seen["unet"]
            assert torch.equal(args[2], encode_prompts(sd, prompts))
            assert not run.calls.seen["dino"]


class TestDropout:
    def test_a_tenth_of_the_samples_see_the_null_condition(self, make: Make, monkeypatch: Any) -> None:
        """What training would draw for 10,000 samples, through a U-Net that only looks."""
        model, told = make(), []

        def look(x_01: Tensor, c: Tensor, t: Tensor, draws: Draws) -> Tensor:
            told.append(c)
            return model.denoiser.unet.conv_in.bias.sum() + torch.zeros(len(c))  # type: ignore[union-attr]

        class Ones(nn.Module):
            def forward(self, x_01: Tensor, prompts: list[str]) -> Tensor:
                return torch.ones(len(x_01), 2, 3)

            def null(self, c: Tensor) -> Tensor:
                return torch.zeros_like(c)

        monkeypatch.setattr(model, "denoising_loss", look)
        model.condition = Ones()  # type: ignore[assignment]
        size = 5000
        batches = [
            {"hq": torch.zeros(size, 3, 1, 1), "prompt": [""] * size, "index": torch.arange(size) + size * i}
            for i in range(2)
        ]
        trainer = Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        share = [float((c == 0).all(2).all(1).float().mean()) for c in told]
        assert np.mean(share) == pytest.approx(0.10, abs=0.01)
        assert all(bool(((c == 0).all(2).all(1) | (c == 1).all(2).all(1)).all()) for c in told)

    def test_drops_whole_samples_whose_draw_is_below_the_rate(self) -> None:
        c, null = torch.ones(4, 3, 2), torch.full((4, 3, 2), -1.0)
        found = drop(c, null, torch.tensor([0.0, 0.0999, 0.1, 0.9]), 0.1)
        assert found[:, 0, 0].tolist() == [-1, -1, 1, 1]
        assert torch.equal(found, found[:, :1, :1].expand(4, 3, 2))

    def test_nothing_is_dropped_at_0_and_everything_at_1(self, make: Make, batch: Batch) -> None:
        for rate, any_left in ((0.0, True), (1.0, False)):
            ((args, _),) = train(make(condition_dropout=rate), batch).calls.seen["unet"]
            assert [bool(row.any()) for row in args[2]] == [any_left] * 2

    @pytest.mark.parametrize("rate", [-0.1, 1.5])
    def test_a_share_outside_0_to_1_is_refused(self, rate: float) -> None:
        with pytest.raises(ValueError, match=rf"condition_dropout={rate} is out of range; set a share"):
            Foundation(condition_dropout=rate)

    def test_a_learned_null_token_learns_from_the_dropped_samples_alone(self, make: Make, batch: Batch) -> None:
        none, some, every = (
            train(make(null_condition="learned", condition_dropout=rate), batch).calls.grads["condition.null_token"]
            for rate in (0.0, dropping_one(batch), 1.0)
        )
        for grad in (some, every):
            assert grad is not None
            assert bool(grad.any())
        assert none is None or not none.any()
        assert not torch.equal(some, every)  # type: ignore[arg-type]

    def test_a_learned_null_token_stands_in_every_place(self, make: Make, batch: Batch) -> None:
        model = make(null_condition="learned", condition_dropout=1.0)
        assert isinstance(model.condition, FeatureCondition)
        assert model.condition.null_token is not None
        model.condition.null_token.data.copy_(torch.randn(1, 1, 16))
        ((args, _),) = train(model, batch).calls.seen["unet"]
        assert torch.equal(args[2], model.condition.null_token.detach().expand(2, 5, 16))

    def test_without_one_there_is_none_to_train(self, make: Make) -> None:
        for options in ({}, {"condition": "text", "null_condition": "learned"}):
            assert all(name.startswith("denoiser.unet.") for name in make(**options).all_trainable())
        assert "condition.null_token" in make(null_condition="learned").all_trainable()


def dropping_one(batch: Batch) -> float:
    """A rate between the two samples' draws."""
    one, other = Draws(0, batch["index"]).uniform("condition").tolist()
    assert abs(one - other) > 0.01
    return (one + other) / 2


class TestDraw:
    def test_is_the_same_at_every_call_and_hears_of_condition_and_guidance(self, make: Make, batch: Batch) -> None:
        model, x = make(sample_steps=2), high(batch)
        first = model.draw(x, ["", ""], 7.5)
        torch.rand(5)
        assert torch.equal(model.draw(x, ["", ""], 7.5), first)
        assert first.shape == x.shape
        assert 0 <= float(first.min()) <= float(first.max()) <= 1
        for other in (model.draw(x.flip(0), ["", ""], 7.5), model.draw(x, ["", ""], 1.0)):
            assert float((other - first).abs().max()) > 1e-3
        without = model.draw(x, ["", ""], 0.0)
        assert torch.equal(model.draw(x.flip(0), ["", ""], 0.0), without)
        assert float((without - first).abs().max()) > 1e-3

    def test_a_prediction_refuses_foreign_files_before_the_work(
        self, make: Make, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Data(LightningDataModule):
            def predict_dataloader(self) -> Any:
                one: Any = [batch]
                return torch.utils.data.DataLoader(one, batch_size=None)

            def names_to_predict(self) -> list[str]:
                return ["a", "b"]

        drawn: list[Tensor] = []
        monkeypatch.setattr(Foundation, "draw", lambda self, x, *_: drawn.append(x) or x)
        (tmp_path / "b.png").write_text("mine")
        model = make()
        model.output.folder = tmp_path
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        with pytest.raises(FileExistsError, match=r"not overwritten, .*b\.png; move it away"):
            trainer.predict(model, datamodule=Data())
        assert not drawn
        assert sorted(path.name for path in tmp_path.glob("*.png")) == ["b.png"]
        (tmp_path / "b.png").unlink()
        for _ in range(2):  # its own it replaces
            trainer.predict(model, datamodule=Data())
        assert len(drawn) == 2
        assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a.png", "b.png"]

    def test_saving_the_foundation_leaves_the_weights_as_they_were(
        self, make: Make, batch: Batch, tmp_path: Path
    ) -> None:
        model = make(ema_decay=0.5, optimizer=partial(torch.optim.SGD, lr=0.1))
        train(model, batch, 3)
        assert model.ema is not None
        state = {name: value.clone() for name, value in model.state_dict().items()}
        average = {name: value.clone() for name, value in model.ema.average.items()}
        model.save_foundation(tmp_path)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        assert all(torch.equal(value, model.ema.average[name]) for name, value in average.items())
        unet = UNet2DConditionModel.from_pretrained(tmp_path)
        assert not torch.equal(state["denoiser.unet.conv_in.weight"], average["denoiser.unet.conv_in.weight"])
        for name, value in unet.state_dict().items():
            assert_close(value, average[f"denoiser.unet.{name}"].half().float())

    def test_an_architecture_of_other_latents_is_refused(self, sd: str, dino: str) -> None:
        with pytest.raises(ValueError, match=r"architecture=f2idiff_tiny denoises 8 latent channels.*makes 4"):
            Foundation(sd, "f2idiff_tiny", features=dino).configure_model()

    def test_images_are_cut_to_what_the_levels_divide(self, make: Make) -> None:
        model = make()
        x = torch.rand(1, 3, 39, 23)
        assert torch.equal(model._cut(x), x[..., :32, :16])
        with pytest.raises(ValueError, match=r"images of \(7, 40\) px are too small: this U-Net needs 8 px"):
            model._cut(torch.rand(1, 3, 7, 40))


def isr(*arguments: object) -> tuple[Any, Any]:
    """`isr` as the shell would run it: model and trainer."""
    caught: list[IsrCLI] = []

    class Caught(IsrCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            caught.append(self)
            return super().instantiate_trainer(**kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning_cli, "IsrCLI", Caught)
        assert main([str(argument) for argument in (*arguments, "--debug")]) == 0
    return caught[0].model, caught[0].trainer


@dataclass
class Trained:
    run: Path
    model: Foundation
    checkpoint: Path

    @property
    def version(self) -> Path:
        return self.checkpoint.parents[1]


def fit(root: Path, name: str, sd: str, dino: str, nano: str, steps: int, **options: Any) -> Trained:
    model = {"pretrained": sd, "architecture": nano, "features": dino, "ema_decay": 0.9, "samples": 2} | options
    model |= {"sample_steps": 2, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 4.0e-3}}}
    config = {
        "model": {"class_path": "papers.f2idiff.Foundation", "init_args": model},
        "data": {
            "class_path": "data.crops.PhotoCrops",
            "init_args": {"crop_size": 32, "val_crop_size": 40, "batch_size": 4, "steps": steps},
        },
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "val_check_interval": max(1, steps // 6), "limit_val_batches": 2,
            "enable_model_summary": False, "enable_progress_bar": False,
        },
        "checkpoint": {"every_n_train_steps": steps},
    }  # fmt: skip
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    trained, _ = isr("fit", "-c", path, "--runs", root / "runs")
    (checkpoint,) = (root / "runs").rglob(f"{name}/**/last.ckpt")
    return Trained(checkpoint.parents[2], trained, checkpoint)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, sd: str, dino: str, nano: str) -> Trained:
    """Trained from scratch for a few seconds, with a learned null token."""
    return fit(tmp_path_factory.mktemp("a"), "f2i", sd, dino, nano, 60, null_condition="learned")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, sd: str, dino: str, nano: str) -> Trained:
    return fit(tmp_path_factory.mktemp("b"), "t2i", sd, dino, nano, 2, condition="text", ema_decay=None)


def events(trained: Trained) -> EventAccumulator:
    accumulator = EventAccumulator(str(trained.version))
    accumulator.Reload()
    return accumulator


class TestFromScratch:
    def test_the_loss_on_photos_that_it_was_not_trained_on_falls(self, features: Trained) -> None:
        scalars = events(features)
        for name in ("loss", *(f"loss_t{t}" for t in (100, 250, 500, 800))):
            values = [event.value for event in scalars.Scalars(f"val/val0/{name}")]
            assert len(values) == 6
            assert values[-1] < 0.95 * values[0], name
        means = [
            np.mean([scalars.Scalars(f"val/val0/loss_t{t}")[i].value for t in (100, 250, 500, 800)]) for i in (0, 5)
        ]
        assert means == pytest.approx([scalars.Scalars("val/val0/loss")[i].value for i in (0, 5)], rel=1e-4)

    def test_validation_shows_photo_and_samples_in_png_and_tensorboard(self, features: Trained) -> None:
        pngs = sorted((features.version / "samples").glob("*.png"), key=lambda p: int(p.stem.removeprefix("step_")))
        assert [path.name for path in pngs] == [f"step_{step}.png" for step in range(10, 61, 10)]
        pixels = np.asarray(Image.open(pngs[-1]))
        assert pixels.shape == (2 * 40, 3 * 40, 3)
        photo, drawn, without = (pixels[:, i * 40 : i * 40 + 40].astype(float) for i in range(3))
        first = next(iter(features.model.trainer.val_dataloaders))["hq"]  # type: ignore[union-attr]
        assert np.abs(photo[:40] / 255 - first[0].permute(1, 2, 0).numpy()).max() < 0.01
        assert np.abs(drawn - without).mean() > 0
        (tag,) = events(features).Tags()["images"]
        assert "samples" in tag
        image = events(features).Images(tag)[-1]
        assert (image.height, image.width) == (80, 120)

    def test_a_learned_null_token_has_learned(self, features: Trained) -> None:
        assert "condition.null_token" in torch.load(features.checkpoint, weights_only=True)["state_dict"]
        assert isinstance(features.model.condition, FeatureCondition)
        assert features.model.condition.null_token is not None
        assert bool(features.model.condition.null_token.any())

    def test_the_checkpoint_holds_no_frozen_weight(self, features: Trained) -> None:
        keys = set(torch.load(features.checkpoint, weights_only=True)["state_dict"])
        assert all(key.startswith(("denoiser.unet.", "condition.null_token", "train_step")) for key in keys)


class TestOpening:
    @pytest.mark.parametrize("given", ["run", "checkpoint"])
    def test_by_path_alone_gives_the_averaged_weights_bit_by_bit(self, features: Trained, given: str) -> None:
        path: Path = getattr(features, given)
        assert newest_checkpoint(features.run) == features.checkpoint
        opened = open_foundation(str(path), "features")
        checkpoint = torch.load(features.checkpoint, weights_only=True)
        average = checkpoint["ema"]["average"]
        state = opened.unet.state_dict()
        assert {f"denoiser.unet.{name}" for name in state} | {"condition.null_token"} == average.keys()
        assert all(torch.equal(value, average[f"denoiser.unet.{name}"]) for name, value in state.items())
        last = checkpoint["state_dict"]
        assert any(not torch.equal(value, last[f"denoiser.unet.{name}"]) for name, value in state.items())
        assert opened.null_token is not None
        assert torch.equal(opened.null_token, average["condition.null_token"])
        assert not opened.unet.training
        assert not any(p.requires_grad for p in opened.unet.parameters())

    def test_without_an_average_gives_the_last_weights(self, text: Trained) -> None:
        opened = open_foundation(str(text.run), "text")
        last = torch.load(text.checkpoint, weights_only=True)["state_dict"]
        assert all(torch.equal(v, last[f"denoiser.unet.{k}"]) for k, v in opened.unet.state_dict().items())
        assert opened.null_token is None

    def test_stage_b_stands_on_it_and_trains(self, features: Trained, sd: str, dino: str, batch: Batch) -> None:
        model = stage_b(sd, dino, features.run)
        average = torch.load(features.checkpoint, weights_only=True)["ema"]["average"]
        assert model.generator is not None
        assert model.prior is not None
        for network in (model.generator.unet, model.prior.unet):
            bases = {k.replace(".base_layer", ""): v for k, v in network.state_dict().items() if "lora_" not in k}
            assert {f"denoiser.unet.{k}" for k in bases} | {"condition.null_token"} == average.keys()
            assert all(torch.equal(value, average[f"denoiser.unet.{name}"]) for name, value in bases.items())
        told: list[Tensor] = []
        model.prior.unet.register_forward_hook(lambda _m, args, _out: told.append(args[2]))
        metrics = fit_b(model, batch)
        null = average["condition.null_token"].expand(2, 5, 16)
        assert [torch.equal(c, null) for c in told[:2]].count(True) == 1
        assert all(math.isfinite(value) for value in metrics.values())
        assert isinstance(model.condition, FeatureCondition)
        assert model.condition.null_token is not None
        assert not model.condition.null_token.requires_grad
        assert torch.equal(model.condition.null_token, average["condition.null_token"])

    def test_stage_b_stands_on_a_text_conditioned_one_likewise(
        self, text: Trained, sd: str, dino: str, batch: Batch
    ) -> None:
        model = stage_b(sd, dino, text.checkpoint, condition="text")
        assert model.generator is not None
        told: list[Tensor] = []
        model.generator.unet.register_forward_hook(lambda _m, args, _out: told.append(args[2]))
        fit_b(model, batch)
        assert torch.equal(told[0], encode_prompts(sd, batch["prompt"]))

    def test_a_checkpoint_of_stage_b_is_refused_on_an_altered_stage_a(
        self, text: Trained, sd: str, dino: str, tmp_path: Path
    ) -> None:
        """It keeps the digest alone; the file may lie elsewhere and may have changed in what stage B does not read."""
        model = stage_b(sd, dino, text.checkpoint, condition="text", lambda_vsd=0.0)
        saved: dict[str, Any] = {"state_dict": dict(model.state_dict())}
        model.on_save_checkpoint(saved)
        assert not saved["stages"]["foundation"]["weights"]
        assert saved["stages"]["foundation"]["path"] == str(text.checkpoint.resolve())
        assert saved["stages"]["foundation"]["run"] == "f2idiff/t2i/version_0/checkpoints/last.ckpt"
        checkpoint = torch.load(text.checkpoint, weights_only=True)
        for change, refused in ((0.0, False), (1e-3, True)):
            checkpoint["global_step"] += 1
            checkpoint["state_dict"]["denoiser.unet.conv_in.bias"] += change
            torch.save(checkpoint, tmp_path / "moved.ckpt")
            other = stage_b(sd, dino, tmp_path / "moved.ckpt", condition="text", lambda_vsd=0.0)
            with pytest.raises(ValueError, match=r"moved\.ckpt holds other weights") if refused else nullcontext():
                other.on_load_checkpoint(dict(saved))

    def test_the_other_condition_is_refused(self, features: Trained, text: Trained) -> None:
        with pytest.raises(ValueError, match=r"foundation=.* was trained on features; set model\.condition=features"):
            open_foundation(str(features.run), "text")
        with pytest.raises(ValueError, match=r"foundation=.* was trained on text; set model\.condition=text"):
            open_foundation(str(text.checkpoint), "features")

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"feature_tokens": "cls"}, "feature_tokens=all, here is feature_tokens=cls; set model.feature_tokens=all"),
            ({"feature_size": 28}, "feature_size=null, here is feature_size=28; set model.feature_size=null"),
        ],
    )
    def test_other_tokens_or_sizes_than_stage_as_are_refused(
        self, features: Trained, sd: str, dino: str, changed: Batch, said: str
    ) -> None:
        with pytest.raises(ValueError, match=rf"foundation=.* was trained with {said}, or train a stage A of its own"):
            stage_b(sd, dino, features.run, **changed)

    def test_other_frozen_networks_than_stage_as_are_refused(
        self, features: Trained, text: Trained, sd: str, dino: str, tmp_path: Path
    ) -> None:
        changed = tmp_path / "dino"
        model = Dinov2Model.from_pretrained(dino)
        model.layernorm.bias.data[3] += 0.01
        model.save_pretrained(changed)
        with pytest.raises(ValueError, match=rf"another DINOv2 than features={changed} has; set model\.features"):
            stage_b(sd, str(changed), features.run)
        for part, file, said in (
            ("vae", "config.json", ("0.18215", "0.2", "latent scaling than pretrained=")),
            ("scheduler", "scheduler_config.json", ("0.012", "0.013", "noise schedule than pretrained=")),
        ):
            other = shutil.copytree(sd, tmp_path / part)
            path = other / part / file
            assert said[0] in path.read_text()
            path.write_text(path.read_text().replace(*said[:2]))
            with pytest.raises(ValueError, match=rf"trained with another {said[2]}{other} has"):
                stage_b(str(other), dino, features.run)
        encoder = shutil.copytree(sd, tmp_path / "text")
        weights = encoder / "text_encoder" / "model.safetensors"
        state = load_file(weights)
        save_file({name: value * 1.5 for name, value in state.items()}, weights, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"another text encoder than text_encoder={encoder} has; set model\."):
            stage_b(sd, dino, text.run, condition="text", text_encoder=str(encoder))

    def test_the_same_networks_are_taken_from_another_place(
        self, features: Trained, sd: str, dino: str, tmp_path: Path
    ) -> None:
        moved = [str(shutil.copytree(folder, tmp_path / name)) for folder, name in ((sd, "sd"), (dino, "dino"))]
        stage_b(*moved, features.run)  # type: ignore[arg-type]  # two places and the foundation

    def test_a_checkpoint_from_before_the_digests_is_taken_with_a_warning(
        self, text: Trained, sd: str, dino: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        checkpoint = torch.load(text.checkpoint, weights_only=True)
        assert set(checkpoint.pop("frozen")) == {
            *(f"pretrained: {part}" for part in ("VAE", "latent scaling", "noise schedule")),
            "text_encoder: text encoder",
        }
        torch.save(checkpoint, tmp_path / "old.ckpt")
        stage_b(sd, dino, tmp_path / "old.ckpt", condition="text")
        assert "old.ckpt has no digests of its frozen networks, so these are not compared" in caplog.text

    def test_stage_a_is_read_once_and_mapped(
        self, features: Trained, sd: str, dino: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[tuple[Path, dict[str, Any]]] = []
        real = torch.load

        def load(path: Any, **options: Any) -> Any:
            reads.append((Path(path), options))
            return real(path, **options)

        monkeypatch.setattr(torch, "load", load)
        model = stage_b(sd, dino, features.run)
        ((path, options),) = reads
        assert path == features.checkpoint
        assert options["mmap"]
        assert model.prior is not None
        opened = open_foundation(str(features.run), "features")
        mapped = {value.data_ptr() for value in opened.state.values()}
        assert not mapped & {value.data_ptr() for value in opened.unet.parameters()}  # the file may be replaced

    def test_another_stages_checkpoint_is_refused(self, text: Trained, tmp_path: Path) -> None:
        checkpoint = torch.load(text.checkpoint, weights_only=True)
        checkpoint["hyper_parameters"]["_class_path"] = "papers.f2idiff.F2IDiffSR"
        torch.save(checkpoint, tmp_path / "b.ckpt")
        with pytest.raises(ValueError, match=r"foundation=.*b\.ckpt is a checkpoint of papers\.f2idiff\.F2IDiffSR"):
            open_foundation(str(tmp_path / "b.ckpt"), "features")

    def test_a_missing_file_is_said_to_be_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"foundation=.*nowhere: no such checkpoint; train that stage"):
            open_foundation(str(tmp_path / "nowhere"), "features")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("missing", r"1 trained keys missing \['conv_in\.bias'\]"),
            ("extra", r"1 unknown \['unknown'\]"),
            ("shape", r"conv_in\.bias is \(3,\) there and \(8,\) here"),
        ],
    )
    def test_weights_that_are_not_exactly_the_u_nets_are_refused(
        self, text: Trained, tmp_path: Path, change: str, said: str
    ) -> None:
        checkpoint = torch.load(text.checkpoint, weights_only=True)
        state = checkpoint["state_dict"]
        if change == "missing":
            del state["denoiser.unet.conv_in.bias"]
        else:
            state["denoiser.unet.unknown" if change == "extra" else "denoiser.unet.conv_in.bias"] = torch.zeros(3)
        torch.save(checkpoint, tmp_path / "c.ckpt")
        with pytest.raises(ValueError, match=rf"foundation=.*c\.ckpt does not fit.*{said}"):
            open_foundation(str(tmp_path / "c.ckpt"), "text")


def stage_b(sd: str, dino: str, foundation: Path, **options: Any) -> F2IDiffSR:
    model = F2IDiffSR(sd, str(foundation), features=dino, perceptual="none", **options)
    model.configure_model()
    return model


def fit_b(model: F2IDiffSR, batch: Batch) -> dict[str, float]:
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
