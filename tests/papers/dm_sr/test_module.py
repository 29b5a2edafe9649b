"""DM-SR's stage 2: inference in closed form, every gradient against autograd by hand, its switches and configs."""

import copy
import math
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.conditioning.text import encode_prompts
from common.losses import LatentLPIPS
from common.restoration import Inference
from launch.parameters import build, parse, summary
from papers.dm_sr import DMSR
from papers.dm_sr import module as dm_sr
from papers.dm_sr.losses import adversarial_loss, discriminator_objective
from papers.dm_sr.module import PROMPT, DMSRConditions
from papers.dm_sr.networks import TimestepEstimator
from papers.dm_sr.sampling import timestep_at

CONFIGS = Path(__file__).resolve().parents[3] / "papers/dm_sr/configs"
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # SD's schedule, independently
REFERENCE = {50: 0.951577, 150: 0.827811, 250: 0.673792, 300: 0.590501, 499: 0.277669}
SGD, STILL = partial(torch.optim.SGD, lr=1e-2), partial(torch.optim.SGD, lr=0.0)
OFF = {f"lambda_{name}": 0.0 for name in ("l1", "per", "adv", "dm", "eps")}
WHOLE = Inference(color_fix="none", tile=None, metrics=["psnr_rgb"])
T_DM = [30, 480]
Batch = dict[str, Any]
Grads = dict[str, Tensor]


def low(batch: Batch) -> Tensor:
    return batch["lq"].float() / 255


def method(pretrained: str, **options: Any) -> DMSR:
    small: dict[str, Any] = {"disc_channels": (8, 16), "disc_heads": (1, 2), "disc_groups": 4, "perceptual_width": 0.05}
    small |= {"optimizer": SGD, "disc_optimizer": SGD, "ema_decay": None, "inference": WHOLE}
    return DMSR(pretrained, **{**small, **options})


def configured(pretrained: str, **options: Any) -> DMSR:
    model = method(pretrained, **options)
    model.configure_model()
    return model


def read_t(stage1: str) -> TimestepEstimator:
    """The estimator, without the code under test."""
    checkpoint = torch.load(stage1, weights_only=True)
    net = TimestepEstimator("random", checkpoint["hyper_parameters"]["width"])
    state = {n.removeprefix("estimator."): v for n, v in checkpoint["state_dict"].items() if n.startswith("estimator.")}
    net.load_state_dict(state)
    return net.eval()


def lq_01(batch: Batch) -> Tensor:
    return batch["lq"].float() / 255


def upsampled(x_01: Tensor) -> Tensor:
    return F.interpolate(x_01, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)


def t_of(stage1: str, batch: Batch) -> Tensor:
    with torch.no_grad():
        return read_t(stage1)(upsampled(lq_01(batch)))


def signal_noise(t: Tensor) -> tuple[Tensor, Tensor]:
    abar = torch.tensor(ABAR[t.numpy()]).view(-1, 1, 1, 1)
    return abar.sqrt().float(), (1 - abar).sqrt().float()


class Hand:
    """Section 3 written out from diffusers' parts, with leaves that are called as the module's parameters."""

    def __init__(self, sd: str, batch: Batch, t_hat: Tensor, prompts: list[str] | None = None) -> None:
        self.vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
        self.unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet").eval().requires_grad_(False)
        self.c = encode_prompts(sd, prompts or [PROMPT]).expand(len(t_hat), -1, -1)
        self.t = t_hat.round().long()
        self.a, self.s = signal_noise(self.t)
        self.x_l = upsampled(lq_01(batch)) * 2 - 1
        with torch.no_grad():
            self.h = 0.18215 * self.vae.encode(batch["hq"].float() / 255 * 2 - 1).latent_dist.mode()
        self.leaves = {f"encoder.encoder.{name}": p for name, p in self.vae.encoder.named_parameters()}
        for level, (block, width) in enumerate(zip(self.vae.encoder.down_blocks, (8, 12, 16), strict=True)):
            weight, bias = torch.zeros(width, requires_grad=True), torch.zeros(width, requires_grad=True)
            self.leaves |= {f"encoder.time.{level}.weight": weight, f"encoder.time.{level}.bias": bias}

            def add(_m: Any, _args: Any, out: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
                return out + (torch.outer(t_hat / 500, weight) + bias)[:, :, None, None]

            block.register_forward_hook(add)
        self.x_sr = 0.18215 * self.vae.encode(self.x_l).latent_dist.mean
        self.eps = self.mu(self.x_sr, self.t)
        self.z = (self.x_sr - self.s * self.eps) / self.a

    def mu(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, self.c).sample

    def decoded(self, z: Tensor) -> Tensor:
        """Not clamped."""
        return self.vae.decode(z / 0.18215).sample

    @torch.no_grad()
    def image(self, z: Tensor) -> Tensor:
        return (self.decoded(z).clamp(-1, 1) + 1) / 2

    @torch.no_grad()
    def dm_gradient(self, noise: Tensor, t: Tensor) -> Tensor:
        a, s = signal_noise(t)
        return self.mu(a * self.z + s * noise, t) - self.mu(a * self.h + s * noise, t)

    @torch.no_grad()
    def residual(self) -> Tensor:
        return self.mu(self.a * self.h + self.s * self.eps, self.t) - self.eps

    def slopes(self, at: Tensor, cotangent: Tensor | None = None) -> Grads:
        """The gradient of a loss, or what a gradient at a tensor becomes at the leaves."""
        found = torch.autograd.grad(at, list(self.leaves.values()), cotangent, retain_graph=True)
        return dict(zip(self.leaves, found, strict=True))


def apart(got: Grads, expected: Grads) -> float:
    """Relative distance; the larger one of the encoder's and the time embeddings'."""
    assert got.keys() == expected.keys()
    found = []
    for part in ("encoder.encoder.", "encoder.time."):
        a, b = (torch.cat([g[n].flatten() for n in expected if n.startswith(part)]) for g in (got, expected))
        assert float(b.norm()) > 0
        found.append(float((a - b).norm() / b.norm()))
    return max(found)


def noise_like(z: Tensor) -> Tensor:
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(11))


class Known:
    """Draws that a test can repeat."""

    def normal(self, stream: str, shape: Any) -> Tensor:
        assert stream.startswith("dm/")
        return noise_like(torch.empty(2, *shape))

    def integers(self, stream: str, low: int, high: int) -> Tensor:
        assert (low, high) == (1, 499)
        return torch.tensor(T_DM)


@dataclass
class Call:
    args: tuple[Any, ...]
    out: Any
    graph: bool  # the output hangs on the first input
    trains: bool  # a parameter of the network does


