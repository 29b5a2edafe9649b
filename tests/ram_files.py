"""A small RAM and DAPE in a folder that is laid out as their authors' files are, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.conditioning.ram import RAM

TAGS = ("cat", "sea", "old town", "tree")


def sizes(context: int = 6) -> dict[str, Any]:
    """Arguments of a small `RAM` for 32 px: 17 image tokens of `context` channels."""
    trunk = {"image_size": 32, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    return {**trunk, "width": 12, "context": context, "head_heads": 3}


def ram_weights(context: int = 6) -> dict[str, Tensor]:
    """RAM's weights by their published names, with captioning parts and buffers as the authors' file has."""
    generator = torch.Generator().manual_seed(0)
    state = {
        key.replace("layers.1.downsample", "layers.0.downsample"): torch.randn(value.shape, generator=generator)
        for key, value in RAM(len(TAGS), **sizes(context)).state_dict().items()
    }
    return state | {
        "text_decoder.bert.x": torch.zeros(3),
        "tag_encoder.encoder.layer.0.attention.self.query.weight": torch.zeros(3),
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(3),
    }


def dape_weights(ram: dict[str, Tensor]) -> dict[str, Tensor]:
    """DAPE's adapters of rank 8 for these weights, by their published names."""
    generator = torch.Generator().manual_seed(1)
    adapters = {}
    for key, weight in ram.items():
        if key.endswith("attn.qkv.weight"):
            shapes = (16, weight.shape[1]), (2 * weight.shape[0] // 3, 8)
        elif key.endswith(("crossattention.self.query.weight", "crossattention.self.key.weight")):
            shapes = (8, weight.shape[1]), (weight.shape[0], 8)
        else:
            continue
        for kind, shape in zip(("A", "B"), shapes, strict=True):
            adapters[key.replace("weight", f"lora_{kind}")] = torch.randn(shape, generator=generator)
    return adapters


def write_folder(folder: Path, thresholds: Sequence[float] = (0.5,) * len(TAGS), context: int = 6) -> Path:
    """Write the four files; `RamTagger.sizes` must be `sizes(context)` to read them."""
    folder.mkdir(parents=True, exist_ok=True)
    ram = ram_weights(context)
    torch.save({"model": ram}, folder / "ram_swin_large_14m.pth")
    torch.save(dape_weights(ram), folder / "DAPE.pth")
    (folder / "ram_tag_list.txt").write_text("\n".join(TAGS))
    (folder / "ram_tag_list_threshold.txt").write_text("\n".join(map(str, thresholds)))
    return folder
