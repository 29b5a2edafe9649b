"""Stage 2: where it starts, what a round computes, both policies on one base and their traps, the comparison."""

import contextlib
import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.testing import assert_close

from common.adapters import adapter_state, count_lora, set_adapter, without_adapters
from common.color import wavelet
from common.conditioning.flux_text import encode_flux_prompts
from common.figures import read_caption
from common.images import bicubic_upsample, to_01, to_pm1
from common.pyiqa import MetricUnavailableError
from common.restoration import Inference
from common.rewards import build_reward, group_rewards
from papers.dnf_sr import DNFSR, NF2T, before_after, judges, module
from papers.dnf_sr.figures import Comparison, paired_gains, write_comparison
from papers.dnf_sr.losses import normalised_rewards
from papers.dnf_sr.unscored import UnscoredError

from .conftest import SMALL, Batch, FakeCaptioner, Spy, high, low, make_sft, train

Make = Callable[..., NF2T]
KONTEXT, DEV = (f"black-forest-labs/FLUX.1-{name}" for name in ("Kontext-dev", "dev"))


def sgd(lr: float = 1e-2) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def of(model: NF2T, name: str) -> dict[str, Tensor]:
    assert model.flow is not None
    return {key: value.clone() for key, value in adapter_state(model.flow.transformer, name).items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def stage_one(flux: str, path: str) -> DNFSR:
    model = make_sft(flux)
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=False)
    return model


def restaged(path: str, folder: Path, **settings: Any) -> str:
    """Stage 1's checkpoint with other settings in it."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"] |= settings
    torch.save(checkpoint, folder / "other.ckpt")
    return str(folder / "other.ckpt")


def trainer() -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1,
        enable_model_summary=False,
    )  # fmt: skip


def loader(batches: list[Batch]) -> Any:
    return torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list will do


def singles(batch: Batch) -> list[Batch]:
    """A batch's images one by one."""
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["name"]))]


def moved(model: NF2T, size: float = 0.05) -> NF2T:
    """Theta away from old."""
    g = torch.Generator().manual_seed(5)
    for parameter in model.trainable_parameters("theta"):
        parameter.data += size * torch.randn(parameter.shape, generator=g)
    return model


class TestStart:
    def test_both_policies_restore_as_stage_one_does(self, make: Make, flux: str, sft_run: str, batch: Batch) -> None:
        model, before = make(), stage_one(flux, sft_run)
        expected = before.upscale(low(batch), batch["prompt"]).sr
        assert_close(model.upscale(low(batch), batch["prompt"]).sr, expected, rtol=1e-4, atol=1e-5)
        theta = model.upscale(low(batch), batch["prompt"]).sr
        with model.policies.use("old"):
            assert torch.equal(model.upscale(low(batch), batch["prompt"]).sr, theta)
        untrained = make_sft(flux).upscale(low(batch), batch["prompt"]).sr
        assert not torch.allclose(untrained, expected, atol=1e-3)

    def test_the_encoder_is_merged_and_frozen(self, make: Make, flux: str, sft_run: str, batch: Batch) -> None:
        model, before = make(), stage_one(flux, sft_run)
        assert not [name for name, _ in model.codec.named_parameters() if "lora" in name]
        with torch.no_grad():
            assert_close(model.encode(low(batch)), before.encode(low(batch)), rtol=1e-4, atol=1e-5)
        assert not any(p.requires_grad for p in model.codec.parameters())

    def test_an_adapter_at_zero_is_the_base_bit_by_bit(self, make: Make, batch: Batch) -> None:
        model = make()
        assert model.flow is not None
        for name, weight in (*model.flow.named_parameters(), *model.flow.named_buffers()):
            if "lora_B" in name:
                weight.data.zero_()
        z = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        slots, text, found = model.fill(z, z), model.text(["a"]), []
        with torch.no_grad():
            for name in ("old", "theta"):
                with model.policies.use(name):
                    found.append(model.velocity(slots, text))
            with without_adapters(model.flow.transformer):
                found.append(model.velocity(slots, text))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    def test_other_settings_than_stage_ones_are_refused(self, make: Make) -> None:
        with pytest.raises(ValueError, match=r"trained with t_mid=0\.5, here is t_mid=0\.25; set model\.t_mid=0\.5$"):
            make(t_mid=0.25)
        with pytest.raises(ValueError, match="was trained with lora_alpha=4"):
            make(lora_alpha=8)

    @pytest.mark.parametrize("here", [DEV, "tiny", "random:flux1"])
    def test_a_stage_one_of_another_base_is_refused(self, make: Make, sft_run: str, tmp_path: Path, here: str) -> None:
        sft = restaged(sft_run, tmp_path, pretrained=KONTEXT)
        with pytest.raises(ValueError, match=f"{KONTEXT}, here is pretrained={here}; set model.pretrained={KONTEXT}"):
            make(sft=sft, pretrained=here)

    @pytest.mark.parametrize("before", [KONTEXT, "/elsewhere/flux", "tiny"])
    def test_a_folder_may_hold_the_same_weights_which_is_said(
        self, make: Make, flux: str, sft_run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, before: str
    ) -> None:
        make(sft=restaged(sft_run, tmp_path, pretrained=before))
        (said,) = [record.getMessage() for record in caplog.records if "same weights" in record.getMessage()]
        assert f"trained with pretrained={before}, here is pretrained={flux}" in said

    def test_one_folder_by_two_names_is_one(
        self, make: Make, flux: str, sft_run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        make(sft=restaged(sft_run, tmp_path, pretrained=f"{flux}/../{Path(flux).name}/"))
        assert "same weights" not in caplog.text

    @pytest.mark.parametrize("other", [{"prompt_suffix": "", "prompt": ""}, {"max_tokens": 5}])
    def test_other_texts_than_stage_ones_may_be_tested_and_not_trained_on(
        self, make: Make, sft_run: str, flux: str, batch: Batch, tmp_path: Path, other: dict[str, Any]
    ) -> None:
        options = {**SMALL, "group_size": 2, "rewards": ("neg_mse",), "compared": 0, **other}
        key = next(iter(other))
        with pytest.raises(
            ValueError, match=rf"was trained with {key}=.*, here is {key}={other[key]}; set model\.{key}="
        ):
            trainer().fit(NF2T(sft_run, pretrained=flux, **options), loader(singles(batch)))
        model = NF2T(sft_run, pretrained=flux, **options)
        model.output.folder = tmp_path
        trainer().test(model, loader(singles(batch)), verbose=False)
        assert len(list(tmp_path.rglob("*.png"))) == 2

    def test_stage_one_must_be_there_before_anything_is_loaded(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module.FlowRestorer, "configure_networks", lambda self: pytest.fail("loaded first"))
        with pytest.raises(FileNotFoundError, match="train that stage first"):
            make(sft=str(tmp_path / "none"))
        with pytest.raises(ValueError, match="was trained with lora_alpha=4"):
            make(lora_alpha=8)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"group_size": 1}, "group_size=1"),
            ({"rewards": ()}, "rewards is empty"),
            ({"reward_args": {"sharpness": {}}}, "not in rewards"),
            ({"input": "lr"}, "input=lr takes no noise"),
            ({"updates_per_rollout": "K", "accumulate": 2}, "accumulate=2"),
            ({"fast_on_policy": True}, "fast_on_policy"),
            ({"nft_kl": 0.1}, "nft_kl=0.1 with variant=nf2t"),
            ({"fast_on_policy": True, "eta_schedule": "type1"}, "fast_on_policy"),
            ({"fast_on_policy": True, "variant": "nft"}, "fast_on_policy"),
        ],
    )
    def test_settings_that_contradict_each_other_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            NF2T("x", **options)


