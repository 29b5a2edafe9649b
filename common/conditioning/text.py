"""Text conditions: prompts through a frozen text encoder, or an embedding learned in its place."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.autoencoder import no_autocast
from common.loading import architecture_only, is_architecture_only, load_text_encoder
from common.parameters import Row, count
from common.stages import fingerprint

_CACHE_SIZE = 4096  # prompts; 77 x 1024 floats take 0.3 MB each
_cache: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
_kept: dict[str, tuple[Any, Any]] = {}


@torch.no_grad()
def encode_prompts(
    pretrained: str, prompts: Sequence[str], device: torch.device | str = "cpu", keep: bool = False
) -> Tensor:
    """Embed prompts as Stable Diffusion does: padded to full length, last hidden state, no attention mask.

    Each prompt is encoded once and remembered; the encoder is loaded only for new ones and freed afterwards. It
    computes in the dtype of its weights, also under autocast, so an embedding is the same before and within a fit.

    Args:
        pretrained: Where the tokenizer and the text encoder come from, see `common.loading`.
        prompts: B prompts; what exceeds the encoder's length is cut.
        device: Where to encode and to return the result.
        keep: Keep the encoder loaded for the next call, for prompts that change from batch to batch.

    Returns:
        Embeddings, (B, N, D), float32; on the meta device within `architecture_only()`.

    Raises:
        ValueError: There are no prompts.
    """
    if not prompts:
        raise ValueError("prompts is empty; give one a sample, '' for no text.")
    if is_architecture_only():
        return _encode(*load_text_encoder(pretrained), list(prompts))
    fresh = [prompt for prompt in dict.fromkeys(prompts) if (pretrained, prompt) not in _cache]
    found = {prompt: _cache[pretrained, prompt] for prompt in prompts if (pretrained, prompt) in _cache}
    if fresh:
        tokenizer, encoder = _kept.get(pretrained) or load_text_encoder(pretrained)
        found |= zip(fresh, _encode(tokenizer, encoder.to(device), fresh).cpu(), strict=True)
        if keep:
            _kept[pretrained] = (tokenizer, encoder)
    for prompt in dict.fromkeys(prompts):
        _cache[pretrained, prompt] = found[prompt]
        _cache.move_to_end((pretrained, prompt))
    while len(_cache) > _CACHE_SIZE:
        _cache.popitem(last=False)
    return torch.stack([found[prompt] for prompt in prompts]).to(device, non_blocking=True)


def text_fingerprint(pretrained: str) -> str:
    """Digest of a text encoder's weights; it is loaded if it is not kept."""
    return fingerprint((_kept.get(pretrained) or load_text_encoder(pretrained))[1])


def text_encoder_row(pretrained: str) -> Row:
    """The row of a text encoder in `isr parameters`; counted without its weights."""
    with architecture_only():
        total = count(load_text_encoder(pretrained)[1]).total
    return Row(f"text encoder of {pretrained}", "text", total, 0)


def forget_prompts() -> None:
    """Drop remembered embeddings and kept encoders."""
    _cache.clear()
    _kept.clear()


def _encode(tokenizer: Any, encoder: Any, prompts: list[str]) -> Tensor:
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    with no_autocast(encoder.device):
        return encoder(ids.to(encoder.device)).last_hidden_state.float()  # (B, N, D)


class LearnedEmbedding(nn.Module):
    """One trainable condition for all images, in the place of a prompt's embedding.

    Args:
        tokens: Its length N; 77 for CLIP-like encoders.
        width: Its width D; 1024 for SD 2.1. SD 2.1's embedding thus has 78,848 parameters.
        init: `normal` for N(0, 1), or the tensor (N, D) or (1, N, D) to start from, e.g. the empty prompt's.

    Raises:
        ValueError: The tensor's shape is not (tokens, width).
    """

    def __init__(self, tokens: int = 77, width: int = 1024, init: Literal["normal"] | Tensor = "normal") -> None:
        super().__init__()
        if isinstance(init, Tensor):
            start = init[0] if init.ndim == 3 and len(init) == 1 else init
            if start.shape != (tokens, width):
                raise ValueError(f"init has shape {tuple(init.shape)}; pass ({tokens}, {width}).")
            start = start.detach().clone().float()
        elif init == "normal":
            start = torch.randn(tokens, width)
        else:
            raise ValueError(f"init='{init}' must be 'normal' or a tensor.")
        self.embedding = nn.Parameter(start)

    def forward(self, batch_size: int) -> Tensor:
        """Repeat the embedding for a batch: (B, N, D), a view without a copy."""
        return self.embedding.expand(batch_size, -1, -1)
