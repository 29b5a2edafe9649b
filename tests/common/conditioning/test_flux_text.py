"""FLUX's text: what diffusers' pipeline makes of prompts, once for each prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline
from torch.testing import assert_close
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from common.conditioning import flux_text as module
from common.conditioning.flux_text import (
    cache_flux_prompts,
    encode_flux_prompts,
    flux_text_encoders,
    forget_flux_prompts,
)
from common.loading import architecture_only, load_text_encoder, models
from common.parameters import count

from ..networks import write_text_encoder

KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"
PROMPTS = ["a cat", "", "a very long prompt " * 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two small random encoders in FLUX's layout, with byte-level tokenizers."""
    root = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    write_text_encoder(root, bos_token_id=0, eos_token_id=1)
    t5 = T5Config(
        vocab_size=384,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,  # as FLUX's config says; the encoder's own embedding is tied all the same
    )
    T5EncoderModel(t5).save_pretrained(root / "text_encoder_2")
    ByT5Tokenizer(model_max_length=40).save_pretrained(root / "tokenizer_2")
    return str(root)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget_flux_prompts()
    yield
    forget_flux_prompts()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Subfolders of the encoders loaded."""
    seen: list[str] = []

    def load(pretrained: str, *parts: str, **kwargs: object) -> object:
        seen.append(parts[0])
        return load_text_encoder(pretrained, *parts, **kwargs)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(module, "load_text_encoder", load)
    return seen


def test_is_what_diffusers_kontext_pipeline_encodes(folder: str) -> None:
    (clip_tokenizer, clip), (t5_tokenizer, t5) = (load_text_encoder(folder, *p) for p in (module.CLIP, module.T5))
    pipeline = FluxKontextPipeline(None, None, clip, clip_tokenizer, t5, t5_tokenizer, None)
    with torch.no_grad():
        tokens, pooled, _ = pipeline.encode_prompt(PROMPTS, prompt_2=None, device="cpu", max_sequence_length=20)
    text = encode_flux_prompts(folder, PROMPTS, max_tokens=20)
    assert text.tokens.shape == (3, 20, 24)
    assert_close(text.tokens, tokens)
    assert_close(text.pooled, pooled)
    assert (text.pooled[0] - text.pooled[1]).abs().max() > 1e-3


def test_a_text_is_the_same_within_autocast(folder: str) -> None:
    expected = encode_flux_prompts(folder, PROMPTS, max_tokens=20)
    forget_flux_prompts()
    with torch.autocast("cpu", torch.bfloat16):
        text = encode_flux_prompts(folder, PROMPTS, max_tokens=20)
    assert torch.equal(text.tokens, expected.tokens)
    assert torch.equal(text.pooled, expected.pooled)


def test_t5s_one_embedding_is_read_from_the_file(folder: str) -> None:
    """A file of FLUX's holds `shared.weight` alone; an encoder's embedding of its own would be random."""
    _, encoder = load_text_encoder(folder, *module.T5)
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
    assert torch.equal(encoder.shared.weight, T5EncoderModel.from_pretrained(f"{folder}/text_encoder_2").shared.weight)


def test_length_is_asked_for_and_bounded_by_the_tokenizer(folder: str) -> None:
    for asked, given in ((8, 8), (40, 40), (512, 40)):
        assert encode_flux_prompts(folder, ["a"], max_tokens=asked).tokens.shape == (1, given, 24)


def test_order_and_repeats_are_kept_and_encoders_loaded_for_new_prompts_alone(folder: str, loads: list[str]) -> None:
    a, b = encode_flux_prompts(folder, ["a"]), encode_flux_prompts(folder, ["b"])
    assert loads == ["text_encoder_2", "text_encoder"] * 2
    both = encode_flux_prompts(folder, ["b", "a", "b"])
    assert len(loads) == 4
    assert torch.equal(both.tokens, torch.cat([b.tokens, a.tokens, b.tokens]))
    assert torch.equal(both.pooled, torch.cat([b.pooled, a.pooled, b.pooled]))
    encode_flux_prompts(folder, ["a"], max_tokens=8)  # another length is another condition
    assert len(loads) == 6


def test_kept_encoders_serve_other_prompts_until_they_are_forgotten(folder: str, loads: list[str]) -> None:
    alone = encode_flux_prompts(folder, ["b"])
    forget_flux_prompts()
    loads.clear()
    encode_flux_prompts(folder, ["a"], keep=True)
    assert torch.equal(encode_flux_prompts(folder, ["b"], keep=True).tokens, alone.tokens)
    assert loads == ["text_encoder_2", "text_encoder"]
    forget_flux_prompts()
    encode_flux_prompts(folder, ["c"])
    assert len(loads) == 4


def test_embeddings_in_a_folder_need_no_encoder_and_depend_on_the_length(
    folder: str, loads: list[str], tmp_path: Path
) -> None:
    first = encode_flux_prompts(folder, ["a", "b"], folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    forget_flux_prompts()
    loads.clear()
    again = encode_flux_prompts(folder, ["b", "a"], folder=tmp_path)
    assert loads == []
    assert torch.equal(again.tokens, first.tokens.flip(0))
    assert torch.equal(again.pooled, first.pooled.flip(0))
    assert encode_flux_prompts(folder, ["a"], max_tokens=8, folder=tmp_path).tokens.shape[1] == 8


def test_a_folder_is_filled_with_what_it_lacks_by_encoders_that_are_loaded_once_and_freed(
    folder: str, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 2)
    encode_flux_prompts(folder, ["a"], max_tokens=8, folder=tmp_path)
    loads.clear()
    prompts = [*"abcdef", "b"]
    assert cache_flux_prompts(folder, prompts, tmp_path, max_tokens=8) == 5
    assert loads == ["text_encoder_2", "text_encoder"]
    assert not module._kept
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    assert cache_flux_prompts(folder, prompts, tmp_path, max_tokens=8) == 0
    forget_flux_prompts()
    found = encode_flux_prompts(folder, prompts, max_tokens=8, folder=tmp_path)
    assert len(loads) == 2
    for part, expected in zip(found, encode_flux_prompts(folder, prompts, max_tokens=8), strict=True):
        assert_close(part, expected)


def test_a_prompt_that_was_remembered_before_there_was_a_folder_gets_into_it(folder: str, tmp_path: Path) -> None:
    encode_flux_prompts(folder, ["a"])
    encode_flux_prompts(folder, ["a"], folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_what_it_remembers_is_bounded(folder: str, loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CACHE_SIZE", 2)
    encode_flux_prompts(folder, ["a", "b"])
    encode_flux_prompts(folder, ["a"])
    encode_flux_prompts(folder, ["c"])  # pushes out b, used longest ago
    encode_flux_prompts(folder, ["a", "c"])
    assert len(loads) == 4
    encode_flux_prompts(folder, ["b"])
    assert len(loads) == 6


@pytest.mark.parametrize("kept", [True, False])
def test_it_remembers_few_where_encoders_or_files_are_kept(folder: str, tmp_path: Path, kept: bool) -> None:
    prompts = [f"a{i}" for i in range(40)]
    where = {"keep": True} if kept else {"folder": tmp_path}
    for prompt in prompts:
        encode_flux_prompts(folder, [prompt], max_tokens=4, **where)  # type: ignore[arg-type]
    assert [key[2] for key in module._cache] == prompts[-32:]
    module.forget_flux_prompts()


def test_a_caller_cannot_spoil_what_is_remembered_and_gradients_flow_past_it(folder: str) -> None:
    with torch.inference_mode():
        encode_flux_prompts(folder, ["a"])
    first = encode_flux_prompts(folder, ["a"])
    kept = first.tokens.clone()
    first.tokens.zero_()
    again = encode_flux_prompts(folder, ["a"]).tokens
    assert torch.equal(again, kept)
    weight = torch.ones(1, requires_grad=True)
    (weight * again).sum().backward()  # fails for tensors that stem from inference mode
    assert weight.grad is not None


def test_nothing_to_encode_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"prompts=\[\]"):
        encode_flux_prompts(folder, [])
    with pytest.raises(ValueError, match="max_tokens=0"):
        encode_flux_prompts(folder, ["a"], max_tokens=0)


def test_a_large_t5_works_in_bfloat16_and_a_small_one_in_float32(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = encode_flux_prompts(folder, ["a"])
    assert (exact.tokens.dtype, exact.pooled.dtype) == (torch.float32, torch.float32)
    forget_flux_prompts()
    config = json.loads((Path(folder) / "text_encoder_2/config.json").read_text())
    size = 384 * config["d_model"] + 2 * (4 * 24 * 16 + 3 * 24 * 32 + 2 * 24) + 32 * 2 + 24  # by hand
    monkeypatch.setattr(models, "_LARGE", size + 1)
    assert encode_flux_prompts(folder, ["a"]).tokens.dtype == torch.float32
    forget_flux_prompts()
    monkeypatch.setattr(models, "_LARGE", size)
    rounded = encode_flux_prompts(folder, ["a"])
    assert rounded.tokens.dtype == torch.bfloat16
    assert_close(rounded.tokens.float(), exact.tokens, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("no_network")
class TestWithoutWeights:
    def test_the_encoders_have_the_published_counts_in_the_types_in_which_they_are_loaded(self) -> None:
        encoders = flux_text_encoders(KONTEXT)
        found = {
            name: (count(encoder).total, {p.dtype for p in encoder.parameters()}) for name, encoder in encoders.items()
        }
        assert found == {"CLIP": (123_060_480, {torch.float32}), "T5": (4_762_310_656, {torch.bfloat16})}
        assert all(p.is_meta for encoder in encoders.values() for p in encoder.parameters())

    def test_gives_the_shapes_alone_and_remembers_nothing(self) -> None:
        with architecture_only():
            text = encode_flux_prompts(KONTEXT, ["a", "b"], max_tokens=512)
        assert text.tokens.is_meta
        assert (text.tokens.shape, text.tokens.dtype) == ((2, 512, 4096), torch.bfloat16)
        assert text.pooled.shape == (2, 768)
        assert not module._cache