class TestRound:
    def by_hand(self, model: NF2T, batch: Batch, drawn: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Gradient of theta, mean loss and rewards, with both branches in one graph."""
        text, prompts = model.text(batch["prompt"]), batch["prompt"]
        with torch.no_grad():
            z_l = model.encode(low(batch))
        restored = []
        with torch.no_grad(), model.policies.use("old"):
            for k in range(3):
                slots = model.fill(z_l, drawn[f"rollout/{k}"])
                z = slots.target - 0.5 * model.velocity(slots, text)
                restored.append(model.codec.decode(z).clamp(-1, 1))
        colourful, close = build_reward("colourfulness"), build_reward("neg_mse")
        scores = [(colourful(x / 2 + 0.5, prompts), close(x / 2 + 0.5, prompts, high(batch))) for x in restored]
        raw = torch.stack([torch.stack(pair) for pair in scores])  # (K, M, B)
        r = torch.stack([group_rewards(raw[:, :, b], [False, False]) for b in range(2)], 1)
        losses = []
        for k, x in enumerate(restored):
            slots = model.fill(z_l, drawn[f"gradient/{k}"])
            with torch.no_grad(), model.policies.use("old"):
                v_old = model.velocity(slots, text)
            v = model.velocity(slots, text)
            for share, velocity in (
                (r[k], (1 - model.beta) * v_old + model.beta * v),
                (1 - r[k], (1 + model.beta) * v_old - model.beta * v),
            ):
                image = model.codec.decode(slots.target - 0.5 * velocity)
                mse = (image - x).square().mean((1, 2, 3))
                losses.append((share * (2 * mse + 5 * model.dists(image / 2 + 0.5, x / 2 + 0.5))).mean())
        loss = torch.stack(losses).sum() / 3
        named = model.all_trainable()
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)), loss.detach(), r

    @pytest.mark.parametrize(("beta", "gain"), [(1.0, 1.0), (0.4, 1.0), (0.4, 20.0)])
    def test_a_round_away_from_the_old_policy_is_the_algorithms(
        self, make: Make, batch: Batch, beta: float, gain: float
    ) -> None:
        """With a larger gain many pixels leave [-1, 1]: the rollout's are clamped, those of x+ and x- are not."""
        model = louder(moved(make(beta=beta)), gain)
        run = train(model, batch)
        (found,) = run.tape.grads
        other = louder(moved(make(beta=beta)), gain)
        z = torch.randn(1, 2, 10, 10, generator=torch.Generator().manual_seed(0))
        assert bool((other.codec.decode(z).abs() > 1).float().mean() > 0.2) is (gain > 1)
        expected, loss, r = self.by_hand(other, batch, run.spy.drawn)
        assert found.keys() == expected.keys()
        size = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * size)
        assert run.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-4)
        assert run.metrics["train/gap"] > 1e-4
        assert run.metrics["train/sum_2r-1"] == pytest.approx(float((2 * r - 1).sum(0).mean()), abs=1e-5)

    def test_what_is_logged_of_the_rewards_is_raw(self, make: Make, batch: Batch) -> None:
        run = train(make(), batch)
        model, drawn = make(), run.spy.drawn
        with torch.no_grad():
            z_l = model.encode(low(batch))
            noises = [drawn[f"rollout/{k}"] for k in range(3)]
            samples = model.rollout(z_l, noises, model.text(batch["prompt"]))
        raw = torch.stack([-((s.x / 2 + 0.5 - high(batch)) ** 2).mean((1, 2, 3)) for s in samples])
        assert run.metrics["train/reward/neg_mse"] == pytest.approx(float(raw.mean()), rel=1e-4)
        assert run.metrics["train/spread/neg_mse"] == pytest.approx(float(raw.std(0, correction=0).mean()), rel=1e-3)
        assert run.metrics["train/flat_groups"] == 0
        assert all(float(s.x.abs().max()) <= 1 for s in samples)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            # rollout and v_old without a graph, v with one; both branches are decoded
            ({}, {"transformer": (6, 3), "encode": (1, 0), "decode": (3, 6)}),
            ({"fast_on_policy": True}, {"transformer": (3, 3), "encode": (1, 0), "decode": (3, 3)}),
            ({"updates_per_rollout": "K"}, {"transformer": (6, 3), "encode": (1, 0), "decode": (3, 6)}),
            ({"variant": "nft"}, {"transformer": (6, 3), "encode": (1, 0), "decode": (3, 0)}),
            ({"variant": "nft", "nft_kl": 0.1}, {"transformer": (9, 3), "encode": (1, 0), "decode": (3, 0)}),
        ],
    )
    def test_calls_of_each_network(self, make: Make, batch: Batch, options: Any, expected: Any) -> None:
        assert train(make(**options), batch).tape.counts() == expected

    def test_fast_and_literal_path_are_one_on_policy(self, make: Make, batch: Batch) -> None:
        literal, fast = (train(make(fast_on_policy=fast), batch).tape.grads[0] for fast in (False, True))
        size = max(float(gradient.abs().max()) for gradient in literal.values())
        assert size > 0
        for name, gradient in literal.items():
            assert_close(fast[name], gradient, rtol=1e-3, atol=1e-5 * size)

    @pytest.mark.parametrize("fast", [False, True])
    def test_the_rollouts_own_noise_teaches_nothing(self, make: Make, batch: Batch, fast: bool) -> None:
        run = train(make(nf2t_noise="rollout", fast_on_policy=fast, rec_weights=(1.0, 0.0)), batch)
        fresh = train(make(fast_on_policy=fast, rec_weights=(1.0, 0.0)), batch)
        largest = [max(float(g.abs().max()) for g in each.tape.grads[0].values()) for each in (run, fresh)]
        assert largest[0] < 1e-4 * largest[1]

    @pytest.mark.parametrize("forced", [None, 0.9])
    def test_equal_restorations_move_nothing_though_fresh_noise_could(
        self, make: Make, batch: Batch, forced: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Same(Spy):
            def normal(self, stream: str, shape: Any) -> Tensor:
                return super().normal("rollout" if stream.startswith("rollout/") else stream, shape)

        model = make(optimizer=sgd())
        before = of(model, "theta")
        if forced is not None:
            monkeypatch.setattr(model, "judge", lambda samples, batch: torch.full((3, 2), forced))
        run = train(model, batch, spy=Same(batch["index"]))
        largest = max(float((value - before[key]).abs().max()) for key, value in of(model, "theta").items())
        if forced is None:
            assert run.metrics["train/flat_groups"] == 1
            assert largest < 1e-7
        else:
            assert largest > 1e-4

    def test_k_updates_a_round_count_as_one_step(self, make: Make, batch: Batch) -> None:
        model = make(updates_per_rollout="K", optimizer=sgd())
        run = train(model, batch, steps=2)
        assert run.trainer.global_step == 2
        assert len(run.tape.grads) == 6
        assert run.metrics["train/gap"] > 0  # theta leaves old within a round

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"updates_per_rollout": "K"}, "2 = 2 x 1 x 1 x 1 "),
            ({"accumulate": 2}, "12 = 2 x 1 x 2 x 3 "),
        ],
    )
    def test_a_fit_prints_the_samples_of_an_update_once(
        self, make: Make, batch: Batch, options: Any, expected: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level("INFO"):
            train(make(**options), batch, steps=2)
        (said,) = [r.getMessage() for r in caplog.records if "samples per update" in r.getMessage()]
        assert said.startswith(f"samples per update: {expected}")

    def test_algorithm_1s_loop_is_the_default(self) -> None:
        assert NF2T("x").updates_per_rollout == "K"

    def test_one_update_is_the_mean_over_the_group(self, make: Make, batch: Batch) -> None:
        whole = train(make(), batch).tape.grads[0]
        each = train(make(updates_per_rollout="K"), batch).tape.grads  # theta stands still: the rate is 0
        for name, gradient in whole.items():
            assert_close(sum(grads[name] for grads in each) / 3, gradient, rtol=1e-4, atol=1e-8)

    def test_judges_stay_in_eval_mode(self, make: Make, batch: Batch) -> None:
        arguments = {"neg_dists": {"weights": "random", "width": 0.05}}
        model = train(make(rewards=("neg_mse", "neg_dists"), reward_args=arguments), batch).model
        assert not any(part.training for part in model.rewards["neg_dists"].modules())
        assert not any(p.requires_grad for p in model.rewards.parameters())


class TestVelocitySpace:
    def test_the_ablations_gradient_at_the_start(self, make: Make, batch: Batch) -> None:
        """At v = v_old it is 2 beta (2r - 1) (v_old - y) through dv / dtheta."""
        run = train(make(variant="nft"), batch)
        model, drawn = make(variant="nft"), run.spy.drawn
        text = model.text(batch["prompt"])
        with torch.no_grad():
            z_l = model.encode(low(batch))
        samples = model.rollout(z_l, [drawn[f"rollout/{k}"] for k in range(3)], text)
        r = rewards_of(model, samples, batch)
        total = torch.zeros(())
        for k, sample in enumerate(samples):
            slots = model.fill(z_l, drawn[f"gradient/{k}"])
            v = model.velocity(slots, text)
            y = (slots.target - sample.z) / 0.5
            push = 2 * (2 * r[k] - 1).view(-1, 1, 1, 1) * (v.detach() - y) / v[0].numel() / 2 / 3
            total = total + (v * push).sum()
        named = model.all_trainable()
        expected = torch.autograd.grad(total, list(named.values()))
        size = max(float(gradient.abs().max()) for gradient in expected)
        for name, gradient in zip(named, expected, strict=True):
            assert_close(run.tape.grads[0][name], gradient, rtol=1e-3, atol=1e-5 * size)

    def test_the_pull_is_to_stage_ones_policy(self, make: Make, flux: str, sft_run: str, batch: Batch) -> None:
        """By |v - v_ref|^2 of another copy of stage 1's network, wherever theta and `old` have gone."""

        def run(kl: float) -> Any:
            model = moved(make(variant="nft", nft_kl=kl))
            for key, old in model.flow.transformer.named_buffers():  # type: ignore[union-attr]
                if ".old." in key:
                    old += 0.03
            kept = of(model, "old")
            return train(model, batch), kept

        (plain, _), (pulled, old) = run(0.0), run(1.0)
        model, before = pulled.model, stage_one(flux, sft_run)
        text, distances = model.text(batch["prompt"]), []
        with torch.no_grad():
            z_l = model.encode(low(batch))
            for k in range(3):
                slots = model.fill(z_l, pulled.spy.drawn[f"gradient/{k}"])
                distances.append((model.velocity(slots, text) - before.velocity(slots, text)).square().mean())
        expected = float(torch.stack(distances).mean())
        assert expected > 1e-4
        assert pulled.metrics["train/loss"] - plain.metrics["train/loss"] == pytest.approx(expected, rel=1e-3)
        assert not equal(of(model, "old"), old)  # the hard copy after the round
        assert equal(of(model, "old"), of(model, "theta"))

    def test_at_the_start_there_is_no_pull(self, make: Make, batch: Batch) -> None:
        plain, pulled = (train(make(variant="nft", nft_kl=kl), batch).metrics["train/loss"] for kl in (0.0, 1.0))
        assert pulled == pytest.approx(plain, abs=1e-9)

    def test_without_stage_ones_policy_a_fit_with_the_pull_is_refused(self, make: Make, batch: Batch) -> None:
        model = make(variant="nft", nft_kl=0.1)
        model.policies.reference = {}
        with pytest.raises(ValueError, match=r"nft_kl=0\.1 needs stage 1's policy, which sft=.* no longer holds"):
            train(model, batch)


def louder(model: NF2T, gain: float) -> NF2T:
    """With a decoder whose output is multiplied."""
    for parameter in model.codec.vae.decoder.conv_out.parameters():
        parameter.data *= gain
    return model


def rewards_of(model: NF2T, samples: Any, batch: Batch) -> Tensor:
    floats = {**batch, "hq": high(batch)}
    scores = [list(model.score(sample.x / 2 + 0.5, floats).values()) for sample in samples]
    return normalised_rewards(torch.stack([torch.stack(score) for score in scores], 1)).r


class TestOnlineUpdate:
    def test_a_hard_copy_makes_the_policies_one(self, make: Make, batch: Batch) -> None:
        model = make(optimizer=sgd())
        before = of(model, "theta")
        train(model, batch)
        assert not equal(of(model, "theta"), before)
        assert equal(of(model, "theta"), of(model, "old"))

    def test_type_1_follows_slowly(self, make: Make, batch: Batch) -> None:
        model = make(optimizer=sgd(), eta_schedule="type1")
        before = of(model, "old")
        train(model, batch)
        theta, old = of(model, "theta"), of(model, "old")
        for key, value in old.items():
            assert_close(value, 0.001 * before[key] + 0.999 * theta[key], rtol=0, atol=1e-7)

    def test_it_follows_once_an_update_however_many_batches_make_it(self, make: Make, batch: Batch) -> None:
        """Type 1's share at update 100 is 0.1."""
        model = make(optimizer=sgd(), eta_schedule="type1", accumulate=2)
        model._steps += 198  # 99 updates of two batches
        first = of(model, "old")
        moved(model)
        theta = of(model, "theta")
        model._steps += 1
        model.follow()
        assert equal(of(model, "old"), first)  # in mid-update
        model._steps += 1
        model.follow()
        for key, value in of(model, "old").items():
            assert_close(value, 0.1 * first[key] + 0.9 * theta[key], rtol=0, atol=1e-7)

    def test_following_does_not_wait_for_the_device(self, make: Make) -> None:
        model = moved(make(optimizer=sgd()))
        model.train_step = torch.empty((), dtype=torch.long, device="meta")  # which cannot be read
        model._steps = 1
        model.follow()
        assert model.update_step == 1
        assert equal(of(model, "old"), of(model, "theta"))

    def test_the_old_policy_is_no_parameter_and_is_in_the_checkpoint(self, make: Make) -> None:
        model = make()
        parameters, keys = dict(model.named_parameters()), model.checkpoint_keys()
        assert not [name for name in parameters if ".old." in name]
        assert len([key for key in keys if ".old." in key]) == len([key for key in keys if ".theta." in key])
        assert keys & parameters.keys() == model.all_trainable().keys()

    def test_frozen_weights_stay_bit_by_bit(self, make: Make, batch: Batch) -> None:
        model = make(optimizer=sgd())
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, batch)
        still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        assert still >= {name for name in before if not name.startswith("flow.") or "lora_" not in name}


