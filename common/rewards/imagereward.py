"""ImageReward (Xu et al., arXiv:2304.05977) on transformers' BLIP modules, reading the released file."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoints import read_tensors
from common.errors import one_line
from common.loading import (
    HUB_ID,
    WeightsNotFoundError,
    ask_hub,
    drawing_weights,
    is_architecture_only,
    network_device,
)
from common.rewards.base import Reward

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_TOKENS = 35

_SCORE_MEAN, _SCORE_STD = 0.16717362830052426, 1.0333394966054072  # of THUDM/ImageReward, `ImageReward.py`
_FILE = "ImageReward.pt"
_SUFFIXES = (".pt", ".pth", ".safetensors")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")

_UNUSED = frozenset(
    {
        "blip.text_encoder.embeddings.position_ids",
        "blip.vision_proj.weight",
        "blip.vision_proj.bias",
        "blip.text_proj.weight",
        "blip.text_proj.bias",
    }
)
# Names of the released file -> ours; all that fit apply, in this order.
_RENAMES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
        (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
        (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
        (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
        (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
        (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
        (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
        (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
        (r"^blip\.text_encoder\.", "text."),
        (r"^mlp\.layers\.", "head."),
    )
)
_HEAD_INDICES = ("0", "2", "4", "6", "7")  # of the released Sequential, whose others are dropouts


@dataclass(frozen=True)
class ImageRewardSize:
    """Sizes of the networks; the defaults are the released file's.

    Args:
        image: Side of the image that the vision transformer sees, px.
        patch: Side of its patches, px.
        vision_width: Its channels; its MLPs have four times as many.
        vision_layers: Its blocks.
        vision_heads: Its attention heads.
        text_width: Channels of the text encoder; its MLPs have four times as many.
        text_layers: Its blocks.
        text_heads: Its attention heads.
        vocabulary: Its tokens: BERT's 30,522 and two that ImageReward never uses.
        positions: Its longest text.
        head: Channels between the linear layers of the head.
    """

    image: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocabulary: int = 30524
    positions: int = 512
    head: tuple[int, int, int, int] = (1024, 128, 64, 16)


class ImageReward(Reward):
    """Human preference for an image given its prompt, about N(0, 1) over the images that the network was trained on.

        h = BLIP text encoder(prompt, cross-attending to ViT(image)) at [CLS],   r = (MLP(h) - 0.1672) / 1.0333

    The MLP is linear throughout. The image's shorter side is resized to 224 px (bicubic with antialias), then its
    centre is cropped; the prompt is cut or padded to 35 BERT tokens. The only difference from `image-reward` is
    the resize of PIL images, which that package rounds to 8 bits.

    Args:
        weights: Hub id (`THUDM/ImageReward`: ImageReward.pt, from the Hugging Face cache or else downloaded into it),
            path of that file (.pt, .pth or .safetensors), or `random` (from `seed`, for tests and demos).
        tokenizer: Hub id, or folder with the vocabulary, of BERT base uncased; read at the first prompt or by `load`.
        size: Sizes of the networks; others than the released ones only with `random` weights.
        seed: Seed of the `random` weights; the global generator is not used.

    Raises:
        ValueError: `size` does not fit, or the file does not hold this network.
        WeightsNotFoundError: The weights are not there and cannot be fetched.
    """

    name = "imagereward"
    differentiable = True
    prompted: ClassVar[bool] = True

    def __init__(
        self,
        weights: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        size: ImageRewardSize | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.size = ImageRewardSize() if size is None else size
        if self.size != ImageRewardSize() and weights != "random":
            raise ValueError(f"size does not fit weights={weights!r}; leave it out, or pass weights='random'.")
        self.tokenizer = tokenizer
        self._tokenizer: Any = None
        vision = BlipVisionConfig(
            hidden_size=self.size.vision_width,
            intermediate_size=4 * self.size.vision_width,
            num_hidden_layers=self.size.vision_layers,
            num_attention_heads=self.size.vision_heads,
            image_size=self.size.image,
            patch_size=self.size.patch,
            layer_norm_eps=1e-6,  # as in BLIP's own `vit.py`; transformers' default is 1e-5
        )
        text = BlipTextConfig(
            vocab_size=self.size.vocabulary,
            hidden_size=self.size.text_width,
            encoder_hidden_size=self.size.vision_width,
            intermediate_size=4 * self.size.text_width,
            num_hidden_layers=self.size.text_layers,
            num_attention_heads=self.size.text_heads,  # transformers' default of 8 is BLIP's VQA model's
            max_position_embeddings=self.size.positions,
            layer_norm_eps=1e-12,
        )
        with torch.device("meta"):
            self.vision = BlipVisionModel(vision)
            self.text = BlipTextModel(text, add_pooling_layer=False)
            layers = (nn.Linear(*pair) for pair in pairwise((self.size.text_width, *self.size.head, 1)))
            self.head = nn.ModuleDict(dict(zip(_HEAD_INDICES, layers, strict=True)))
        if not is_architecture_only():
            self._fill(weights, seed)
        self.requires_grad_(False).train(False)

    def load(self, device: torch.device | str = "cpu") -> None:
        """Read the tokenizer now.

        Raises:
            WeightsNotFoundError: It is not there and cannot be fetched.
        """
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.tokenizer)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Cut or pad prompts to 35 tokens; gives ids and mask (1 for tokens, 0 for padding), (B, 35) int64 each.

        Raises:
            WeightsNotFoundError: The tokenizer is not there and cannot be fetched.
        """
        self.load()
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask

    def score_ids(self, ids: Tensor, mask: Tensor, x_01: Tensor) -> Tensor:
        """Score images against prompts that are tokens already.

        Args:
            ids: Tokens of the prompts, (B, L), the first of them [CLS].
            mask: 1 for tokens, 0 for padding, (B, L).
            x_01: Images, (B, 3, H, W), RGB in [0, 1], clamped to it.

        Returns:
            Standardised score per image, (B,), in the weights' dtype.

        Raises:
            ValueError: The shapes do not fit, or the module was cast to 16 bits.
        """
        x = self._images(x_01)
        if ids.shape != mask.shape or ids.ndim != 2 or len(ids) != len(x):
            raise ValueError(
                f"ids has shape {tuple(ids.shape)} and mask {tuple(mask.shape)} for {len(x)} images; pass (B, L) twice."
            )
        with torch.autocast(x.device.type, enabled=False):
            patches = self.vision(pixel_values=clip_pixels(x, self.size.image)).last_hidden_state
            hidden = self.text(
                input_ids=ids.to(x.device), attention_mask=mask.to(x.device), encoder_hidden_states=patches
            ).last_hidden_state[:, 0]
            for index in _HEAD_INDICES:
                hidden = self.head[index](hidden)
            return (hidden[:, 0] - _SCORE_MEAN) / _SCORE_STD

    def _score(self, x: Tensor, prompts: Sequence[str], hq: Tensor | None) -> Tensor:
        return self.score_ids(*self.tokenize(prompts), x)

    def _fill(self, weights: str, seed: int) -> None:
        """Give the networks, laid out on the meta device, their values in fp32."""
        if weights == "random":
            logger.warning("ImageReward has random weights: a stand-in for tests and demos.")
            state = _random_state(self, seed)
        else:
            state = released_to_ours(_read(weights))
        try:
            self.load_state_dict({key: value.float() for key, value in state.items()}, strict=True, assign=True)
        except RuntimeError as err:
            reason = one_line(err, 300)
            raise ValueError(f"weights={weights!r} is not an ImageReward; pass its {_FILE}: {reason}") from err
        embeddings = self.text.embeddings  # holds the one buffer that no file has
        embeddings.position_ids = torch.arange(self.size.positions)[None]
        self.to(network_device())


