"""A text that all images share is in the checkpoint: neither a prediction nor a resumed fit reads its encoder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves

from common.conditioning import text
from common.conditioning.text import encode_prompts, forget_prompts
from common.loading import TINY, WeightsNotFoundError, load_text_encoder
from common.metrics import to_uint8
from common.restoration import Inference
from launch.cli import main
from launch.export import load
from papers.dfosd import DFOSD
from papers.dm_sr import DMSR
from papers.dm_sr.estimation import read_restorer

from ..launch.test_ddp import in_two

SGD = partial(torch.optim.SGD, lr=1e-2)
WHOLE = Inference(color_fix="none", tile=None, metrics=["psnr_rgb"])
LOW = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = {
    "lq": LOW,
    "hq": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    "prompt": [""],
    "name": ["a"],
    "index": torch.tensor([0]),
}


def dm_sr(pretrained: str, **options: Any) -> DMSR:
    return DMSR(pretrained, timestep=100, optimizer=SGD, inference=WHOLE, lambda_adv=0.0, lambda_per=0.0, **options)


def dfosd(pretrained: str, **options: Any) -> DFOSD:
    small: dict[str, Any] = {"lora_rank": 2, "perceptual": "none", "disc_hidden": 8}
    return DFOSD(pretrained, optimizer=SGD, disc_optimizer=SGD, inference=WHOLE, **small, **options)


MAKERS: dict[str, Callable[..., Any]] = {
    "DM-SR's prompt": dm_sr,
    "DFOSD's empty prompt": partial(dfosd, condition="empty"),
    "DFOSD's learned embedding": partial(dfosd, embedding_init="empty_prompt"),
}


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The encoders that are read."""
    seen: list[str] = []
    monkeypatch.setattr(text, "load_text_encoder", lambda base: seen.append(base) or load_text_encoder(base))
    forget_prompts()
    yield seen
    forget_prompts()


@pytest.fixture
def base(make_sd: Callable[..., str]) -> Path:
    return Path(make_sd())


def strip(base: Path) -> None:
    """Take the text encoder away, and forget what it has encoded."""
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(base / part)
    forget_prompts()


def trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", logger=False, **quiet, **options)


def loader(batches: int = 1) -> Any:
    data: Any = [BATCH] * batches
    return torch.utils.data.DataLoader(data, batch_size=None)


