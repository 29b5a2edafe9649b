"""DM-SR's stage 1: its targets by hand, their calibration, what it reports, and how stage 2 reads it."""

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from common.conditioning.text import encode_prompts
from common.losses import LPIPS
from launch.parameters import parse
from papers.dm_sr import DMSR, TimestepEstimation, estimation, module
from papers.dm_sr.estimation import read_restorer
from papers.dm_sr.networks import TimestepEstimator
from papers.dm_sr.stage1 import build_estimator, read_estimator

ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
SGD, STILL = partial(torch.optim.SGD, lr=1e-2), partial(torch.optim.SGD, lr=0.0)
Batch = dict[str, Any]


def stage(**options: Any) -> TimestepEstimation:
    small: dict[str, Any] = {"weights": "random", "width": 0.05, "lpips_weights": "random", "optimizer": STILL}
    return TimestepEstimation(**{**small, "target": "l1", **options})


def pictures(batch: Batch) -> tuple[Tensor, Tensor]:
    """Up-sampled low-quality and high-quality images in [0,1], by hand."""
    lq, hq = batch["lq"].float() / 255, batch["hq"].float() / 255
    return F.interpolate(lq, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1), hq


def distance(target: str, batch: Batch) -> Tensor:
    x, y = pictures(batch)
    if target == "l1":
        return (x - y).abs().mean((1, 2, 3))
    if target == "ssim":
        ssim = [
            structural_similarity_index_measure(a[None], b[None], data_range=1.0) for a, b in zip(x, y, strict=True)
        ]
        return 1 - torch.stack([torch.as_tensor(value) for value in ssim])
    return LPIPS("random", net="alexnet")(x, y)


def doubled(batch: Batch) -> Batch:
    """AlexNet wants larger images."""
    return {**batch, **{key: batch[key].repeat(1, 1, 2, 2) for key in ("lq", "hq")}}


class Data(LightningDataModule):
    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches
        self.asked = 0
        self.dataset_names = {"val": ["some"], "test": ["some", "others"]}

    def loader(self, batches: list[Batch]) -> Any:
        data: Any = batches
        return torch.utils.data.DataLoader(data, batch_size=None)

    def train_dataloader(self) -> Any:
        self.asked += 1
        return self.loader(self.batches)

    def val_dataloader(self) -> Any:
        return self.loader(self.batches)

    def test_dataloader(self) -> Any:
        return [self.loader(self.batches[:2]), self.loader(self.batches[2:])]


