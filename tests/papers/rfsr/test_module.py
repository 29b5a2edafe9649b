"""RFSR's training step: which networks run with a graph, each loss and gradient by hand, theta', the average."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from common.conditioning.text import encode_prompts
from common.datainfo import DataInfo
from common.draws import Draws, generator
from common.loading import WeightsNotFoundError
from common.losses import GramKL, dwt_low
from papers.rfsr import RFSR, BaseSR, Untagged
from papers.rfsr import module as rfsr_module
from papers.rfsr.base_models import Base
from papers.rfsr.seesr import SeeSRControlNet, SeeSRUNet

from .steps import ABAR, Batch, Make, described, high, low, see, upsampled

ADAM = partial(torch.optim.Adam, lr=1e-2, eps=1e-30)  # moves whatever has a gradient
EARLY, LATE = 2, 5  # of five steps: t = 601 and 1
BOTH = {"t_early_min": 0, "t_late_max": 999}
Disturb = Callable[..., RFSR]


def level(t: int) -> tuple[float, float]:
    return math.sqrt(ABAR[t]), math.sqrt(1 - ABAR[t])


@dataclass
class Call:
    args: tuple[Any, ...]
    out: Any
    graph: bool
    start: bool  # whether the networks were theta'


@dataclass
class Tape(Callback):
    """What went in and out of the networks, and gradients."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    grads: list[dict[str, Tensor]] = field(default_factory=list)

    def attach(self, model: Any) -> None:
        base = model.base
        self.model, self.first = model, {n: p.detach().clone() for n, p in model.all_trainable().items()}
        networks = {"unet": base.unet, "controlnet": base.controlnet}
        networks |= {"encode": base.codec.vae.encoder, "decode": base.codec.vae.decoder}
        if isinstance(model, RFSR):
            self.first = dict(zip(self.first, model.start.values, strict=False)) if len(model.start.values) else {}
            self.first = {n: p.detach().clone() for n, p in self.first.items()}
            networks |= {"gram": model.gram} if model.gram is not None else {}
            networks |= {f"reward_{name}": reward for name, reward in model.rewards.items()}
        for name, network in networks.items():
            self.calls[name] = []
            network.register_forward_hook(partial(self._write, name))

    def _write(self, name: str, network: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        found = out[1] if name == "controlnet" else out[0] if isinstance(out, tuple) else out
        now = self.model.all_trainable()
        start = bool(self.first) and all(torch.equal(p, now[n]) for n, p in self.first.items())
        self.calls[name].append(Call(args, found, found.requires_grad, start))

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(calls) for name, calls in self.calls.items()}

    def clear(self) -> None:
        for calls in self.calls.values():
            calls.clear()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.grads.append({name: p.grad.clone() for name, p in named if p.grad is not None})


@dataclass
class Run:
    model: Any
    tape: Tape
    metrics: dict[str, float]

    def grad(self) -> dict[str, Tensor]:
        (grads,) = self.tape.grads
        return grads


def train(model: Any, batch: Batch, st: int | None = None, steps: int = 1, **options: Any) -> Run:
    """`st`: the step that is trained, instead of a drawn one."""
    tape = Tape()
    tape.attach(model)
    if st is not None:
        model.draw_step = lambda: st
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[tape], log_every_n_steps=1, **options,
    )  # fmt: skip
    batches: Any = [batch] * steps
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    return Run(model, tape, {name: float(value) for name, value in trainer.callback_metrics.items()})


def untouched(kind: str, sd: str, seesr: str, frozen: bool = True) -> tuple[Any, Any]:
    """The base's networks, loaded apart from the method; torch may round otherwise where weights are `frozen`."""
    classes: Any = (UNet2DConditionModel, ControlNetModel) if kind == "plain" else (SeeSRUNet, SeeSRControlNet)
    root = sd if kind == "plain" else seesr
    return tuple(
        c.from_pretrained(root, subfolder=s).eval().requires_grad_(not frozen)
        for c, s in zip(classes, ("unet", "controlnet"), strict=True)
    )  # type: ignore[return-value]


def run_networks(
    kind: str, nets: tuple[Any, Any], z: Tensor, t: int, e_txt: Tensor, control: Tensor, e_img: Any
) -> Any:
    unet, controlnet = nets
    with torch.no_grad():
        if kind == "seesr":
            return unet(z, t, e_txt, controlnet(z, t, e_txt, control, e_img), e_img)
        down, mid = controlnet(z, t, e_txt, control, return_dict=False)
        return unet(
            z, t, e_txt, down_block_additional_residuals=down, mid_block_additional_residual=mid, return_dict=False
        )[0]


def decoded(sd: str, x0: Tensor) -> Tensor:
    """I_t by another copy of the VAE."""
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
    with torch.no_grad():
        return ((vae.decode(x0 / 0.18215).sample + 1) / 2).clamp(0, 1)


def clean(call: Call, t: int) -> Tensor:
    a, s = level(t)
    return (call.args[0] - s * call.out.detach()) / a


