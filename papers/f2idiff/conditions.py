"""Conditions of the U-Net: an image's DINOv2 features (F2IDiff) or a text (T2IDiff), and the null condition."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from common.conditioning.captions import Captioner
from common.conditioning.features import DinoFeatures, Tokens
from common.conditioning.text import encode_prompts, text_fingerprint
from common.precision import FrozenDtype
from common.stages import fingerprint

ConditionKind = Literal["features", "text"]
Null = Literal["zeros", "learned"]


class FeatureCondition(nn.Module):
    """Tokens of a frozen DINOv2. They reach cross-attention without projection, mask or positions.

    Args:
        pretrained: DINOv2, see `DinoFeatures`.
        tokens: Kind of tokens: `all`, `patch` or `cls`.
        size: Pixels of the shorter side at DINOv2's input; null for the image's own size.
        null: The null condition: `zeros`, or one `learned` token in every place.
        frozen_dtype: Dtype of DINOv2's weights.
    """

    def __init__(
        self,
        pretrained: str,
        tokens: Tokens = "all",
        size: int | None = None,
        null: Null = "zeros",
        frozen_dtype: FrozenDtype = "float32",
    ) -> None:
        super().__init__()
        self.features = DinoFeatures(pretrained, tokens, size, frozen_dtype=frozen_dtype)
        self.null_token = nn.Parameter(torch.zeros(1, 1, self.features.width)) if null == "learned" else None

    def forward(self, x_01: Tensor, prompts: list[str]) -> Tensor:
        """Condition of images (B,3,H,W) in [0,1], (B,N,D), fp32, without a graph; prompts are ignored."""
        return self.features(x_01)

    def null(self, c: Tensor) -> Tensor:
        """The null condition, of the shape of `c`."""
        return DinoFeatures.null_features(c) if self.null_token is None else self.null_token.expand_as(c)

    def negative(self, c: Tensor) -> Tensor:
        """The null condition, for the negative branch of guidance."""
        return self.null(c)

    def digest(self) -> str:
        """Digest of the weights that make the condition."""
        return fingerprint(self.features)


class TextCondition(nn.Module):
    """Embeddings of prompts by a frozen text encoder.

    Args:
        pretrained: Source of the tokenizer and the text encoder, see `common.loading`.
        width: Width of the U-Net's cross-attention.
        captioner: Image-to-text model that writes the prompts if none are given, see `Captioner`.
        negative_prompt: Text of the negative branch of guidance.

    Raises:
        ValueError: The embeddings have another width than the cross-attention.
    """

    def __init__(self, pretrained: str, width: int, captioner: str | None = None, negative_prompt: str = "") -> None:
        super().__init__()
        found = encode_prompts(pretrained, [""], keep=True).shape[-1]
        if found != width:
            raise ValueError(
                f"text_encoder={pretrained} makes embeddings {found} wide, the U-Net's cross-attention takes {width}. "
                "Set the text encoder that the U-Net was trained with."
            )
        self.pretrained, self.negative_prompt = pretrained, negative_prompt
        self.captioner = Captioner(captioner) if captioner is not None else None

    def forward(self, x_01: Tensor, prompts: list[str]) -> Tensor:
        """Condition of images (B,3,H,W) in [0,1], (B,N,D), fp32, without a graph; without prompts, the captioner's."""
        texts = prompts if prompts or self.captioner is None else self.captioner.to(x_01.device)(x_01)
        return encode_prompts(self.pretrained, texts, x_01.device, keep=True)

    def null(self, c: Tensor) -> Tensor:
        """The empty prompt, of the shape of `c`."""
        return encode_prompts(self.pretrained, [""], c.device, keep=True).expand_as(c)

    def negative(self, c: Tensor) -> Tensor:
        """Embeddings of the negative prompt, of the shape of `c`."""
        return encode_prompts(self.pretrained, [self.negative_prompt], c.device, keep=True).expand_as(c)

    def digest(self) -> str:
        """Digest of the weights that make the condition."""
        return text_fingerprint(self.pretrained)


Condition = FeatureCondition | TextCondition


def drop(c: Tensor, null: Tensor, draw: Tensor, rate: float) -> Tensor:
    """Condition dropout: the null condition for samples whose draw from U[0,1) is below the rate; (B,N,D)."""
    return torch.where((draw < rate).view(-1, 1, 1), null.to(c), c)