class Plain(LightningDataModule):
    """Without targets."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = [{key: value for key, value in batch.items() if key != "hq"} for batch in batches]

    def loader(self) -> Any:
        data: Any = self.batches
        return torch.utils.data.DataLoader(data, batch_size=None)

    predict_dataloader = test_dataloader = val_dataloader = loader


def trainer_for(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, log_every_n_steps=1, **{**quiet, **options})


def fit(model: TimestepEstimation, batches: list[Batch], **options: Any) -> Trainer:
    trainer = trainer_for(max_steps=len(batches), limit_val_batches=0, **options)
    trainer.fit(model, datamodule=Data(batches), weights_only=False)
    return trainer


def estimates(model: TimestepEstimation, batch: Batch) -> Tensor:
    """By the same weights in a network of its own."""
    net = TimestepEstimator("random", 0.05)
    assert model.estimator is not None
    net.load_state_dict(model.estimator.state_dict())
    with torch.no_grad():
        return net(pictures(batch)[0])


def restorer_at(path: Path, sd: str, **options: Any) -> DMSR:
    """A stage 2 whose encoder has moved away from the VAE's, and its checkpoint as Lightning's CLI writes it."""
    model = DMSR(
        sd, timestep=0, perceptual_width=0.05, disc_channels=(8, 16), disc_heads=(1, 2), disc_groups=4, **options
    )
    model.configure_model()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.all_trainable().items():
            if name.startswith("encoder."):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.5 if ".time." in name else 0.02))
    keys = model.checkpoint_keys()
    state = {name: value for name, value in model.state_dict().items() if name in keys}
    given = {"_class_path": "papers.dm_sr.DMSR", "pretrained": sd, "prompt": "sharp", "embedding": "scalar"}
    torch.save({"state_dict": state, "hyper_parameters": {**given, "scale": 4, "seed": 0}}, path)
    return model


class TestTargets:
    @pytest.mark.parametrize("target", ["l1", "ssim", "lpips"])
    def test_they_are_the_scaled_distance(self, target: str, batch: Batch) -> None:
        batch = doubled(batch)
        d = distance(target, batch)
        low, high = float(d.min()), float(d.max())
        assert low < high
        for lo, hi in ((0.0, 1.0), (0.5 * low, 2 * high), ((low + high) / 2, 2 * high), (0.0, (low + high) / 2)):
            model = stage(target=target, lo=lo, hi=hi)
            model.configure_model()
            images = {"lq": batch["lq"].float() / 255, "hq": batch["hq"].float() / 255}
            expected = 499 * ((d - lo) / (hi - lo)).clamp(0, 1)
            torch.testing.assert_close(model.targets(images, torch.zeros(2)), expected, rtol=1e-4, atol=2e-2)

    def test_the_ends_are_0_and_499(self, batch: Batch) -> None:
        d = distance("l1", batch)
        for lo, hi, expected in ((1.0, 2.0, 0.0), (0.0, float(d.min()) / 2, 499.0)):
            model = stage(lo=lo, hi=hi)
            model.configure_model()
            images = {"lq": batch["lq"].float() / 255, "hq": batch["hq"].float() / 255}
            assert model.targets(images, torch.zeros(2)).tolist() == [expected] * 2

    def test_the_loss_is_the_mean_square_in_five_hundredths(self, batch: Batch) -> None:
        model = stage(lo=0.0, hi=0.3)
        trainer = fit(model, [batch] * 2)
        t, t_hat = 499 * (distance("l1", batch) / 0.3).clamp(0, 1), estimates(model, batch)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert metrics["train/loss"] == pytest.approx(float((((t_hat - t) / 500) ** 2).mean()), rel=1e-3)
        assert metrics["train/t"] == pytest.approx(float(t.mean()), rel=1e-4)
        assert metrics["train/t_hat"] == pytest.approx(float(t_hat.mean()), rel=1e-4)

    def test_a_step_follows_the_losses_gradient(self, batch: Batch) -> None:
        model, net = (
            stage(lo=0.0, hi=0.3, optimizer=partial(torch.optim.SGD, lr=1.0)),
            TimestepEstimator("random", 0.05),
        )
        fit(model, [batch])
        t = 499 * (distance("l1", batch) / 0.3).clamp(0, 1)
        loss = (((net(pictures(batch)[0]) - t) / 500) ** 2).mean()
        loss.backward()
        assert model.estimator is not None
        moved = dict(model.estimator.named_parameters())
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            step = parameter.detach() - parameter.grad
            torch.testing.assert_close(moved[name].detach(), step, rtol=1e-4, atol=1e-6)
        assert model.all_trainable().keys() == {f"estimator.{name}" for name in moved}


class TestCalibration:
    def test_lo_and_hi_come_from_the_first_training_batches_alone(self, batches: list[Batch]) -> None:
        d = torch.stack([distance("l1", batch) for batch in batches])
        for calibration in (1, 2, 9):
            model = stage(lo=None, hi=None, calibration=calibration)
            fit(model, batches)
            assert float(model.lo) == pytest.approx(float(d[:calibration].min()), rel=1e-5)
            assert float(model.hi) == pytest.approx(float(d[:calibration].max()), rel=1e-5)
        assert float(d[0].min()) != float(d.min()) or float(d[0].max()) != float(d.max())

    def test_what_is_given_stays(self, batches: list[Batch]) -> None:
        d = torch.stack([distance("l1", batch) for batch in batches])
        model = stage(lo=None, hi=0.9)
        fit(model, batches)
        assert [float(model.lo), float(model.hi)] == [pytest.approx(float(d.min()), rel=1e-5), pytest.approx(0.9)]
        model = stage(lo=0.001, hi=None)
        fit(model, batches)
        assert [float(model.lo), float(model.hi)] == [pytest.approx(0.001), pytest.approx(float(d.max()), rel=1e-5)]

    def test_a_checkpoint_keeps_it_and_a_resumed_run_does_not_repeat_it(
        self, batches: list[Batch], tmp_path: Path
    ) -> None:
        first = stage(lo=None, hi=None, optimizer=SGD)
        fit(first, batches[:1]).save_checkpoint(tmp_path / "one.ckpt")
        saved = torch.load(tmp_path / "one.ckpt", weights_only=False)["state_dict"]
        assert (saved["lo"], saved["hi"]) == (first.lo, first.hi)
        again, data = stage(lo=None, hi=None, optimizer=SGD), Data(batches[1:])
        trainer = trainer_for(max_steps=2, limit_val_batches=0)
        trainer.fit(again, datamodule=data, ckpt_path=tmp_path / "one.ckpt", weights_only=False)
        assert int(again.train_step) == 2
        assert (float(again.lo), float(again.hi)) == (float(first.lo), float(first.hi))
        assert data.asked == 1  # the training's own

    def test_it_needs_a_data_module(self, batch: Batch) -> None:
        loader: Any = torch.utils.data.DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="lo and hi=null need a data module"):
            trainer_for(max_steps=1).fit(stage(lo=None, hi=None), loader)
        with pytest.raises(ValueError, match="hi=null need a data module"):
            trainer_for(max_steps=1).fit(stage(hi=None), loader)

    @pytest.mark.parametrize(("lo", "hi"), [(0.5, 0.5), (0.6, 0.5)])
    def test_lo_must_be_below_hi(self, lo: float, hi: float) -> None:
        with pytest.raises(ValueError, match=f"lo={lo} is not below hi={hi}"):
            stage(lo=lo, hi=hi)

    def test_so_must_it_after_calibration(self, batch: Batch) -> None:
        with pytest.raises(ValueError, match="after calibration"):
            fit(stage(lo=0.9, hi=None), [batch])


class TestMinimum:
    """Table 5's last row: the target is found by a trained stage 2."""

    @pytest.fixture(autouse=True)
    def _no_losses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "LatentLPIPS", lambda *_: torch.nn.Identity())  # takes a second, and is not asked

    @pytest.mark.parametrize("averaged", [False, True])
    def test_it_is_the_nearest_of_three_timesteps(
        self, averaged: bool, sd: str, batches: list[Batch], tmp_path: Path
    ) -> None:
        stage2 = restorer_at(tmp_path / "two.ckpt", sd, prompt="sharp")
        if averaged:  # then the weights beside the average must not matter
            saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
            average = {name: saved["state_dict"][name].clone() for name in stage2.all_trainable()}
            saved["state_dict"] = {k: v * (0 if k in average else 1) for k, v in saved["state_dict"].items()}
            torch.save({**saved, "ema": {"updates": 1, "average": average}}, tmp_path / "two.ckpt")
        vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
        unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet").eval()
        assert stage2.encoder is not None
        c, chosen = encode_prompts(sd, ["sharp"]), []
        model = stage(target="min", restorer=str(tmp_path / "two.ckpt"))
        model.configure_model()
        for batch in batches[:2]:
            x, y = pictures(batch)
            for first, second in ((0.2, 300.6), (120.4, 498.9)):
                expected = []
                for i, t_hat in enumerate((first, second)):
                    errors = {}
                    for t in sorted({min(max(round(t_hat) + step, 0), 499) for step in (-1, 0, 1)}):
                        with torch.no_grad():
                            h = 0.18215 * vae.encode(y[i : i + 1] * 2 - 1).latent_dist.mode()
                            x_sr = stage2.encoder(x[i : i + 1] * 2 - 1, torch.tensor([float(t)]))
                            eps = unet(x_sr, t, c).sample
                        z = (x_sr - math.sqrt(1 - ABAR[t]) * eps) / math.sqrt(ABAR[t])
                        errors[t] = float((z - h).abs().mean())
                    expected.append(float(min(errors, key=lambda t: errors[t])))
                    chosen.append(expected[-1] - round(t_hat))
                images = {"lq": batch["lq"].float() / 255, "hq": y, "prompt": batch["prompt"]}
                assert model.targets(images, torch.tensor([first, second])).tolist() == expected
        assert len(set(chosen)) > 1  # not always the same neighbour

    def test_it_trains_and_keeps_stage_2_out_of_its_checkpoint(self, sd: str, batch: Batch, tmp_path: Path) -> None:
        restorer_at(tmp_path / "two.ckpt", sd, prompt="sharp")
        model = stage(target="min", restorer=str(tmp_path / "two.ckpt"), optimizer=SGD)
        trainer = fit(model, [batch] * 2)
        assert math.isfinite(float(trainer.callback_metrics["train/loss"]))
        assert all(key.startswith("estimator.") or "." not in key for key in model.checkpoint_keys())
        assert model.restorer is not None
        assert all(p.grad is None and not p.requires_grad for p in model.restorer.parameters())

    def test_it_needs_a_restorer(self) -> None:
        with pytest.raises(ValueError, match="target=min needs a trained stage 2; set restorer"):
            stage(target="min")

    def test_a_wrong_restorer_is_refused_by_the_arguments_name(self, sd: str, stage1: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^restorer=.* is a checkpoint of papers\.dm_sr\.TimestepEstimation"):
            stage(target="min", restorer=stage1).configure_model()
        with pytest.raises(FileNotFoundError, match=f"^restorer={tmp_path}/none"):
            stage(target="min", restorer=f"{tmp_path}/none").configure_model()
        path = tmp_path / "two.ckpt"
        restorer_at(path, sd)
        saved = torch.load(path, weights_only=True)
        saved["state_dict"].pop("encoder.time.0.weight")
        torch.save(saved, path)
        with pytest.raises(ValueError, match=f"^restorer={path} does not fit"):
            read_restorer(str(path))


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


class TestReports:
    def check(self, rows: list[dict[str, str]], model: TimestepEstimation, batches: list[Batch], hi: float) -> None:
        expected = {}
        for batch in batches:
            t, t_hat = 499 * (distance("l1", batch) / hi).clamp(0, 1), estimates(model, batch)
            expected |= {name: (float(t[i]), float(t_hat[i])) for i, name in enumerate(batch["name"])}
        assert [row["image"] for row in rows] == sorted(expected)
        for row in rows:
            assert float(row["target"]) == pytest.approx(expected[row["image"]][0], abs=2e-2)
            assert float(row["predicted"]) == pytest.approx(expected[row["image"]][1], abs=2e-2)

    @staticmethod
    def agreement(rows: list[dict[str, str]]) -> dict[str, float]:
        t, t_hat = (np.array([float(row[name]) for row in rows]) for name in ("target", "predicted"))
        rmse, std = float(np.sqrt(((t - t_hat) ** 2).mean())), float(t.std())
        return {"rmse": rmse, "r2": 1 - rmse**2 / std**2, "target_std": std}

    def test_test_compares_prediction_and_target(self, batches: list[Batch], tmp_path: Path) -> None:
        model = stage(lo=0.0, hi=0.25)
        model.output.folder = tmp_path
        trainer = trainer_for()
        trainer.test(model, datamodule=Data(batches), verbose=False)
        rows = table(tmp_path / "test/timesteps.csv")
        assert list(rows[0]) == ["dataset", "image", "target", "predicted"]
        for name, part in (("some", batches[:2]), ("others", batches[2:])):
            own = [row for row in rows if row["dataset"] == name]
            self.check(own, model, part, 0.25)
            assert (tmp_path / f"test/figures/timestep_{name}.png").is_file()
            for metric, value in self.agreement(own).items():
                assert float(trainer.callback_metrics[f"test/{name}/{metric}"]) == pytest.approx(value, rel=1e-3)
        assert len(rows) == 6
        assert model._rows == []

    def test_a_foreign_table_is_refused_before_the_work(
        self, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Tensor] = []
        estimate = TimestepEstimation.estimate
        monkeypatch.setattr(TimestepEstimation, "estimate", lambda self, x: asked.append(x) or estimate(self, x))
        (tmp_path / "timesteps.csv").write_text("mine")
        model = stage()
        model.output.folder = tmp_path
        with pytest.raises(FileExistsError, match=r"not overwritten, .*timesteps\.csv"):
            trainer_for().predict(model, datamodule=Plain(batches))
        assert not asked
        assert (tmp_path / "timesteps.csv").read_text() == "mine"
        (tmp_path / "timesteps.csv").unlink()
        for _ in range(2):  # its own it replaces
            trainer_for().predict(model, datamodule=Plain(batches))
        assert len(asked) == 6

    def test_validation_logs_the_same_and_writes_nothing(self, batches: list[Batch], tmp_path: Path) -> None:
        model = stage(lo=0.0, hi=0.25)
        model.output.folder = tmp_path
        trainer = trainer_for()
        trainer.validate(model, datamodule=Data(batches), verbose=False)
        rows = [
            {"target": str(t), "predicted": str(t_hat)}
            for batch in batches
            for t, t_hat in zip((499 * (distance("l1", batch) / 0.25).clamp(0, 1)).tolist(),
                                estimates(model, batch).tolist(), strict=True)
        ]  # fmt: skip
        for metric, value in self.agreement(rows).items():
            assert float(trainer.callback_metrics[f"val/some/{metric}"]) == pytest.approx(value, rel=1e-3)
        assert list(tmp_path.iterdir()) == []

    def test_prediction_needs_no_targets(self, batches: list[Batch], tmp_path: Path) -> None:
        model = stage()
        model.output.folder = tmp_path
        trainer_for().predict(model, datamodule=Plain(batches))
        rows = table(tmp_path / "timesteps.csv")
        assert [row["image"] for row in rows] == ["0a", "0b", "1a", "1b", "2a", "2b"]
        assert all(row["target"] == "" for row in rows)
        t_hat = torch.cat([estimates(model, batch) for batch in batches])
        np.testing.assert_allclose([float(row["predicted"]) for row in rows], t_hat.numpy(), atol=2e-2)
        assert model._rows == []

    def test_a_test_set_without_targets_is_predicted(self, batches: list[Batch], tmp_path: Path) -> None:
        model = stage()
        model.output.folder = tmp_path
        trainer_for().test(model, datamodule=Plain(batches), verbose=False)
        rows = table(tmp_path / "test/timesteps.csv")
        assert len(rows) == 6
        assert all(row["target"] == "" for row in rows)
        trainer_for().validate(model, datamodule=Plain(batches), verbose=False)

    def test_a_constant_target_has_no_r2(self, batch: Batch, tmp_path: Path) -> None:
        model = stage(lo=1.0, hi=2.0)
        model.output.folder = tmp_path
        trainer = trainer_for()
        trainer.validate(model, datamodule=Data([batch]), verbose=False)
        assert "val/some/r2" not in trainer.callback_metrics
        assert float(trainer.callback_metrics["val/some/target_std"]) == 0


class TestCollapse:
    """Predictions that are one constant are named, once, and those that follow their images are not."""

    def model(self, constant: bool) -> TimestepEstimation:
        model = stage(lo=0.0, hi=0.25)
        model.configure_model()
        assert model.estimator is not None
        with torch.no_grad():
            model.estimator.head.weight *= 0 if constant else 200
        return model

    @pytest.mark.parametrize("constant", [True, False])
    def test_in_training(
        self, constant: bool, batches: list[Batch], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = self.model(constant)
        expected = float(estimates(model, batches[-1]).std(correction=0))
        trainer = fit(model, batches)
        for name in ("a", "b"):
            trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        assert float(trainer.callback_metrics["train/t_hat_std"]) == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert (expected < 1e-3) is constant
        assert caplog.text.count("T has collapsed to a constant: lower the learning rate") == constant

    @pytest.mark.parametrize("constant", [True, False])
    def test_in_validation(self, constant: bool, batches: list[Batch], caplog: pytest.LogCaptureFixture) -> None:
        model, trainer = self.model(constant), trainer_for()
        expected = float(torch.cat([estimates(model, batch) for batch in batches]).std(correction=0))
        trainer.validate(model, datamodule=Data(batches), verbose=False)
        assert float(trainer.callback_metrics["val/some/t_hat_std"]) == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert caplog.text.count("(some). If it stays so") == constant


def test_paper_scale_warms_up_anneals_averages_and_clips() -> None:
    _, parsed = parse([Path(estimation.__file__).parent / "configs/estimator.yaml"])
    args = parsed.model.init_args.as_dict()
    assert (args["clip"], args["ema_decay"]) == (1.0, 0.999)
    given = args["lr_scheduler"]["init_args"]
    assert args["lr_scheduler"]["class_path"] == "torch.optim.lr_scheduler.OneCycleLR"
    assert given["max_lr"] == args["optimizer"]["init_args"]["lr"] == 1e-4
    assert (given["total_steps"], given["pct_start"], given["cycle_momentum"]) == (50_000, 0.04, False)


class TestReadEstimator:
    def test_it_answers_as_the_trained_one(self, stage1: str, batch: Batch) -> None:
        saved = torch.load(stage1, weights_only=True)["state_dict"]
        net = build_estimator(read_estimator(stage1))
        assert all(torch.equal(saved[f"estimator.{name}"], p) for name, p in net.named_parameters())
        by_hand = TimestepEstimator("random", 0.05)
        by_hand.load_state_dict({name.removeprefix("estimator."): v for name, v in saved.items() if "." in name})
        with torch.no_grad():
            assert torch.equal(net(pictures(batch)[0]), by_hand(pictures(batch)[0]))

    def test_it_takes_the_average_where_there_is_one(self, batch: Batch, tmp_path: Path) -> None:
        model = stage(lo=0.0, hi=0.3, optimizer=partial(torch.optim.SGD, lr=1.0), ema_decay=0.9)
        fit(model, [batch] * 3).save_checkpoint(tmp_path / "one.ckpt")
        saved = torch.load(tmp_path / "one.ckpt", weights_only=False)
        saved["hyper_parameters"] = {"_class_path": "papers.dm_sr.estimation.TimestepEstimation", "width": 0.05}
        torch.save(saved, tmp_path / "one.ckpt")
        average = saved["ema"]["average"]
        net = dict(build_estimator(read_estimator(str(tmp_path / "one.ckpt"))).named_parameters())
        assert {f"estimator.{name}" for name in net} == average.keys()
        assert all(torch.equal(average[f"estimator.{name}"], p) for name, p in net.items())
        assert not torch.equal(saved["state_dict"]["estimator.head.weight"], net["head.weight"])

    def test_within_stage_2_it_is_frozen(self, sd: str, stage1: str) -> None:
        model = DMSR(sd, estimator=stage1, lambda_adv=0.0, perceptual_width=0.05)
        model.configure_model()
        assert model.estimator is not None
        assert not model.estimator.training
        assert not any(p.requires_grad for p in model.estimator.parameters())
        x_01 = torch.rand(1, 3, 32, 32, requires_grad=True)
        assert not model.timesteps(x_01).requires_grad


def test_the_last_timestep_is_499() -> None:
    assert estimation.LAST == 499