class Watched(RFSR):
    """Remembers what autograd kept for the backward pass of each step, and where each step began."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        kept: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            super().training_step(batch, batch_idx)
        self.__dict__.setdefault("kept", []).append((len(kept), sum(kept)))

    def rollout(self, *args: Any) -> Tensor:
        z_t = super().rollout(*args)
        self.__dict__.setdefault("began", []).append(z_t)
        return z_t


class TestGraph:
    """Check 1: whatever the step, one network call has a graph."""

    @pytest.mark.parametrize(
        ("kind", "sampler", "cfg"), [("plain", "ddim", 2.0), ("plain", "unipc", 1.0), ("seesr", "ddpm", 1.0)]
    )
    def test_only_the_last_step_has_one_and_its_size_is_that_of_one_step(
        self, make: Make, disturb: Disturb, batch: Batch, kind: str, sampler: str, cfg: float
    ) -> None:
        model: Any = make(kind, {"sampler": sampler}, Watched, train_cfg_scale=cfg, **BOTH)
        disturb(model)
        per_step: list[dict[str, list[Call]]] = []
        tape, calls = Tape(), 1 if cfg == 1 else 2

        def draw() -> int:
            per_step.append({name: list(found) for name, found in tape.calls.items()})
            tape.clear()
            return len(per_step)

        tape.attach(model)
        model.draw_step = draw
        train(model, batch, steps=5)
        draw()
        assert len(per_step) == 6
        for st, found in enumerate(per_step[1:], 1):
            assert len(model.base.timesteps) == 5
            t = model.base.timesteps[st - 1]
            for name in ("unet", "controlnet"):
                theta = [call for call in found[name] if not call.start]
                assert [call.graph for call in theta] == [False] * calls * (st - 1) + [True] * calls
                was = [call for call in found[name] if call.start]
                assert [call.graph for call in was] == [False] * calls
                assert {int(call.args[1]) for call in was} == {t}
                assert [int(call.args[1]) for call in theta[::calls]] == model.base.timesteps[:st]
            assert [call.graph for call in found["decode"]] == [False, True]
            assert len(found["encode"]) == 1
            assert not found["encode"][0].graph
        assert all(z_t.grad_fn is None and not z_t.requires_grad for z_t in model.began)
        assert len(model.kept) == 5
        assert len(set(model.kept)) == 1
        assert model.kept[0][0] > 100

    @pytest.mark.parametrize(("regulariser", "more"), [("gram", 1), ("kl", 1), ("lora", 0), ("none", 0)])
    def test_a_late_step_asks_the_start_once_where_it_is_held_to_it(
        self, make: Make, batch: Batch, regulariser: str, more: int
    ) -> None:
        run = train(make(regulariser=regulariser), batch, LATE)
        counts = run.tape.counts
        assert (counts["unet"], counts["controlnet"], counts["decode"]) == (
            LATE + more,
            LATE + more,
            2 if regulariser == "gram" else 1,  # noise is compared without images
        )

    def test_an_early_step_does_not_ask_it(self, make: Make, batch: Batch) -> None:
        counts = train(make(), batch, EARLY).tape.counts
        assert (counts["unet"], counts["controlnet"], counts["decode"]) == (EARLY, EARLY, 1)

    def test_the_start_sees_what_the_trained_network_sees(self, make: Make, disturb: Disturb, batch: Batch) -> None:
        for kind in ("plain", "seesr"):
            calls = train(disturb(make(kind)), batch, LATE).tape.calls
            for name in ("unet", "controlnet"):
                (was,) = [call for call in calls[name] if call.start]
                (now,) = [call for call in calls[name] if call.graph]
                assert torch.equal(was.args[0], now.args[0])
                assert was.args[1] == now.args[1] == 1
                rest = (2, 3, 4) if kind == "seesr" and name == "controlnet" else (2,)
                assert all(torch.equal(was.args[i], now.args[i]) for i in rest)
                assert not torch.equal(was.out, now.out)


class TestBands:
    """Check 7: what is computed at which step."""

    @pytest.fixture
    def low_bands(self, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
        seen: list[Tensor] = []
        real = rfsr_module.dwt_low_loss

        def spy(x_01: Tensor, *args: Any) -> Tensor:
            seen.append(x_01)
            return real(x_01, *args)

        monkeypatch.setattr(rfsr_module, "dwt_low_loss", spy)
        return seen

    @pytest.mark.parametrize("kind", ["plain", "seesr"])
    def test_early_the_low_band_alone_late_rewards_and_gram_alone(
        self, make: Make, batch: Batch, low_bands: list[Tensor], monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        entered: list[int] = []
        real = RFSR.as_it_was

        @contextmanager
        def spy(self: RFSR) -> Iterator[None]:
            entered.append(1)
            with real(self):
                yield

        monkeypatch.setattr(RFSR, "as_it_was", spy)
        for st in (EARLY, LATE):
            low_bands.clear(), entered.clear()
            counts = train(make(kind), batch, st).tape.counts
            late = st == LATE
            assert (len(low_bands), counts["reward_bright"], counts["gram"], len(entered)) == (
                (0, 1, 1, 1) if late else (1, 0, 0, 0)
            )

    def test_where_bands_overlap_all_losses_count(self, make: Make, batch: Batch, low_bands: list[Tensor]) -> None:
        metrics = train(make(**BOTH), batch, 3).metrics
        assert len(low_bands) == 1
        assert {"train/dwt", "train/reward_bright", "train/gram"} <= metrics.keys()
        assert {"train/grad_norm_early", "train/grad_norm_late", "train/loss_st03"} <= metrics.keys()

    @pytest.mark.parametrize("st", [EARLY, LATE])
    @pytest.mark.parametrize("kind", ["plain", "seesr"])
    def test_gradients_reach_all_that_is_trained_and_nothing_else(
        self, make: Make, disturb: Disturb, batch: Batch, kind: str, st: int
    ) -> None:
        model = disturb(make(kind))
        grads = train(model, batch, st).grad()
        controlnet = {name for name, _ in model.named_parameters() if name.startswith("base.controlnet.")}
        attentions = {n for n, _ in model.named_parameters() if n.startswith("base.unet.") and "image_attentions" in n}
        assert bool(attentions) is (kind == "seesr")
        assert grads.keys() == controlnet | attentions
        assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in grads.values())
        assert any(name.startswith("rewards.") for name, _ in model.named_parameters())

    def test_full_trains_both_networks_whole(self, make: Make, disturb: Disturb, batch: Batch) -> None:
        model = disturb(make("seesr", trained="full"))
        for st in (EARLY, LATE):
            grads = train(model, batch, st).grad()
            networks = ("base.controlnet.", "base.unet.")
            assert grads.keys() == {name for name, _ in model.named_parameters() if name.startswith(networks)}
            assert all(bool(g.any()) for g in grads.values())

    def test_adapters_are_all_that_the_lora_ablation_trains(self, make: Make, batch: Batch) -> None:
        model = make("seesr", regulariser="lora", lora_rank=2, optimizer=ADAM)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        grads = train(model, batch, LATE, steps=2).tape.grads[-1]
        adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
        assert {n.split(".")[1] for n in adapters} == {"controlnet", "unet"}
        assert grads.keys() == adapters
        assert all(bool(g.any()) for g in grads.values())  # A has one from the second step on
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == adapters

    def test_a_step_of_a_band_without_a_loss_is_not_trained(self, make: Make) -> None:
        assert make().steps == [1, 2, 5]  # t = 801, 601, then 1; 201 is step 4
        assert make(early_loss="none").steps == [5]
        assert make(rewards={}, regulariser="none").steps == [1, 2]
        assert make(rewards={}, regulariser="lora").steps == [1, 2]
        assert make(rewards={}).steps == [1, 2, 5]
        assert make(**BOTH, early_loss="none", rewards={}, regulariser="kl").steps == [1, 2, 3, 4, 5]
        with pytest.raises(ValueError, match="hold none of the sampler's timesteps"):
            make(early_loss="none", rewards={}, regulariser="none")


class TestLosses:
    """Values by hand from what the networks said."""

    @pytest.mark.parametrize("early_loss", ["dwt", "l1"])
    def test_early(self, make: Make, sd: str, batch: Batch, early_loss: str) -> None:
        run = train(make(early_loss=early_loss, lambda_dwt=0.3), batch, EARLY)
        x_01 = decoded(sd, clean(run.tape.calls["unet"][-1], 601))
        a, b = (2 * F.avg_pool2d(x, 2) for x in (x_01, high(batch))) if early_loss == "dwt" else (x_01, high(batch))
        expected = float((a - b).abs().mean())
        assert run.metrics[f"train/{early_loss}"] == pytest.approx(expected, rel=1e-4)
        assert run.metrics["train/loss"] == pytest.approx(0.3 * expected, rel=1e-4)
        assert run.metrics["train/loss_st02"] == run.metrics["train/loss"]

    def test_early_with_the_released_codes_wavelet(self, make: Make, sd: str, batch: Batch) -> None:
        run = train(make(wavelet="dtcwt3"), batch, EARLY)
        x_01 = decoded(sd, clean(run.tape.calls["unet"][-1], 601))
        difference = dwt_low(x_01, "dtcwt3") - dwt_low(high(batch), "dtcwt3")
        assert run.metrics["train/dwt"] == pytest.approx(float(difference.abs().mean()), rel=1e-4)

    @pytest.mark.parametrize("regulariser", ["gram", "kl"])
    def test_late(self, make: Make, disturb: Disturb, sd: str, batch: Batch, regulariser: str) -> None:
        options = {"gram_features": "plain", "gram_distance": "l1_mean", "lambda_r": 7e3}
        run = train(disturb(make(rewards={"bright": 0.2}, regulariser=regulariser, **options)), batch, LATE)
        calls = run.tape.calls["unet"]
        (was,), (now,) = ([c for c in calls if c.start], [c for c in calls if c.graph])
        x_01, x_ref = (decoded(sd, clean(call, 1)) for call in (now, was))
        score = x_01.mean((1, 2, 3))
        if regulariser == "gram":
            hold = GramKL("random", 0.1, "plain", "l1_mean")(x_01, x_ref).mean()
        else:
            hold = (now.out.detach() - was.out).square().flatten(1).sum(1).mean()
        assert float(hold) > 0
        assert run.metrics["train/reward_bright"] == pytest.approx(float(score.mean()), rel=1e-4)
        assert run.metrics[f"train/{regulariser}"] == pytest.approx(float(hold), rel=2e-2)
        total = 0.2 * float((2 - score).mean()) + 7e3 * run.metrics[f"train/{regulariser}"]
        assert run.metrics["train/loss"] == pytest.approx(total, rel=1e-4)

    def test_images_are_cut_to_their_range_before_they_are_judged(self, make: Make, batch: Batch) -> None:
        model = make()
        model.base.codec.vae.decoder.conv_out.weight.data *= 40
        z = torch.randn(2, 4, 8, 8)
        x_01 = model.image(z, torch.zeros_like(z), 1)
        assert float(x_01.min()) == 0
        assert float(x_01.max()) == 1
        with torch.no_grad():
            raw = model.base.codec.decode(z / level(1)[0])
        assert_close(x_01, ((raw + 1) / 2).clamp(0, 1))

    def test_a_reward_pulls_by_minus_its_weight_until_it_is_2(self, make: Make) -> None:
        model: Any = make(rewards={"bright": 2.0, "glaring": 3.0})
        model.log = lambda *args, **kwargs: None
        x = torch.stack([torch.full((3, 16, 16), 0.25), torch.full((3, 16, 16), 0.75)]).requires_grad_()
        loss = model.preference_loss(x, ["", ""])
        # bright: 0.25 and 0.75; glaring: 1 and 3, which is enough
        assert float(loss) == pytest.approx(2 * (1.75 + 1.25) / 2 + 3 * (1 + 0) / 2, rel=1e-6)
        (slope,) = torch.autograd.grad(loss, x)
        assert_close(slope[0], torch.full((3, 16, 16), -(2 * 1 + 3 * 4) / 2 / 768))
        assert_close(slope[1], torch.full((3, 16, 16), -(2 * 1) / 2 / 768))

    def test_weights_multiply_the_gradient(self, make: Make, disturb: Disturb, batch: Batch) -> None:
        one = train(make(regulariser="none"), batch, LATE).grad()
        three = train(make(regulariser="none", rewards={"bright": 3.0}), batch, LATE).grad()
        for name, grad in one.items():
            assert_close(three[name], 3 * grad, rtol=1e-4, atol=1e-9)

    def test_guidance_in_training_is_of_the_negative_prompt(
        self, make: Make, sd: str, seesr: str, batch: Batch
    ) -> None:
        model = make("plain", {"negative_prompt": "noise"}, train_cfg_scale=3.0, regulariser="none")
        run = train(model, batch, EARLY)
        pos, neg = run.tape.calls["unet"][-2:]
        assert_close(pos.args[2], encode_prompts(sd, batch["prompt"]))
        assert_close(neg.args[2], encode_prompts(sd, ["noise"]).expand(2, -1, -1))
        a, s = level(601)
        eps = neg.out + 3 * (pos.out - neg.out)
        x_01 = decoded(sd, ((pos.args[0] - s * eps) / a).detach())
        expected = (2 * F.avg_pool2d(x_01 - high(batch), 2)).abs().mean()
        assert run.metrics["train/dwt"] == pytest.approx(float(expected), rel=1e-4)


class TestPrompts:
    def kept(self, run: Run) -> list[list[str]]:
        return run.model.rewards["bright"].told

    def test_dropped_texts_are_empty_for_the_generator_and_kept_for_rewards(
        self, make: Make, sd: str, batch: Batch
    ) -> None:
        for reward_prompt, told in (("kept", batch["prompt"]), ("same", ["", ""])):
            run = train(make(prompt_dropout=1.0, reward_prompt=reward_prompt), batch, LATE)
            empty = encode_prompts(sd, ["", ""])
            for name in ("unet", "controlnet"):
                assert all(torch.equal(call.args[2].expand(2, -1, -1), empty) for call in run.tape.calls[name])
            assert self.kept(run) == [told]

    def test_tags_are_dropped_too_and_kept_for_rewards(self, make: Make, sd: str, batch: Batch) -> None:
        """Photos without a text of their own, as in training at paper scale."""
        batch = batch | {"prompt": ["", ""]}
        tags = ["roof, tree", "dog, grass"]
        for dropout, reward_prompt, generator_, reward in (
            (0.0, "kept", tags, tags),
            (1.0, "kept", ["", ""], tags),
            (1.0, "same", ["", ""], ["", ""]),
        ):
            run = train(make("seesr", prompt_dropout=dropout, reward_prompt=reward_prompt), batch, LATE)
            read = run.tape.calls["unet"][-1].args[2]
            assert torch.equal(read, encode_prompts(sd, generator_)), (dropout, reward_prompt)
            assert self.kept(run) == [reward], (dropout, reward_prompt)

    def test_half_of_them_are_dropped_sample_by_sample(self, make: Make) -> None:
        model = make(prompt_dropout=0.5)
        texts = model.dropped(["x"] * 400, Draws(0, torch.arange(400)))
        assert set(texts) == {"", "x"}
        assert 160 < texts.count("") < 240
        assert model.dropped(["x"] * 3, Draws(0, torch.tensor([7, 8, 9]))) == texts[7:10]


class TestRewardArguments:
    def test_they_reach_the_rewards_class(self, make: Make) -> None:
        arguments = {"imagereward": {"weights": "elsewhere/ImageReward.pt"}}
        with pytest.raises(WeightsNotFoundError, match=r"weights='elsewhere/ImageReward\.pt' is neither an existing"):
            make(rewards={"imagereward": 1.0}, reward_args=arguments)

    def test_a_metric_of_pyiqa_becomes_a_reward_to_train_on(self, make: Make) -> None:
        with pytest.raises(ValueError, match="has no gradient"):
            make(rewards={"pyiqa:musiq": 1.0})
        model = make(rewards={"pyiqa:musiq": 1.0}, reward_args={"pyiqa:musiq": {"differentiable": True}})
        assert model.rewards["pyiqa:musiq"].differentiable

    def test_arguments_of_no_reward_are_refused(self, make: Make) -> None:
        with pytest.raises(ValueError, match=r"reward_args is for \['clipiqa'\], which are not in rewards"):
            make(reward_args={"clipiqa": {}})

    @pytest.mark.parametrize("prompts", [True, False])
    def test_a_reward_that_reads_texts_warns_where_there_are_none(
        self, make: Make, batch: Batch, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, prompts: bool
    ) -> None:
        model = make("seesr", {"tagger": Untagged(5, 10)})
        monkeypatch.setattr(type(model.rewards["bright"]), "prompted", True)
        monkeypatch.setattr(DataInfo, "has_prompts", lambda self, split: prompts)
        train(model, batch, LATE)
        assert ("rewards=bright scores every image for the empty text" in caplog.text) is not prompts


class TestReference:
    """Checks 5 and 10: theta'."""

    @pytest.mark.parametrize(
        ("kind", "regulariser", "reference", "cfg"),
        [
            ("plain", "kl", "full", 2.0),
            ("plain", "gram", "full", 1.0),
            ("plain", "gram", "shared_control", 2.0),
            ("seesr", "gram", "full", 1.0),
            ("seesr", "kl", "shared_control", 1.0),
        ],
    )
    def test_at_the_start_it_adds_neither_loss_nor_gradient(
        self, make: Make, batch: Batch, kind: str, regulariser: str, reference: str, cfg: float
    ) -> None:
        options: dict[str, Any] = {"train_cfg_scale": cfg, "reference": reference, "lambda_r": 100.0}
        held = train(make(kind, regulariser=regulariser, **options), batch, LATE)
        free = train(make(kind, regulariser="none", **options), batch, LATE)
        assert held.metrics[f"train/{regulariser}"] == 0
        assert held.metrics["train/loss"] == free.metrics["train/loss"]
        for name, grad in free.grad().items():
            assert torch.equal(held.grad()[name], grad), name

    @pytest.mark.parametrize("kind", ["plain", "seesr"])
    def test_after_training_it_still_is_the_untouched_base_bit_by_bit(
        self, make: Make, sd: str, seesr: str, batch: Batch, kind: str
    ) -> None:
        model = make(kind, optimizer=ADAM, trained="full", ema_decay=0.9)
        train(model, batch, LATE, steps=2)
        with torch.no_grad():
            c = see(model, low(batch), batch["prompt"])
            z, nets = torch.randn(2, 4, 8, 8), untouched(kind, sd, seesr, frozen=False)
            e_txt = encode_prompts(sd, batch["prompt"])
            expected = run_networks(kind, nets, z, 101, e_txt, c.control, c.description.e_img)
            own = model.base.predict(z, 101, c)
            assert float((own - expected).abs().max()) > 1e-3
            before = digest(model)
            for _ in range(2):
                eps, x_01 = model.reference(z, 101, c)
                assert torch.equal(eps, expected)
                assert digest(model) == before
            a, s = level(101)
            assert_close(x_01, decoded(sd, (z - s * expected) / a), rtol=1e-4, atol=1e-5)
            assert torch.equal(model.base.predict(z, 101, c), own)
            average = {name: value.clone() for name, value in model.ema.average.items()}
            with model.ema.swapped(model.all_trainable()):
                inside = digest(model)
                assert inside != before
                assert torch.equal(model.reference(z, 101, c).eps, expected)
                assert digest(model) == inside
        assert digest(model) == before
        assert all(torch.equal(value, model.ema.average[name]) for name, value in average.items())

    def test_under_autocast_it_is_the_untouched_base_too(self, make: Make, disturb: Disturb, batch: Batch) -> None:
        """Autocast's 16-bit copies of trained weights are theta's, whose storages theta' takes for a while."""
        model, z = disturb(make("plain", trained="full")), torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            c = see(model, low(batch), batch["prompt"])
            with torch.autocast("cpu", torch.bfloat16):
                alone = model.reference(z, 101, c).eps
            with torch.autocast("cpu", torch.bfloat16):
                own = model.base.predict(z, 101, c)  # as the rollout does before
                assert torch.equal(model.reference(z, 101, c).eps, alone)
                assert torch.equal(model.base.predict(z, 101, c), own)
        assert float((own - alone).abs().max()) > 0.1

    def test_an_adapters_start_is_its_base(self, make: Make, sd: str, seesr: str, batch: Batch) -> None:
        model = make("seesr", regulariser="lora", optimizer=ADAM)
        train(model, batch, LATE, steps=2)
        assert not len(model.start.values)
        with torch.no_grad():
            c = see(model, low(batch), batch["prompt"])
            z = torch.randn(2, 4, 8, 8)
            before, own = digest(model), model.base.predict(z, 101, c)
            with model.as_it_was():
                was = model.base.predict(z, 101, c)
            e_txt = encode_prompts(sd, batch["prompt"])
            expected = run_networks("seesr", untouched("seesr", sd, seesr), z, 101, e_txt, c.control, c.description[2])
            assert torch.equal(was, expected)
            assert digest(model) == before
            assert torch.equal(model.base.predict(z, 101, c), own)
            assert not torch.equal(own, was)

    def test_it_leaves_the_weights_as_they_were_when_something_fails_inside(self, make: Make, disturb: Disturb) -> None:
        model = disturb(make())
        before = digest(model)
        with pytest.raises(KeyError), model.as_it_was():
            raise KeyError(digest(model) == before)
        assert digest(model) == before

    def test_the_optimisers_parameters_are_the_networks_after_it(self, make: Make, batch: Batch) -> None:
        """Weights move, and the start does not, in steps that went through theta'."""
        model = make(optimizer=ADAM)
        first = [value.detach().clone() for value in model.start.values]
        held = [id(p) for p in model.all_trainable().values()]
        train(model, batch, LATE, steps=2)
        assert [id(p) for p in model.all_trainable().values()] == held
        assert all(torch.equal(a, b) for a, b in zip(first, model.start.values, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, model.all_trainable().values(), strict=True))
        assert not any(value.requires_grad for value in model.start.values)

    @pytest.mark.parametrize("kind", ["plain", "seesr"])
    def test_shared_control_is_the_starts_u_net_told_by_the_trained_controlnet(
        self, make: Make, disturb: Disturb, sd: str, seesr: str, batch: Batch, kind: str
    ) -> None:
        model = disturb(make(kind, trained="full", reference="shared_control"))
        with torch.no_grad():
            c = see(model, low(batch), batch["prompt"])
            z, (unet, controlnet) = torch.randn(2, 4, 8, 8), untouched(kind, sd, seesr)
            e_txt = encode_prompts(sd, batch["prompt"])
            found = model.reference(z, 101, c).eps
            mixed, full = (
                run_networks(kind, (unet, net), z, 101, e_txt, c.control, c.description.e_img)
                for net in (model.base.controlnet, controlnet)
            )
        assert_close(found, mixed, rtol=1e-5, atol=1e-6)
        assert float((found - full).abs().max()) > 1e-3