def trained(model: Any, path: Path) -> Tensor:
    """Train a step, save, and return what the model restores."""
    fit = trainer(max_steps=1)
    fit.fit(model, loader())
    fit.save_checkpoint(path)
    with model.ema.swapped(model.all_trainable()) if model.ema is not None else torch.no_grad():
        return model.upscale(LOW, [""]).sr


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_checkpoint_holds_is_not_encoded_again(
    name: str, base: Path, tmp_path: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, path = MAKERS[name], tmp_path / "a.ckpt"
    expected = trained(make(str(base)), path)
    assert str(base) in loads
    loads.clear()
    strip(base)
    with pytest.raises(WeightsNotFoundError, match="no subfolder 'text_encoder'"):
        trainer(max_steps=1).fit(make(str(base)), loader())
    loads.clear()
    for command in ("validate", "test", "predict"):
        model = make(str(base))
        model.awaits_checkpoint, model.output.folder = True, tmp_path / command
        seen: list[Tensor] = []
        for caller in ("common.restoration", "common.upscaler"):
            monkeypatch.setattr(f"{caller}.write_images", lambda _paths, sr, seen=seen: seen.append(sr))
        getattr(trainer(), command)(model, loader(), ckpt_path=path, weights_only=True)
        assert loads == []
        with model.ema.swapped(model.all_trainable()) if model.ema is not None else torch.no_grad():
            assert torch.equal(model.upscale(LOW, [""]).sr, expected)
        assert all(torch.equal(sr, expected) for sr in seen)
        assert len(seen) == (command != "validate")


def test_another_prompt_is_encoded_and_the_checkpoints_left_alone(base: Path, tmp_path: Path, loads: list[str]) -> None:
    trained(dm_sr(str(base)), tmp_path / "a.ckpt")
    forget_prompts()
    loads.clear()
    model = dm_sr(str(base), prompt="a cat")
    trainer().validate(model, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert loads == [str(base)]
    assert torch.equal(model.prompt_embeds, encode_prompts(str(base), ["a cat"]))


def test_another_base_has_another_encoder(base: Path, tmp_path: Path, loads: list[str]) -> None:
    trained(dm_sr(str(base)), tmp_path / "a.ckpt")
    other = shutil.copytree(base, tmp_path / "other")
    loads.clear()
    trainer().validate(dm_sr(str(other)), loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert loads == [str(other)]


def test_an_older_checkpoint_has_no_text(base: Path, tmp_path: Path, loads: list[str]) -> None:
    expected = trained(dm_sr(str(base), ema_decay=None), tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    del checkpoint["texts"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    for stripped in (False, True):
        forget_prompts()
        loads.clear()
        model = dm_sr(str(base), ema_decay=None)
        run = partial(trainer().validate, model, loader(), verbose=False)
        if stripped:
            strip(base)
            with pytest.raises(WeightsNotFoundError, match="text_encoder"):
                run(ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        else:
            run(ckpt_path=tmp_path / "a.ckpt", weights_only=True)
            assert loads == [str(base)]
            assert torch.equal(model.upscale(LOW, [""]).sr, expected)


def test_without_a_trainer_texts_are_there_at_once(base: Path) -> None:
    model = dm_sr(str(base))
    model.configure_model()
    assert model.prompt_embeds.shape == (1, 77, 16)


def test_the_text_of_an_added_start_must_be_as_long_as_the_embedding(base: Path) -> None:
    with pytest.raises(ValueError, match=r"embedding_tokens=32.* has 77 tokens; set embedding_tokens=77"):
        dfosd(str(base), embedding_init="empty_prompt", embedding_tokens=32).configure_model()


def test_stage_2_as_a_restorer_needs_no_encoder(base: Path, tmp_path: Path, loads: list[str]) -> None:
    """DM-SR's target `min`."""
    model = dm_sr(str(base), ema_decay=None)
    trained(model, tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "papers.dm_sr.DMSR"
    torch.save(checkpoint, tmp_path / "a.ckpt")
    strip(base)
    loads.clear()
    restorer, _ = read_restorer(str(tmp_path / "a.ckpt"))
    assert torch.equal(restorer.text_condition([""]), model.prompt_embeds)
    assert loads == []


@pytest.mark.parametrize("name", list(MAKERS)[:2])
def test_a_resumed_fit_goes_on_without_the_encoder(name: str, base: Path, tmp_path: Path, loads: list[str]) -> None:
    make = MAKERS[name]
    whole = trainer(max_steps=2)
    whole.fit(make(str(base)), loader(2))
    whole.save_checkpoint(tmp_path / "whole.ckpt")
    half = trainer(max_steps=1)
    half.fit(make(str(base)), loader(2))
    half.save_checkpoint(tmp_path / "half.ckpt")
    strip(base)
    loads.clear()
    model = make(str(base))
    model.awaits_checkpoint = True
    resumed = trainer(max_steps=2)
    resumed.fit(model, loader(2), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    resumed.save_checkpoint(tmp_path / "resumed.ckpt")
    assert loads == []
    one, other = (torch.load(tmp_path / f"{which}.ckpt", weights_only=True) for which in ("whole", "resumed"))
    assert one["global_step"] == other["global_step"] >= 2
    for part in ("state_dict", "texts", "optimizer_states"):
        assert str(one.get(part)) == str(other.get(part))
        for a, b in zip(tree_leaves(one.get(part)), tree_leaves(other.get(part)), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_the_shells_prediction_and_a_loaded_run_need_no_encoder(tmp_path: Path, loads: list[str]) -> None:
    """On a copy of the embedded foundation."""
    for part in ("unet", "vae", "scheduler", "text_encoder", "tokenizer"):
        shutil.copytree(TINY / part, tmp_path / "base" / part)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    fit = ["fit", "-c", "papers/dfosd/configs/demo/01_dfosd.yaml", f"--model.pretrained={tmp_path / 'base'}", *quiet]
    fit += ["--model.condition=empty", "--model.perceptual=none", "--data.batch_size=1", "--trainer.max_steps=1"]
    fit += ["--trainer.limit_val_batches=0", "--checkpoint.every_n_train_steps=1", "--name=fixed", "--runs"]
    assert main([*fit, str(tmp_path / "runs")]) == 0
    (last,) = (tmp_path / "runs").glob("dfosd/*/version_0/checkpoints/last.ckpt")
    assert set(torch.load(last, weights_only=True)["texts"]) == {"empty_prompt", "disc_empty_prompt"}
    Image.fromarray((LOW[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(tmp_path / "a.png")
    predict = ["predict", "--ckpt_path", str(last), "--data=data.SRData", "--data.predict", str(tmp_path / "a.png")]
    assert main([*predict, *quiet, "--output", str(tmp_path / "one.png")]) == 0
    strip(tmp_path / "base")
    loads.clear()
    assert main([*predict, *quiet, "--output", str(tmp_path / "two.png")]) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    x_lq = torch.from_numpy(np.asarray(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[None].float() / 255
    upscaled = to_uint8(load(last).upscale(x_lq, [""]).sr)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(upscaled, np.asarray(Image.open(tmp_path / "one.png")))
    assert loads == []


@pytest.mark.long
def test_two_processes_go_on_without_the_encoder_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    for part in ("unet", "vae", "scheduler", "text_encoder", "tokenizer"):
        shutil.copytree(TINY / part, tmp_path / "base" / part)

    def fit(runs: str, batch_size: int, steps: int, *options: str) -> list[str]:
        small = ["--model.condition=empty", "--model.perceptual=none", "--trainer.limit_val_batches=0"]
        for name in ("optimizer", "disc_optimizer"):  # plain descent does not blow rounding up
            small += [f"--model.{name}=torch.optim.SGD", f"--model.{name}.init_args.lr=0.1"]
        small += [
            f"--data.batch_size={batch_size}",
            f"--trainer.max_steps={steps}",
            "--checkpoint.every_n_train_steps=1",
            "--name=fixed",  # the folder's name would join the run's, and may be long
        ]
        config = ["-c", "papers/dfosd/configs/demo/01_dfosd.yaml", f"--model.pretrained={tmp_path / 'base'}"]
        return ["fit", *config, "--runs", str(tmp_path / runs), *small, "--trainer.enable_progress_bar=false", *options]

    def last(runs: str) -> Path:
        """The newest version's: a resumed run with another batch size has a folder of its own."""
        return max((tmp_path / runs).glob("dfosd/*/version_*/checkpoints/last.ckpt"))

    assert main(fit("whole", 4, 2)) == 0
    assert main(fit("half", 4, 1)) == 0
    strip(tmp_path / "base")
    in_two([fit("half", 2, 2, "--ckpt_path", str(last("half")))])
    one, other = (torch.load(last(runs), weights_only=True) for runs in ("whole", "half"))
    assert one["global_step"] == other["global_step"] == 2
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-3, atol=1e-6)
    for name, kept in one["texts"].items():
        assert torch.equal(other["texts"][name]["embedding"], kept["embedding"])
