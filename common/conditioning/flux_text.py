"""FLUX's text condition: tokens of T5 and one pooled vector of CLIP, each prompt encoded once and then remembered."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.autoencoder import no_autocast
from common.denoisers.flux import FluxText
from common.files import replacing
from common.loading import architecture_only, is_architecture_only, load_text_encoder

CLIP = ("text_encoder", "tokenizer")
T5 = ("text_encoder_2", "tokenizer_2")

_BATCH = 16  # prompts that are encoded at once where there are many
_CACHE_SIZE = 2048  # prompts; 512 x 4096 numbers of bfloat16 take 4.2 MB each
_SMALL_CACHE_SIZE = 32  # with `keep` or `folder`, where a prompt is soon encoded or read again
_cache: OrderedDict[tuple[str, int, str], FluxText] = OrderedDict()
_kept: dict[tuple[str, str], tuple[Any, Any]] = {}


@torch.no_grad()
def encode_flux_prompts(
    pretrained: str,
    prompts: Sequence[str],
    device: torch.device | str = "cpu",
    max_tokens: int = 512,
    keep: bool = False,
    folder: str | Path | None = None,
) -> FluxText:
    """Embed prompts as FLUX's pipelines do: both padded to full length, without attention mask.

    Each prompt is encoded once and remembered on the CPU, the last 2,048 of them (8.6 GB of FLUX.1 [dev]), or the last
    32 with `keep` or `folder`; the encoders are loaded only for new ones, one after the other, and freed afterwards.
    They compute in the dtype of their weights, also under autocast: T5-XXL in bfloat16, as it was published (9.5 GB),
    CLIP in float32.

    Args:
        pretrained: Folder or hub id in FLUX's layout, `tiny` or `random:<architecture>`, see `common.loading`.
        prompts: B prompts; what exceeds an encoder's length is cut.
        device: Where to encode and to return the result.
        max_tokens: N, but no more than T5's tokenizer has (FLUX.1 [dev]: 512; `tiny`: 32).
        keep: Keep both encoders loaded for the next call, for prompts that change from batch to batch.
        folder: Where to keep embeddings from run to run, a file a prompt (4.2 MB of FLUX.1 [dev]); made where missing.

    Returns:
        The condition, (B, N, D) and (B, P), in the encoders' dtypes; on the meta device within `architecture_only()`.

    Raises:
        ValueError: There are no prompts, or no tokens.
    """
    if not prompts or max_tokens < 1:
        raise ValueError(f"prompts={list(prompts)} and max_tokens={max_tokens}: give one prompt a sample, '' for none.")
    if is_architecture_only():
        return _encode(pretrained, list(prompts), "meta", max_tokens)
    wanted = {prompt: (pretrained, max_tokens, prompt) for prompt in prompts}
    found = {prompt: _cache[key] for prompt, key in wanted.items() if key in _cache}
    files = {prompt: _file(folder, *key) for prompt, key in wanted.items()} if folder else {}
    for prompt, file in files.items():
        if prompt not in found and file.is_file():
            found[prompt] = FluxText(**load_file(file))
    fresh = [prompt for prompt in wanted if prompt not in found]
    if fresh:
        encoded = _encode(pretrained, fresh, device, max_tokens, keep)
        rows = zip(encoded.tokens.cpu(), encoded.pooled.cpu(), strict=True)
        found |= {prompt: FluxText(*row) for prompt, row in zip(fresh, rows, strict=True)}
    for prompt, file in files.items():
        if not file.is_file():  # also of one that was remembered before there was a folder
            with replacing(file) as temporary:
                save_file({name: part.contiguous() for name, part in found[prompt]._asdict().items()}, temporary)
    for prompt, key in wanted.items():
        _cache[key] = found[prompt]
        _cache.move_to_end(key)
    while len(_cache) > (_SMALL_CACHE_SIZE if keep or folder else _CACHE_SIZE):
        _cache.popitem(last=False)
    columns = zip(*(found[prompt] for prompt in prompts), strict=True)
    return FluxText(*(torch.stack(column).to(device, non_blocking=True) for column in columns))


def cache_flux_prompts(
    pretrained: str,
    prompts: Sequence[str],
    folder: str | Path,
    device: torch.device | str = "cpu",
    max_tokens: int = 512,
) -> int:
    """Embed the prompts that a folder lacks, as `encode_flux_prompts` would; both encoders are loaded once, then freed.

    Args:
        pretrained: As for `encode_flux_prompts`.
        prompts: Prompts; duplicates count once.
        folder: Where their embeddings are kept.
        device: Where to encode.
        max_tokens: As for `encode_flux_prompts`.

    Returns:
        Number of prompts that were missing.
    """
    fresh = lacking_flux_prompts(pretrained, prompts, folder, max_tokens)
    try:
        for start in range(0, len(fresh), _BATCH):
            encode_flux_prompts(pretrained, fresh[start : start + _BATCH], device, max_tokens, True, folder)
    finally:
        for name, _ in (T5, CLIP):
            _kept.pop((pretrained, name), None)
    return len(fresh)


def lacking_flux_prompts(
    pretrained: str, prompts: Sequence[str], folder: str | Path, max_tokens: int = 512
) -> list[str]:
    """The distinct prompts whose embeddings a folder lacks; arguments as for `cache_flux_prompts`."""
    distinct = dict.fromkeys(prompts)
    return [prompt for prompt in distinct if not _file(folder, pretrained, max_tokens, prompt).is_file()]


def flux_text_encoders(pretrained: str) -> dict[str, Any]:
    """CLIP and T5 in the dtypes in which they are loaded, on the meta device: to count them without their weights."""
    with architecture_only():
        return {name: _encoder(pretrained, parts, "meta", False)[1] for name, parts in (("CLIP", CLIP), ("T5", T5))}


def forget_flux_prompts() -> None:
    """Drop remembered embeddings and kept encoders."""
    _cache.clear()
    _kept.clear()


def t5_tokens(tokenizer: Any, encoder: Any, prompts: Sequence[str], max_tokens: int) -> Tensor:
    """T5's last hidden state, (B, N, D); padding is encoded like text, as FLUX was trained."""
    ids = _ids(tokenizer, encoder, prompts, min(max_tokens, tokenizer.model_max_length))
    with no_autocast(encoder.device):
        return encoder(ids).last_hidden_state