def digest(model: RFSR) -> int:
    """Of all weights, by the bytes."""
    return hash(b"".join(p.detach().numpy().tobytes() for p in (*model.base.parameters(), *model.start.parameters())))


class TestAverage:
    """Check 8."""

    def test_it_starts_at_the_base_and_goes_to_fixed_weights_by_the_decay(self, make: Make, batch: Batch) -> None:
        model: Any = make("seesr", trained="full", ema_decay=0.9)
        first = {name: p.detach().clone() for name, p in model.all_trainable().items()}
        model.ema.start(model.all_trainable())
        with torch.no_grad():
            for p in model.all_trainable().values():
                p += 0.5
        train(model, batch, EARLY, steps=3)  # at a rate of 0
        assert {name.split(".")[1] for name in first} == {"controlnet", "unet"}
        assert model.ema.average.keys() == first.keys()
        for name, p in model.all_trainable().items():
            assert_close(p.detach(), first[name] + 0.5)
            assert_close(model.ema.average[name], p.detach() + 0.9**3 * (first[name] - p.detach()))

    def test_a_fit_starts_it_where_the_weights_are_and_not_after_the_first_step(self, make: Make, batch: Batch) -> None:
        """With a rate of 0.5 the first update leaves half of the base."""
        model: Any = make(ema_decay=0.5, optimizer=ADAM)
        first = {name: p.detach().clone() for name, p in model.all_trainable().items()}
        train(model, batch, EARLY)
        assert model.ema.updates == 1
        for name, p in model.all_trainable().items():
            assert_close(model.ema.average[name], (first[name] + p.detach()) / 2)

    def test_after_training_both_networks_averages_have_left_the_start(self, make: Make, batch: Batch) -> None:
        for kind in ("seesr", "plain"):
            model: Any = make(kind, ema_decay=0.9, optimizer=ADAM)
            first = {name: p.detach().clone() for name, p in model.all_trainable().items()}
            train(model, batch, EARLY, steps=2)
            assert any(name.startswith("base.unet.") for name in first) is (kind == "seesr")
            for name, p in model.all_trainable().items():
                average = model.ema.average[name]
                assert not torch.equal(average, first[name]), name
                assert not torch.equal(average, p), name

    def test_what_is_tested_is_the_average(self, make: Make, disturb: Disturb, batch: Batch) -> None:
        """At first it is the base, whatever has become of the weights."""
        model: Any = make(ema_decay=0.9)
        model.ema.start(model.all_trainable())
        other = make(ema_decay=0.9)
        was = other.upscale(low(batch), batch["prompt"]).sr
        disturb(model)
        assert not torch.equal(model.upscale(low(batch), batch["prompt"]).sr, was)
        model.on_test_start()
        assert torch.equal(model.upscale(low(batch), batch["prompt"]).sr, was)


