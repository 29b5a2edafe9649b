"""RAM, which tags images, and DAPE, its adaptation to degraded images (SeeSR, arXiv:2311.16518, section 3.2).

RAM (arXiv:2306.03514) is a Swin-L whose patch tokens, and their mean before them, are projected to 512 channels; two
layers of cross-attention from 4585 tag embeddings to these tokens give one logit a tag. DAPE is a LoRA of rank 8 on
query and value of the Swin blocks and on query and key of the tagging layers, merged here.

Names are those of `ram_swin_large_14m.pth` and `DAPE.pth`, with two exceptions: timm counts a stage's `downsample` to
the stage after it, and older files name `tagging_head` `vision_multi`. The captioning parts, `text_decoder` and
`tag_encoder`, are left out. With random weights tokens are equal to those of the authors' code and logits to 1e-6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.autoencoder import no_autocast
from common.checkpoints import read_tensors
from common.losses.vgg import IMAGENET_MEAN, IMAGENET_STD

RAM_FILE, DAPE_FILE = "ram_swin_large_14m.pth", "DAPE.pth"
TAG_FILE, THRESHOLD_FILE = "ram_tag_list.txt", "ram_tag_list_threshold.txt"
_RANK = 8  # of DAPE's LoRA; its alpha is loralib's 1
_DOWNSAMPLE = re.compile(r"^visual_encoder\.layers\.(\d+)\.downsample\.")
_LEFT_OUT = re.compile(
    r"text_decoder\.|tag_encoder\.|.*\.(relative_position_index|attn_mask)$|tagging_head\.embeddings\."
)


class Tagged(NamedTuple):
    """Logits of the tags, (B,T), and image tokens, (B,N,512): the patches' mean, then the patches."""

    logits: Tensor
    e_img: Tensor


class _CrossAttention(nn.Module):
    """Attention from tags to image tokens, by the names of BERT's code."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {"query": nn.Linear(width, width), "key": nn.Linear(context, width), "value": nn.Linear(context, width)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, 1e-12)})

    def forward(self, x: Tensor, e_img: Tensor) -> Tensor:
        q, k, v = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in zip(self.self.values(), (x, e_img, e_img), strict=True)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        found: Tensor = self.output["LayerNorm"](self.output["dense"](attended) + x)
        return found


class _TaggingLayer(nn.Module):
    """A BERT layer without its self-attention."""

    def __init__(self, width: int, context: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.crossattention = _CrossAttention(width, context, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width), "LayerNorm": nn.LayerNorm(width, 1e-12)})

    def forward(self, x: Tensor, e_img: Tensor) -> Tensor:
        x = self.crossattention(x, e_img)
        hidden = F.gelu(self.intermediate["dense"](x))
        found: Tensor = self.output["LayerNorm"](self.output["dense"](hidden) + x)
        return found


class RAM(nn.Module):
    """RAM's image encoder and tagging head; the defaults are RAM-14M with Swin-L at 384 px.

    Args:
        tags: Number of tags, T.
        image_size: Side of the images that the trunk takes, px.
        embed_dim: Width of the trunk's first stage.
        depths: Number of Swin blocks of each stage.
        num_heads: Number of attention heads of each stage.
        window_size: Side of an attention window, tokens.
        width: Width of the tagging layers.
        context: Width of the image tokens.
        head_heads: Number of attention heads of a tagging layer.
    """

    def __init__(
        self,
        tags: int = 4585,
        image_size: int = 384,
        embed_dim: int = 192,
        depths: Sequence[int] = (2, 2, 18, 2),
        num_heads: Sequence[int] = (6, 12, 24, 48),
        window_size: int = 12,
        width: int = 768,
        context: int = 512,
        head_heads: int = 4,
    ) -> None:
        super().__init__()
        try:
            from timm.models.swin_transformer import SwinTransformer
        except ImportError as error:
            raise ImportError("RAM and DAPE need the package timm: pip install 'isr-papers[tagger]'") from error
        self.image_size = image_size
        self.visual_encoder = SwinTransformer(
            img_size=image_size,
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window_size,
            drop_path_rate=0.0,
            num_classes=0,
            weight_init="skip",
        )
        self.image_proj = nn.Linear(self.visual_encoder.num_features, context)
        self.label_embed = nn.Parameter(torch.zeros(tags, context))
        self.wordvec_proj = nn.Linear(context, width)
        layers = nn.ModuleList(_TaggingLayer(width, context, head_heads, 4 * width) for _ in range(2))
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})
        self.fc = nn.Linear(width, 1)

    def forward(self, x_01: Tensor) -> Tagged:
        """Tag images (B,3,h,w) in [0,1] of any size; they are resized without antialiasing, as SeeSR's script does."""
        side = (self.image_size, self.image_size)
        x = F.interpolate(x_01, side, mode="bilinear", align_corners=False)
        x = (x - x.new_tensor(IMAGENET_MEAN).view(3, 1, 1)) / x.new_tensor(IMAGENET_STD).view(3, 1, 1)
        patches = self.visual_encoder.forward_features(x).flatten(1, 2)
        e_img = self.image_proj(torch.cat([patches.mean(1, keepdim=True), patches], 1))
        embedded = F.relu(self.wordvec_proj(self.label_embed)).expand(len(x), -1, -1)
        for layer in self.tagging_head.get_submodule("encoder.layer").children():
            embedded = layer(embedded, e_img)
        return Tagged(self.fc(embedded).squeeze(-1), e_img)

    def load_published(self, ram: Mapping[str, Tensor], dape: Mapping[str, Tensor] | None = None) -> None:
        """Load weights by their published names, strictly.

        Args:
            ram: Weights of `ram_swin_large_14m.pth`.
            dape: LoRA weights of `DAPE.pth`, merged into RAM's; null for RAM alone.

        Raises:
            ValueError: Weights are missing, not known or of another shape.
        """
        ram = {key.replace("vision_multi.", "tagging_head."): value for key, value in ram.items()}
        ram = {key: value for key, value in ram.items() if not _LEFT_OUT.match(key)}
        state = ram if dape is None else merged(ram, dape)
        try:
            self.load_state_dict({_DOWNSAMPLE.sub(_next_stage, key): value for key, value in state.items()})
        except RuntimeError as error:
            raise ValueError(f"{RAM_FILE} does not fit RAM of this size: {error}") from error


