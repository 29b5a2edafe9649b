"""The bases: which input reaches which network, what they start from, and how they are taken away."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from torch import Tensor
from torch.testing import assert_close

from common.conditioning.text import encode_prompts
from common.loading import load_unet
from papers.rfsr import RFSR, BaseSR, ControlNet, SeeSR, Untagged, base_models
from papers.rfsr.base_models import Base
from papers.rfsr.seesr import SeeSRControlNet, SeeSRUNet

from .steps import Batch, Make, described, low, see, upsampled

TAGS = ["roof, tree", "dog, grass"]


def record(model: Any) -> dict[str, list[tuple[Any, ...]]]:
    calls: dict[str, list[tuple[Any, ...]]] = {"unet": [], "controlnet": []}
    for name in calls:
        getattr(model.base, name).register_forward_pre_hook(lambda _, args, name=name: calls[name].append(args))
    return calls


class TestSeeSR:
    """Section 2's table, column SeeSR."""

    def options(self) -> dict[str, Any]:
        return {"cfg_scale": 5.5, "prompt_suffix": "clean, 8k", "negative_prompt": "dotted, noise"}

    @pytest.mark.parametrize(
        ("given", "texts"),
        [
            (["", ""], ["roof, tree, clean, 8k", "dog, grass, clean, 8k"]),
            (["a house", "two dogs"], ["a house, clean, 8k", "two dogs, clean, 8k"]),
        ],
    )
    def test_at_test_time_both_networks_read_tags_and_suffix_then_the_negative_prompt(
        self, make: Make, sd: str, batch: Batch, image_tokens: Tensor, given: list[str], texts: list[str]
    ) -> None:
        model = make("seesr", self.options())
        calls = record(model)
        model.upscale(low(batch), given)
        positive = encode_prompts(sd, texts)
        negative = encode_prompts(sd, ["dotted, noise"] * 2)
        for found in calls.values():
            assert len(found) == 10
            for i, (_, t, e_txt, _, e_img) in enumerate(found):
                assert t == model.base.timesteps[i // 2]
                assert torch.equal(e_txt.expand(2, -1, -1), negative if i % 2 else positive)
                assert torch.equal(e_img, image_tokens)  # in both halves
        for *_, x_up, _ in calls["controlnet"]:
            assert_close(x_up, upsampled(low(batch)))
            assert float(x_up.min()) >= 0

    def test_in_training_they_read_the_tags_alone(
        self, make: Make, sd: str, batch: Batch, image_tokens: Tensor
    ) -> None:
        model = make("seesr", self.options())
        calls = record(model)
        with torch.no_grad():
            c = see(model, low(batch), ["", ""])
            model.base.predict(torch.randn(2, 4, 8, 8), 601, c)
        for ((_, t, e_txt, _, e_img),) in calls.values():
            assert t == 601
            assert torch.equal(e_txt, encode_prompts(sd, TAGS))
            assert torch.equal(e_img, image_tokens)

    def test_guidance_is_the_formula(self, make: Make, batch: Batch) -> None:
        model = make("seesr", self.options())
        z = torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            c = see(model, low(batch), batch["prompt"])
            other = c._replace(description=c.description._replace(e_txt=c.description.e_neg))
            eps, neg = (model.base.predict(z, 401, x) for x in (c, other))
            assert_close(model.base.predict(z, 401, c, 5.5), 5.5 * eps - 4.5 * neg, rtol=1e-4, atol=1e-5)
            assert_close(model.base.predict(z, 401, c, 0.0), neg)
        assert float((eps - neg).abs().max()) > 1e-4

    def test_image_tokens_are_the_whole_images_in_every_tile(
        self, make: Make, image_tokens: Tensor, batch: Batch
    ) -> None:
        from common.restoration import Inference

        model = make("seesr", {"cfg_scale": 1.0}, inference=Inference(color_fix="none", tile=16, overlap=0))
        calls = record(model)
        model.upscale(low(batch), batch["prompt"])
        assert len(calls["unet"]) == 4 * 5
        assert all(torch.equal(args[4], image_tokens) for args in calls["unet"])
        assert {tuple(args[3].shape) for args in calls["controlnet"]} == {(2, 3, 16, 16)}

    def test_its_networks_need_a_tagger_and_random_ones_do_not(self, sd: str, seesr: str) -> None:
        base = SeeSR(sd, seesr)
        with pytest.raises(ValueError, match=r"base.tagger=null: SeeSR needs tags and image tokens; give papers\.rfsr"):
            base.configure()
        SeeSR(sd, seesr, Untagged(5, 10)).configure()

    def test_the_pretrained_folder_needs_no_unet(self, sd: str, seesr: str, tmp_path: Path) -> None:
        shutil.copytree(sd, tmp_path / "sd", ignore=shutil.ignore_patterns("unet", "controlnet"))
        base = SeeSR(str(tmp_path / "sd"), seesr, Untagged(5, 10))
        base.configure()
        assert base.config["prediction_type"] == "epsilon"

    def test_checkpointing_changes_no_gradient(self, make: Make, batch: Batch) -> None:
        found = []
        for checkpointing in (False, True):
            model = make("seesr", {"gradient_checkpointing": checkpointing})
            c = see(model, low(batch), batch["prompt"])
            z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            x_01 = model.image(z, model.base.predict(z, 601, c), 601)
            x_01.square().mean().backward()
            found.append({name: p.grad for name, p in model.all_trainable().items()})
        for name, grad in found[0].items():
            assert_close(found[1][name], grad, rtol=1e-4, atol=1e-8)


class TestControlNet:
    def test_a_grown_one_changes_nothing_and_is_the_u_net_elsewhere(self) -> None:
        state = torch.get_rng_state()
        base = ControlNet("tiny", grow=True)
        base.configure()
        assert torch.equal(torch.get_rng_state(), state)
        unet = load_unet("tiny")
        own, theirs = base.controlnet.state_dict(), unet.state_dict()
        shared = own.keys() & theirs.keys()
        assert len(shared) > 50
        assert all(torch.equal(own[name], theirs[name]) for name in shared)
        assert all(name.startswith("controlnet_") for name in own.keys() - shared)
        x = torch.rand(2, 3, 16, 16)
        with torch.no_grad():
            c = base.see(x, 4, described(base, x, ["a house", "two dogs"]))
            z = torch.randn_like(c.z_lq)
            plain = unet(z, 601, c.description.e_txt, return_dict=False)[0]
            assert torch.equal(base.predict(z, 601, c), plain)
        assert base.timesteps == list(range(901, 0, -100))

    def test_a_grown_one_is_drawn_on_the_cpu_and_goes_to_the_u_net(
        self, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, str]]
    ) -> None:
        base = ControlNet("tiny", grow=True)
        base.configure()
        grow, bare = ControlNetModel.from_unet, {"load_weights_from_unet": False}  # meta has none to copy
        monkeypatch.setattr(ControlNetModel, "from_unet", lambda unet, **config: grow(unet, **config | bare))
        monkeypatch.setattr(base_models, "load_unet", lambda _: load_unet("tiny").to("meta"))
        del calls[:]
        with torch.device("meta"):
            _, controlnet = base.load_networks()
        assert ("uniform_", "cpu") in calls
        assert {p.device.type for p in controlnet.parameters()} == {"meta"}

    def test_its_controlnet_looks_at_the_low_quality_latents(self, make: Make, batch: Batch) -> None:
        model = make()
        calls = record(model)
        with torch.no_grad():
            c = see(model, low(batch), batch["prompt"])
            model.base.predict(torch.randn(2, 4, 8, 8), 601, c)
            z_lq = 0.18215 * model.base.codec.vae.encode(2 * upsampled(low(batch)) - 1).latent_dist.mode()
        assert_close(calls["controlnet"][0][3], z_lq)
        assert_close(c.z_lq, z_lq)

    def test_a_pair_in_a_folder_is_loaded_as_it_is(self, make: Make, sd: str) -> None:
        net = ControlNetModel.from_pretrained(sd, subfolder="controlnet").state_dict()
        own = make().base.controlnet.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in net.items())


