"""Image features as conditions: the tokens of a frozen DINOv2 (arXiv:2304.07193) in the place of a prompt's."""

from contextlib import nullcontext
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.autoencoder import no_autocast
from common.loading import load_vision_model
from common.losses.vgg import IMAGENET_MEAN, IMAGENET_STD
from common.precision import FrozenDtype, hold

Tokens = Literal["all", "patch", "cls"]
_SLICES = {"all": slice(None), "patch": slice(1, None), "cls": slice(1)}  # DINOv2's sequence is CLS, then the patches


class DinoFeatures(nn.Module):
    """Last hidden state of a frozen DINOv2, after its final LayerNorm; F2IDiff's condition (arXiv:2512.24473).

    The image is resized bicubically with antialiasing, without a clamp of the overshoot, to whole patches, and
    normalised by ImageNet's mean and standard deviation. DINOv2 itself interpolates its position embeddings. The module
    is always in eval mode and without a graph. Weights held in float32 compute in float32, also under autocast.
    Weights held in bfloat16 compute in the dtype of autocast, and in float32 without it.

    Args:
        pretrained: Hub id such as `facebook/dinov2-large`, folder as transformers saves it, `random:dinov2_large`, or
            `tiny`: two layers of width 32 with random weights, for demos.
        tokens: `all` for CLS and patches, `patch` or `cls` for these alone.
        size: Pixels of the shorter side at DINOv2's input, a multiple of its patch size (14), the other side in
            proportion; None for the image's own size. Either way a side becomes 14 * round(side / 14).
        seed: Random seed of random weights; the global random state is neither read nor changed.
        frozen_dtype: Dtype of the blocks' weights.

    Raises:
        ValueError: An argument is unknown or does not fit, or the model is not a DINOv2.
        WeightsNotFoundError: The weights are not there and cannot be fetched.
    """

    def __init__(
        self,
        pretrained: str,
        tokens: Tokens = "all",
        size: int | None = None,
        seed: int = 0,
        frozen_dtype: FrozenDtype = "float32",
    ) -> None:
        super().__init__()
        if tokens not in _SLICES:
            raise ValueError(f"tokens={tokens!r} is unknown; use one of {', '.join(_SLICES)}.")
        self.model = load_vision_model(pretrained, seed)
        config = self.model.config
        if config.model_type != "dinov2":
            raise ValueError(f"pretrained='{pretrained}' is a '{config.model_type}' model; give a 'dinov2'.")
        self.patch: int = config.patch_size
        if size is not None and (size < self.patch or size % self.patch):
            raise ValueError(f"size={size} must be a positive multiple of {self.patch}, DINOv2's patch size, or null.")
        hold(self.model.encoder, frozen_dtype)  # without the patches' embedding, which sets the dtype of the rest
        self.follows_autocast = frozen_dtype != "float32"
        self.tokens = tokens
        self.size = size
        self.width: int = config.hidden_size
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also when the parent module enters train mode."""
        return super().train(False)

    def num_tokens(self, height: int, width: int) -> int:
        """The number of tokens N for an image of height x width pixels: 1370 for 512 x 512, 325 for 256 x 256."""
        rows, columns = (side // self.patch for side in self._input_size(height, width))
        return len(range(rows * columns + 1)[_SLICES[self.tokens]])

    @torch.no_grad()
    def forward(self, x_01: Tensor) -> Tensor:
        """Compute the tokens of images.

        Args:
            x_01: Images, (B, 3, H, W), RGB in [0, 1]; values outside are taken as they are.

        Returns:
            Features, (B, N, D), float32, without a graph; N is that of `num_tokens`, CLS first.

        Raises:
            ValueError: `x_01` has another shape.
        """
        if x_01.ndim != 4 or x_01.shape[1] != 3:
            raise ValueError(f"x_01 has shape {tuple(x_01.shape)}; pass (B, 3, H, W).")
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        x = x_01.to(dtype)
        mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        with no_autocast(x.device):
            x = F.interpolate(x, self._input_size(*x.shape[-2:]), mode="bicubic", antialias=True)
            x = ((x - mean) / std).to(self.model.dtype)
        with nullcontext() if self.follows_autocast else no_autocast(x.device):
            hidden = self.model(x).last_hidden_state.to(dtype)
        return hidden[:, _SLICES[self.tokens]]

    @staticmethod
    def null_features(like: Tensor) -> Tensor:
        """The condition "no image" of classifier-free guidance: zeros, of the shape (B, N, D) of `like`."""
        return torch.zeros_like(like)

    def _input_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (H', W') at DINOv2's input: whole patches, one at least."""
        factor = 1.0 if self.size is None else self.size / min(height, width)
        rows, columns = (max(1, round(factor * side / self.patch)) for side in (height, width))
        return rows * self.patch, columns * self.patch
