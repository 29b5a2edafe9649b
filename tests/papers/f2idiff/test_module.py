"""Stage B: inference in closed form, losses and gradients by hand, calls of each network, what each tile is told."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import Dinov2Model

from common.adapters import OSEDIFF_TARGETS, adapter_state, add_lora, load_adapter_state, merge
from common.conditioning.text import encode_prompts
from common.denoisers.unet import UNetDenoiser
from common.draws import Draws
from common.loading import load_unet
from common.losses import LPIPS
from common.restoration import Inference
from papers.f2idiff import F2IDiffSR, conditions
from papers.f2idiff import module as stage_b
from papers.f2idiff.conditions import FeatureCondition

ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
A, S = math.sqrt(ABAR[999]), math.sqrt(1 - ABAR[999])
SGD, STILL = partial(torch.optim.SGD, lr=1e-2), partial(torch.optim.SGD, lr=0.0)
WHOLE = Inference(color_fix="none", tile=None)
Batch = dict[str, Any]
Make = Callable[..., F2IDiffSR]


@pytest.fixture
def make(sd: str, dino: str) -> Make:
    """Makes the method on the small base, configured."""

    def configured(**options: Any) -> F2IDiffSR:
        small: dict[str, Any] = {"features": dino, "perceptual_weights": "random", "perceptual_width": 0.05}
        small |= {"optimizer": STILL, "reg_optimizer": STILL, "clip": None, "inference": WHOLE}
        model = F2IDiffSR(sd, **{**small, **options})
        model.configure_model()
        return model

    return configured


def base(sd: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(sd, subfolder="unet").eval().requires_grad_(False)


def vae(sd: str) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(sd, subfolder="vae").eval().requires_grad_(False)


def disturb(network: nn.Module, size: float = 0.05) -> None:
    """Adapters as if they had been trained."""
    g = torch.Generator().manual_seed(11)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=g))


def low(batch: Batch) -> Tensor:
    return batch["lq"].float() / 255


def high(batch: Batch) -> Tensor:
    return batch["hq"].float() / 255


def upsampled(x_01: Tensor) -> Tensor:
    return F.interpolate(x_01, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)


def tokens(dino: str, x_01: Tensor) -> Tensor:
    """DINOv2's features of images whose sides round to 28 px."""
    x = F.interpolate(x_01, (28, 28), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        return Dinov2Model.from_pretrained(dino).eval()((x - mean) / std).last_hidden_state


def level(t: Tensor) -> tuple[Tensor, Tensor]:
    abar = torch.tensor(ABAR[t.numpy()]).view(-1, 1, 1, 1)
    return abar.sqrt().float(), (1 - abar).sqrt().float()


class Spy(Draws):
    """The draws, remembered."""

    def __init__(self, index: Tensor) -> None:
        super().__init__(0, index)
        self.drawn: dict[str, Tensor] = {}
        self.ranges: dict[str, tuple[int, int]] = {}

    def normal(self, stream: str, shape: Any) -> Tensor:
        self.drawn[stream] = super().normal(stream, shape)
        return self.drawn[stream]

    def integers(self, stream: str, low: int, high: int) -> Tensor:
        self.ranges[stream] = (low, high)
        self.drawn[stream] = super().integers(stream, low, high)
        return self.drawn[stream]


@dataclass
class Call:
    args: tuple[Any, ...]
    out: Any
    graph: bool
    adapted: bool


def adapted(network: nn.Module) -> bool:
    return any("lora" in type(m).__module__ and not getattr(m, "_disable_adapters", True) for m in network.modules())


@dataclass
class Tape(Callback):
    """What went in and out of the networks, and the gradients of each optimiser."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    grads: list[dict[str, Tensor]] = field(default_factory=list)

    def attach(self, model: F2IDiffSR) -> None:
        assert model.generator is not None
        networks: dict[str, nn.Module] = {"encode": model.codec.vae.encoder, "decode": model.codec.vae.decoder}
        networks["unet"] = model.generator.unet
        if isinstance(model.condition, FeatureCondition):
            networks["dino"] = model.condition.features
        if model.prior is not None:
            networks["prior"] = model.prior.unet
        for name, network in networks.items():
            self.calls[name] = []
            network.register_forward_hook(partial(self._write, name))

    def _write(self, name: str, network: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        out = getattr(out, "sample", out)
        self.calls[name].append(Call(args, out, out.requires_grad, adapted(network)))

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(calls) for name, calls in self.calls.items()}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.grads.append({name: p.grad.clone() for name, p in named if p.grad is not None})


@dataclass
class Run:
    model: F2IDiffSR
    tape: Tape
    spy: Spy
    metrics: dict[str, float]


def train(model: F2IDiffSR, batch: Batch, steps: int = 1) -> Run:
    tape, spy = Tape(), Spy(batch["index"])
    tape.attach(model)
    model.draws = lambda batch: spy  # type: ignore[method-assign, assignment, return-value]  # the same in each step
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[tape], log_every_n_steps=1,
    )  # fmt: skip
    batches: Any = [batch] * steps
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    return Run(model, tape, spy, {name: float(value) for name, value in trainer.callback_metrics.items()})


def generator_names(model: F2IDiffSR) -> set[str]:
    """What section 3 trains of the generator, by peft's names."""
    names = {name for name, _ in model.named_parameters()}
    places = ("generator.unet.", "codec.vae.encoder.", "codec.vae.quant_conv.")
    lora = {name for name in names if name.startswith(places) and "lora_" in name}
    return lora | {f"generator.unet.conv_in.base_layer.{part}" for part in ("weight", "bias")}


def regulariser_names(model: F2IDiffSR) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith("prior.unet.") and "lora_" in name}