def clip_pixels(x: Tensor, side: int) -> Tensor:
    """Prepare images for CLIP's and BLIP's vision transformers, as torchvision's transforms of tensors do.

    Args:
        x: Images, (B, 3, H, W), RGB in [0, 1].
        side: Side of the square, px: the shorter side is resized to it, the longer cropped at both ends.

    Returns:
        Pixels less CLIP's mean, over its standard deviation, (B, 3, side, side).
    """
    height, width = x.shape[2:]
    short = min(height, width)
    size = (int(side * height / short), int(side * width / short))
    x = F.interpolate(x, size, mode="bicubic", antialias=True)
    top, left = (round((length - side) / 2) for length in size)
    x = x[..., top : top + side, left : left + side]
    return (x - x.new_tensor(CLIP_MEAN).view(3, 1, 1)) / x.new_tensor(CLIP_STD).view(3, 1, 1)


def released_to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the released file's tensors to this module's, and leave out the five that it does not use.

    Args:
        state: State dict in the layout of ImageReward.pt: 625 tensors, 446,666,465 values.

    Returns:
        The same tensors under our names, without position ids and the projections of BLIP's contrastive loss (459,776
        values). A name without a rule stays, and strict loading refuses it.
    """
    renamed = {}
    for key, value in state.items():
        if key in _UNUSED:
            continue
        for pattern, ours in _RENAMES:
            key = pattern.sub(ours, key)
        renamed[key] = value
    return renamed


def _random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Normal weights over the fan-in, norms of weight 1, biases 0; on the CPU, see `drawing_weights`."""
    state = {}
    with drawing_weights(seed):
        for key, meta in model.state_dict().items():
            if meta.ndim > 1:
                std = 1 / math.sqrt(math.prod(meta.shape[1:]))
                state[key] = std * torch.randn(meta.shape)
            else:
                state[key] = torch.full(meta.shape, float(key.endswith("weight")))
    return state