class TestDraw:
    """Check 3."""

    def test_steps_are_drawn_evenly_from_both_bands(self, make: Make) -> None:
        model = make("plain", {"sampler": "ddpm", "steps": 50})
        assert model.steps == [*range(1, 21), *range(41, 51)]
        drawn = []
        for n in range(3000):
            model._steps = n
            drawn.append(model.draw_step())
        counts = Counter(drawn)
        assert set(counts) == set(model.steps)
        early = sum(number for st, number in counts.items() if st <= 20) / 3000
        assert early == pytest.approx(2 / 3, abs=4 * math.sqrt(2 / 9 / 3000))
        chi_square = sum((number - 100) ** 2 / 100 for number in counts.values())
        assert chi_square < 58.3  # 29 degrees of freedom, p = 0.001
        assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.06

    def test_every_process_draws_the_same_step_and_each_its_own_noise(self, make: Make, batch: Batch) -> None:
        starts, steps = [], []
        for index in (torch.tensor([0, 1]), torch.tensor([2, 3])):
            run = train(make(), batch | {"index": index}, steps=1)
            starts.append(run.tape.calls["unet"][0].args[0])
            steps.append(next(name for name in run.metrics if name.startswith("train/loss_st")))
        assert steps[0] == steps[1]
        assert not torch.equal(*starts)
        assert len({make(seed=seed).draw_step() for seed in range(8)}) > 1