@dataclass
class Tape(Callback):
    """What went in and out of the networks, and gradients and weights before each optimiser's step."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    grads: list[Grads] = field(default_factory=list)
    states: list[Grads] = field(default_factory=list)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.listen(pl_module)

    def listen(self, model: DMSR) -> "Tape":
        vae = model.codec.vae
        networks = {"encoder": model.encoder, "vae": vae.encoder, "decode": vae.decoder, "unet": model.denoiser.unet}
        for name, network in {**networks, "t": model.estimator, "disc": model.discriminator}.items():
            self.calls[name] = []
            if network is not None:
                network.register_forward_hook(partial(self._write, name))
        return self

    def _write(self, name: str, network: torch.nn.Module, args: Any, out: Any) -> None:
        out = getattr(out, "sample", out)
        trains = any(p.requires_grad for p in network.parameters())
        graph = torch.is_grad_enabled() and args[0].requires_grad and out.requires_grad
        args = tuple(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args)
        self.calls[name].append(Call(args, out.detach().clone(), graph, trains))

    def counts(self) -> dict[str, int]:
        return {name: len(calls) for name, calls in self.calls.items()}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        self.grads.append({name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None})


@dataclass
class Run:
    model: DMSR
    tape: Tape
    metrics: dict[str, float]
    before: Grads
    discriminator: Any  # as it was before


def trainer_with(*callbacks: Callback, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=list(callbacks),
        log_every_n_steps=1,
        **quiet,
        **options,
    )


def loader(batches: list[Batch]) -> Any:
    data: Any = batches
    return torch.utils.data.DataLoader(data, batch_size=None)


def train(model: DMSR, batch: Batch, steps: int = 1, known: bool = True, **options: Any) -> Run:
    model.configure_model()
    if known:
        model.draws = lambda batch: Known()  # type: ignore[method-assign, assignment, return-value]  # a stand-in
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tape, discriminator = Tape(), copy.deepcopy(model.discriminator)
    trainer = trainer_with(tape, max_steps=steps, **options)
    trainer.fit(model, loader([batch] * steps * model.accumulate))
    assert trainer.global_step == steps
    assert int(model.train_step) == steps * model.accumulate
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Run(model, tape, metrics, before, discriminator)


def different(a: Grads, b: Grads) -> set[str]:
    return {name for name, value in a.items() if not torch.equal(value, b[name])} - {"train_step"}


@pytest.fixture(scope="module")
def plain(sd: str, stage1: str, batch: Batch) -> Run:
    """One step of the paper's method."""
    return train(method(sd, estimator=stage1), batch)


@pytest.fixture(scope="module")
def hand(sd: str, stage1: str, batch: Batch) -> Hand:
    return Hand(sd, batch, t_of(stage1, batch))


