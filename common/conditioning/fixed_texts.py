"""Prompts that never change: each is encoded once, and checkpoints hold its embedding, so they need no text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.conditioning.text import encode_prompts
from common.loading import is_architecture_only


class FixedTexts:
    """Embeddings of fixed prompts in buffers of a module.

    The buffers are not persistent: checkpoints hold them by `record`, with their prompts.
    """

    def __init__(self) -> None:
        self._texts: dict[str, tuple[str, str]] = {}  # buffer -> place of the text encoder, prompt

    def add(self, module: nn.Module, name: str, pretrained: str, prompt: str, awaited: bool) -> None:
        """Hold a prompt's embedding, (1,N,D), in a buffer.

        Args:
            module: The module.
            name: Name of the buffer.
            pretrained: Where tokenizer and text encoder come from, see `common.loading`.
            prompt: The prompt.
            awaited: True if a checkpoint may come: the buffer stays empty until `take` or `encode`.
        """
        self._texts[name] = (pretrained, prompt)
        waits = awaited and not is_architecture_only()
        embedding = torch.empty(0) if waits else encode_prompts(pretrained, [prompt])
        module.register_buffer(name, embedding, persistent=False)

    def take(self, module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
        """Use the embeddings that a checkpoint holds of the same prompts and text encoders."""
        kept = checkpoint.get("texts", {})
        for name, (pretrained, prompt) in self._texts.items():
            text = kept.get(name)
            if text is not None and (text["pretrained"], text["prompt"]) == (pretrained, prompt):
                _set(module, name, text["embedding"])

    def encode(self, module: nn.Module) -> None:
        """Encode the prompts that no checkpoint brought.

        Raises:
            WeightsNotFoundError: The text encoder is not there and cannot be fetched.
        """
        for name, (pretrained, prompt) in self._texts.items():
            if not module.get_buffer(name).numel():
                _set(module, name, encode_prompts(pretrained, [prompt]))

    def record(self, module: nn.Module) -> dict[str, Any]:
        """The entry `texts` of a checkpoint; empty if there are none."""
        texts = {
            name: {"pretrained": pretrained, "prompt": prompt, "embedding": module.get_buffer(name)}
            for name, (pretrained, prompt) in self._texts.items()
        }
        return {"texts": texts} if texts else {}


def _set(module: nn.Module, name: str, embedding: Tensor) -> None:
    # clone: the checkpoint's file may be replaced
    setattr(module, name, embedding.clone().to(module.get_buffer(name)))