class TestPrecision:
    """Check 14."""

    @pytest.mark.parametrize(("regulariser", "st"), [("gram", EARLY), ("gram", LATE), ("kl", LATE)])
    def test_bfloat16_changes_no_loss_by_a_hundredth(
        self, make: Make, disturb: Disturb, batch: Batch, regulariser: str, st: int
    ) -> None:
        runs = []
        for precision in ("32-true", "bf16-mixed"):
            model = disturb(make("seesr", regulariser=regulariser, gram_features="plain"), 0.1)
            seen: list[torch.dtype] = []
            if model.gram is not None:
                model.gram.trunk.register_forward_hook(
                    lambda _, args, out, seen=seen: seen.extend(x.dtype for x in out)
                )
            runs.append(train(model, batch, st, precision=precision))
            assert set(seen) <= {torch.float32}
            assert bool(seen) is (st == LATE and regulariser == "gram")
        exact, mixed = runs
        assert {c.out.dtype for c in mixed.tape.calls["controlnet"]} == {torch.bfloat16}
        assert {c.out.dtype for c in mixed.tape.calls["decode"]} == {torch.float32}
        names = {"train/dwt"} if st == EARLY else {"train/reward_bright", f"train/{regulariser}"}
        for name in names | {"train/loss"}:
            assert exact.metrics[name] > 0
            assert mixed.metrics[name] == pytest.approx(exact.metrics[name], rel=1e-2), name
        assert mixed.grad().keys() == exact.grad().keys()
        assert all(bool(grad.any()) for grad in mixed.grad().values())

    def test_in_bfloat16_too_theta_prime_is_theta_at_the_start(self, make: Make, batch: Batch) -> None:
        run = train(make("seesr", lambda_r=100.0), batch, LATE, precision="bf16-mixed")
        assert run.metrics["train/gram"] == 0