class TestInference:
    def test_the_result_is_the_closed_form(self, sd: str, stage1: str, batch: Batch, hand: Hand) -> None:
        model = configured(sd, estimator=stage1)
        with torch.no_grad():
            conditions = model.prepare(lq_01(batch), ["", ""])
            torch.testing.assert_close(conditions.t_hat, t_of(stage1, batch))
            x_sr = model.encoder(hand.x_l, conditions.t_hat)  # type: ignore[misc]
            eps, z = model.split(hand.x_l, conditions.t_hat, conditions.prompt_embeds)
            sr = model.restore(lq_01(batch), conditions)
        expected = hand.image(hand.z)
        for got, by_hand in ((x_sr, hand.x_sr), (eps, hand.eps), (z, hand.z)):
            torch.testing.assert_close(got, by_hand.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hand.a * z + hand.s * eps, x_sr, rtol=0, atol=1e-6)
        assert (float(expected.min()), float(expected.max())) == (0, 1)  # the clamp acts
        torch.testing.assert_close(sr, expected, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("timestep", REFERENCE)
    def test_a_fixed_timestep_needs_no_estimator(self, sd: str, batch: Batch, timestep: int) -> None:
        model = configured(sd, timestep=timestep)
        assert model.estimator is None
        tape, by_hand = Tape().listen(model), Hand(sd, batch, torch.full((2,), float(timestep)))
        assert float(model.denoiser.schedule.alpha_bar[timestep]) == pytest.approx(REFERENCE[timestep], abs=1e-6)
        torch.testing.assert_close(by_hand.a.flatten() ** 2, torch.full((2,), REFERENCE[timestep]), rtol=0, atol=1e-6)
        raw = model.upscale(lq_01(batch), ["", ""]).raw
        assert tape.calls["unet"][0].args[1].tolist() == [timestep] * 2
        assert tape.calls["encoder"][0].args[1].tolist() == [float(timestep)] * 2
        torch.testing.assert_close(raw, by_hand.image(by_hand.z), rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_tiles_share_the_timestep_of_the_whole_image(self, sd: str, stage1: str, batch_size: int) -> None:
        x_lq = torch.rand(batch_size, 3, 8, 20, generator=torch.Generator().manual_seed(5))
        x_lq[..., :10] = 0.5
        model = configured(sd, estimator=stage1, inference=Inference("none", 32, 16))
        tape = Tape().listen(model)
        assert model.upscale(x_lq, [""] * batch_size).sr.shape == (batch_size, 3, 32, 80)
        t = read_t(stage1)
        with torch.no_grad():
            t_hat, t_tile = t(upsampled(x_lq)), t(upsampled(x_lq[..., :8]))
        assert (t_hat.round() != t_tile.round()).all()
        assert tape.counts() == {"encoder": 4, "vae": 0, "decode": 4, "unet": 4, "t": 1, "disc": 0}
        for call in tape.calls["unet"]:
            assert torch.equal(call.args[1], t_hat.round().long())
        for call in tape.calls["encoder"]:
            torch.testing.assert_close(call.args[1], t_hat)

    def test_the_estimator_sees_a_large_image_by_tiles_and_never_whole(
        self, sd: str, stage1: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x_lq = torch.rand(1, 3, 20, 36, generator=torch.Generator().manual_seed(0))
        x_lq[..., :16] *= 0.2
        whole = configured(sd, estimator=stage1, inference=Inference(tile=64, overlap=16))
        large = configured(sd, estimator=stage1, inference=Inference(tile=64, overlap=16, large=0.01))
        seen: list[tuple[int, ...]] = []
        timesteps = large.timesteps
        monkeypatch.setattr(large, "timesteps", lambda x: seen.append(tuple(x.shape[-2:])) or timesteps(x))
        t_hat = large.prepare(x_lq, [""]).t_hat
        assert seen == [(64, 64)] * 6
        parts = [x_lq[..., top : top + 16, left : left + 16] for top in (0, 4) for left in (0, 16, 20)]
        by_hand = torch.stack([read_t(stage1)(upsampled(part)) for part in parts]).mean(0)
        assert torch.allclose(t_hat, by_hand, atol=1e-3)
        assert not torch.allclose(t_hat, whole.prepare(x_lq, [""]).t_hat, atol=1e-2)

    def test_given_timesteps_reach_the_encoder_as_they_are_and_the_denoiser_rounded(
        self, sd: str, stage1: str, batch: Batch
    ) -> None:
        model = configured(sd, estimator=stage1)
        tape, c = Tape().listen(model), encode_prompts(sd, ["a cat"])
        for given, rounded in (([12.6, 498.7], [13, 499]), ([0.4, 499.0], [0, 499]), ([0.0, 77.2], [0, 77])):
            t_hat = torch.tensor(given)
            raw = model.upscale(lq_01(batch), ["", ""], DMSRConditions(t_hat, c)).raw
            assert torch.equal(tape.calls["encoder"][-1].args[1], t_hat)
            x, t, text = tape.calls["unet"][-1].args
            assert t.tolist() == rounded
            assert t.dtype == torch.int64
            assert torch.equal(text, c.expand(2, -1, -1))
            by_hand = Hand(sd, batch, t_hat, ["a cat"])
            torch.testing.assert_close(raw, by_hand.image(by_hand.z), rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(x, by_hand.x_sr.detach(), rtol=1e-5, atol=1e-6)
        assert not tape.calls["t"]

    @pytest.mark.parametrize("timestep", [-1, 1000])
    def test_a_timestep_outside_the_schedule_is_refused(self, sd: str, timestep: int) -> None:
        with pytest.raises(ValueError, match=f"timestep={timestep} is out of range"):
            method(sd, timestep=timestep).configure_model()

    def test_predicted_timesteps_need_an_estimator(self, sd: str) -> None:
        with pytest.raises(ValueError, match=r"timestep=predicted needs stage 1: set estimator"):
            method(sd)

    def test_no_steps_at_all_are_refused(self, sd: str) -> None:
        with pytest.raises(ValueError, match="num_steps=0"):
            method(sd, timestep=1, num_steps=0)

    def test_a_wrong_estimator_is_refused_by_the_arguments_name(self, sd: str, stage1: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=f"estimator={tmp_path}/none"):
            configured(sd, estimator=f"{tmp_path}/none")
        good = torch.load(stage1, weights_only=True)
        path, state, given = tmp_path / "bad.ckpt", good["state_dict"], good["hyper_parameters"]
        wrong: dict[str, tuple[dict[str, Any], str]] = {
            "another class": ({"hyper_parameters": {"_class_path": "papers.dfosd.DFOSD"}}, "papers.dfosd.DFOSD"),
            "no class": ({"hyper_parameters": {}}, "papers.dm_sr.TimestepEstimation"),
            "another width": ({"hyper_parameters": {**given, "width": 0.1}}, "other shapes"),
            "too little": ({"state_dict": {k: v for k, v in state.items() if "head" not in k}}, "missing"),
        }
        for change, message in wrong.values():
            torch.save({**good, **change}, path)
            with pytest.raises(ValueError, match=message) as refused:
                configured(sd, estimator=str(path))
            assert str(refused.value).startswith(f"estimator={path}")
        path.write_text("no checkpoint")
        with pytest.raises(ValueError, match=f"^estimator={path}"):
            configured(sd, estimator=str(path))


class TestSteps:
    """Section 4.4."""

    def run(self, sd: str, batch: Batch, t_hat: Tensor, num_steps: int, noise: str) -> tuple[list[Any], Tensor]:
        model = configured(sd, timestep=0, num_steps=num_steps, multistep_noise=noise)
        tape = Tape().listen(model)
        conditions = DMSRConditions(t_hat, encode_prompts(sd, [PROMPT]))
        raw = model.upscale(lq_01(batch), ["", ""], conditions).raw
        assert tape.counts()["encoder"] == tape.counts()["decode"] == 1
        return [call.args[1].tolist() for call in tape.calls["unet"]], raw

    def test_timesteps_fall_linearly(self) -> None:
        t_hat = torch.tensor([301.0, 499.0, 0.0])
        assert [timestep_at(t_hat, k, 4).tolist() for k in range(4)] == [
            [301, 499, 0], [226, 374, 0], [150, 250, 0], [75, 125, 0],
        ]  # fmt: skip
        assert timestep_at(torch.tensor([100.7]), 1, 2).tolist() == [50]
        assert timestep_at(t_hat, 0, 1).dtype == torch.int64

    @pytest.mark.parametrize("noise", ["first", "latest"])
    def test_one_step_is_the_plain_path(self, sd: str, batch: Batch, hand: Hand, noise: str) -> None:
        t_hat = hand.t.float()
        seen, raw = self.run(sd, batch, t_hat, 1, noise)
        assert seen == [hand.t.tolist()]
        torch.testing.assert_close(raw, hand.image(hand.z), rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("noise", ["first", "latest"])
    @pytest.mark.parametrize("num_steps", [2, 3])
    def test_more_steps_by_hand(self, sd: str, batch: Batch, num_steps: int, noise: str) -> None:
        t_hat = torch.tensor([210.3, 420.9])
        by_hand = Hand(sd, batch, t_hat)
        steps = {2: [[210, 421], [105, 210]], 3: [[210, 421], [140, 281], [70, 140]]}[num_steps]
        with torch.no_grad():
            eps, z = by_hand.eps, by_hand.z
            for t in map(torch.tensor, steps[1:]):
                a, s = signal_noise(t)
                x = a * z + s * eps
                newest = by_hand.mu(x, t)
                z = (x - s * newest) / a
                eps = newest if noise == "latest" else by_hand.eps
        expected = by_hand.image(z)
        seen, raw = self.run(sd, batch, t_hat, num_steps, noise)
        assert seen == steps
        torch.testing.assert_close(raw, expected, rtol=1e-4, atol=2e-5)

    def test_the_noise_matters_from_the_third_step_on(self, sd: str, batch: Batch) -> None:
        t_hat = torch.tensor([210.3, 420.9])
        two = [self.run(sd, batch, t_hat, 2, noise)[1] for noise in ("first", "latest")]
        three = [self.run(sd, batch, t_hat, 3, noise)[1] for noise in ("first", "latest")]
        assert torch.equal(*two)  # after one step the first noise is the latest
        assert float((three[0] - three[1]).abs().max()) > 1e-4


class FakeCaptioner:
    def __init__(self, model: str) -> None:
        self.model, self.seen, self.device = model, list[Tensor](), ""

    def to(self, device: torch.device) -> "FakeCaptioner":
        self.device = str(device)
        return self

    def __call__(self, x_01: Tensor) -> list[str]:
        self.seen.append(x_01)
        return [f"image {len(self.seen)}.{i}" for i in range(len(x_01))]


class TestPrompts:
    def texts(self, model: DMSR, batch: Batch) -> list[Tensor]:
        tape = Tape().listen(model)
        model.upscale(lq_01(batch), batch["prompt"])
        return [call.args[2] for call in tape.calls["unet"]]

    def test_the_papers_prompt_is_every_images(self, sd: str, batch: Batch) -> None:
        assert PROMPT.startswith("High-quality, high-contrast, photo-realistic, clean, sharp, highly-detailed, perfect")
        (text,) = self.texts(configured(sd, timestep=100), batch)
        assert torch.equal(text, encode_prompts(sd, [PROMPT, PROMPT]))
        (text,) = self.texts(configured(sd, timestep=100, prompt="sharp"), batch)
        assert torch.equal(text, encode_prompts(sd, ["sharp", "sharp"]))
        assert torch.equal(self.texts(configured(sd, timestep=100, prompt=""), batch)[0], encode_prompts(sd, ["", ""]))

    def test_without_a_prompt_each_image_has_its_own(self, sd: str, batch: Batch) -> None:
        (text,) = self.texts(configured(sd, timestep=100, prompt=None), batch)
        assert torch.equal(text, encode_prompts(sd, ["a house", "two dogs"]))
        assert not torch.equal(*text)
        run = train(method(sd, timestep=100, prompt=None), batch)
        assert all(torch.equal(call.args[2], text) for call in run.tape.calls["unet"])
        assert all(torch.equal(call.args[3], text) for call in run.tape.calls["disc"])

    def test_a_captioner_writes_each_test_images_text_once(
        self, sd: str, batches: list[Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dm_sr, "Captioner", FakeCaptioner)
        model = configured(sd, timestep=100, captioner="someone/llava", inference=Inference("none", 16, 8, metrics=[]))
        model.output.folder, tape, captioner = tmp_path, Tape(), model.captioner
        assert isinstance(captioner, FakeCaptioner)
        trainer_with(tape).test(model, loader(batches), verbose=False)
        assert captioner.model == "someone/llava"
        assert captioner.device == "cpu"
        assert len(captioner.seen) == len(batches)
        for seen, each in zip(captioner.seen, batches, strict=True):
            torch.testing.assert_close(seen, lq_01(each))
        tiles = len(tape.calls["unet"]) // len(batches)
        assert tiles == 9
        for i, call in enumerate(tape.calls["unet"]):
            number = i // tiles + 1
            assert torch.equal(call.args[2], encode_prompts(sd, [f"image {number}.0", f"image {number}.1"]))

    def test_training_does_not_ask_the_captioner(self, sd: str, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dm_sr, "Captioner", FakeCaptioner)
        run = train(method(sd, timestep=100, captioner="someone/llava"), batch)
        assert run.model.captioner.seen == []  # type: ignore[union-attr]
        text = encode_prompts(sd, [PROMPT, PROMPT])
        assert all(torch.equal(call.args[2], text) for call in run.tape.calls["unet"])


TABLE_6: dict[str, tuple[dict[str, float], int, int]] = {  # weights off, U-Net forwards, discriminator's
    "L1 and per": ({"lambda_adv": 0.0, "lambda_dm": 0.0, "lambda_eps": 0.0}, 1, 0),
    "adv": ({"lambda_dm": 0.0, "lambda_eps": 0.0}, 1, 3),
    "dm": ({"lambda_adv": 0.0, "lambda_eps": 0.0}, 3, 0),
    "eps": ({"lambda_adv": 0.0, "lambda_dm": 0.0}, 2, 0),
    "no dm": ({"lambda_dm": 0.0}, 2, 3),
    "all": ({}, 4, 3),
}


class TestTrainingStep:
    @pytest.mark.parametrize("row", TABLE_6)
    def test_it_calls_each_network_as_often_as_its_losses_need(
        self, row: str, sd: str, stage1: str, batch: Batch
    ) -> None:
        off, unet, disc = TABLE_6[row]
        run = train(method(sd, estimator=stage1, **off), batch)
        assert run.tape.counts() == {"encoder": 1, "vae": 1, "decode": 0, "unet": unet, "t": 1, "disc": disc}
        assert [call.graph for call in run.tape.calls["unet"]] == [True] + [False] * (unet - 1)
        assert all(math.isfinite(value) for value in run.metrics.values())

    def test_the_denoiser_is_asked_about_the_papers_four_latents(self, plain: Run, hand: Hand) -> None:
        split, dm_z, dm_h, noise = plain.tape.calls["unet"]
        t, t_dm, eps = hand.t, torch.tensor(T_DM), noise_like(hand.z)
        a, s = signal_noise(t_dm)
        expected = [
            (split, hand.x_sr, t),
            (dm_z, a * hand.z + s * eps, t_dm),
            (dm_h, a * hand.h + s * eps, t_dm),
            (noise, hand.a * hand.h + hand.s * hand.eps, t),
        ]
        assert len(set(t.tolist())) == 2
        for call, latent, timestep in expected:
            torch.testing.assert_close(call.args[0], latent.detach(), rtol=1e-4, atol=1e-5)
            assert torch.equal(call.args[1], timestep)
            assert torch.equal(call.args[2], hand.c)

    def test_the_discriminator_sees_restored_then_real_and_restored_latents(self, plain: Run, hand: Hand) -> None:
        adversarial, real, fake = plain.tape.calls["disc"]
        for call, z in ((adversarial, hand.z), (real, hand.h), (fake, hand.z)):
            torch.testing.assert_close(call.args[0], z.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(call.args[1], hand.x_l)
            assert torch.equal(call.args[2], hand.t)
            assert torch.equal(call.args[3].expand(2, -1, -1), hand.c)
        assert [call.graph for call in plain.tape.calls["disc"]] == [True, False, False]
        assert [call.trains for call in plain.tape.calls["disc"]] == [False, True, True]

    def test_gradients_reach_what_is_trained_and_nothing_else(self, plain: Run) -> None:
        of_encoder, of_discriminator = plain.tape.grads
        names = dict(plain.model.named_parameters())
        assert of_encoder.keys() == {n for n in names if n.startswith(("encoder.encoder.", "encoder.time."))}
        assert of_discriminator.keys() == {n for n in names if n.startswith("discriminator.")}
        assert all(
            float(of_encoder[f"encoder.time.{i}.{kind}"].norm()) > 0 for i in range(3) for kind in ("weight", "bias")
        )
        assert float(of_encoder["encoder.encoder.conv_in.weight"].norm()) > 0
        frozen = ("estimator.", "denoiser.", "codec.vae.", "encoder.quant_conv.", "perceptual.")
        for prefix in frozen:
            own = [p for name, p in names.items() if name.startswith(prefix)]
            assert own
            assert all(p.grad is None and not p.requires_grad for p in own)
        assert all(name.startswith((*frozen, "encoder.", "discriminator.")) for name in names)

    def test_each_turn_changes_only_its_own_network(self, plain: Run) -> None:
        start, between, end = plain.before, plain.tape.states[1], plain.model.state_dict()
        first, second = different(start, between), different(between, end)
        assert first
        assert second
        assert all(name.startswith(("encoder.encoder.", "encoder.time.")) for name in first)
        assert all(name.startswith("discriminator.") for name in second)

    def test_after_a_step_the_encoder_depends_on_the_timestep(self, plain: Run, hand: Hand) -> None:
        assert plain.model.encoder is not None
        with torch.no_grad():
            low, high = (plain.model.encoder(hand.x_l, torch.full((2,), t)) for t in (0.0, 499.0))
        assert not torch.equal(low, high)

    def test_a_checkpoint_holds_what_is_trained(self, plain: Run) -> None:
        keys = plain.model.checkpoint_keys()
        trained = set(plain.model.all_trainable())
        assert keys == trained | {"train_step"}

    @pytest.mark.parametrize("kind", ["bce", "hinge", "printed"])
    def test_the_logged_numbers_are_the_formulas(
        self, kind: str, sd: str, stage1: str, batch: Batch, hand: Hand
    ) -> None:
        """Two equal steps: Lightning forgets what the first of an epoch logs before an optimiser's step."""
        model = method(sd, estimator=stage1, gan_loss=kind, optimizer=STILL, disc_optimizer=STILL)
        run = train(model, batch, 2)
        z, t_dm = hand.z.detach(), torch.tensor(T_DM)
        with torch.no_grad():
            adv, real, fake = (call.out.double() for call in run.tape.calls["disc"][:3])
            l1 = (z - hand.h).abs().mean()
            per = 2 * LatentLPIPS("random", 4, 0.05)(z, hand.h).mean()
            g, r = hand.dm_gradient(noise_like(z), t_dm), hand.residual()
            dm, eps = 0.5 * (g * hand.x_sr).mean(), (-r * hand.x_sr).mean()
        d_real, d_fake = torch.sigmoid(real), torch.sigmoid(fake)
        of_d = {
            "bce": -d_real.log().mean() - (1 - d_fake).log().mean(),
            "hinge": 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()),
            "printed": d_real.log().mean() - (1 - d_fake).log().mean(),
        }[kind]
        of_e = 0.1 * (-adv.mean() if kind == "hinge" else -torch.sigmoid(adv).log().mean())
        expected = {"l1": l1, "per": per, "adv": of_e, "dm": dm, "dm_gradient": g.abs().mean()}
        expected |= {
            "eps_residual": r.abs().mean(),
            "discriminator": of_d,
            "d_real": real.mean(),
            "d_fake": fake.mean(),
        }
        expected |= {"loss": l1 + per + of_e + dm + eps, "t_hat": t_of(stage1, batch).mean()}
        expected["z_error"] = l1
        for name, value in expected.items():
            assert run.metrics[f"train/{name}"] == pytest.approx(float(value), rel=2e-4, abs=1e-6), name

    def test_an_extra_loss_is_of_the_decoded_image(self, sd: str, batch: Batch) -> None:
        run = train(method(sd, timestep=200, **OFF, losses={"l1": 0.5}), batch)
        by_hand = Hand(sd, batch, torch.full((2,), 200.0))
        loss = 0.5 * ((by_hand.decoded(by_hand.z) + 1) / 2 - batch["hq"].float() / 255).abs().mean()
        assert run.tape.counts()["decode"] == 1
        assert apart(run.tape.grads[0], by_hand.slopes(loss)) < 1e-4

    def test_checkpointing_changes_no_gradient(self, sd: str, stage1: str, batch: Batch, plain: Run) -> None:
        run = train(method(sd, estimator=stage1, gradient_checkpointing=True), batch)
        assert apart(run.tape.grads[0], plain.tape.grads[0]) < 1e-4

    def test_the_rate_falls_once_an_update_and_only_the_encoders(self, sd: str, batch: Batch) -> None:
        halve = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
        model = method(sd, timestep=200, lr_scheduler=halve)
        train(model, batch, 4)
        optimizers: Any = model.optimizers()
        assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [pytest.approx(1e-2 / 4), 1e-2]


class TestEncodersGradient:
    """Each loss alone, against autograd through diffusers' parts."""

    def alone(self, sd: str, stage1: str, batch: Batch, **options: Any) -> Grads:
        run = train(method(sd, estimator=stage1, **{**OFF, **options}), batch)
        return run.tape.grads[0]

    def test_l1_goes_through_the_frozen_denoiser(self, sd: str, stage1: str, batch: Batch, hand: Hand) -> None:
        got = self.alone(sd, stage1, batch, lambda_l1=1.0)
        assert apart(got, hand.slopes((hand.z - hand.h).abs().mean())) < 1e-4
        detached = (hand.x_sr - hand.s * hand.eps.detach()) / hand.a
        assert apart(got, hand.slopes((detached - hand.h).abs().mean())) > 1e-2

    def test_so_does_the_perceptual_loss(self, sd: str, stage1: str, batch: Batch, hand: Hand) -> None:
        got = self.alone(sd, stage1, batch, lambda_per=2.0)
        assert apart(got, hand.slopes(2 * LatentLPIPS("random", 4, 0.05)(hand.z, hand.h).mean())) < 1e-3

    @pytest.mark.parametrize("path", ["encoder", "latent"])
    @pytest.mark.parametrize("time", ["uniform", "predicted"])
    def test_distribution_matching_is_its_gradient(
        self, path: str, time: str, sd: str, stage1: str, batch: Batch, hand: Hand
    ) -> None:
        got = self.alone(sd, stage1, batch, lambda_dm=0.5, dm_path=path, dm_timestep=time)
        g = hand.dm_gradient(noise_like(hand.z), torch.tensor(T_DM) if time == "uniform" else hand.t)
        places = {"encoder": hand.x_sr, "latent": hand.z}
        assert apart(got, hand.slopes(places.pop(path), 0.5 * g / g.numel())) < 1e-4
        (other,) = places.values()
        assert apart(got, hand.slopes(other, 0.5 * g / g.numel())) > 1e-2
        assert apart(got, hand.slopes(hand.x_sr, -0.5 * g / g.numel())) > 1

    @pytest.mark.parametrize("path", ["encoder", "noise"])
    def test_the_noise_loss_is_its_gradient(self, path: str, sd: str, stage1: str, batch: Batch, hand: Hand) -> None:
        options = {"lambda_eps": 0.75, "noise_path": path}
        corrected = self.alone(sd, stage1, batch, **options, noise_sign="corrected")
        printed = self.alone(sd, stage1, batch, **options, noise_sign="printed")
        r = hand.residual()
        place = {"encoder": hand.x_sr, "noise": hand.eps}[path]
        assert apart(corrected, hand.slopes(place, -0.75 * r / r.numel())) < 1e-4
        assert all(torch.equal(corrected[name], -value) for name, value in printed.items())

    @pytest.mark.parametrize("kind", ["bce", "hinge", "printed"])
    def test_the_adversarial_loss_is_equation_5(
        self, kind: str, sd: str, stage1: str, batch: Batch, hand: Hand, plain: Run
    ) -> None:
        got = self.alone(sd, stage1, batch, lambda_adv=0.1, gan_loss=kind)
        logits = plain.discriminator(hand.z, hand.x_l, hand.t, hand.c)
        loss = -logits.mean() if kind == "hinge" else -torch.sigmoid(logits).log().mean()
        assert apart(got, hand.slopes(0.1 * loss)) < 1e-3

    def test_the_whole_is_equation_9(self, plain: Run, hand: Hand) -> None:
        g, r = hand.dm_gradient(noise_like(hand.z), torch.tensor(T_DM)), hand.residual()
        logits = plain.discriminator(hand.z, hand.x_l, hand.t, hand.c)
        loss = (hand.z - hand.h).abs().mean() + 2 * LatentLPIPS("random", 4, 0.05)(hand.z, hand.h).mean()
        loss = loss + 0.1 * F.softplus(-logits).mean() + 0.5 * (g * hand.x_sr).mean() - 1.0 * (r * hand.x_sr).mean()
        assert apart(plain.tape.grads[0], hand.slopes(loss)) < 1e-3

    def test_the_dm_timestep_knows_nothing_of_the_predicted_one(self, sd: str, batch: Batch) -> None:
        drawn = []
        for timestep in (50, 300):
            run = train(method(sd, timestep=timestep, **{**OFF, "lambda_dm": 0.5}), batch, 2, known=False)
            calls = run.tape.calls["unet"]
            assert all(torch.equal(calls[3 * k + 1].args[1], calls[3 * k + 2].args[1]) for k in range(2))
            drawn.append([calls[3 * k + 1].args[1].tolist() for k in range(2)])
        assert drawn[0] == drawn[1]
        assert len({t for step in drawn[0] for t in step}) == 2  # the same two samples twice
        assert all(1 <= t <= 499 for step in drawn[0] for t in step)

    def test_the_dm_noise_is_normal_and_shared(self, sd: str, batch: Batch) -> None:
        run = train(method(sd, timestep=50, **{**OFF, "lambda_dm": 0.5}), batch, known=False)
        _split, first, second = run.tape.calls["unet"]
        by_hand = Hand(sd, batch, torch.full((2,), 50.0))
        a, s = signal_noise(first.args[1])
        noises = [(x - a * z.detach()) / s for x, z in ((first.args[0], by_hand.z), (second.args[0], by_hand.h))]
        torch.testing.assert_close(*noises, rtol=1e-4, atol=1e-4)
        assert 0.9 < float(noises[0].std()) < 1.1
        assert abs(float(noises[0].mean())) < 0.15


class TestDiscriminator:
    @pytest.mark.parametrize("kind", ["bce", "hinge", "printed"])
    def test_its_gradient_is_equation_4s_alone(
        self, kind: str, sd: str, stage1: str, batch: Batch, hand: Hand, plain: Run
    ) -> None:
        """So none of the adversarial loss's gradient is left in it."""
        run = train(method(sd, estimator=stage1, lambda_adv=100.0, gan_loss=kind), batch)
        net = copy.deepcopy(plain.discriminator).requires_grad_(True)
        real, fake = (net(z.detach(), hand.x_l, hand.t, hand.c) for z in (hand.h, hand.z))
        loss = {
            "bce": F.softplus(-real).mean() + F.softplus(fake).mean(),
            "hinge": 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean()),
            "printed": F.logsigmoid(real).mean() + F.softplus(fake).mean(),
        }[kind]
        loss.backward()
        expected: dict[str, Any] = {f"discriminator.{name}": p.grad for name, p in net.named_parameters()}
        got = run.tape.grads[1]
        assert got.keys() == expected.keys()
        a, b = (torch.cat([g[name].flatten() for name in expected]) for g in (got, expected))
        assert float((a - b).norm() / b.norm()) < 1e-3

    def test_disc_start_counts_updates_not_batches(self, sd: str, batch: Batch) -> None:
        run = train(method(sd, timestep=200, **{**OFF, "lambda_adv": 0.1}, disc_start=2, accumulate=2), batch, 3)
        graphs = [call.graph for call in run.tape.calls["disc"]]
        assert graphs == [False, False] * 4 + [True, False, False] * 2  # six batches, three updates

    def test_before_disc_start_it_trains_alone(self, sd: str, stage1: str, batch: Batch, hand: Hand) -> None:
        run = train(method(sd, estimator=stage1, **{**OFF, "lambda_adv": 0.1}, disc_start=2), batch, 3)
        assert run.tape.counts()["disc"] == 2 + 2 + 3
        assert [call.graph for call in run.tape.calls["disc"]] == [False] * 4 + [True, False, False]
        encoders, states = run.tape.grads[::2], run.tape.states
        assert [any(float(g.norm()) > 0 for g in grads.values()) for grads in encoders] == [False, False, True]
        for before, after in ((states[0], states[2]), (states[2], states[4])):
            moved = different(before, after)
            assert moved
            assert all(name.startswith("discriminator.") for name in moved)

    def test_without_an_adversarial_loss_there_is_none(self, sd: str, batch: Batch) -> None:
        run = train(method(sd, timestep=200, lambda_adv=0.0), batch, 2)
        assert run.model.discriminator is None
        assert len(run.tape.grads) == 2  # one optimiser's
        assert not isinstance(run.model.optimizers(), list)
        assert list(run.model.trainable_patterns()) == ["encoder"]
        assert not {"train/adv", "train/discriminator"} & run.metrics.keys()

    def test_it_may_be_told_no_timestep(self, sd: str, stage1: str, batch: Batch) -> None:
        run = train(method(sd, estimator=stage1, disc_timestep="zero"), batch)
        assert [call.args[2].tolist() for call in run.tape.calls["disc"]] == [[0, 0]] * 3

    def test_it_learns_to_tell_them_apart(self, sd: str, stage1: str, batch: Batch) -> None:
        model = method(sd, estimator=stage1, optimizer=STILL, disc_optimizer=partial(torch.optim.SGD, lr=0.1))
        calls = train(model, batch, 4).tape.calls["disc"]
        gaps = [float(calls[3 * k + 1].out.mean() - calls[3 * k + 2].out.mean()) for k in range(4)]
        assert gaps == sorted(gaps)
        assert gaps[-1] > gaps[0]

    REAL, FAKE = torch.tensor([[2.0], [-0.5]]), torch.tensor([[0.3], [-3.0]])

    @staticmethod
    def log_d(logit: float) -> float:
        return -math.log1p(math.exp(-logit))

    def test_its_losses_by_hand(self) -> None:
        log_d, real, fake = self.log_d, self.REAL.flatten().tolist(), self.FAKE.flatten().tolist()
        expected = {
            "bce": [-log_d(r) - log_d(-f) for r, f in zip(real, fake, strict=True)],
            "printed": [log_d(r) - log_d(-f) for r, f in zip(real, fake, strict=True)],
            "hinge": [0.5 * 1.3, 0.5 * 1.5],
        }
        for kind, values in expected.items():
            found = discriminator_objective(kind, self.REAL, self.FAKE)  # type: ignore[arg-type]
            torch.testing.assert_close(found, torch.tensor(values))
        for kind in ("bce", "printed"):
            found = adversarial_loss(kind, self.FAKE)  # type: ignore[arg-type]
            torch.testing.assert_close(found, torch.tensor([-log_d(f) for f in fake]))
        torch.testing.assert_close(adversarial_loss("hinge", self.FAKE), torch.tensor([-0.3, 3.0]))

    def test_bce_wants_real_up_and_fake_down_and_printed_both_down(self) -> None:
        def loss(kind: Any, real: float, fake: float) -> float:
            return float(discriminator_objective(kind, self.REAL + real, self.FAKE + fake).sum())

        for kind in ("bce", "hinge"):
            assert loss(kind, 0.1, 0) < loss(kind, 0, 0) < loss(kind, -0.1, 0)
            assert loss(kind, 0, -0.1) < loss(kind, 0, 0) < loss(kind, 0, 0.1)
        assert loss("printed", -0.1, 0) < loss("printed", 0, 0)
        assert loss("printed", 0, -0.1) < loss("printed", 0, 0)
        assert loss("printed", -1e3, -1e3) < loss("printed", -10, -10) < loss("printed", 0, 0)


class TestTest:
    @pytest.mark.parametrize("num_steps", [1, 3])
    def test_it_draws_the_predicted_noise_of_all_test_images(
        self,
        num_steps: int,
        sd: str,
        stage1: str,
        batches: list[Batch],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        drawn: list[np.ndarray] = []
        real = dm_sr.noise_distribution
        monkeypatch.setattr(dm_sr, "noise_distribution", lambda eps: drawn.append(eps) or real(eps))
        model = configured(sd, estimator=stage1, num_steps=num_steps)
        model.output.folder = tmp_path
        trainer_with().test(model, loader(batches), verbose=False)
        assert (tmp_path / "test/figures/predicted_noise.png").is_file()
        expected = [Hand(sd, each, t_of(stage1, each)).eps.detach().flatten() for each in batches]
        (values,) = drawn
        np.testing.assert_allclose(values, torch.cat(expected).numpy(), rtol=1e-4, atol=1e-5)
        assert len(model._noise) == 0
        rows = (tmp_path / "test/metrics.csv").read_text().splitlines()
        assert len(rows) == 1 + 6
        assert len(list((tmp_path / "test/test0").glob("*.png"))) == 6

    def test_of_a_large_tile_it_keeps_a_sample_of_all_rows_and_columns(self) -> None:
        columns = torch.arange(64.0).expand(2, 4, 64, 64)
        for eps in (columns, columns.mT):
            kept = dm_sr.noise_sample(eps)
            assert len(kept) <= dm_sr.NOISE_SAMPLE
            assert set(kept.tolist()) == set(range(64))
            assert float(kept.mean()) == pytest.approx(31.5, abs=0.5)

    def test_of_any_number_of_tiles_it_keeps_a_bounded_sample_of_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dm_sr, "NOISE_KEPT", 4000)
        noise, eps = dm_sr.NoiseSample(), torch.arange(200_000.0).view(200, 1, 10, 100)
        for place, tile in enumerate(eps, start=1):
            noise.add(tile)
            assert len(noise) == len(noise._keys) == min(1000 * place, 4000)
            if place == 4:
                assert torch.equal(noise.values, eps[:4].flatten())
        assert len(noise.values.unique()) == 4000  # no value twice
        share, _ = np.histogram(noise.values.numpy(), bins=20, range=(0, 200_000))
        assert all(abs(found - 200) < 4 * math.sqrt(200) for found in share)  # of early tiles as many as of late ones

    def test_a_large_test_image_keeps_no_more_and_is_restored_alike(
        self, sd: str, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[np.ndarray] = []
        real = dm_sr.noise_distribution
        monkeypatch.setattr(dm_sr, "noise_distribution", lambda eps: drawn.append(eps) or real(eps))
        monkeypatch.setattr(dm_sr, "NOISE_KEPT", 500)
        tiles = Inference(color_fix="none", tile=32, overlap=16, metrics=["psnr_rgb"])
        model = configured(sd, timestep=100, inference=tiles)
        model.output.folder = tmp_path
        large = {**batch, **{name: batch[name].repeat(1, 1, 3, 3) for name in ("lq", "hq")}}
        expected = model.upscale(low(large), batch["prompt"]).sr
        seen: list[Tensor] = []
        monkeypatch.setattr(model, "tested", lambda _batch, _conditions, sr, *_: seen.append(sr))
        trainer_with().test(model, loader([large]), verbose=False)
        assert torch.equal(seen[0], expected)
        assert [values.shape for values in drawn] == [(500,)]

    def test_the_logged_error_of_the_latent_needs_no_l1_loss(self, sd: str, batch: Batch) -> None:
        run = train(method(sd, timestep=200, **{**OFF, "lambda_eps": 1.0}, optimizer=STILL), batch, 2)
        by_hand = Hand(sd, batch, torch.full((2,), 200.0))
        error = float((by_hand.z - by_hand.h).abs().mean().detach())
        assert run.metrics["train/z_error"] == pytest.approx(error, rel=1e-4)
        assert run.tape.counts()["unet"] == 2 * 2

    def test_prediction_and_validation_keep_no_noise(self, sd: str, batches: list[Batch], tmp_path: Path) -> None:
        model = configured(sd, timestep=100)
        model.output.folder = tmp_path
        trainer_with().predict(model, loader(batches))
        trainer_with().validate(model, loader(batches), verbose=False)
        assert len(model._noise) == 0
        assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [f"{n}{s}.png" for n in range(3) for s in "ab"]


EXPECTED: dict[str, tuple[str, str, dict[str, Any]]] = {  # in the head line, what of the whole is different
    **{
        f"dm_{round(100 * weight):03}": (
            "Table 8", f"lambda_dm {weight:.2f} without the noise loss", {"lambda_dm": weight, "lambda_eps": 0.0}
        )
        for weight in (0.25, 0.5, 0.75, 1.0)
    },
    **{
        f"eps_{round(100 * weight):03}": (
            "Table 8",
            f"lambda_eps {weight:.2f} without distribution matching",
            {"lambda_dm": 0.0, "lambda_eps": weight},
        )
        for weight in (0.25, 0.5, 0.75, 1.0, 1.25)
    },
    "losses_none": (
        "Table 6", "L1 and perceptual loss alone", {"lambda_adv": 0.0, "lambda_dm": 0.0, "lambda_eps": 0.0}
    ),
    "losses_adv": ("Table 6", "with the adversarial loss", {"lambda_dm": 0.0, "lambda_eps": 0.0}),
    "losses_dm": ("Table 6", "with distribution matching", {"lambda_adv": 0.0, "lambda_eps": 0.0}),
    "losses_eps": ("Table 6", "with the noise loss", {"lambda_adv": 0.0, "lambda_dm": 0.0}),
    "no_dm": ("Table 9", "without distribution matching", {"lambda_dm": 0.0}),
    "prompt_llava": ("Table 7", "LLaVA-OneVision", {"captioner": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"}),
    **{f"steps_{n}": ("Table 4", f" {n} steps, at test time only", {"num_steps": n}) for n in (2, 5, 10, 20)},
    **{
        f"timestep_{t}": ("Table 3", f"fixed timestep {t}, ", {"timestep": min(t, 499), "estimator": None})
        for t in (50, 150, 250, 300, 500)
    },
    **{
        f"{key}_{value}": (f"Equation {number}: its gradient at the ", phrase, {key: value})
        for number, key, value, phrase in (
            (7, "dm_path", "encoder", "encoder's output, as printed"),
            (7, "dm_path", "latent", "image latent Z_SR"),
            (8, "noise_path", "encoder", "encoder's output, as printed"),
            (8, "noise_path", "noise", "noise eps_SR"),
        )
    },
    "target_l1": ("Table 5", "pixel distance", {"target": "l1", "lo": None, "hi": None}),
    "target_ssim": ("Table 5", "1 - SSIM", {"target": "ssim"}),
    "target_min": ("Table 5", "a trained stage 2", {"target": "min", "restorer": "runs/dm_sr/sd_turbo"}),
}  # fmt: skip


def arguments(*configs: Path) -> dict[str, Any]:
    _, parsed = parse(configs)
    return {"": str(parsed.model.class_path).rpartition(".")[2], **parsed.model.init_args.as_dict()}


@pytest.fixture(scope="module")
def turbo() -> Any:
    assert not Path("vgg16_sdturbo_lpips.pth").exists()
    return build([CONFIGS / "sd_turbo.yaml"], ["--model.estimator=runs/dm_sr/there-is-none"])


class TestConfigs:
    def test_every_ablation_has_an_expectation(self) -> None:
        assert {path.stem for path in (CONFIGS / "ablations").glob("*.yaml")} == set(EXPECTED)

    @pytest.mark.parametrize("name", EXPECTED)
    def test_an_ablation_changes_what_its_head_says_and_no_more(self, name: str) -> None:
        table, phrase, changes = EXPECTED[name]
        base = CONFIGS / ("estimator.yaml" if name.startswith("target_") else "sd_turbo.yaml")
        path = CONFIGS / "ablations" / f"{name}.yaml"
        head = path.read_text().splitlines()[0]
        assert head.startswith(f"# {table}")
        assert phrase in head
        assert head.endswith(f"; over {base.name}")
        whole, ablation = arguments(base), arguments(base, path)
        assert {key for key, value in ablation.items() if value != whole[key]} <= changes.keys()
        assert {key: ablation[key] for key in changes} == changes

    def test_sd_turbo_holds_the_papers_numbers(self) -> None:
        args = arguments(CONFIGS / "sd_turbo.yaml")
        assert args[""] == "DMSR"
        assert [args[f"lambda_{name}"] for name in ("l1", "per", "adv", "dm", "eps")] == [1.0, 2.0, 0.1, 0.5, 1.0]
        assert (args["pretrained"], args["timestep"], args["num_steps"]) == ("stabilityai/sd-turbo", "predicted", 1)
        assert (args["prompt"], args["captioner"]) == (PROMPT, None)
        assert (args["dm_path"], args["dm_timestep"]) == ("encoder", "uniform")
        assert (args["noise_path"], args["noise_sign"], args["gan_loss"]) == ("encoder", "corrected", "bce")
        assert args["optimizer"]["class_path"] == "torch.optim.AdamW"
        assert args["optimizer"]["init_args"]["lr"] == 1e-4
        assert (args["disc_start"], args["ema_decay"], args["clip"]) == (10_000, 0.999, None)
        assert args["inference"]["color_fix"] == "none"

    def test_the_rate_is_halved_every_100k_steps(self, turbo: DMSR) -> None:
        optimizer: Any = turbo.optimizer([torch.nn.Parameter(torch.zeros(1))])
        assert turbo.lr_scheduler is not None
        scheduler: Any = turbo.lr_scheduler(optimizer)
        seen = {}
        for step in range(200_001):
            if step % 100_000 in (0, 99_999):
                seen[step] = optimizer.param_groups[0]["lr"]
            optimizer._step_count = step + 1  # it has stepped
            scheduler.step()
        assert seen == {0: 1e-4, 99_999: 1e-4, 100_000: 5e-5, 199_999: 5e-5, 200_000: 2.5e-5}

    def test_stage_2_has_the_papers_parameters(self, turbo: DMSR) -> None:
        counted = summary(turbo)
        rows = {row["name"]: (row["kind"], row["total"], row["trainable"]) for row in counted["networks"]}
        assert rows.pop("EMA of what is trained")[0] == "copy"
        assert rows == {
            "encoder": ("module", 34_163_592, 34_163_592),
            "encoder's quant_conv": ("base", 72, 0),
            "encoder's time embeddings": ("module", 2_816, 2_816),
            "timestep estimator, VGG19": ("base", 20_024_384, 0),
            "timestep estimator, linear": ("base", 256_500, 0),
            "U-Net": ("base", 865_910_724, 0),
            "VAE": ("base", 83_653_863, 0),
            "discriminator": ("module", 16_483_345, 16_483_345),
            "latent LPIPS": ("base", 14_715_264 + 1_472, 0),
            "text encoder of stabilityai/sd-turbo": ("text", 340_387_840, 0),
        }
        assert counted["sums"] == {"Table 2 (encoder, time embeddings)": 34_163_592 + 2_816}
        assert counted["optimizers"] == {"encoder": 34_166_408, "discriminator": 16_483_345}
        assert counted["trainable"] == 34_166_408 + 16_483_345

    def test_stage_1_trains_all_of_its_estimator(self) -> None:
        counted = summary(build([CONFIGS / "estimator.yaml"]))
        rows = {row["name"]: (row["total"], row["trainable"]) for row in counted["networks"]}
        assert rows["timestep estimator, VGG19"] == (20_024_384,) * 2
        assert rows["timestep estimator, linear"] == (256_500,) * 2
        assert rows["LPIPS (AlexNet)"][1] == 0
        assert counted["trainable"] == counted["optimizers"]["estimator"] == 20_024_384 + 256_500

    @pytest.mark.parametrize("name", ["target_min", "target_l1"])
    def test_counting_stage_1s_ablations_needs_no_stage_2(self, name: str) -> None:
        counted = summary(build([CONFIGS / "estimator.yaml", CONFIGS / "ablations" / f"{name}.yaml"]))
        assert counted["trainable"] == 20_024_384 + 256_500
        assert counted["total"] == 2 * counted["trainable"]  # with the average


class TestWholeness:
    """A checkpoint of stage 2 holds the estimator that it was trained with."""

    @pytest.fixture
    def saved(self, sd: str, stage1: str, batch: Batch, tmp_path: Path) -> tuple[Path, Path, Tensor]:
        """Stage 1's file, a checkpoint of stage 2, and what stage 2 restores."""
        own = Path(shutil.copy(stage1, tmp_path / "t.ckpt"))
        model = method(sd, estimator=str(own), lambda_adv=0.0, optimizer=STILL)
        trainer = trainer_with(max_steps=1)
        trainer.fit(model, loader([batch]))
        trainer.save_checkpoint(tmp_path / "two.ckpt")
        return own, tmp_path / "two.ckpt", model.upscale(low(batch), batch["prompt"]).sr

    def opened(self, sd: str, own: Path, path: Path, batch: Batch) -> DMSR:
        model = method(sd, estimator=str(own), lambda_adv=0.0)
        trainer_with().validate(model, loader([batch]), ckpt_path=str(path), weights_only=True, verbose=False)
        return model

    @pytest.mark.parametrize("change", ["altered", "deleted"])
    def test_whatever_becomes_of_stage_1s_file(
        self,
        sd: str,
        saved: tuple[Path, Path, Tensor],
        batch: Batch,
        caplog: pytest.LogCaptureFixture,
        change: str,
    ) -> None:
        own, path, expected = saved
        self.change(own, change)
        model = self.opened(sd, own, path, batch)
        assert torch.equal(model.upscale(low(batch), batch["prompt"]).sr, expected)
        assert ("holds other weights than this checkpoint's run had" in caplog.text) is (change == "altered")
        again: dict[str, Any] = {"state_dict": dict(model.state_dict())}
        model.on_save_checkpoint(again)
        kept = torch.load(path, weights_only=True)["stages"]["estimator"]
        assert again["stages"]["estimator"]["digest"] == kept["digest"]
        assert kept["path"] == str(own)

    @pytest.mark.parametrize("change", ["altered", "deleted"])
    def test_an_older_checkpoint_says_that_it_does_not(
        self,
        sd: str,
        saved: tuple[Path, Path, Tensor],
        batch: Batch,
        caplog: pytest.LogCaptureFixture,
        change: str,
    ) -> None:
        own, path, expected = saved
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["stages"]
        torch.save(checkpoint, path)
        self.change(own, change)
        if change == "deleted":
            with pytest.raises(FileNotFoundError, match=r"estimator=.*t\.ckpt: no such checkpoint; train that stage"):
                self.opened(sd, own, path, batch)
            return
        model = self.opened(sd, own, path, batch)
        assert not torch.equal(model.upscale(low(batch), batch["prompt"]).sr, expected)
        assert f"does not hold its earlier stage: estimator={own} is used as it is" in caplog.text

    @staticmethod
    def change(own: Path, change: str) -> None:
        checkpoint = torch.load(own, weights_only=True)
        own.unlink()
        if change == "altered":
            checkpoint["state_dict"]["estimator.head.weight"] *= -1
            torch.save(checkpoint, own)


def test_held_weights_are_not_cast_in_a_step_that_casts_float32_ones_at_every_call(
    sd: str, stage1: str, batch: Batch
) -> None:
    """Autocast casts a frozen weight at every call: four times in a step, which calls the denoiser four times."""

    class Casts(TorchDispatchMode):
        counted = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.counted += "_to_copy" in str(func) and args[0].data_ptr() in weights
            return func(*args, **(kwargs or {}))

    found = {}
    for dtype in ("float32", "bfloat16"):
        model = configured(sd, estimator=stage1, lambda_per=0.0, lambda_adv=0.0, frozen_dtype=dtype)
        frozen = [p for p in model.denoiser.unet.parameters() if p.ndim == 4]
        weights, casts = {p.data_ptr() for p in frozen}, Casts()
        step = model.training_step

        def counted(*args: Any, casts: Casts = casts, step: Any = step) -> None:
            with casts:
                step(*args)

        model.training_step = counted  # type: ignore[method-assign]
        run = train(model, batch, precision="bf16-mixed")
        found[dtype] = (casts.counted, run.metrics, {name: p.detach().clone() for name, p in model.named_parameters()})
    assert found["float32"][0] == 4 * len(frozen)
    assert found["bfloat16"][0] == 0
    assert found["float32"][1] == found["bfloat16"][1]
    trained = model.all_trainable()
    assert all(torch.equal(found["float32"][2][name], found["bfloat16"][2][name]) for name in trained)