class TestTraps:
    """Both of peft's: its switch changes what is trained, and checkpointing recomputes with whatever is active."""

    def test_switching_leaves_what_is_trained_alone(self, make: Make) -> None:
        model = make()
        assert model.flow is not None
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == model.all_trainable().keys()
        with model.policies.use("old"):
            assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        layers = [layer for layer in model.flow.transformer.modules() if hasattr(layer, "lora_A")]
        layers[0].set_adapter("old")  # peft's own
        assert not layers[0].lora_A["theta"].weight.requires_grad

    def test_the_trained_policy_is_back_after_an_error(self, make: Make) -> None:
        model = make()
        assert model.flow is not None
        with pytest.raises(KeyError), model.policies.use("old"):
            raise KeyError
        layers = [layer for layer in model.flow.transformer.modules() if hasattr(layer, "lora_A")]
        assert {tuple(layer.active_adapters) for layer in layers} == {("theta",)}

    def test_checkpointing_changes_no_gradient(self, make: Make, batch: Batch) -> None:
        plain, checkpointed = (
            train(moved(make(gradient_checkpointing=on)), batch).tape.grads[0] for on in (False, True)
        )
        size = max(float(gradient.abs().max()) for gradient in plain.values())
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6 * size)

    def test_switching_before_the_backward_pass_loses_the_gradient(self, make: Make, batch: Batch) -> None:
        """Why the order is as it is: inside the checkpointed blocks theta gets nothing."""
        model = make(gradient_checkpointing=True)
        assert model.flow is not None
        z = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        text = model.text(["a"])
        found = {}
        for switch in (False, True):
            v = model.velocity(model.fill(z, z), text)
            if switch:
                set_adapter(model.flow.transformer, "old")
            with contextlib.suppress(torch.utils.checkpoint.CheckpointError):
                v.square().sum().backward()
            set_adapter(model.flow.transformer, "theta")
            named = {name: p for name, p in model.all_trainable().items() if "transformer_blocks" in name}
            found[switch] = [name for name, p in named.items() if p.grad is not None]
            model.zero_grad()
        assert found[False]
        assert found[True] == []

    def test_a_backward_pass_under_another_policy_is_refused(self, make: Make) -> None:
        model = make()
        with model.policies.use("old"), pytest.raises(RuntimeError, match="the policy 'old' is active"):
            model.descend(lambda loss, step=True, count=True: None, torch.zeros(()), last=True)

    def test_as_many_layers_in_both(self, make: Make) -> None:
        model = make()
        assert model.flow is not None
        layers = [count_lora(model.flow.transformer, name).layers for name in ("old", "theta")]
        assert layers[0] == layers[1] > 0
        assert len(of(model, "old")) == len(of(model, "theta")) == 2 * layers[0]