class TestCheckpoint:
    def test_it_holds_both_networks_trained_weights_and_no_start(self, make: Make) -> None:
        model: Any = make("seesr")
        model.ema.start(model.all_trainable())
        checkpoint: dict[str, Any] = {"state_dict": dict(model.state_dict())}
        model.on_save_checkpoint(checkpoint)
        kept = set(checkpoint["state_dict"])
        assert {n for n in kept if "." in n} == {
            n for n, _ in model.named_parameters() if n.startswith("base.controlnet.") or ".image_attentions." in n
        }
        assert set(checkpoint["ema"]["average"]) == {name for name in kept if "." in name}
        assert not any(name.startswith(("start.", "rewards.", "gram.")) for name in kept)

    def test_a_new_process_keeps_the_base_as_its_start(self, make: Make, batch: Batch) -> None:
        """What is loaded into the weights is not what theta' is."""
        model, other = make(optimizer=ADAM), make()
        train(model, batch, EARLY)
        other.load_state_dict(
            {n: p for n, p in model.state_dict().items() if n in model.checkpoint_keys()}, strict=False
        )
        assert all(torch.equal(a, b) for a, b in zip(model.start.values, other.start.values, strict=True))
        changed = [
            not torch.equal(a, b) for a, b in zip(other.start.values, other.all_trainable().values(), strict=True)
        ]
        assert all(changed)