def with_grad(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None}


class TestUntrained:
    def test_the_generator_is_the_foundation_at_999_bit_by_bit(
        self, make: Make, sd: str, dino: str, batch: Batch
    ) -> None:
        model, tape = make(), Tape()
        tape.attach(model)
        x_up = upsampled(low(batch))
        c = model.condition(x_up, batch["prompt"])
        assert_close(c, tokens(dino, x_up), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            model.generate(x_up, c)
            raw = vae(sd).encode(x_up * 2 - 1).latent_dist.mode()
            z_l = model.codec.scaling.scale(raw)
            eps = base(sd)(z_l, 999, c).sample
        assert_close(z_l, 0.18215 * raw, rtol=1e-6, atol=0)
        (call,) = tape.calls["unet"]
        assert torch.equal(call.args[0], z_l)  # no noise, no factor
        assert int(call.args[1]) == 999
        assert torch.equal(call.out, eps)

    def test_the_regulariser_is_the_teacher_bit_by_bit(self, make: Make, sd: str, batch: Batch) -> None:
        model, z, t = make(), torch.randn(2, 4, 8, 8), torch.tensor([20, 700])
        c = model.condition(high(batch), [])
        with torch.no_grad():
            assert torch.equal(model._regulariser(z, t, c), base(sd)(z, t, c).sample)
            assert torch.equal(model._teacher(z, t, c), base(sd)(z, t, c).sample)

    def test_without_guidance_distillation_then_has_no_gradient_at_all(self, make: Make, batch: Batch) -> None:
        c = torch.randn(2, 5, 16)
        for cfg in (1.0, 7.5):
            model = make(cfg_vsd=cfg)
            z_hat = torch.randn(2, 4, 8, 8, requires_grad=True)
            (slope,) = torch.autograd.grad(model.distillation_loss(z_hat, c, Spy(batch["index"])), z_hat)
            assert bool(slope.any()) is (cfg != 1)


class TestGenerate:
    def test_z_hat_is_the_closed_form_in_fp64(self, make: Make, batch: Batch) -> None:
        model, tape = make().double(), Tape()
        assert model.generator is not None
        disturb(model.generator.unet)
        disturb(model.codec.vae)
        tape.attach(model)
        x_up = upsampled(low(batch).double())
        with torch.no_grad():
            z_hat, _ = model.generate(x_up, torch.randn(2, 5, 16, dtype=torch.float64))
        (call,) = tape.calls["unet"]
        assert z_hat.dtype == torch.float64
        assert pytest.approx(14.649, abs=1e-3) == 1 / A
        assert_close(A * z_hat + S * call.out, call.args[0], rtol=0, atol=1e-10)

    def test_z_hat_stays_in_fp32_under_mixed_precision(self, make: Make, batch: Batch) -> None:
        model, tape = make(lambda_vsd=0.0, perceptual="none"), Tape()
        tape.attach(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z_hat, _ = model.generate(upsampled(low(batch)), torch.randn(2, 5, 16))
        (call,) = tape.calls["unet"]
        assert call.out.dtype == torch.bfloat16
        assert z_hat.dtype == call.args[0].dtype == torch.float32
        assert_close(A * z_hat + S * call.out.float(), call.args[0], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("timestep", [0, 250])
    def test_the_timestep_reaches_network_and_formula(self, make: Make, batch: Batch, timestep: int) -> None:
        model, tape = make(timestep=timestep, lambda_vsd=0.0, perceptual="none"), Tape()
        tape.attach(model)
        with torch.no_grad():
            z_hat, _ = model.generate(upsampled(low(batch)), torch.randn(1, 5, 16))
        (call,) = tape.calls["unet"]
        assert int(call.args[1]) == timestep
        a, s = math.sqrt(ABAR[timestep]), math.sqrt(1 - ABAR[timestep])
        assert_close(z_hat, (call.args[0] - s * call.out) / a, rtol=1e-5, atol=1e-5)

    def test_x_hat_is_the_decoded_latent_cut_to_its_range(self, make: Make, sd: str, batch: Batch) -> None:
        model, tape = make(), Tape()
        model.codec.vae.decoder.conv_out.weight.data *= 20
        tape.attach(model)
        x_up = upsampled(low(batch))
        with torch.no_grad():
            z_hat, x_hat = model.generate(x_up, model.condition(x_up, []))
            raw = model.codec.vae.decode(z_hat / 0.18215).sample
            restored = model.restore(low(batch), None)
        assert float(raw.abs().max()) > 1.5
        assert float(raw.abs().min()) < 0.5
        assert_close(x_hat, raw.clamp(-1, 1), rtol=1e-4, atol=1e-4)
        assert_close(restored, (x_hat + 1) / 2)

    def test_other_features_are_another_image(self, make: Make, dino: str, batch: Batch) -> None:
        model = make()
        x_up = upsampled(low(batch))
        f = tokens(dino, x_up)
        with torch.no_grad():
            own, exchanged = (model.generate(x_up, c)[1] for c in (f, f.flip(0)))
        assert float((own - exchanged).abs().mean()) > 1e-3

    def test_merged_adapters_of_scale_2_give_the_same_image(self, make: Make, sd: str, batch: Batch) -> None:
        model = make()
        assert model.generator is not None
        unet, codec = model.generator.unet, model.codec.vae
        x_up = upsampled(low(batch))
        c = model.condition(x_up, [])
        with torch.no_grad():
            before = model.generate(x_up, c)
            for network in (unet, codec):
                disturb(network, 0.02)
            z_hat, x_hat = model.generate(x_up, c)
            assert float((x_hat - before[1]).abs().mean()) > 1e-2
            for layer in (unet.conv_in, codec.encoder.conv_in, codec.quant_conv):
                assert layer.scaling == {"default": 2.0}
            a, b = (getattr(codec.encoder.conv_in, name)["default"].weight.clone() for name in ("lora_A", "lora_B"))
            for network in (unet, codec):
                merge(network)
            merged = model.generate(x_up, c)
        assert type(codec.encoder.conv_in) is nn.Conv2d
        expected = vae(sd).encoder.conv_in.weight + 2 * torch.einsum("or,rihw->oihw", b[..., 0, 0], a)
        assert_close(codec.encoder.conv_in.weight, expected, rtol=1e-5, atol=1e-6)
        assert_close(merged[1], x_hat, rtol=0, atol=1e-4)
        assert_close(merged[0], z_hat, rtol=1e-4, atol=1e-3)
        assert not [name for name, _ in model.named_parameters() if "lora_" in name and "prior" not in name]


class TestCalls:
    """How often a training step asks which network, and with what."""

    def test_the_papers_step(self, make: Make, sd: str, dino: str, batch: Batch) -> None:
        run = train(make(), batch)
        assert run.tape.counts == {"encode": 1, "decode": 1, "dino": 1, "unet": 1, "prior": 4}
        calls = run.tape.calls
        assert all(calls[name][0].graph for name in ("encode", "decode", "unet"))
        assert not calls["dino"][0].graph
        prior = calls["prior"]
        assert [(call.adapted, call.graph) for call in prior] == [
            (False, False), (False, False), (True, False), (True, True),
        ]  # fmt: skip

        f = tokens(dino, upsampled(low(batch)))
        told = [call.args[2] for call in prior]
        null = next(i for i in (0, 1) if not told[i].any())  # the teacher's two come in any order
        for i in {0, 1, 2, 3} - {null}:
            assert_close(told[i], f, rtol=1e-4, atol=1e-5)
        assert_close(calls["unet"][0].args[2], f, rtol=1e-4, atol=1e-5)

        drawn = run.spy.drawn
        z_hat = (calls["unet"][0].args[0] - S * calls["unet"][0].out).detach() / A
        for call, stage in zip(prior, ("vsd", "vsd", "vsd", "diff"), strict=True):
            a, s = level(drawn[f"{stage}/t"])
            assert_close(call.args[0], a * z_hat + s * drawn[f"{stage}/noise"], rtol=1e-4, atol=1e-3)
            assert torch.equal(call.args[1], drawn[f"{stage}/t"])
            assert not call.args[0].requires_grad
        assert run.spy.ranges == {"vsd/t": (20, 979), "diff/t": (0, 999)}
        assert len({tuple(value.flatten().tolist()) for value in drawn.values()}) == 4

    def test_without_guidance_the_teacher_is_asked_once(self, make: Make, batch: Batch) -> None:
        run = train(make(cfg_vsd=1.0), batch)
        assert [(call.adapted, call.graph) for call in run.tape.calls["prior"]] == [
            (False, False), (True, False), (True, True),
        ]  # fmt: skip
        assert all(call.args[2].any() for call in run.tape.calls["prior"])

    def test_without_distillation_there_is_no_prior(self, make: Make, batch: Batch) -> None:
        run = train(make(lambda_vsd=0.0), batch, 2)
        assert run.model.prior is None
        assert list(run.model.trainable_patterns()) == ["generator"]
        assert run.tape.counts == {"encode": 2, "decode": 2, "dino": 2, "unet": 2}
        assert len(run.tape.grads) == 2
        assert not {"train/diff", "train/vsd_gradient"} & run.metrics.keys()

    def test_the_timesteps_of_distillation_are_those_asked_for(self, make: Make, batch: Batch) -> None:
        run = train(make(vsd_timesteps=(400, 402)), batch)
        assert run.spy.ranges["vsd/t"] == (400, 402)

    @pytest.mark.parametrize(("source", "picture"), [("lr", lambda b: upsampled(low(b))), ("hr", high)])
    def test_dino_sees_the_image_asked_for_in_training_and_at_test_the_low_quality_one(
        self, make: Make, batch: Batch, source: str, picture: Callable[[Batch], Tensor]
    ) -> None:
        model = make(feature_source=source)
        run = train(model, batch)
        (call,) = run.tape.calls["dino"]
        assert_close(call.args[0], picture(batch))
        model.upscale(low(batch), batch["prompt"])
        assert_close(run.tape.calls["dino"][1].args[0], upsampled(low(batch)))
        assert len(run.tape.calls["dino"]) == 2

    def test_dropped_samples_see_the_null_condition_in_all_networks_and_at_test_none_is(
        self, make: Make, dino: str, batch: Batch
    ) -> None:
        model = make(condition_dropout=0.5)
        chances = torch.tensor([0.49, 0.5])  # the first is below the rate
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Spy, "uniform", lambda self, stream: chances, raising=False)
            run = train(model, batch)
        f = tokens(dino, upsampled(low(batch)))
        for call in (run.tape.calls["unet"][0], run.tape.calls["prior"][-1]):
            assert call.args[2][0].abs().max() == 0
            assert_close(call.args[2][1], f[1])
        model.upscale(low(batch), batch["prompt"])
        assert_close(run.tape.calls["unet"][-1].args[2], f)


class TestLosses:
    @pytest.mark.parametrize("weights", [(1.0, 2.0, 1.0), (0.5, 3.0, 0.25), (0.0, 0.0, 2.0)])
    def test_the_step_logs_the_weighted_sum_computed_by_hand(
        self, make: Make, sd: str, batch: Batch, weights: tuple[float, float, float]
    ) -> None:
        mse, perceptual, vsd = weights
        model = make(lambda_mse=mse, lambda_perceptual=perceptual, lambda_vsd=vsd)
        assert model.prior is not None
        disturb(model.prior.unet)
        run = train(model, batch, 2)  # Lightning forgets what an epoch's first optimiser step logs before it
        calls, drawn = run.tape.calls, run.spy.drawn
        x_hat = calls["decode"][-1].out.detach().clamp(-1, 1)
        z_hat = (calls["unet"][-1].args[0] - S * calls["unet"][-1].out).detach() / A
        f = calls["unet"][-1].args[2]
        of_mse = (x_hat - (2 * high(batch) - 1)).square().mean()
        of_lpips = LPIPS("random", 0.05)((x_hat + 1) / 2, high(batch)).mean()
        g = gradient_by_hand(sd, model.prior, z_hat, f, drawn["vsd/t"], drawn["vsd/noise"], 7.5)
        metrics = run.metrics
        assert metrics["train/mse"] == pytest.approx(mse * float(of_mse), rel=1e-4)
        assert metrics["train/lpips"] == pytest.approx(perceptual * float(of_lpips), rel=1e-4)
        assert metrics["train/vsd_gradient"] == pytest.approx(float(g.abs().mean()), rel=1e-3)
        of_vsd = 2 * (g * z_hat).mean()
        total = mse * float(of_mse) + perceptual * float(of_lpips) + vsd * float(of_vsd)
        assert metrics["train/loss"] == pytest.approx(total, rel=1e-3, abs=1e-3)
        assert abs(vsd * float(of_vsd)) > 0.05

        a, s = level(drawn["diff/t"])
        n = drawn["diff/noise"]
        with torch.no_grad():
            eps = model.prior.unet(a * z_hat + s * n, drawn["diff/t"], f).sample
        assert metrics["train/diff"] == pytest.approx(float((eps - n).square().mean()), rel=1e-4)

    @pytest.mark.parametrize("cfg", [0.0, 1.0, 7.5])
    def test_the_surrogates_gradient_at_z_hat_is_2_g_over_numel(
        self, make: Make, sd: str, batch: Batch, cfg: float
    ) -> None:
        model, spy = make(cfg_vsd=cfg), Spy(batch["index"])
        assert model.prior is not None
        disturb(model.prior.unet)
        z_hat, f = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 5, 16)
        (slope,) = torch.autograd.grad(model.distillation_loss(z_hat, f, spy), z_hat)
        g = gradient_by_hand(sd, model.prior, z_hat.detach(), f, spy.drawn["vsd/t"], spy.drawn["vsd/noise"], cfg)
        assert_close(slope, 2 * g / 512, rtol=1e-3, atol=1e-6)
        assert float(slope.abs().mean()) > 1e-5

    def test_lambda_diff_scales_the_regularisers_gradient_alone(self, make: Make, batch: Batch) -> None:
        one, three = (train(make(lambda_diff=weight), batch) for weight in (1.0, 3.0))
        for name, grad in one.tape.grads[0].items():
            assert_close(three.tape.grads[0][name], grad)
        for name, grad in one.tape.grads[1].items():
            assert_close(three.tape.grads[1][name], 3 * grad, rtol=1e-3, atol=1e-5)

    def test_the_text_methods_null_condition_is_the_empty_prompt(self, make: Make, sd: str, batch: Batch) -> None:
        run = train(make(condition="text"), batch)
        prompts, empty = encode_prompts(sd, batch["prompt"]), encode_prompts(sd, [""]).expand(2, -1, -1)
        told = [call.args[2] for call in run.tape.calls["prior"]]
        assert [torch.equal(c, prompts) for c in told].count(True) == 3
        assert [torch.equal(c, empty) for c in told[:2]].count(True) == 1
        assert torch.equal(run.tape.calls["unet"][0].args[2], prompts)

    def test_guidance_leads_away_from_the_negative_prompt_and_dropout_to_the_empty_one(
        self, make: Make, sd: str, batch: Batch
    ) -> None:
        options = {"condition": "text", "negative_prompt": "oil painting", "condition_dropout": 1.0}
        told = [call.args[2] for call in train(make(**options), batch).tape.calls["prior"]]
        negative, empty = (encode_prompts(sd, [text]).expand(2, -1, -1) for text in ("oil painting", ""))
        assert not torch.equal(negative, empty)
        assert [torch.equal(c, negative) for c in told[:2]].count(True) == 1
        assert [torch.equal(c, empty) for c in told].count(True) == 3
        z_hat, c, spy = torch.randn(2, 4, 8, 8), encode_prompts(sd, batch["prompt"]), Spy(batch["index"])
        model = make(**options)
        surrogate = model.distillation_loss(z_hat.requires_grad_(), c, spy)
        (slope,) = torch.autograd.grad(surrogate, z_hat)
        assert model.prior is not None
        at = spy.drawn["vsd/t"], spy.drawn["vsd/noise"]
        g, other = (gradient_by_hand(sd, model.prior, z_hat.detach(), c, *at, 7.5, null) for null in (negative, empty))
        assert_close(slope, 2 * g / 512, rtol=1e-3, atol=1e-6)
        assert not torch.allclose(slope, 2 * other / 512, rtol=1e-2, atol=1e-5)


def gradient_by_hand(
    sd: str, prior: UNetDenoiser, z: Tensor, f: Tensor, t: Tensor, noise: Tensor, w: float, null: Tensor | None = None
) -> Tensor:
    """Section 3, stage B, step 3; the teacher is a copy of its own, and the null condition zeros by default."""
    null = torch.zeros_like(f) if null is None else null
    a, s = level(t)
    z_t = a * z + s * noise
    with torch.no_grad():
        e_f, e_null = (base(sd)(z_t, t, c).sample for c in (f, null))
        e_reg = prior.unet(z_t, t, f).sample
    x0_fix, x0_reg = ((z_t - s * e) / a for e in (e_null + w * (e_f - e_null), e_reg))
    return (x0_reg - x0_fix) / (z - x0_fix).abs().mean((1, 2, 3), keepdim=True)


class TestGradients:
    def test_each_step_has_those_of_its_own_network(self, make: Make, batch: Batch) -> None:
        model = make()
        assert model.prior is not None
        for network in (model.generator, model.codec, model.prior):
            assert network is not None
            disturb(network)
        run = train(model, batch)
        of_generator, of_regulariser = run.tape.grads
        assert of_generator.keys() == generator_names(model)
        assert of_regulariser.keys() == regulariser_names(model)
        for grads in (of_generator, of_regulariser):
            assert all(bool(torch.isfinite(grad).all()) and bool(grad.any()) for grad in grads.values())
        assert any(".conv1.lora_A" in name for name in of_generator)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(model.all_trainable())

    def test_it_is_the_losses_and_not_their_turns_that_part_them(self, make: Make, batch: Batch) -> None:
        """With everything that is trained requiring gradients at once."""
        model, spy = make(), Spy(batch["index"])
        x_up = upsampled(low(batch))
        c = model.condition(x_up, [])
        z_hat, x_hat = model.generate(x_up, c)
        (model.data_loss(x_hat, high(batch)) + model.distillation_loss(z_hat, c, spy)).backward()
        assert with_grad(model) == generator_names(model)
        model.zero_grad(set_to_none=True)
        model.diffusion_loss(z_hat.detach(), c, spy).backward()
        assert with_grad(model) == regulariser_names(model)

    def test_distillation_alone_reaches_encoder_and_u_net(self, make: Make, batch: Batch) -> None:
        run = train(make(lambda_mse=0.0, lambda_perceptual=0.0), batch)
        grads = run.tape.grads[0]
        assert all(bool(grads[name].any()) for name in grads if "lora_B" in name and ".encoder." in name)
        assert bool(grads["generator.unet.conv_in.base_layer.weight"].any())

    def test_conv_in_itself_may_stay_frozen(self, make: Make, batch: Batch) -> None:
        model = make(train_conv_in=False)
        run = train(model, batch)
        assert run.tape.grads[0].keys() == {n for n in generator_names(model) if "base_layer" not in n}
        assert model.generator is not None
        assert not any(p.requires_grad for p in model.generator.unet.conv_in.base_layer.parameters())
        assert any("conv_in.lora_B" in name for name in run.tape.grads[0])


class TestPrior:
    def test_at_mid_block_it_trains_what_osediffs_code_does_in_effect(self, make: Make, sd: str, batch: Batch) -> None:
        """OSEDiff adds three adapters, for encoder, decoder and the rest, and leaves the last one active."""
        endings = tuple(f".{target}" for target in OSEDIFF_TARGETS)
        unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
        layers = [name for name, _ in unet.named_modules() if f".{name}".endswith(endings)]
        parts: dict[str, list[str]] = {"down": [], "up": [], "others": []}
        for name in layers:
            is_down, is_up = "down_blocks" in name or name == "conv_in", "up_blocks" in name or name == "conv_out"
            parts["down" if is_down else "up" if is_up else "others"].append(name)
        for adapter, targets in parts.items():
            unet.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian"), adapter)
        unet.requires_grad_(True)
        unet(torch.randn(2, 4, 8, 8), 500, torch.randn(2, 5, 16)).sample.square().mean().backward()
        moved = {name for name, p in unet.named_parameters() if "lora_B" in name and p.grad is not None}
        assert all(".others." in name for name in moved)

        model = make(reg_targets="mid_block")
        run = train(model, batch)
        of_regulariser = run.tape.grads[1]
        assert of_regulariser.keys() == regulariser_names(model) == set(model.checkpoint_keys()) & of_regulariser.keys()
        assert {f"prior.unet.{name.replace('.others.', '.default.')}" for name in moved} == {
            name for name in of_regulariser if "lora_B" in name
        }
        assert run.tape.grads[0].keys() == generator_names(model)  # the generator keeps all of its own

    def test_at_mid_block_a_resumed_run_equals_one_that_went_on(self, make: Make, batch: Batch, tmp_path: Path) -> None:
        def fit(steps: int, resume: bool) -> dict[str, Tensor]:
            model = make(reg_targets="mid_block", optimizer=SGD, reg_optimizer=SGD, clip=1.0)
            trainer = Trainer(
                max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            last = tmp_path / "last.ckpt"
            loader: Any = torch.utils.data.DataLoader([batch] * 2, batch_size=None)  # type: ignore[arg-type]
            trainer.fit(model, loader, ckpt_path=str(last) if resume else None)
            if steps == 1:
                trainer.save_checkpoint(last)
            return {name: value.detach().clone() for name, value in model.all_trainable().items()}

        fit(1, resume=False)
        whole, resumed = fit(2, resume=False), fit(2, resume=True)
        assert any("prior.unet.mid_block" in name for name in whole)
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())

    def test_the_u_nets_file_is_read_once_for_generator_and_prior(
        self, make: Make, sd: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[str] = []

        def load(pretrained: str, subfolder: str) -> UNet2DConditionModel:
            reads.append(subfolder)
            return load_unet(pretrained, subfolder)

        monkeypatch.setattr(stage_b, "load_unet", load)
        model = make()
        assert reads == ["unet"]
        assert model.generator is not None
        assert model.prior is not None
        ours, other = (network.unet.conv_in.base_layer.weight for network in (model.generator, model.prior))
        assert torch.equal(ours, other)
        assert ours.data_ptr() != other.data_ptr()

    def test_teacher_and_regulariser_are_two_copies_bit_by_bit_after_training_too(
        self, make: Make, sd: str, batch: Batch
    ) -> None:
        model = make(reg_optimizer=SGD, optimizer=SGD, clip=1.0)
        assert model.prior is not None
        start = copy.deepcopy(adapter_state(model.prior.unet))
        train(model, batch, 3)
        learnt = adapter_state(model.prior.unet)
        assert any(not torch.equal(value, learnt[name]) for name, value in start.items())
        teacher, regulariser = base(sd), base(sd)
        add_lora(regulariser, 4, 8, OSEDIFF_TARGETS)
        load_adapter_state(regulariser, learnt)
        z, t, c = torch.randn(2, 4, 8, 8), torch.tensor([50, 900]), torch.randn(2, 5, 16)
        with torch.no_grad():
            fixed, student = teacher(z, t, c).sample, regulariser(z, t, c).sample
            for _ in range(2):  # the switch goes back
                assert torch.equal(model._teacher(z, t, c), fixed)
                assert torch.equal(model._regulariser(z, t, c), student)
        assert float((fixed - student).abs().max()) > 1e-5

    def test_its_base_is_not_the_generators_whose_conv_in_moves(self, make: Make, sd: str, batch: Batch) -> None:
        model = make(optimizer=SGD, reg_optimizer=SGD, clip=1.0)
        train(model, batch)
        assert model.generator is not None
        assert model.prior is not None
        original = base(sd).conv_in.weight
        assert not torch.equal(model.generator.unet.conv_in.base_layer.weight, original)
        assert torch.equal(model.prior.unet.conv_in.base_layer.weight, original)

    def test_its_adapter_starts_apart_from_the_generators(self, make: Make) -> None:
        model = make()
        assert model.generator is not None
        assert model.prior is not None
        own, other = adapter_state(model.generator.unet), adapter_state(model.prior.unet)
        assert own.keys() == other.keys()
        assert all(not torch.equal(v, other[k]) for k, v in own.items() if "lora_A" in k)
        assert not any(v.any() for state in (own, other) for k, v in state.items() if "lora_B" in k)


class Stub:
    """A captioner that names an image by its mean."""

    def __init__(self, model: str) -> None:
        self.seen: list[Tensor] = []

    def to(self, device: torch.device) -> "Stub":
        return self

    def __call__(self, x_01: Tensor) -> list[str]:
        self.seen.append(x_01)
        return [self.name(image) for image in x_01]

    @staticmethod
    def name(image: Tensor) -> str:
        return f"grey {float(image.mean()):.6f}"


@pytest.fixture
def captioned(make: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[F2IDiffSR, Stub]]:
    monkeypatch.setattr(conditions, "Captioner", Stub)

    def configured(**options: Any) -> tuple[F2IDiffSR, Stub]:
        model = make(condition="text", captioner="someone/captions", **options)
        stub: Any = model.condition.captioner
        return model, stub

    return configured


TILES = Inference(color_fix="none", tile=32, overlap=16)


def tiles(x_lq: Tensor) -> Iterator[Tensor]:
    """The tiles of a 16 x 12 image: 8 px, every 4 px."""
    for top in (0, 4, 8):
        for left in (0, 4):
            yield x_lq[..., top : top + 8, left : left + 8]


@pytest.fixture
def photo() -> Tensor:
    return torch.rand(1, 3, 16, 12, generator=torch.Generator().manual_seed(5))


class TestTiles:
    def test_features_are_made_of_each_tile(self, make: Make, dino: str, photo: Tensor) -> None:
        model, tape = make(inference=TILES, lambda_vsd=0.0), Tape()
        tape.attach(model)
        model.upscale(photo, [""])
        assert tape.counts == {"encode": 6, "decode": 6, "unet": 6, "dino": 6}
        expected = [upsampled(tile) for tile in tiles(photo)]
        seen = [call.args[0] for call in tape.calls["dino"]]
        for picture in expected:
            (at,) = [i for i, x in enumerate(seen) if torch.allclose(x, picture, atol=1e-6)]
            assert_close(tape.calls["encode"][at].args[0], 2 * picture - 1)
            assert_close(tape.calls["unet"][at].args[2], tokens(dino, picture), rtol=1e-4, atol=1e-5)

    def test_a_prompt_is_encoded_once_for_the_whole_image(
        self, make: Make, sd: str, photo: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[list[str]] = []

        def encode(pretrained: str, prompts: list[str], *args: Any, **kwargs: Any) -> Tensor:
            asked.append(list(prompts))
            return encode_prompts(pretrained, prompts, *args, **kwargs)

        model, tape = make(condition="text", inference=TILES, lambda_vsd=0.0), Tape()
        monkeypatch.setattr(conditions, "encode_prompts", encode)
        tape.attach(model)
        model.upscale(photo, ["a house"])
        assert asked == [["a house"]]
        assert tape.counts == {"encode": 6, "decode": 6, "unet": 6}
        assert all(torch.equal(call.args[2], encode_prompts(sd, ["a house"])) for call in tape.calls["unet"])

    def test_a_captioner_says_what_each_tile_shows_in_the_prompts_place(
        self, captioned: Callable[..., tuple[F2IDiffSR, Stub]], sd: str, photo: Tensor
    ) -> None:
        model, stub = captioned(inference=TILES, lambda_vsd=0.0)
        tape = Tape()
        tape.attach(model)
        model.upscale(photo, ["a house"])
        expected = [upsampled(tile) for tile in tiles(photo)]
        assert len(stub.seen) == 6
        for seen, call in zip(stub.seen, tape.calls["unet"], strict=True):
            assert any(torch.allclose(seen, picture, atol=1e-6) for picture in expected)
            assert torch.equal(call.args[2], encode_prompts(sd, [Stub.name(seen[0])]))
        assert len({Stub.name(x[0]) for x in stub.seen}) == 6

    def test_a_captioner_leaves_training_to_the_datas_prompts(
        self, captioned: Callable[..., tuple[F2IDiffSR, Stub]], sd: str, batch: Batch
    ) -> None:
        model, stub = captioned()
        run = train(model, batch)
        assert not stub.seen
        assert torch.equal(run.tape.calls["unet"][0].args[2], encode_prompts(sd, batch["prompt"]))


class TestEnlarge:
    def test_random_draws_each_of_three_ways_and_the_same_again(self, make: Make) -> None:
        model = make(train_upsample="random", lambda_vsd=0.0, perceptual="none")
        x = torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(0)).round()  # bicubic overshoots
        ways = {
            "nearest": x.repeat_interleave(4, -1).repeat_interleave(4, -2),
            "bilinear": F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False),
            "bicubic": upsampled(x),
        }
        found = model.enlarge(x, Draws(0, torch.arange(60)))
        chosen = []
        for i in range(60):
            (way,) = [name for name, all_ in ways.items() if torch.allclose(found[i], all_[i], atol=1e-6)]
            chosen.append(way)
        assert all(10 <= chosen.count(name) <= 32 for name in ways)
        assert torch.equal(model.enlarge(x, Draws(0, torch.arange(60))), found)
        assert torch.equal(model.enlarge(x[7:9], Draws(0, torch.arange(7, 9))), found[7:9])
        assert not torch.equal(model.enlarge(x, Draws(1, torch.arange(60))), found)

    @pytest.mark.parametrize("way", ["bicubic", "random"])
    def test_training_looks_at_the_enlarged_image(self, make: Make, batch: Batch, way: str) -> None:
        model = make(train_upsample=way)
        run = train(model, batch)
        x_up = model.enlarge(low(batch), Spy(batch["index"]))
        assert_close(run.tape.calls["encode"][0].args[0], 2 * x_up - 1)
        assert_close(run.tape.calls["dino"][0].args[0], x_up)
        assert torch.equal(x_up, upsampled(low(batch))) is (way == "bicubic")


class TestErrors:
    def test_a_negative_prompt_where_no_text_is_told(self) -> None:
        with pytest.raises(ValueError, match=r"negative_prompt=blurry is a text, which condition=features has no use"):
            F2IDiffSR(negative_prompt="blurry")

    @pytest.mark.parametrize("timestep", [-1, 1000])
    def test_a_timestep_outside_the_schedule(self, make: Make, timestep: int) -> None:
        with pytest.raises(ValueError, match=rf"timestep={timestep} is out of range; set 0 \.\. 999"):
            make(timestep=timestep)

    @pytest.mark.parametrize("given", [(0, 1000), (-1, 5), (500, 20)])
    def test_timesteps_of_distillation_that_are_no_range(self, make: Make, given: tuple[int, int]) -> None:
        message = rf"vsd_timesteps=\[{given[0]}, {given[1]}\].*; set .*0 \.\. 999"
        with pytest.raises(ValueError, match=message):
            make(vsd_timesteps=given)

    def test_features_of_another_width(self, make: Make, make_dino: Callable[[int], str]) -> None:
        other = make_dino(24)
        with pytest.raises(ValueError, match=rf"features={other} are 24 wide, .* takes 16; give the DINOv2"):
            make(features=other)

    def test_a_text_encoder_of_another_width(self, make: Make) -> None:
        with pytest.raises(ValueError, match=r"text_encoder=tiny makes embeddings 32 wide, .* takes 16\. Set the text"):
            make(condition="text", text_encoder="tiny")