def _next_stage(found: re.Match[str]) -> str:
    return f"visual_encoder.layers.{int(found[1]) + 1}.downsample."


def merged(ram: Mapping[str, Tensor], dape: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """RAM's weights plus B A / 8 of DAPE's adapters.

    A merged linear layer of loralib holds query's and value's adapters in one pair of matrices, (2r,in) and (2 out,r).

    Raises:
        ValueError: DAPE lacks one matrix of a pair, or adapts a layer that RAM does not have.
    """
    state = dict(ram)
    for key, a in dape.items():
        layer, _, kind = key.rpartition(".")
        if kind != "lora_A" or _LEFT_OUT.match(key):
            continue
        weight, b = state.get(f"{layer}.weight"), dape.get(f"{layer}.lora_B")
        if weight is None or b is None:
            lacking = f"{layer}.weight" if weight is None else f"{layer}.lora_B"
            raise ValueError(f"{DAPE_FILE} has {key}, and there is no {lacking}")
        parts = [pair_b @ pair_a for pair_a, pair_b in zip(a.split(_RANK), b.chunk(len(a) // _RANK), strict=True)]
        delta = torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]]) if len(parts) == 2 else parts[0]
        state[f"{layer}.weight"] = weight + delta / _RANK
    return state


class RamTagger:
    """RAM or DAPE from a folder of its authors' files, loaded at the first call.

    The folder holds `ram_swin_large_14m.pth`, `DAPE.pth`, and RAM's `ram_tag_list.txt` and
    `ram_tag_list_threshold.txt`.

    Args:
        folder: The folder, e.g. SeeSR's `preset/models`.
        adapted: Tag with DAPE's adapters, as for degraded images; false for RAM alone.

    Its weights are bfloat16 on an accelerator and float32 on a CPU.
    """

    sizes: ClassVar[Mapping[str, Any]] = {}
    """Arguments of `RAM` other than its defaults."""

    def __init__(self, folder: str | Path, adapted: bool = True) -> None:
        self.folder, self.adapted = Path(folder).expanduser(), adapted
        self.names: list[str] = []
        self._device = torch.device("cpu")
        self._loaded: tuple[RAM, Tensor] | None = None

    def to(self, device: torch.device | str) -> RamTagger:
        """Set the device of the network; loads nothing."""
        self._device = torch.device(device)
        if self._loaded is not None:
            network, thresholds = self._loaded
            self._loaded = network.to(self._device, self._dtype()), thresholds.to(self._device)
        return self

    def _dtype(self) -> torch.dtype:
        return torch.float32 if self._device.type == "cpu" else torch.bfloat16

    def __call__(self, x_01: Tensor) -> list[str]:
        """Tags of images (B,3,h,w) in [0,1], separated by commas, in the tag list's order."""
        return self.tag(x_01)[0]

    @torch.no_grad()
    def tag(self, x_01: Tensor) -> tuple[list[str], Tensor]:
        """Tags as for a call, and image tokens, (B,145,512), float32.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file does not fit.
        """
        if self._loaded is None:
            self._loaded = self._load()
        network, thresholds = self._loaded
        with no_autocast(self._device):
            logits, e_img = network(x_01.to(self._device, self._dtype()))
        above = (logits.float().sigmoid() > thresholds).cpu()
        return [", ".join(self.names[i] for i in row.nonzero().flatten().tolist()) for row in above], e_img.float()

    def _load(self) -> tuple[RAM, Tensor]:
        lacking = [name for name in self._files() if not (self.folder / name).is_file()]
        if lacking:
            raise FileNotFoundError(
                f"folder={self.folder} of the tagger lacks {', '.join(lacking)}. {RAM_FILE} is at "
                "https://huggingface.co/spaces/xinyu1205/recognize-anything (Apache-2.0), its two text files are in "
                "ram/data of https://github.com/cswry/SeeSR, which also links DAPE.pth (Apache-2.0)"
            )
        self.names = (self.folder / TAG_FILE).read_text(encoding="utf-8").splitlines()
        thresholds = [float(line) for line in (self.folder / THRESHOLD_FILE).read_text().split()]
        if len(thresholds) != len(self.names):
            raise ValueError(
                f"{self.folder}: {TAG_FILE} has {len(self.names)} tags and {THRESHOLD_FILE} {len(thresholds)} numbers; "
                "give both of one release"
            )
        ram = read_tensors(self.folder / RAM_FILE, mapped=True)["model"]
        dape = read_tensors(self.folder / DAPE_FILE) if self.adapted else None
        network = RAM(len(self.names), **self.sizes)
        network.load_published(ram, dape)
        network = network.to(self._device, self._dtype()).eval().requires_grad_(False)
        return network, torch.tensor(thresholds, device=self._device)

    def _files(self) -> list[str]:
        return [RAM_FILE, TAG_FILE, THRESHOLD_FILE, *([DAPE_FILE] if self.adapted else [])]