class TestStart:
    """Theta' is the base's, whatever was loaded into the weights before the fit."""

    def looked_at(self, make: Make, disturb: Disturb, checkpoint: dict[str, Any] | None = None, **options: Any) -> Any:
        """A model that validated a checkpoint (moved weights, where none is given) and now is to be fitted."""
        model: Any = make(**options)
        if checkpoint is None:
            checkpoint = self.saved(disturb(make(**options)))
        fresh: Any = make(**options, configure=False)
        fresh.inference_only = True
        fresh.configure_model()
        fresh.on_load_checkpoint(checkpoint)
        fresh.load_state_dict(checkpoint["state_dict"], strict=False)
        fresh.inference_only = False
        fresh.configure_model()
        return model, fresh

    @pytest.mark.parametrize("options", [{"kind": "seesr"}, {"kind": "plain", "trained": "full"}])
    def test_a_fit_after_a_validation_has_the_bases(
        self, make: Make, disturb: Disturb, options: dict[str, Any]
    ) -> None:
        model, fresh = self.looked_at(make, disturb, ema_decay=None, **options)
        named = zip(fresh.all_trainable().values(), model.all_trainable().values(), strict=True)
        assert all(not torch.equal(one, other) for one, other in named)
        assert len(fresh.start.values) == len(model.start.values) > 0
        assert all(torch.equal(one, other) for one, other in zip(fresh.start.values, model.start.values, strict=True))

    def test_a_fit_from_a_base_has_that_runs_and_keeps_it_in_its_checkpoints(
        self, make: Make, disturb: Disturb, tmp_path: Path
    ) -> None:
        base: Any = disturb(make(cls=BaseSR, ema_decay=None))
        path = tmp_path / "base.ckpt"
        checkpoint = {"state_dict": dict(base.state_dict()), "hyper_parameters": {}}
        base.on_save_checkpoint(checkpoint)
        torch.save(checkpoint | {"hyper_parameters": {"_class_path": "papers.rfsr.BaseSR"}}, path)
        model: Any = make(ema_decay=None)
        assert "start" not in self.saved(model)
        model.start_from(path)
        expected = [value.clone() for value in base.all_trainable().values()]
        disturb(model)
        assert all(torch.equal(one, other) for one, other in zip(model.start.values, expected, strict=True))
        kept = self.saved(model)
        resumed: Any = make(ema_decay=None)
        resumed.on_load_checkpoint(kept)
        _, looked = self.looked_at(make, disturb, kept, ema_decay=None)
        for other in (resumed, looked):
            assert all(torch.equal(one, value) for one, value in zip(other.start.values, expected, strict=True))

    def saved(self, model: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = {"state_dict": {n: v.clone() for n, v in model.state_dict().items()}}
        model.on_save_checkpoint(checkpoint)
        return checkpoint

    def test_one_step_is_drawn_for_all_batches_of_an_update(self, make: Make) -> None:
        one, two = make(), make(accumulate=2)
        drawn: dict[int, list[int]] = {1: [], 2: []}
        for model in (one, two):
            for _ in range(12):
                model._steps += 1
                drawn[model.accumulate].append(model.draw_step())
        assert len(set(drawn[1])) > 1
        assert drawn[2] == [step for step in drawn[1][:6] for _ in range(2)]


class TestBase:
    """The base's own training."""

    def make(self, base: Base, **options: Any) -> BaseSR:
        model = BaseSR(base, optimizer=ADAM, clip=None, **options)
        model.configure_model()
        return model

    @pytest.mark.parametrize("kind", ["plain", "seesr"])
    def test_its_loss_is_that_of_denoising(
        self, make_base: Callable[..., Base], sd: str, seesr: str, batch: Batch, kind: str
    ) -> None:
        model = self.make(make_base(kind), prompt_dropout=0.0)
        nets = untouched(kind, sd, seesr)
        run = train(model, batch)
        t = [int(torch.randint(0, 1000, (), generator=generator(0, "t", i))) for i in (0, 1)]
        noise = torch.stack([torch.randn(4, 8, 8, generator=generator(0, "noise", i)) for i in (0, 1)])
        vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
        losses = []
        with torch.no_grad():
            z, z_lq = (0.18215 * vae.encode(2 * x - 1).latent_dist.mode() for x in (high(batch), upsampled(low(batch))))
            e_txt = encode_prompts(sd, batch["prompt"])
            control = z_lq if kind == "plain" else upsampled(low(batch))
            tokens = described(model.base, low(batch), batch["prompt"]).e_img
            for i in (0, 1):
                a, s = level(t[i])
                z_t = a * z[i : i + 1] + s * noise[i : i + 1]
                e_img = tokens if tokens is None else tokens[i : i + 1]
                eps = run_networks(kind, nets, z_t, t[i], e_txt[i : i + 1], control[i : i + 1], e_img)
                losses.append(float((eps - noise[i]).square().mean()))
        assert run.metrics["train/loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
        names = {name for name, _ in model.named_parameters() if name.startswith("base.controlnet.")}
        assert run.grad().keys() == names
        assert all(bool(g.any()) for g in run.grad().values())

    def test_dropout_out_of_range_is_named(self, make_base: Callable[..., Base]) -> None:
        with pytest.raises(ValueError, match=r"prompt_dropout=1.5 is out of range; set a share, 0 \.\. 1"):
            BaseSR(make_base(), prompt_dropout=1.5)
