"""Captions of images by an image-to-text model of transformers, for methods that train on captions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from torch import Tensor

from common.autoencoder import no_autocast
from common.conditioning.ram import RamTagger
from common.errors import one_line
from common.loading import DTYPES, HUB_ID, WeightsNotFoundError, ask_hub
from common.metrics import to_uint8

FLORENCE_TASK, FLORENCE_TOKENS = "<MORE_DETAILED_CAPTION>", 77
"""Default instruction and caption length of Florence-2, those of `isr caption`: CLIP's text encoders read 77 tokens."""
INSTRUCTION, TOKENS = "Describe this image in one sentence.", 64
"""Default instruction and caption length of all other models."""

_TASK = re.compile(r"<[A-Z_]+>")
_CONFIGS = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS = ("model.safetensors", "model-*.safetensors")
_CACHED_WEIGHTS = (*_WEIGHTS, "pytorch_model*.bin")


class Captioner:
    """A frozen image-to-text model, loaded at the first call; equal images give equal captions.

    Args:
        model: Hub id, from the Hugging Face cache or else downloaded into it, or folder of a model that transformers
            knows as image-text-to-text: LLaVA-OneVision, BLIP, Florence-2 and others. `dape:FOLDER` and `ram:FOLDER`
            give the tags of DAPE and RAM instead, see `common.conditioning.ram`; the arguments below are not for them.
        instruction: Question for a chat model, or one of Florence-2's tasks, such as `<CAPTION>`. null takes
            `FLORENCE_TASK` for Florence-2, as captions for training do, and `INSTRUCTION` for chat models. A model with
            neither chat template nor tasks, such as BLIP, gets the image alone.
        max_new_tokens: Largest number of tokens in a caption; null takes `FLORENCE_TOKENS` for Florence-2, else
            `TOKENS`.
        dtype: Dtype of the weights: `float32`, `bfloat16`, or `auto` for bfloat16 on an accelerator, where 8 billion
            parameters then take 16 GB, and float32 on a CPU.

    Raises:
        ValueError: `max_new_tokens` is below 1, or `dtype` is unknown.
    """

    def __init__(
        self,
        model: str,
        instruction: str | None = None,
        max_new_tokens: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} is out of range; give 1 or more")
        if dtype != "auto" and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; use one of auto, {', '.join(DTYPES)}")
        self.model = model
        self.instruction = instruction
        self.max_new_tokens = max_new_tokens
        self.dtype = dtype
        self._device = torch.device("cpu")
        self._loaded: tuple[Any, Any] | None = None
        kind, _, folder = model.partition(":")
        self._tagger = RamTagger(folder, kind == "dape") if kind in ("dape", "ram") and folder else None

    def to(self, device: torch.device | str) -> Captioner:
        """Set the device of the model; loads nothing."""
        self._device = torch.device(device)
        if self._tagger is not None:
            self._tagger.to(device)
        if self._loaded is not None:
            self._loaded[1].to(self._device, self._torch_dtype())
        return self

    def _torch_dtype(self) -> torch.dtype:
        """The weights' dtype on the present device."""
        if self.dtype == "auto":
            return torch.float32 if self._device.type == "cpu" else torch.bfloat16
        return DTYPES[self.dtype]

    @torch.no_grad()
    def __call__(self, x_01: Tensor) -> list[str]:
        """Caption images by greedy decoding.

        Args:
            x_01: (B, 3, h, w), [0, 1], on any device; rounded to 8 bits.

        Returns:
            B captions, without the instruction, special tokens and surrounding blanks.

        Raises:
            ValueError: `x_01` is not a batch of images, `model` cannot caption, or `instruction` does not fit it.
            WeightsNotFoundError: The model is not there and cannot be fetched.
        """
        if x_01.ndim != 4:
            raise ValueError(f"x_01 has shape {tuple(x_01.shape)}; pass (B, 3, h, w)")
        if self._tagger is not None:
            return self._tagger(x_01) if len(x_01) else []
        from PIL import Image

        images = [Image.fromarray(image) for image in to_uint8(x_01).permute(0, 2, 3, 1).cpu().numpy()]
        if not images:
            return []
        if self._loaded is None:
            self._loaded = self._load()
        processor, model = self._loaded
        inputs = self._inputs(processor, images).to(self._device, self._torch_dtype())  # token ids stay integers
        longest = self.max_new_tokens or (FLORENCE_TOKENS if _tasks(processor) else TOKENS)
        with no_autocast(self._device):
            tokens = model.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
        if "input_ids" in inputs and not model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # a decoder-only model repeats its prompt
        return [caption.strip() for caption in processor.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, processor: Any, images: list[Any]) -> Any:
        """Inputs of the model; images of one size give prompts of one length, so nothing is padded."""
        tasks = _tasks(processor)
        if getattr(processor, "chat_template", None):
            if self.instruction is not None and _TASK.fullmatch(self.instruction):
                raise ValueError(
                    f"instruction={self.instruction} is a task of Florence-2, and model='{self.model}' is a chat "
                    f'model; give a question, such as "{INSTRUCTION}"'
                )
            text = {"type": "text", "text": self.instruction or INSTRUCTION}
            chats = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}] for image in images]
            return processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        if tasks:
            instruction = self.instruction or FLORENCE_TASK
            if not any(task in instruction for task in tasks):
                raise ValueError(
                    f"instruction={instruction} is not a task of model='{self.model}'; give one of {', '.join(tasks)}"
                )
            return processor(images=images, text=[instruction] * len(images), return_tensors="pt")
        return processor(images=images, return_tensors="pt")

    def _load(self) -> tuple[Any, Any]:
        """Processor and model."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        root = self._root()
        try:
            processor = AutoProcessor.from_pretrained(root, local_files_only=True)
            if not hasattr(processor, "image_processor"):  # what transformers gives where that file is missing
                raise OSError(f"{root} has no image processor (preprocessor_config.json)")
            model = AutoModelForImageTextToText.from_pretrained(root, dtype=self._torch_dtype(), local_files_only=True)
        except OSError as error:
            raise WeightsNotFoundError(
                f"model='{self.model}' cannot be read: {one_line(error, 300)}. Give a folder with processor, config "
                "and weights as transformers saves them, or a hub id."
            ) from error
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"model='{self.model}' is not an image-to-text model of transformers: {one_line(error, 300)}. Give "
                "one that AutoModelForImageTextToText loads, e.g. 'llava-hf/llava-onevision-qwen2-0.5b-ov-hf'."
            ) from error
        return processor, model.to(self._device).eval().requires_grad_(False)

    def _root(self) -> Path:
        """The folder with the model, fetched from the hub if it must be."""
        folder = Path(self.model).expanduser()
        if folder.is_dir():
            return folder
        if not HUB_ID.fullmatch(self.model):
            raise ValueError(
                f"model='{self.model}' is neither an existing folder nor a hub id (owner/name); give one of these."
            )
        try:
            root = Path(huggingface_hub.snapshot_download(self.model, local_files_only=True))
            if any(next(root.glob(pattern), None) for pattern in _CACHED_WEIGHTS):
                return root
        except FileNotFoundError:  # LocalEntryNotFoundError: nothing of it in the cache
            pass
        try:
            ask_hub()
            return Path(huggingface_hub.snapshot_download(self.model, allow_patterns=[*_CONFIGS, *_WEIGHTS]))
        except Exception as error:
            known = isinstance(error, ConnectionError)
            reason = (
                one_line(error, 300)
                if known
                else f"the download failed with {type(error).__name__}: {one_line(error, 300)}"
            )
            raise WeightsNotFoundError(
                f"model='{self.model}': not in the Hugging Face cache {huggingface_hub.constants.HF_HUB_CACHE}, and "
                f"{reason}. Fetch it with `hf download {self.model}`, or give a folder."
            ) from error


def _tasks(processor: Any) -> list[str]:
    """The tasks that Florence-2's processor knows; none of other models."""
    kinds = ("task_prompts_without_inputs", "task_prompts_with_input")
    return [task for kind in kinds for task in getattr(processor, kind, ())]
