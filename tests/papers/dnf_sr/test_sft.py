"""Stage 1: the step in closed form, its noise, losses by hand, and where gradients go."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from common.adapters import adapter_names
from common.conditioning import flux_text
from common.conditioning.flux_text import encode_flux_prompts, forget_flux_prompts
from common.denoisers.flux import FluxDenoiser
from common.diffusion import flow_velocity
from common.loading import WeightsNotFoundError
from common.losses import DISTS, EADISTS, generator_loss
from common.restoration import Inference
from data.photos import PHOTOS
from launch.cli import main
from papers.dnf_sr import DNFSR, module
from papers.dnf_sr.module import Slots

from .conftest import Batch, FakeCaptioner, disturb, high, low, make_sft, train

Make = Callable[..., DNFSR]


@pytest.fixture
def make(flux: str) -> Make:
    return lambda **options: make_sft(flux, **options)


def vae(flux: str) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(flux, subfolder="vae").eval().requires_grad_(False)


def transformer(flux: str) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer").eval().requires_grad_(False)


def upsampled(x_01: Tensor) -> Tensor:
    return F.interpolate(x_01, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)


def latent(flux: str, x_01: Tensor) -> Tensor:
    """0.7 (mode - 0.1), the small VAE's scaling."""
    with torch.no_grad():
        return 0.7 * (vae(flux).encode(2 * x_01 - 1).latent_dist.mode() - 0.1)


