"""DFOSD's method: Algorithm 1 step by step, its gradients, its switches; driven by a real Trainer on a small model."""

import hashlib
import math
from collections.abc import Callable
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

from common.conditioning.text import encode_prompts
from common.loading import architecture_only
from common.losses import EADISTS, discriminator_loss
from common.restoration import Inference
from launch.parameters import parse
from papers.dfosd import DFOSD
from papers.dfosd.networks import LatentDiscriminator, PixelDiscriminator

CONFIGS = Path(__file__).resolve().parents[3] / "papers/dfosd/configs"
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # SD's schedule, independently
SGD = partial(torch.optim.SGD, lr=1e-2)
Batch = dict[str, Any]


def method(pretrained: str, **options: Any) -> DFOSD:
    small: dict[str, Any] = {"lora_rank": 2, "lora_alpha": 2, "perceptual_weights": "random", "perceptual_width": 0.05}
    return DFOSD(pretrained, **{**small, "disc_hidden": 8, "optimizer": SGD, "disc_optimizer": SGD, **options})


class Silent:
    """Draws without noise, at given timesteps: what is left can be computed by hand."""

    def __init__(self, index: Tensor, t: list[int]) -> None:
        self.index, self.t = index.tolist(), t

    def normal(self, stream: str, shape: Any) -> Tensor:
        return torch.zeros(len(self.index), *shape)

    def integers(self, stream: str, low: int, high: int) -> Tensor:
        assert (low, high) == (0, 999)
        return torch.tensor(self.t)