class TestJudged:
    def test_rewards_judge_what_users_get(self, make: Make, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
        """The wavelet fix gives a restoration the low-quality image's colours, so a cast in it changes no reward."""
        model, seen = make(inference=Inference(color_fix="wavelet", tile=None)), list[Tensor]()
        judge = model.score
        monkeypatch.setattr(model, "score", lambda x_01, of: seen.append(x_01) or judge(x_01, of))
        rolled = model.rollout
        monkeypatch.setattr(
            model, "rollout", lambda *of: [sample._replace(x=0.1 + 0.8 * sample.x) for sample in rolled(*of)]
        )
        spy = train(model, {**batch, "lq": low(batch), "hq": high(batch)}).spy
        assert len(seen) == 3
        for k, x in enumerate(seen):
            monkeypatch.setattr(model, "test_noise", lambda *of, k=k: spy.drawn[f"rollout/{k}"])
            with model.policies.use("old"):  # not yet moved: the learning rate is 0
                raw = 0.1 + 0.8 * to_pm1(model.upscale(low(batch), batch["prompt"]).raw)
            expected = wavelet(to_01(raw), bicubic_upsample(low(batch), 4))
            assert_close(x, expected.clamp(0, 1), rtol=1e-4, atol=1e-5)
            assert (x - to_01(raw)).abs().mean() > 0.01


class TestComparison:
    @pytest.mark.parametrize("color_fix", ["none", "wavelet"])
    def test_a_test_compares_with_stage_one_by_the_same_noise(
        self, make: Make, flux: str, sft_run: str, batch: Batch, tmp_path: Path, color_fix: Any
    ) -> None:
        inference = Inference(color_fix=color_fix, tile=None)
        model, before = moved(make(compared=2, inference=inference)), stage_one(flux, sft_run)
        before.inference = inference
        old = of(model, "old")
        model.output.folder = tmp_path
        batches = [{**one, "lq": low(one), "hq": high(one), "prompt": ["a"]} for one in singles(batch)]
        trainer().test(model, loader(batches), verbose=False)
        expected: dict[str, list[float]] = {"before": [], "after": []}
        for one in batches:
            for noise in range(2):
                for which, method in (("before", before), ("after", model)):
                    told = method.prepare(one["lq"], ["a"])._replace(noise=noise)
                    x = method.upscale(one["lq"], ["a"], told).sr
                    expected[which].append(-float((x - one["hq"]).square().mean()))
        with (tmp_path / "test" / "rewards.csv").open() as file:
            rows = {row["metric"]: row for row in csv.DictReader(file)}
        assert set(rows) == {"colourfulness", "neg_mse", "psnr_y"}
        row = rows["neg_mse"]
        assert (row["images"], row["noises"]) == ("2", "2")
        for which, values in expected.items():
            assert float(row[which]) == pytest.approx(sum(values) / 4, rel=1e-4)
        assert float(row["low"]) <= float(row["after"]) - float(row["before"]) <= float(row["high"])
        figures = tmp_path / "test" / "figures"
        assert "3 samples of one test image" in read_caption(figures / "samples.png")
        assert "2 images, 2 noises each" in read_caption(figures / "rewards.png")
        assert equal(of(model, "old"), old)  # stage 1 stood in its place for a while

    def compared(self, model: NF2T, batches: list[Batch], folder: Path) -> list[Comparison]:
        """What a test notes."""
        model.output.folder, rows = folder, list[Comparison]()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(before_after, "write_comparison", lambda folder, found, compared: rows.extend(found) or [])
            trainer().test(model, loader(batches), verbose=False)
        return rows

    @pytest.mark.parametrize("together", [False, True])
    def test_the_picture_is_of_one_image_of_the_set_whatever_the_batches(
        self, make: Make, batch: Batch, together: bool, tmp_path: Path
    ) -> None:
        """Of two processes this may be the one with the images 3 and 1: image 0 is the other's."""
        mine = {**batch, "index": torch.tensor([3, 1])}
        batches = [mine] if together else singles(mine)
        rows = self.compared(make(pictured=1), [dict(one) for one in batches], tmp_path)
        assert [(row.image, row.noise) for row in rows if row.images is not None] == [("b", 0), ("b", 1), ("b", 2)]
        assert not [row for row in self.compared(make(pictured=0), batches, tmp_path) if row.images is not None]

    def test_a_batch_without_numbers_is_counted(self, make: Make, batch: Batch, tmp_path: Path) -> None:
        batches = [{key: value for key, value in batch.items() if key != "index"} for _ in range(2)]
        batches[1]["name"] = ["c", "d"]
        rows = self.compared(make(pictured=3), batches, tmp_path)
        assert {row.image for row in rows if row.images is not None} == {"d"}

    def test_more_noises_are_compared_than_drawn(self, make: Make, batch: Batch, tmp_path: Path) -> None:
        rows = self.compared(make(compared=4), singles(batch), tmp_path)
        assert [row.noise for row in rows if row.image == "a"] == [row.noise for row in rows if row.image == "b"]
        assert len([row for row in rows if row.images is not None]) == 3

    def test_an_image_that_two_processes_saw_counts_once(
        self, make: Make, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make()
        monkeypatch.setattr(model, "gathered", lambda mine: [*mine, *mine])
        rows = self.compared(model, singles(batch), tmp_path)
        assert [(row.image, row.noise) for row in rows] == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]

    def test_only_the_first_of_several_pictured_images_is_drawn(self, tmp_path: Path) -> None:
        images = (torch.zeros(3, 4, 4), torch.ones(3, 4, 4))
        rows = [Comparison("set", image, noise, {"m": 0.0}, {"m": 1.0}, images) for image in "ab" for noise in range(3)]
        write_comparison(tmp_path, rows, 1)
        assert "3 samples of one test image" in read_caption(tmp_path / "figures" / "samples.png")

    def test_a_metric_that_the_first_image_lacks_is_compared_too(self) -> None:
        rows = [
            Comparison("set", "a", 0, {"m": 0.0}, {"m": 1.0}, None),
            Comparison("set", "b", 0, {"m": 0.0, "psnr_y": 20.0}, {"m": 1.0, "psnr_y": 21.0}, None),
        ]
        assert [(gain.metric, gain.images) for gain in paired_gains(rows)] == [("m", 2), ("psnr_y", 1)]

    def test_it_can_be_switched_off(self, make: Make, batch: Batch, tmp_path: Path) -> None:
        model = make(compared=0)
        model.output.folder, calls = tmp_path, list[int]()
        assert model.flow is not None
        model.flow.register_forward_hook(lambda *_: calls.append(1))
        trainer().test(model, loader(singles(batch)), verbose=False)
        assert len(calls) == 2
        assert {path.name for path in tmp_path.rglob("[!.]*") if path.is_file()} == {"a.png", "b.png", "metrics.csv"}

    @pytest.mark.parametrize("when", ["built", "loaded"])
    def test_a_test_goes_without_a_reward_that_cannot_be_had_and_a_fit_does_not(
        self,
        make: Make,
        batch: Batch,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        when: str,
    ) -> None:
        """LPIPS reads its weights when it is built, pyiqa's metrics when they are loaded."""
        real, model = judges.build_reward, make()
        model.rewards.clear()  # as where Lightning tests only

        def build(name: str, **arguments: Any) -> Any:
            if name == "colourfulness" and when == "built":
                raise FileNotFoundError("no weights of it")
            reward = real(name, **arguments)
            if name == "colourfulness":
                monkeypatch.setattr(type(reward), "load", load)
            return reward

        def load(self: Any, device: Any) -> None:
            raise MetricUnavailableError("no weights of it")

        monkeypatch.setattr(judges, "build_reward", build)
        rows = self.compared(model, singles(batch), tmp_path)
        assert {tuple(row.before) for row in rows} == {("neg_mse", "psnr_y")}
        assert caplog.text.count("reward colourfulness is not computed: no weights of it") == 1
        with pytest.raises((FileNotFoundError, MetricUnavailableError), match="no weights of it"):
            train(model, batch)
        assert int(model.train_step) == 0

    def test_a_captioner_writes_each_test_images_text_once(
        self, make: Make, flux: str, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "Captioner", FakeCaptioner)
        model, texts = make(captioner="someone/llava", compared=2), list[Tensor]()
        captioner = model.captioner
        assert isinstance(captioner, FakeCaptioner)
        assert model.flow is not None
        model.flow.register_forward_pre_hook(lambda network, args: texts.append(args[2].tokens))
        self.compared(model, singles(batch), tmp_path)
        assert_close(torch.cat(captioner.seen), low(batch))
        assert len(captioner.seen) == 2
        expected = [encode_flux_prompts(flux, [f"image {i}.0 {module.SUFFIX}"], max_tokens=6).tokens for i in (1, 2)]
        for calls, text in zip((texts[:7], texts[7:]), expected, strict=True):  # 1 + 2 x 3 and 1 + 2 x 2
            assert all(torch.equal(call, text) for call in calls)
        assert len(texts) == 12
        model.upscale(low(batch)[:1], ["a"])
        assert len(captioner.seen) == 3  # another image has another text

    def test_the_interval_is_over_images(self) -> None:
        """Repeating an image's noises does not narrow it."""
        rows = [
            Comparison("set", image, noise, {"m": 0.0}, {"m": gain}, None)
            for image, gain in zip("abcdef", (0.1, 0.3, 0.2, 0.5, -0.1, 0.2), strict=True)
            for noise in range(3)
        ]
        (many,), (few,) = paired_gains(rows), paired_gains([row for row in rows if row.noise == 0])
        assert (many.low, many.high) == (few.low, few.high)
        assert (many.images, many.noises, few.noises) == (6, 3, 1)
        assert many.after - many.before == pytest.approx(0.2)
        spread = math.sqrt(sum((g - 0.2) ** 2 for g in (0.1, 0.3, 0.2, 0.5, -0.1, 0.2)) / 6 / 6)
        assert many.low == pytest.approx(0.2 - 1.96 * spread, abs=0.02)
        assert many.high == pytest.approx(0.2 + 1.96 * spread, abs=0.02)

    def test_without_references_rewards_that_need_them_are_left_out(self, make: Make, batch: Batch) -> None:
        model = make()
        assert set(model.score(torch.rand(2, 3, 40, 40), {"prompt": ["a", "b"]})) == {"colourfulness"}


def test_stage_two_restores_alike_after_saving_and_loading(make: Make, batch: Batch, tmp_path: Path) -> None:
    model = moved(make())
    keys, state = model.checkpoint_keys(), model.state_dict()
    checkpoint = {"state_dict": {key: state[key] for key in keys}}
    other = make()
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"], strict=False)
    expected = model.upscale(low(batch), batch["prompt"]).sr
    assert torch.equal(other.upscale(low(batch), batch["prompt"]).sr, expected)
    assert equal(of(other, "old"), of(model, "old"))


@pytest.mark.parametrize("change", ["none", "altered", "deleted"])
def test_a_checkpoint_holds_stage_ones_encoder_whatever_becomes_of_its_file(
    make: Make, sft_run: str, batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    own = Path(shutil.copy(sft_run, tmp_path / "one.ckpt"))
    model = moved(make(sft=str(own)))
    saved: dict[str, Any] = {"state_dict": dict(model.state_dict())}
    model.on_save_checkpoint(saved)
    kept = saved["stages"]["sft"]["weights"]
    assert kept
    checkpoint = torch.load(own, weights_only=True)
    for name, value in checkpoint["state_dict"].items():
        if change == "altered" and "lora_" in name:
            value *= 2.0
    torch.save(checkpoint, own)
    if change == "deleted":
        own.unlink()
    other = make(sft=str(own), awaits_checkpoint=True)
    other.on_load_checkpoint(saved)
    other.load_state_dict(saved["state_dict"], strict=False)
    other.stages.check()
    expected = model.upscale(low(batch), batch["prompt"]).sr
    assert torch.equal(other.upscale(low(batch), batch["prompt"]).sr, expected)
    assert bool(other.policies.reference) is (change == "none")  # what a test compares with
    assert ("holds other weights than this checkpoint's run had" in caplog.text) is (change == "altered")


class TestUnscored:
    """A reward that is not finite takes a group's preference, and nothing else."""

    def fit(self, model: NF2T, batch: Batch, folder: Path, bad: set[int], steps: int) -> list[Tensor]:
        """Fit; in the bad steps the second image's first restoration has a NaN. Returns each step's rewards r."""
        score, judge, given = model.score, model.judge, list[Tensor]()

        def scored(x_01: Tensor, batch: Batch) -> dict[str, Tensor]:
            values = score(x_01, batch)
            if int(model.train_step) in bad and len(given) < int(model.train_step):
                values["neg_mse"] = values["neg_mse"].clone().index_fill(0, torch.tensor([1]), math.nan)
            return values

        def judged(samples: Any, batch: Batch) -> Tensor:
            given.append(judge(samples, batch))
            return given[-1]

        model.score, model.judge = scored, judged  # type: ignore[method-assign]
        runner = Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        runner.fit(model, loader([dict(batch) for _ in range(steps)]))
        return given

    def test_the_fit_goes_on_without_that_groups_preference(
        self, make: Make, batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = make()
        r = self.fit(model, batch, tmp_path, {2, 3}, steps=3)
        assert (r[1][:, 1] == 0.5).all()
        assert not (r[1][:, 0] == 0.5).all()
        assert not (r[0] == 0.5).all(0).any()
        assert all(value.isfinite().all() for value in model.state_dict().values())
        said = [record.getMessage() for record in caplog.records if "have no preference" in record.getMessage()]
        assert ["(1 so far)" in said[0], "(2 so far)" in said[1]] == [True, True]
        saved = sorted(path.name for path in tmp_path.rglob("unscored_*.pt"))
        assert saved == ["unscored_step2_rank0.pt", "unscored_step3_rank0.pt"]
        found = torch.load(next(tmp_path.rglob("unscored_step2*")), weights_only=True)
        assert found["name"] == batch["name"]

    def test_it_stops_after_several_in_a_row(self, make: Make, batch: Batch, tmp_path: Path) -> None:
        model = make(group_size=2, fast_on_policy=True)
        with pytest.raises(UnscoredError, match="in 5 train steps in a row, up to step 7:"):
            self.fit(model, batch, tmp_path, {1, 3, 4, 5, 6, 7}, steps=8)
        assert len(list(tmp_path.rglob("unscored_*.pt"))) == 6

    def test_no_reward_of_that_group_is_heard(self) -> None:
        raw = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
        expected = normalised_rewards(raw).r
        raw[1, 3, 2] = math.inf
        found = normalised_rewards(raw)
        assert found.unscored.tolist() == [False, False, True]
        assert (found.r[:, 2] == 0.5).all()
        assert torch.equal(found.r[:, :2], expected[:, :2])