def _read(weights: str) -> dict[str, Tensor]:
    path = Path(weights).expanduser()
    if not path.is_file():
        path = _download(weights)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"weights={weights!r} is none of {', '.join(_SUFFIXES)}; pass {_FILE} or 'random'.")
    state: dict[str, Tensor] = read_tensors(path)
    return state


def _download(repo: str) -> Path:
    """ImageReward.pt of a hub repository, from the cache, else by download."""
    if not HUB_ID.fullmatch(repo) or Path(repo).suffix in _SUFFIXES:
        raise WeightsNotFoundError(
            f"weights='{repo}' is neither an existing file nor a hub id (owner/name); pass the path of {_FILE}, "
            "'THUDM/ImageReward', or 'random' for a demo."
        )
    try:
        return Path(huggingface_hub.hf_hub_download(repo, _FILE, local_files_only=True))
    except FileNotFoundError:  # LocalEntryNotFoundError: not in the cache
        pass
    try:
        ask_hub()
        return Path(huggingface_hub.hf_hub_download(repo, _FILE))
    except Exception as error:
        raise _not_found(f"weights='{repo}': no {_FILE}", f"{repo} {_FILE}", error, "its path") from error


def _load_tokenizer(tokenizer: str) -> Any:
    """BERT's tokenizer from a folder or the hub."""
    from transformers import BertTokenizer

    root = _tokenizer_folder(tokenizer)
    try:
        found = BertTokenizer.from_pretrained(root, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsNotFoundError(f"tokenizer='{tokenizer}' cannot be read: {one_line(error, 300)}") from error
    return found


def _tokenizer_folder(tokenizer: str) -> Path:
    """The folder with the vocabulary, fetched from the hub if it must be."""
    folder = Path(tokenizer).expanduser()
    if folder.is_dir():
        if not _has_vocabulary(folder):
            raise WeightsNotFoundError(
                f"tokenizer='{tokenizer}' holds none of {', '.join(_TOKENIZER_FILES)}; pass BERT base uncased's folder."
            )
        return folder
    if not HUB_ID.fullmatch(tokenizer):
        raise WeightsNotFoundError(
            f"tokenizer='{tokenizer}' is neither an existing folder nor a hub id (owner/name); pass one of these."
        )
    try:
        root = Path(huggingface_hub.snapshot_download(tokenizer, local_files_only=True))
        if _has_vocabulary(root):
            return root
    except FileNotFoundError:  # LocalEntryNotFoundError: nothing of it in the cache
        pass
    try:
        ask_hub()
        return Path(huggingface_hub.snapshot_download(tokenizer, allow_patterns=["*.json", "*.txt"]))
    except Exception as error:
        raise _not_found(f"tokenizer='{tokenizer}': it is not", tokenizer, error, "a folder with it") from error


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def _not_found(what: str, repo: str, error: Exception, instead: str) -> WeightsNotFoundError:
    known = isinstance(error, ConnectionError)
    reason = str(error) if known else f"the download failed with {type(error).__name__}: {one_line(error, 300)}"
    return WeightsNotFoundError(
        f"{what} in the Hugging Face cache {huggingface_hub.constants.HF_HUB_CACHE}, and {reason}. "
        f"Fetch it with `hf download {repo}`, or pass {instead}."
    )