@dataclass
class Tape(Callback):
    """What went in and out of the networks in training, and the gradients of each optimiser before clipping."""

    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = field(default_factory=dict)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)
    disc_required_grad: list[bool] = field(default_factory=list)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        networks = {"encode": pl_module.codec.vae.encoder, "decode": pl_module.codec.vae.decoder}
        networks |= {"unet": pl_module.generator.unet, "disc": pl_module.discriminator}
        for name, network in networks.items():
            if network is not None:
                self.calls[name] = []
                network.register_forward_hook(partial(self._write, name, pl_module), with_kwargs=True)

    def _write(self, name: str, module: DFOSD, network: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.calls[name].append((args, kwargs, out))
        if name == "disc":
            self.disc_required_grad.append(any(p.requires_grad for p in network.parameters()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        named = pl_module.named_parameters()
        self.grads.append({name: p.grad.clone() for name, p in named if p.grad is not None})


@dataclass
class Run:
    model: DFOSD
    tape: Tape
    metrics: dict[str, float]
    before: dict[str, Tensor]


def train(model: DFOSD, batch: Batch, steps: int = 1, silent: list[int] | None = None) -> Run:
    model.configure_model()
    if silent is not None:
        model.draws = lambda batch: Silent(batch["index"], silent)  # type: ignore[method-assign, assignment, return-value]  # a stand-in
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tape = Tape()
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[tape], log_every_n_steps=1,
    )  # fmt: skip
    batches: Any = [batch] * steps
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    assert int(model.train_step) == trainer.global_step == steps
    return Run(model, tape, {name: float(value) for name, value in trainer.callback_metrics.items()}, before)


def images(batch: Batch) -> tuple[Tensor, Tensor]:
    """x_L up-sampled and x_H, both in [-1,1], by hand."""
    lq, hq = batch["lq"].float() / 255, batch["hq"].float() / 255
    up = F.interpolate(lq, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
    return up * 2 - 1, hq * 2 - 1


def changed(run: Run) -> set[str]:
    now = run.model.state_dict()
    return {name for name, value in run.before.items() if not torch.equal(value, now[name])}


def digest(module: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        sha.update(name.encode() + value.numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def plain(sd: str, batch: Batch) -> Run:
    """One step of the paper's method, without noise in F and at known timesteps."""
    return train(method(sd), batch, silent=[200, 700])


@pytest.fixture(scope="module")
def alone(sd: str, batch: Batch) -> Run:
    """One step without a discriminator."""
    return train(method(sd, discriminator="none"), batch)


STILL = partial(torch.optim.SGD, lr=0.0)


@pytest.fixture(scope="module")
def still(sd: str, batch: Batch) -> Run:
    """Two equal steps, since Lightning forgets what the first one of an epoch logs before an optimiser's step."""
    return train(method(sd, optimizer=STILL, disc_optimizer=STILL), batch, 2, [200, 700])


class TestOneStepGenerator:
    def test_the_result_is_the_closed_form(self, sd: str, batch: Batch) -> None:
        model = method(sd)
        model.configure_model()
        x_l, _ = images(batch)
        e = model.text_condition(["", ""])
        with torch.no_grad():
            z_l, z_h_hat = model.restore_latent(x_l, e)
            vae = AutoencoderKL.from_pretrained(sd, subfolder="vae").eval()
            unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet").eval()
            z = 0.18215 * vae.encode(x_l).latent_dist.mode()
            eps = unet(z, 399, e.expand(2, -1, -1)).sample
        torch.testing.assert_close(z_l, z, rtol=1e-5, atol=1e-6)
        signal, sigma = math.sqrt(ABAR[399]), math.sqrt(1 - ABAR[399])
        assert signal == pytest.approx(0.652753, abs=1e-6)
        torch.testing.assert_close(z_h_hat, (z - sigma * eps) / signal, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(signal * z_h_hat + sigma * eps, z_l, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("timestep", [0, 200, 999])
    def test_the_timestep_reaches_unet_and_formula(self, sd: str, batch: Batch, timestep: int) -> None:
        model = method(sd, timestep=timestep, discriminator="none", perceptual="none")
        model.configure_model()
        assert model.generator is not None
        seen: list[Any] = []
        model.generator.unet.register_forward_hook(lambda _m, args, out: seen.append((args, out.sample)))
        with torch.no_grad():
            z_l, z_h_hat = model.restore_latent(images(batch)[0], model.text_condition(["", ""]))
        (z, t, _), eps = seen[0]
        assert int(t) == timestep
        assert torch.equal(z, z_l)  # no noise, no factor
        expected = (z_l - math.sqrt(1 - ABAR[timestep]) * eps) / math.sqrt(ABAR[timestep])
        torch.testing.assert_close(z_h_hat, expected, rtol=1e-5, atol=1e-5)

    def test_a_timestep_outside_the_schedule_is_refused(self, sd: str) -> None:
        with pytest.raises(ValueError, match="timestep=1000"):
            method(sd, timestep=1000).configure_model()

    def test_an_image_of_one_tile_needs_no_tiles(self, sd: str, batch: Batch) -> None:
        outs = []
        for tile in (None, 32):
            model = method(sd, inference=Inference(tile=tile, overlap=16), discriminator="none", perceptual="none")
            model.configure_model()
            outs.append(model.upscale(batch["lq"].float() / 255, ["", ""]))
        torch.testing.assert_close(outs[0].sr, outs[1].sr, rtol=0, atol=1e-6)
        assert outs[0].sr.shape == (2, 3, 32, 32)
        assert not torch.allclose(outs[0].raw, outs[0].sr, atol=1e-3)  # AdaIN did something

    def test_restore_maps_back_to_0_1(self, sd: str, batch: Batch) -> None:
        model = method(sd, discriminator="none", perceptual="none")
        model.configure_model()
        x_l, _ = images(batch)
        with torch.no_grad():
            _, z = model.restore_latent(x_l, model.text_condition(["", ""]))
            raw = model.codec.vae.decode(z / 0.18215).sample
            sr = model.restore(batch["lq"].float() / 255, model.prepare(batch["lq"], ["", ""]))
        torch.testing.assert_close(sr, (raw + 1) / 2, rtol=1e-5, atol=1e-5)


class TestAlgorithm1:
    def test_it_calls_each_network_as_often_as_the_paper_does(self, plain: Run) -> None:
        assert {name: len(calls) for name, calls in plain.tape.calls.items()} == {
            "encode": 2, "decode": 1, "unet": 1, "disc": 2,
        }  # fmt: skip
        fake, both = (args[0] for args, _, _ in plain.tape.calls["disc"])
        assert (len(fake), len(both)) == (2, 4)

    def test_the_discriminator_sees_rescaled_latents_at_their_own_timestep(self, plain: Run, batch: Batch) -> None:
        model, calls = plain.model, plain.tape.calls
        (z_l, _, _), eps = calls["unet"][0][0], calls["unet"][0][2].sample
        z_hat = (z_l - math.sqrt(1 - ABAR[399]) * eps) / math.sqrt(ABAR[399])
        with torch.no_grad():
            z_h = 0.18215 * model.codec.vae.encode(images(batch)[1]).latent_dist.mode()
        t = torch.tensor([200, 700])
        signal = torch.tensor(ABAR[t.numpy()]).sqrt().float().view(2, 1, 1, 1)
        (fake, t_fake, _), (both, t_both, _) = (args for args, _, _ in calls["disc"])
        assert t_fake.tolist() == [200, 700]
        assert t_both.tolist() == [200, 700, 200, 700]  # one t for the pair
        torch.testing.assert_close(fake, signal * z_hat, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both, torch.cat([signal * z_hat, signal * z_h]), rtol=1e-5, atol=1e-5)

    def test_only_the_generators_step_has_a_graph_to_the_latents(self, plain: Run) -> None:
        fake, both = (args[0] for args, _, _ in plain.tape.calls["disc"])
        assert fake.requires_grad
        assert not both.requires_grad  # z_H_hat detached, z_H without a graph
        assert plain.tape.disc_required_grad == [False, True]

    def test_the_logged_losses_are_the_formulas(self, still: Run, batch: Batch) -> None:
        _, x_h = images(batch)
        x_hat = still.tape.calls["decode"][0][2].detach()
        logits, both = (out.detach() for _, _, out in still.tape.calls["disc"][-2:])
        fake, real = both.chunk(2)
        metrics = still.metrics
        assert metrics["train/mse"] == pytest.approx(float((x_hat - x_h).square().mean()), rel=1e-5)
        ea_dists = EADISTS("random", 0.05)((x_hat + 1) / 2, (x_h + 1) / 2).mean()
        assert metrics["train/ea_dists"] == pytest.approx(float(ea_dists), rel=1e-4)
        assert metrics["train/gan"] == pytest.approx(float(-torch.sigmoid(logits).log().mean()), rel=1e-5)
        total = metrics["train/mse"] + metrics["train/ea_dists"] + 5e-3 * metrics["train/gan"]
        assert metrics["train/loss"] == pytest.approx(total, rel=1e-5)
        loss_d = -(1 - torch.sigmoid(fake)).log().mean() - torch.sigmoid(real).log().mean()
        assert metrics["train/discriminator"] == pytest.approx(float(loss_d), rel=1e-5)
        assert metrics["train/d_real"] == pytest.approx(float(real.mean()), rel=1e-4)
        assert metrics["train/d_fake"] == pytest.approx(float(fake.mean()), rel=1e-4)

    def test_the_discriminators_second_look_follows_the_generators_update_but_uses_the_old_latents(
        self, plain: Run
    ) -> None:
        fake, both = (args[0] for args, _, _ in plain.tape.calls["disc"])
        assert torch.equal(fake.detach(), both[:2])

    def test_each_step_changes_only_its_own_network(self, plain: Run) -> None:
        start, between, end = plain.tape.states[0], plain.tape.states[1], plain.model.state_dict()

        def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
            return {name for name, value in a.items() if not torch.equal(value, b[name])}

        first, second = different(start, between), different(between, end)
        assert any(name.startswith("embedding.") for name in first)
        assert any(name.startswith("generator.") for name in first)
        assert not any(name.startswith("discriminator.") for name in first)
        assert second
        assert all(name.startswith("discriminator.") for name in second)
        of_generator, of_discriminator = plain.tape.grads
        assert of_generator["embedding.embedding"].abs().sum() > 0
        assert all(name.startswith(("generator.", "embedding.")) for name in of_generator)
        assert all(name.startswith("discriminator.") for name in of_discriminator)

    def test_three_steps_change_what_is_trained_and_nothing_else(self, sd: str, batch: Batch) -> None:
        model = method(sd, optimizer=partial(torch.optim.AdamW, lr=1e-3), disc_optimizer=partial(torch.optim.AdamW))
        model.configure_model()
        vae = digest(model.codec)
        run = train(model, batch, steps=3)
        assert digest(model.codec) == vae
        moved = changed(run) - {"train_step"}
        assert moved == set(model.all_trainable())
        assert all("lora_" in name or name.startswith(("embedding.", "discriminator.head.")) for name in moved)
        required = {name for name, p in model.named_parameters() if p.requires_grad}
        assert required == set(model.all_trainable())
        assert model.generator is not None
        assert model.generator.unet.conv_in.scaling["default"] == 1.0  # alpha = rank

    def test_noise_and_timesteps_are_fresh_in_each_step_and_each_half(self, sd: str, batch: Batch) -> None:
        noises = self._noises(train(method(sd), batch))
        assert all(0.85 < float(noise.std()) < 1.15 for noise in noises)
        for i, a in enumerate(noises):
            assert all(abs(float((a * b).mean())) < 0.2 for b in noises[:i])

    def test_share_noise_shares_it_between_real_and_fake(self, sd: str, batch: Batch) -> None:
        _, fake, real = self._noises(train(method(sd, share_noise=True), batch))
        torch.testing.assert_close(fake, real, rtol=0, atol=1e-3)
        assert 0.85 < float(fake.std()) < 1.15

    @staticmethod
    def _noises(run: Run) -> list[Tensor]:
        """Noise of the generator's step, of the fakes and of the reals, recovered from what D saw."""
        calls = run.tape.calls
        z_l, eps = calls["unet"][0][0][0], calls["unet"][0][2].sample.detach()
        z_hat = (z_l - math.sqrt(1 - ABAR[399]) * eps) / math.sqrt(ABAR[399])
        mean = calls["encode"][1][2]
        z_h = 0.18215 * run.model.codec.vae.quant_conv(mean).chunk(2, 1)[0].detach()
        (seen_g, t_g, _), (seen_d, t_d, _) = (args for args, _, _ in calls["disc"])
        assert t_d[:2].tolist() == t_d[2:].tolist() != t_g.tolist()

        def noise(seen: Tensor, t: Tensor, z: Tensor) -> Tensor:
            abar = torch.tensor(ABAR[t.numpy()]).float().view(-1, 1, 1, 1)
            return (seen.detach() - abar.sqrt() * z) / (1 - abar).sqrt()

        return [noise(seen_g, t_g, z_hat), noise(seen_d[:2], t_d[:2], z_hat), noise(seen_d[2:], t_d[2:], z_h)]

    def test_forward_noise_has_the_right_limits(self, sd: str) -> None:
        model = method(sd)
        model.configure_model()
        assert model.generator is not None
        schedule = model.generator.schedule
        g = torch.Generator().manual_seed(0)
        z, noise = (torch.randn(1, 4, 128, 128, generator=g) for _ in range(2))
        assert schedule.alpha_bar[0].item() == pytest.approx(0.99915, abs=1e-6)
        assert float((schedule.add_noise(z, noise, 0) - z).std()) < 0.03
        assert float(schedule.add_noise(z, noise, 999).var()) == pytest.approx(1, abs=0.02)


class TestGradients:
    def test_without_lambda_1_only_the_spatial_loss_is_left(self, sd: str, batch: Batch, alone: Run) -> None:
        zero = train(method(sd, lambda_gan=0.0), batch).tape.grads[0]
        none = alone.tape.grads[0]
        assert zero.keys() == none.keys()
        for name, grad in none.items():
            torch.testing.assert_close(zero[name], grad, rtol=1e-5, atol=1e-8)

    def test_without_lambda_2_only_the_mse_is_left(self, sd: str, batch: Batch, alone: Run) -> None:
        zero = train(method(sd, lambda_perceptual=0.0, discriminator="none"), batch).tape.grads[0]
        none = train(method(sd, perceptual="none", discriminator="none"), batch).tape.grads[0]
        with_it = alone.tape.grads[0]
        for name, grad in none.items():
            torch.testing.assert_close(zero[name], grad, rtol=1e-5, atol=1e-8)
        assert any(not torch.allclose(with_it[name], grad, rtol=1e-3, atol=1e-8) for name, grad in none.items())

    def test_the_adversarial_gradient_is_that_of_minus_log_d(self, sd: str, batch: Batch, alone: Run) -> None:
        """Against autograd on the formula, written out from the networks."""
        strong = train(method(sd, lambda_gan=100.0), batch, silent=[200, 700]).tape.grads[0]
        model = method(sd)
        model.configure_model()
        assert model.generator is not None
        assert model.discriminator is not None
        assert model.embedding is not None
        model.discriminator.requires_grad_(False)
        x_l, _ = images(batch)
        z_l = 0.18215 * model.codec.vae.encode(x_l).latent_dist.mode()
        eps = model.generator.unet(z_l, 399, model.embedding.embedding.expand(2, -1, -1)).sample
        z_hat = (z_l - math.sqrt(1 - ABAR[399]) * eps) / math.sqrt(ABAR[399])
        t = torch.tensor([200, 700])
        signal = torch.tensor(ABAR[t.numpy()]).sqrt().float().view(2, 1, 1, 1)
        logits = model.discriminator(signal * z_hat, t, encode_prompts(sd, [""]))
        (-torch.sigmoid(logits).log().mean()).backward()
        named = dict(model.named_parameters())
        for name, grad in strong.items():
            expected = named[name].grad
            assert expected is not None
            torch.testing.assert_close(grad - alone.tape.grads[0][name], 100 * expected, rtol=2e-3, atol=2e-5)
        assert any(float(p.grad.abs().max()) > 1e-5 for p in named.values() if p.grad is not None)

    def test_the_generator_learns_to_raise_the_fake_logit(self, sd: str, batch: Batch) -> None:
        options = {"perceptual": "none", "lambda_gan": 1e4, "clip": None, "disc_optimizer": STILL}
        run = train(method(sd, **options, optimizer=partial(torch.optim.SGD, lr=1e-7)), batch, 4, [200, 700])
        fakes = [float(out.detach().mean()) for args, _, out in run.tape.calls["disc"] if len(args[0]) == 2]
        assert fakes == sorted(fakes)
        assert fakes[-1] > fakes[0] + 1e-6

    def test_the_discriminator_learns_to_tell_them_apart(self, sd: str, batch: Batch) -> None:
        run = train(method(sd, optimizer=STILL, disc_optimizer=SGD, clip=None), batch, 5, [200, 700])
        both = [out.detach().flatten(1).mean(1) for args, _, out in run.tape.calls["disc"] if len(args[0]) == 4]
        losses = [float(F.softplus(out[:2]).mean() + F.softplus(-out[2:]).mean()) for out in both]
        assert losses == sorted(losses, reverse=True)
        gaps = [float(out[2:].mean() - out[:2].mean()) for out in both]
        assert gaps[-1] > gaps[0]


def has(*parts: str) -> Callable[[DFOSD], bool]:
    return lambda model: all(any(part in name for name in model.all_trainable()) for part in parts)


SWITCHES: dict[str, tuple[dict[str, Any], Callable[[DFOSD], bool], set[str]]] = {
    "latent D": ({"discriminator": "latent"}, has("discriminator.levels", "discriminator.time"), {"train/gan"}),
    "pixel D": ({"discriminator": "pixel"}, has("discriminator.levels"), {"train/gan"}),
    "no perceptual loss": ({"perceptual": "none"}, lambda m: not m.image_losses, {"train/mse"}),
    "LPIPS": ({"perceptual": "lpips"}, lambda m: list(m.loss_networks) == ["lpips"], {"train/lpips"}),
    "EA-LPIPS": ({"perceptual": "ea_lpips"}, lambda m: list(m.loss_networks) == ["ea_lpips"], {"train/ea_lpips"}),
    "DISTS": ({"perceptual": "dists"}, lambda m: list(m.loss_networks) == ["dists"], {"train/dists"}),
    "own prompt of D": ({"disc_prompt": "own_learned"}, has("disc_embedding."), {"train/gan"}),
    "shared prompt of D": ({"disc_prompt": "shared_detached"}, has("embedding."), {"train/gan"}),
    "time projections": ({"lora_time": True}, has("generator.unet.down_blocks.0.resnets.0.time_emb_proj."), set()),
    "checkpointing": ({"gradient_checkpointing": True}, has("embedding."), set()),
    "average": ({"ema_decay": 0.9}, lambda m: m.ema is not None and m.ema.updates == 2, set()),
    "e from the empty prompt": ({"embedding_init": "empty_prompt"}, has("embedding."), set()),
}


class TestSwitches:
    @pytest.mark.parametrize("name", SWITCHES)
    def test_every_ablation_trains(self, name: str, sd: str, batch: Batch) -> None:
        options, holds, logged = SWITCHES[name]
        run = train(method(sd, **options), batch, 2)
        assert holds(run.model)
        assert logged <= run.metrics.keys()
        assert all(math.isfinite(value) for value in run.metrics.values())
        assert changed(run) >= {n for n in run.model.all_trainable() if "lora_B" in n or "embedding" in n}

    def test_no_discriminator_means_one_optimiser_and_no_second_encoding(self, alone: Run) -> None:
        assert len(alone.tape.grads) == len(alone.tape.calls["encode"]) == 1
        assert list(alone.model.trainable_patterns()) == ["generator"]
        assert not {"train/gan", "train/discriminator"} & alone.metrics.keys()

    def test_the_pixel_discriminator_looks_at_images(self, sd: str, batch: Batch) -> None:
        run = train(method(sd, discriminator="pixel"), batch)
        x_hat = run.tape.calls["decode"][0][2]
        (fake,), (both,) = (args for args, _, _ in run.tape.calls["disc"])
        assert fake is x_hat
        torch.testing.assert_close(both, torch.cat([x_hat.detach(), images(batch)[1]]))
        assert not both.requires_grad

    def test_the_discriminators_text_is_what_was_asked_for(self, sd: str, batch: Batch) -> None:
        def text(**options: Any) -> tuple[DFOSD, Tensor, Tensor]:
            run = train(method(sd, **options), batch)
            first, second = (args[2] for args, _, _ in run.tape.calls["disc"])
            return run.model, first, second

        _, first, second = text()
        assert torch.equal(first, encode_prompts(sd, [""]))
        assert torch.equal(first, second)
        model, first, second = text(disc_prompt="shared_detached")
        assert not second.requires_grad
        assert first.shape == (1, 77, 16)
        assert not torch.equal(first, encode_prompts(sd, [""]))
        model, first, _ = text(disc_prompt="own_learned")
        assert model.disc_embedding is not None
        assert model.embedding is not None
        assert not torch.equal(model.disc_embedding.embedding, model.embedding.embedding)

    def test_a_shared_prompt_that_does_not_fit_is_refused(self, sd: str, sdxl: str) -> None:
        for options in ({"condition": "empty"}, {"disc_pretrained": sdxl}):
            with pytest.raises(ValueError, match="disc_prompt=shared_detached"):
                method(sd, disc_prompt="shared_detached", **options).configure_model()

    def test_lora_time_adapts_the_time_projections_too(self, sd: str) -> None:
        names = {}
        for switch in (False, True):
            model = method(sd, lora_time=switch, discriminator="none", perceptual="none")
            model.configure_model()
            names[switch] = set(model.all_trainable())
        added = names[True] - names[False]
        assert names[False] < names[True]
        assert all("time_emb_proj" in name for name in added)

    def test_the_head_of_the_discriminator_may_have_its_own_rate(self, sd: str) -> None:
        model = method(sd, disc_head_lr=0.5, disc_optimizer=partial(torch.optim.AdamW, lr=0.1))
        model.configure_model()
        generator, discriminator = model.configure_optimizers()[0]
        rest, head = discriminator.param_groups
        assert (rest["lr"], head["lr"]) == (0.1, 0.5)
        assert model.discriminator is not None
        own = list(model.discriminator.head.parameters())  # type: ignore[union-attr]  # nn.Module's getattr
        assert {id(p) for p in head["params"]} == {id(p) for p in own}
        ids = [id(p) for group in discriminator.param_groups for p in group["params"]]
        assert len(ids) == len(set(ids)) == len(model.trainable_parameters("discriminator"))
        assert {id(p) for p in generator.param_groups[0]["params"]} == {
            id(p) for p in model.trainable_parameters("generator")
        }

    def test_an_extra_loss_adds_its_weight_times_itself(self, sd: str, batch: Batch, still: Run) -> None:
        model = method(sd, losses={"l1": 0.5}, optimizer=STILL, disc_optimizer=STILL)
        metrics = train(model, batch, 2, [200, 700]).metrics
        x_hat, (_, x_h) = still.tape.calls["decode"][0][2].detach(), images(batch)
        l1 = float((x_hat - x_h).abs().mean()) / 2  # in [0,1]
        assert metrics["train/losses/l1"] == pytest.approx(l1, rel=1e-4)
        assert metrics["train/loss"] - still.metrics["train/loss"] == pytest.approx(0.5 * l1, rel=1e-3)

    def test_the_embedded_foundation_trains(self, batch: Batch) -> None:
        run = train(method("tiny", lora_rank=1, lora_alpha=1), batch)
        assert all(math.isfinite(value) for value in run.metrics.values())


class TestConditions:
    """Table 3 of the supplement: only e differs."""

    def test_only_e_differs(self, sd: str, batch: Batch) -> None:
        seen = {}
        for condition in ("learned", "noise", "empty", "prompt"):
            run = train(method(sd, condition=condition, discriminator="none", perceptual="none"), batch)
            (z, t, e), kwargs, _ = run.tape.calls["unet"][0]
            e = run.before["embedding.embedding"].expand(2, -1, -1) if condition == "learned" else e  # since updated
            seen[condition] = (z, int(t), e.detach(), sorted(kwargs))
            trains_e = any(name.startswith("embedding") for name in run.model.all_trainable())
            assert trains_e == (condition == "learned")
            assert ("embedding.embedding" in changed(run)) == (condition == "learned")
        z, t, e, keys = seen["learned"]
        assert all(torch.equal(z, other[0]) and (t, keys) == (other[1], other[3]) for other in seen.values())
        assert torch.equal(seen["noise"][2], e)  # the same tensor, frozen
        assert torch.equal(seen["empty"][2], encode_prompts(sd, ["", ""]))
        assert torch.equal(seen["prompt"][2], encode_prompts(sd, batch["prompt"]))
        assert not torch.equal(*seen["prompt"][2])

    def test_the_embedding_starts_normal_or_empty(self, sd: str) -> None:
        for init in ("normal", "empty_prompt"):
            model = method(sd, embedding_init=init, discriminator="none", perceptual="none")
            model.configure_model()
            assert model.embedding is not None
            e = model.embedding.embedding.detach()
            if init == "normal":
                assert float(e.mean()) == pytest.approx(0, abs=0.1)
                assert float(e.std()) == pytest.approx(1, abs=0.1)
            else:
                assert torch.equal(e, encode_prompts(sd, [""])[0])

    def test_the_embedding_is_made_by_the_seed_alone(self, sd: str) -> None:
        made = []
        for seed, noise in ((0, 1), (0, 2), (1, 1)):
            torch.manual_seed(noise)
            model = method(sd, seed=seed, discriminator="none", perceptual="none")
            model.configure_model()
            assert model.embedding is not None
            made.append(model.embedding.embedding.detach())
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])

    def test_the_embedding_is_drawn_on_the_cpu_and_goes_to_the_default_device(
        self, sd: str, calls: list[tuple[str, str]]
    ) -> None:
        model = method(sd)
        with torch.device("meta"):
            model._configure_condition(16)
        assert {device for name, device in calls if name == "randn"} == {"cpu"}
        assert model.embedding is not None
        assert model.embedding.embedding.device.type == "meta"


@pytest.mark.parametrize("kind", ["nad", "latent", "pixel"])
def test_discriminators_are_drawn_on_the_cpu_and_go_to_the_default_device(
    kind: str, sd: str, calls: list[tuple[str, str]]
) -> None:
    model = method(sd, discriminator=kind, disc_prompt="own_learned", perceptual="none")
    model.configure_model()
    assert model.generator is not None
    del calls[:]
    with torch.device("meta"):
        model._configure_discriminator(model.generator.schedule)
    assert {device for name, device in calls if name in ("randn", "uniform_", "normal_")} == {"cpu"}
    found = {n: p.device.type for n, p in model.named_parameters() if n.startswith(("discriminator.", "disc_emb"))}
    assert set(found.values()) == {"meta"}
    assert ("disc_embedding.embedding" in found) is (kind == "nad")


class TestD3SR:
    def test_an_sdxl_discriminator_gets_zeros_for_text_and_sds_latents(self, sd: str, sdxl: str, batch: Batch) -> None:
        run = train(method(sd, disc_pretrained=sdxl), batch, 2)
        z, _, text = run.tape.calls["disc"][0][0]
        assert z.shape == (2, 4, 8, 8)
        assert text.shape == (1, 77, 24)
        assert not text.any()
        assert run.tape.calls["disc"][0][2].shape == (2, 1, 2, 2)
        assert any(name.startswith("discriminator.trunk.") for name in changed(run))
        assert all(math.isfinite(value) for value in run.metrics.values())


class TestConfigs:
    """What the YAML files set over the paper's own."""

    EXPECTED: dict[str, dict[str, Any]] = {  # noqa: RUF012 - a table
        "condition_empty": {"condition": "empty"},
        "condition_noise": {"condition": "noise"},
        "condition_prompt": {"condition": "prompt"},
        "lora_r4_a4": {"lora_rank": 4, "lora_alpha": 4.0},
        "lora_r8_a8": {"lora_rank": 8, "lora_alpha": 8.0},
        "lora_r8_a64": {"lora_rank": 8, "lora_alpha": 64.0},
        "lora_r64_a128": {"lora_rank": 64, "lora_alpha": 128.0},
        "d3sr/disc_latent": {"discriminator": "latent", "disc_pretrained": None},
        "d3sr/disc_none": {"discriminator": "none"},
        "d3sr/disc_pixel": {"discriminator": "pixel", "disc_pretrained": None},
        "d3sr/disc_sd21": {"disc_pretrained": None},
        "d3sr/perceptual_none": {"perceptual": "none"},
        "d3sr/perceptual_lpips": {"perceptual": "lpips"},
        "d3sr/perceptual_ea_lpips": {"perceptual": "ea_lpips"},
        "d3sr/perceptual_dists": {"perceptual": "dists"},
    }

    @staticmethod
    def arguments(*configs: Path) -> dict[str, Any]:
        _, parsed = parse(configs)
        assert parsed.model.class_path in ("papers.dfosd.DFOSD", "papers.dfosd.module.DFOSD")
        return dict(parsed.model.init_args.as_dict())

    def test_every_ablation_has_an_expectation(self) -> None:
        folder = CONFIGS / "ablations"
        found = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
        assert found == set(self.EXPECTED)

    @pytest.mark.parametrize("name", EXPECTED)
    def test_an_ablation_changes_what_its_name_says_and_no_more(self, name: str) -> None:
        base = [CONFIGS / "sd21.yaml", *([CONFIGS / "d3sr.yaml"] if name.startswith("d3sr/") else [])]
        path = CONFIGS / "ablations" / f"{name}.yaml"
        assert path.read_text().splitlines()[0].endswith(f"; over {' and '.join(each.name for each in base)}")
        whole, ablation = self.arguments(*base), self.arguments(*base, path)
        different = {key: value for key, value in ablation.items() if value != whole[key]}
        assert different == self.EXPECTED[name]

    @pytest.mark.parametrize("kind", ["pixel", "latent"])
    @pytest.mark.parametrize("d3sr", [True, False])
    @pytest.mark.parametrize(
        "seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)]
    )
    def test_the_optimiser_of_a_discriminator_from_scratch_makes_it_learn(
        self, seed: int, d3sr: bool, kind: str
    ) -> None:
        """Real and fake differ in their mean; at the rate of sd21.yaml the loss stays at 2 ln 2 = 1.386."""
        base = [CONFIGS / "sd21.yaml", *([CONFIGS / "d3sr.yaml"] if d3sr else [])]
        overlay, paper = (
            self.arguments(*files)["disc_optimizer"]["init_args"]
            for files in ([*base, CONFIGS / f"ablations/d3sr/disc_{kind}.yaml"], [CONFIGS / "sd21.yaml"])
        )
        learns = {"pixel": self.loss_of_pixels, "latent": self.loss_of_latents}[kind]
        assert learns({**overlay, "fused": False}, seed) < 1.0
        assert learns({**paper, "fused": False}, seed) > 1.3

    @staticmethod
    def loss_of_pixels(settings: dict[str, Any], seed: int) -> float:
        torch.manual_seed(seed)
        network = PixelDiscriminator((16, 32))
        optimizer = torch.optim.AdamW(network.parameters(), **settings)
        for _ in range(300):
            real, fake = (network(0.3 * torch.randn(4, 3, 16, 16) + mean) for mean in (0.5, -0.5))
            loss = discriminator_loss("bce", real, fake).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    @staticmethod
    def loss_of_latents(settings: dict[str, Any], seed: int) -> float:
        """Noisy latents at all timesteps, the mean of the last 20 of 150 steps."""
        torch.manual_seed(seed)
        network, losses = LatentDiscriminator(channels=(16, 32, 32)), []
        optimizer = torch.optim.AdamW(network.parameters(), **settings)
        for _ in range(150):
            t = torch.randint(0, 1000, (4,))
            abar = torch.tensor(ABAR[t.numpy()], dtype=torch.float32).view(-1, 1, 1, 1)
            z_t = [abar.sqrt() * mean + torch.randn(4, 4, 16, 16) for mean in (0.5, -0.5)]  # of N(mean, 1)
            real, fake = (network(z, t, torch.zeros(1, 1, 1)) for z in z_t)
            loss = discriminator_loss("bce", real, fake).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[-20:]) / 20

    def test_sd21_holds_the_papers_numbers(self) -> None:
        args = self.arguments(CONFIGS / "sd21.yaml")
        assert (args["lora_rank"], args["lora_alpha"], args["timestep"]) == (16, 16, 399)
        assert (args["lambda_gan"], args["lambda_perceptual"]) == (5e-3, 1)
        assert (args["perceptual"], args["discriminator"], args["condition"]) == ("ea_dists", "nad", "learned")
        for name, lr in (("optimizer", 5e-5), ("disc_optimizer", 5e-7)):
            assert args[name]["class_path"] == "torch.optim.AdamW"
            assert args[name]["init_args"]["lr"] == lr

    def test_d3sr_changes_discriminator_and_rates_only(self) -> None:
        paper = self.arguments(CONFIGS / "sd21.yaml")
        d3sr = self.arguments(CONFIGS / "sd21.yaml", CONFIGS / "d3sr.yaml")
        different = {key for key, value in d3sr.items() if value != paper[key]}
        assert different == {"disc_pretrained", "disc_optimizer"}
        assert d3sr["disc_optimizer"]["init_args"]["lr"] == 5e-5
        assert d3sr["disc_pretrained"] == "stabilityai/stable-diffusion-xl-base-1.0"

    def test_counting_needs_no_weights(self) -> None:
        with architecture_only():
            model = DFOSD("random:sd21", perceptual="none", discriminator="none")
            model.configure_model()
        rows = {row.name: (row.total, row.trainable) for row in model.parameter_rows()}
        assert rows["U-Net LoRA"] == (16_222_848, 16_222_848)
        assert model.parameter_sums() == {"generator (U-Net, VAE, embedding, LoRA)": 965_866_283}