def image(flux: str, z: Tensor) -> Tensor:
    with torch.no_grad():
        return vae(flux).decode(z / 0.7 + 0.1).sample


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestStep:
    @pytest.mark.parametrize("t", [0.25, 0.5, 1.0])
    def test_with_the_oracles_velocity_it_returns_the_answer(self, make: Make, t: float) -> None:
        model = make(t_mid=t, lambda_gan=0.0)
        z_l, eps, answer = (random(seed, 2, 2, 4, 4) for seed in range(3))
        slots = model.fill(z_l, eps)
        assert_close(slots.target, (1 - t) * z_l + t * eps)
        v = (eps - z_l) + (z_l - answer) / t
        assert_close(flow_velocity(slots.start, answer, t), v)
        assert_close(model.clean(slots, v), answer)
        assert_close(model.clean(slots, eps - z_l), z_l)  # what the pretrained flow predicts

    def test_the_supplements_line_leaves_noise_in(self, make: Make) -> None:
        model = make(t_mid=0.25, clean_estimate="z_lq", lambda_gan=0.0)
        z_l, eps = random(0, 2, 2, 4, 4), random(1, 2, 2, 4, 4)
        assert_close(model.clean(model.fill(z_l, eps), eps - z_l), 1.25 * z_l - 0.25 * eps)

    def test_inputs(self, make: Make) -> None:
        z_l, eps = random(0, 2, 2, 4, 4), random(1, 2, 2, 4, 4)
        mixed = 0.5 * z_l + 0.5 * eps
        for which, target, reference in (("dual", mixed, z_l), ("mix", mixed, None), ("lr", z_l, None)):
            slots = make(input=which, lambda_gan=0.0).fill(z_l, eps)
            assert_close(slots.target, target)
            assert_close(slots.start, target)
            assert slots.reference is reference or torch.equal(slots.reference, reference)  # type: ignore[arg-type]

    def test_at_time_1_the_latent_is_seen_through_the_reference_alone(self, make: Make, batch: Batch) -> None:
        eps, text = random(1, 1, 2, 4, 4), make(lambda_gan=0.0).text(["a"])
        for which, same in (("mix", True), ("dual", False)):
            model = make(t_mid=1.0, input=which, lambda_gan=0.0)
            with torch.no_grad():
                one, other = (model.velocity(model.fill(random(s, 1, 2, 4, 4), eps), text) for s in (2, 3))
            assert torch.equal(one, other) is same

    def test_untrained_it_is_the_base_with_an_unchanged_codec(self, make: Make, flux: str, batch: Batch) -> None:
        model = make(guidance=2.5)
        x, eps = low(batch), random(1, 2, 2, 10, 10)
        text = encode_flux_prompts(flux, [f"{caption} {module.SUFFIX}" for caption in batch["prompt"]], max_tokens=6)
        z_l = latent(flux, upsampled(x))
        z_mix = 0.5 * z_l + 0.5 * eps
        with torch.no_grad():
            v = FluxDenoiser(transformer(flux))(z_mix, 0.5, text, z_l, 2.5)
        model.test_noise = lambda x_lq, shape, number: eps  # type: ignore[method-assign]  # given
        with torch.no_grad():
            found = model.restore(x, model.prepare(x, batch["prompt"]))
        assert_close(found, image(flux, z_mix - 0.5 * v).clamp(-1, 1) / 2 + 0.5)

    def test_texts(self, make: Make, flux: str, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[str] = []

        def spy(pretrained: str, prompts: list[str], *args: Any) -> Any:
            seen.extend(prompts)
            return encode_flux_prompts(flux, prompts, *args)

        monkeypatch.setattr(module, "encode_flux_prompts", spy)
        for options in ({}, {"prompt": "a cat"}, {"prompt": "", "prompt_suffix": ""}, {"prompt_suffix": ""}):
            make(lambda_gan=0.0, **options).text(["a house "])
        assert seen == [f"a house {module.SUFFIX}", f"a cat {module.SUFFIX}", "", "a house"]

    def test_a_captioner_writes_a_tested_images_text_once_for_all_tiles(
        self, make: Make, flux: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "Captioner", FakeCaptioner)
        model = make(captioner="someone/llava", lambda_gan=0.0, inference=Inference("none", 24, 8))
        captioner, texts = model.captioner, list[Tensor]()
        assert isinstance(captioner, FakeCaptioner)
        assert captioner.model == "someone/llava"
        assert model.flow is not None
        model.flow.register_forward_pre_hook(lambda network, args: texts.append(args[2].tokens))
        model.upscale(low(batch), batch["prompt"])
        assert_close(torch.cat(captioner.seen), low(batch))
        assert len(captioner.seen) == 1
        said = [f"image 1.{i} {module.SUFFIX}" for i in range(2)]
        expected = encode_flux_prompts(flux, said, max_tokens=6).tokens
        assert len(texts) > 1
        assert all(torch.equal(text, expected) for text in texts)
        train(model, batch)
        assert len(captioner.seen) == 1  # training's texts are the data's

    def test_a_time_of_0_is_refused(self, make: Make) -> None:
        with pytest.raises(ValueError, match=r"t_mid=0\.0 is out of range"):
            make(t_mid=0.0)


class TestEncodersOfText:
    def test_without_them_a_fit_fails_before_it_starts(
        self, make: Make, batch: Batch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*args: Any, **kwargs: Any) -> None:
            raise WeightsNotFoundError("no T5")

        forget_flux_prompts()
        monkeypatch.setattr(flux_text, "load_text_encoder", load)
        model = make(lambda_gan=0.0)
        with pytest.raises(WeightsNotFoundError, match="no T5"):
            train(model, batch)
        assert int(model.train_step) == 0

    @pytest.mark.slow
    def test_with_a_cache_they_are_loaded_once_before_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """All texts of training and validation are encoded then; a second run loads nothing."""
        loads, steps = [], list[int]()
        real, step = flux_text.load_text_encoder, DNFSR.training_step

        def load(pretrained: str, *parts: str, **kwargs: Any) -> Any:
            loads.append(parts[0])
            return real(pretrained, *parts, **kwargs)

        def counted(model: DNFSR, batch: Batch, batch_idx: int) -> None:
            steps.append(len(loads))
            forget_flux_prompts()  # so that each text is read from the folder
            step(model, batch, batch_idx)

        monkeypatch.setattr(flux_text, "load_text_encoder", load)
        monkeypatch.setattr(DNFSR, "training_step", counted)
        forget_flux_prompts()
        demo = Path(module.__file__).parent / "configs/demo/01_sft.yaml"
        arguments = [
            *("fit", "-c", str(demo), "--runs", str(tmp_path / "runs"), "--name=texts"),
            "--trainer.enable_progress_bar=false",
            *(f"--model.text_cache={tmp_path / 'texts'}", "--data.crop_size=40", "--data.val_crops=2"),
            *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.batch_size=2"),
        ]
        texts = {photo.caption for split in ("train", "val") for photo in PHOTOS[split]}  # type: ignore[index]
        for fresh, loaded in ((len(texts), ["text_encoder_2", "text_encoder"]), (0, [])):
            assert main(arguments) == 0
            assert loads == loaded
            assert steps == [len(loaded)] * 2
            assert f"encoded {fresh} of {len(texts)} texts" in caplog.text
            loads.clear()
            steps.clear()
        assert len(list((tmp_path / "texts").iterdir())) == len(texts)
        assert not flux_text._kept


@pytest.mark.parametrize("shared", [True, False])
def test_processes_share_the_encoding_of_texts(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Process 1 of 2 encodes every second text; the other's are there after the barrier, or the folder is refused."""
    model, texts, encoded = make(), list("abcde"), list[str]()
    forget_flux_prompts()
    real = flux_text._encode

    def encode(pretrained: str, prompts: list[str], *rest: Any) -> Any:
        encoded.extend(prompts)
        return real(pretrained, prompts, *rest)

    def barrier(name: str) -> None:
        if shared:
            flux_text.cache_flux_prompts(model.pretrained, texts[::2], tmp_path, max_tokens=model.max_tokens)

    trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=SimpleNamespace(barrier=barrier))
    monkeypatch.setattr(DNFSR, "trainer", trainer)
    monkeypatch.setattr(DNFSR, "global_rank", 1)
    monkeypatch.setattr(flux_text, "_encode", encode)
    refused = pytest.raises(ValueError, match="lacks 3 texts that other processes encoded; set a folder")
    with contextlib.nullcontext() if shared else refused:
        model._fill_text_cache(str(tmp_path), texts)
    assert encoded == ["b", "d"] + (["a", "c", "e"] if shared else [])


class TestNoiseOfATest:
    def test_it_follows_from_seed_and_pixels_alone(self, make: Make, batch: Batch) -> None:
        model, x = make(lambda_gan=0.0), low(batch)
        noise = model.test_noise(x, torch.Size((2, 4, 4)))
        assert torch.equal(model.test_noise(x[1:], torch.Size((2, 4, 4))), noise[1:])
        assert not torch.equal(noise[0], noise[1])
        assert not torch.equal(model.test_noise(x, torch.Size((2, 4, 4)), 1), noise)
        assert not torch.equal(make(seed=1, lambda_gan=0.0).test_noise(x, torch.Size((2, 4, 4))), noise)

    def test_a_restoration_repeats(self, make: Make, batch: Batch) -> None:
        model = make(lambda_gan=0.0)
        one, other = (model.upscale(low(batch), batch["prompt"]).sr for _ in range(2))
        assert torch.equal(one, other)
        told = model.prepare(low(batch), batch["prompt"])._replace(noise=1)
        assert not torch.equal(one, model.upscale(low(batch), batch["prompt"], told).sr)


class TestLosses:
    @pytest.mark.parametrize("kind", ["dists", "ea_dists"])
    def test_by_hand(self, make: Make, flux: str, batch: Batch, kind: str) -> None:
        model = make(dists=kind, lambda_z=3.0, disc_augment=False)
        run = train(model, batch)
        x, x_h = low(batch), high(batch)
        z_l, z_h = latent(flux, upsampled(x)), latent(flux, x_h)
        z_mix = 0.5 * z_l + 0.5 * run.spy.drawn["noise"]
        text = encode_flux_prompts(flux, [f"{caption} {module.SUFFIX}" for caption in batch["prompt"]], max_tokens=6)
        with torch.no_grad():
            v = FluxDenoiser(transformer(flux))(z_mix, 0.5, text, z_l)
        x_hat = image(flux, z_mix - 0.5 * v)
        feature = (DISTS if kind == "dists" else EADISTS)("random", 0.05)
        terms = {
            "latent": (z_l - z_h).square().mean(),
            "mse": (x_hat - (2 * x_h - 1)).square().mean(),
            kind: feature(x_hat / 2 + 0.5, x_h).mean(),
        }
        fresh = make(disc_augment=False).discriminator
        assert fresh is not None
        fresh.train()
        terms["gan"] = generator_loss("bce_smooth", fresh(x_hat)).mean().detach()
        for name, value in terms.items():
            assert run.metrics[f"train/{name}"] == pytest.approx(float(value), rel=2e-4), name
        weights = {"latent": 3.0, "mse": 2.0, kind: 5.0, "gan": 0.5}
        total = sum(weights[name] * float(value) for name, value in terms.items())
        assert run.metrics["train/loss"] == pytest.approx(total, rel=2e-4)

    def test_the_clean_latent_is_the_original_encoders(self, make: Make, flux: str, batch: Batch) -> None:
        """Where low- and high-quality image are one, a trained encoder still has something to unlearn."""
        same = {**batch, "hq": (upsampled(low(batch)) * 255).round().to(torch.uint8)}
        same["hq"] = same["hq"].float() / 255
        for size, expected in ((0.0, 0.0), (0.3, None)):
            model = make(lambda_gan=0.0, scale=4)
            disturb(model.codec, size)
            value = train(model, same).metrics["train/latent"]
            assert value < 1e-4 if expected == 0.0 else value > 1e-3

    def test_generators_target_is_the_odds_of_four(self) -> None:
        logits = torch.linspace(0, 3, 3001, dtype=torch.float64).view(-1, 1)
        losses = generator_loss("bce_smooth", logits)
        best = int(losses.argmin())
        assert float(logits[best]) == pytest.approx(math.log(4), abs=1e-3)
        assert float(losses[best]) == pytest.approx(0.5004, abs=1e-4)


class TestGradients:
    @pytest.mark.parametrize("path", ["latent", "target", "start", "reference"])
    def test_each_of_four_paths_alone_reaches_the_encoder(self, make: Make, batch: Batch, path: str) -> None:
        model = make(lambda_gan=0.0)
        z_l = model.encode(low(batch))
        if path == "latent":
            loss = z_l.square().mean()
        else:
            slots = model.fill(z_l, random(0, *z_l.shape))
            cut = {name: None if part is None else part.detach() for name, part in slots._asdict().items()}
            alone = Slots(**{**cut, path: getattr(slots, path)})
            loss = model.codec.decode(model.clean(alone, model.velocity(alone, model.text(["a", "b"])))).square().mean()
        named = {name: p for name, p in model.named_parameters() if "encoder" in name and "lora_B" in name}
        gradients = torch.autograd.grad(loss, list(named.values()))
        assert all(float(gradient.abs().max()) > 0 for gradient in gradients)

    def test_each_turn_trains_its_own_and_nothing_else_moves(self, make: Make, batch: Batch) -> None:
        model = make(
            optimizer=lambda p: torch.optim.SGD(p, lr=1e-2), disc_optimizer=lambda p: torch.optim.SGD(p, lr=1e-2)
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        run = train(model, batch)
        generator, discriminator = (set(grads) for grads in run.tape.grads)
        assert all("lora_" in name and not name.startswith("discriminator") for name in generator)
        assert {name.split(".")[0] for name in generator} == {"flow", "codec"}
        assert not any(".decoder." in name for name in generator)
        assert discriminator == {name for name in before if name.startswith("discriminator.heads.")}
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved <= generator | discriminator
        assert {name for name in moved if "lora_B" in name} == {name for name in generator if "lora_B" in name}
        # one encoding of each image, one call of the transformer, one decoding
        assert run.tape.counts() == {"transformer": (0, 1), "encode": (1, 1), "decode": (0, 1)}

    def test_checkpointing_changes_no_gradient(self, make: Make, batch: Batch) -> None:
        grads = []
        for on in (False, True):
            model = make(gradient_checkpointing=on, disc_augment=False)
            disturb(model)
            grads.append(train(model, batch).tape.grads)
        for plain, checkpointed in zip(*grads, strict=True):
            assert plain.keys() == checkpointed.keys()
            for name, gradient in plain.items():
                assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-7)

    def test_without_an_adversarial_loss_there_is_no_discriminator(self, make: Make, batch: Batch) -> None:
        model = make(lambda_gan=0.0)
        assert model.discriminator is None
        assert len(train(model, batch).tape.grads) == 1

    def test_the_loss_network_has_nothing_to_train_and_stays_in_eval_mode(self, make: Make, batch: Batch) -> None:
        model = train(make(), batch).model
        assert not any(p.requires_grad for p in model.dists.parameters())
        assert {"alpha", "beta"} <= dict(model.dists.named_buffers()).keys()
        assert not any(part.training for part in model.discriminator.trunk.modules())


def test_a_base_in_bfloat16_has_adapters_in_float32(make: Make, batch: Batch) -> None:
    model = make(frozen_dtype="bfloat16", optimizer=lambda p: torch.optim.SGD(p, lr=1e-2))
    assert model.flow is not None
    types = {("lora_" in name, p.dtype) for name, p in model.flow.transformer.named_parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16), (False, torch.float32)}
    norms = [p.dtype for name, p in model.flow.transformer.named_parameters() if "norm_q" in name]
    assert set(norms) == {torch.float32}
    run = train(model, batch, precision="bf16-mixed")
    assert all(g.isfinite().all() and g.dtype == torch.float32 for grads in run.tape.grads for g in grads.values())
    assert run.metrics["train/loss"] == pytest.approx(train(make(), batch).metrics["train/loss"], rel=0.05)


def test_a_transformer_of_another_vae_is_refused(flux: str, tmp_path: Any) -> None:
    vae(flux).save_pretrained(tmp_path / "vae")
    config = {**transformer(flux).config, "in_channels": 12}
    FluxTransformer2DModel.from_config(config).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="tokens of 12, but 2x2 pixels of the VAE's latents are 8"):
        make_sft(str(tmp_path))


def test_only_the_encoder_is_adapted(make: Make) -> None:
    model = make(lambda_gan=0.0)
    assert adapter_names(model.codec.vae.encoder) == ["default"]
    assert adapter_names(model.codec.vae.decoder) == []