class TestBaseSR:
    def test_weights_of_timesteps_are_noise_over_signal_up_to_a_limit(self, make_base: Callable[..., Base]) -> None:
        model = BaseSR(make_base(), weight_limit=5.0)
        model.configure_model()
        t = torch.tensor([0, 250, 999])
        found = model.weight(t, torch.zeros(3, 4, 8, 8))
        abar = model.base.schedule.alpha_bar[t]
        expected = [float((1 - a) / a) for a in abar[:2]] + [5.0]
        assert_close(found, torch.tensor(expected).view(3, 1, 1, 1))
        assert not torch.equal(found, torch.ones(3, 1, 1, 1))
        model = BaseSR(make_base())
        model.configure_model()
        assert torch.equal(model.weight(t, torch.zeros(3, 4, 8, 8)), torch.ones(3, 1, 1, 1))


class TestExport:
    """Defect 3 of the released code: one network was written over the other."""

    def test_the_folder_holds_both_networks_and_serves_as_base(
        self, make: Make, disturb: Callable[..., RFSR], sd: str, batch: Batch, tmp_path: Path, tags: str
    ) -> None:
        from papers.rfsr import TagFiles

        model = disturb(make("seesr", trained="full"))
        model.export(tmp_path)
        for kind, name in ((SeeSRUNet, "unet"), (SeeSRControlNet, "controlnet")):
            saved, own = kind.from_pretrained(tmp_path, subfolder=name).state_dict(), getattr(model.base, name)
            assert all(torch.equal(value, saved[key]) for key, value in own.state_dict().items())
        base = SeeSR(sd, str(tmp_path), TagFiles(tags), sampler="ddim", steps=5, cfg_scale=1.0)
        other = BaseSR(base, inference=model.inference)
        other.configure_model()
        again = other.upscale(low(batch), ["", ""]).sr
        assert_close(again, model.upscale(low(batch), ["", ""]).sr, rtol=0, atol=1e-5)

    def test_adapters_are_merged(self, make: Make, disturb: Callable[..., RFSR], batch: Batch, tmp_path: Path) -> None:
        model = disturb(make("seesr", regulariser="lora", lora_rank=2), 0.2)
        c = see(model, low(batch), batch["prompt"])
        z = torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            expected = model.base.predict(z, 601, c)
            with model.as_it_was():
                assert float((model.base.predict(z, 601, c) - expected).abs().max()) > 1e-3
            model.export(tmp_path)
            model.base.unet = SeeSRUNet.from_pretrained(tmp_path, subfolder="unet").eval()
            model.base.controlnet = SeeSRControlNet.from_pretrained(tmp_path, subfolder="controlnet").eval()
            assert_close(model.base.predict(z, 601, c), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"trained": "full"}, {"regulariser": "lora"}])
def test_the_optimiser_holds_what_is_declared_and_no_more(make: Make, options: dict[str, Any]) -> None:
    model = make("seesr", optimizer=partial(torch.optim.AdamW, lr=1e-3), **options)
    ((optimizer,), _) = model.configure_optimizers()
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = {
        name: p
        for name, p in model.named_parameters()
        if ("lora_" in name if "regulariser" in options else name.startswith("base.controlnet."))
        or ("regulariser" not in options and ".image_attentions." in name)
        or ("trained" in options and name.startswith("base.unet."))
    }
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in wanted.values()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted.keys()
