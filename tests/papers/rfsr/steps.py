"""Images and conditions as a step of RFSR takes them, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from papers.rfsr import RFSR, BaseSR
from papers.rfsr.base_models import Base, Description, TileConditions

ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
Batch = dict[str, Any]
Make = Callable[..., RFSR]


def see(model: BaseSR, x_lq: Tensor, prompts: list[str]) -> TileConditions:
    texts, e_img = model.base.look(x_lq, prompts)
    return model.see(x_lq, texts, e_img)


def described(base: Base, x_lq: Tensor, prompts: list[str]) -> Description:
    texts, e_img = base.look(x_lq, prompts)
    return base.describe(texts, e_img, x_lq.device)


def low(batch: Batch) -> Tensor:
    return batch["lq"].float() / 255


def high(batch: Batch) -> Tensor:
    return batch["hq"].float() / 255


def upsampled(x_01: Tensor) -> Tensor:
    return F.interpolate(x_01, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