def clip_pooled(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Tensor:
    """CLIP's state at the end of the text, (B, P)."""
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    ids = _ids(tokenizer, encoder, prompts, length)
    with no_autocast(encoder.device):
        return encoder(ids).pooler_output


def _encode(
    pretrained: str, prompts: list[str], device: torch.device | str, max_tokens: int, keep: bool = False
) -> FluxText:
    tokens = t5_tokens(*_encoder(pretrained, T5, device, keep), prompts, max_tokens)  # freed before CLIP comes
    return FluxText(tokens, clip_pooled(*_encoder(pretrained, CLIP, device, keep), prompts))


def _encoder(pretrained: str, parts: tuple[str, str], device: torch.device | str, keep: bool) -> tuple[Any, Any]:
    key = (pretrained, parts[0])
    if key in _kept:
        return _kept[key]
    dtype = None if parts == T5 else torch.float32
    tokenizer, encoder = load_text_encoder(pretrained, *parts, dtype=dtype)
    loaded: tuple[Any, Any] = tokenizer, encoder.to(device)
    if keep:
        _kept[key] = loaded
    return loaded


def _file(folder: str | Path, pretrained: str, max_tokens: int, prompt: str) -> Path:
    digest = hashlib.blake2b(f"{pretrained}\n{max_tokens}\n{prompt}".encode(), digest_size=16).hexdigest()
    return Path(folder) / f"{digest}.safetensors"


def _ids(tokenizer: Any, encoder: Any, prompts: Sequence[str], length: int) -> Tensor:
    ids = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    ).input_ids
    return ids.to(encoder.device)
