"""DNF-SR's discriminator: DiffAugment, and small heads on the features of a frozen DINOv3 (arXiv:2508.10104).

The paper only names "DINOv3"; augmentation, levels and heads are those of OMGSR, whose settings it takes over.
B batch, C channels, H W image and h w feature sides, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from common.autoencoder import no_autocast
from common.draws import Draws
from common.loading import drawing_weights, load_vision_model
from common.losses.vgg import IMAGENET_MEAN, IMAGENET_STD

_VIT, _CONVNEXT = "dinov3_vit", "dinov3_convnext"  # transformers' model types
_DEFAULT_LEVELS = (5, 9, 12)  # of 12 blocks


class DinoTrunk(nn.Module):
    """Features of a frozen DINOv3 at several depths; the gradient passes through to the images.

    A vision transformer gives its patch tokens after the final LayerNorm, whatever the depth, as DINOv3's own
    `get_intermediate_layers` does; a ConvNeXt gives its stages' outputs unchanged. Blocks after the last level are not
    computed. The trunk is always in eval mode, and computes in the dtype of its weights under any autocast.

    Args:
        pretrained: Hub id such as `facebook/dinov3-vitb16-pretrain-lvd1689m` (gated), folder as transformers saves it,
            or `random:dinov3_vitb16`, `random:dinov3_convnext_l`, `random:dinov3_tiny`.
        levels: Numbers of the blocks (ConvNeXt: stages) after which features are taken, from 1, increasing. Default:
            5, 9 and 12 of 12 blocks, in proportion for another number of them; ConvNeXt's stages 1, 2 and 3.
        gradient_checkpointing: Recompute the blocks' activations in the backward pass: less memory, more time.
        seed: Random seed of random weights; the global random state is neither read nor changed.

    Raises:
        ValueError: The model is not a DINOv3, or it has no such levels.
        WeightsNotFoundError: The weights are not there and cannot be fetched.
    """

    def __init__(
        self, pretrained: str, levels: Sequence[int] | None = None, gradient_checkpointing: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.model = load_vision_model(pretrained, seed)
        config = self.model.config
        if config.model_type not in (_VIT, _CONVNEXT):
            raise ValueError(
                f"pretrained={pretrained!r} is a '{config.model_type}' model, not a DINOv3; use a hub id such as "
                "facebook/dinov3-vitb16-pretrain-lvd1689m, or 'random:dinov3_tiny' for a demo."
            )
        self.is_vit: bool = config.model_type == _VIT
        blocks = self._blocks()
        if levels is None:
            levels = [round(level * len(blocks) / 12) for level in _DEFAULT_LEVELS] if self.is_vit else (1, 2, 3)
        if not levels or list(levels) != sorted(set(levels)) or not 1 <= levels[0] <= levels[-1] <= len(blocks):
            raise ValueError(
                f"levels={list(levels)} must increase within 1..{len(blocks)}, the depth of {pretrained!r}."
            )
        self.levels = tuple(levels)
        self.gradient_checkpointing = gradient_checkpointing
        if self.is_vit:
            self.channels = (config.hidden_size,) * len(levels)
            self.strides: tuple[int, ...] = (config.patch_size,) * len(levels)
        else:
            self.channels = tuple(config.hidden_sizes[level - 1] for level in levels)
            self.strides = tuple(2 ** (level + 1) for level in levels)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode in any mode of the parent module; DINOv3 jitters its positions in train mode."""
        return super().train(False)

    def forward(self, x_pm1: Tensor) -> list[Tensor]:
        """Compute the features.

        Args:
            x_pm1: Images, (B,3,H,W), RGB in [-1,1]; values outside are not clamped. H and W are multiples of the
                last level's stride.

        Returns:
            One map for each level, (B,C,H/stride,W/stride), in the dtype of the weights.

        Raises:
            ValueError: The size is not a multiple of the stride.
        """
        if x_pm1.shape[-2] % self.strides[-1] or x_pm1.shape[-1] % self.strides[-1]:
            size = tuple(x_pm1.shape[-2:])
            raise ValueError(f"x_pm1 is {size}, not a multiple of {self.strides[-1]}, DINOv3's stride; crop or pad it.")
        with no_autocast(x_pm1.device):
            x = x_pm1.to(torch.promote_types(x_pm1.dtype, torch.float32))
            mean, std = (x.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
            x = ((x * 0.5 + 0.5 - mean) / std).to(self.model.dtype)
            return self._tokens(x) if self.is_vit else self._stages(x)

    def _tokens(self, x: Tensor) -> list[Tensor]:
        model = self.model
        hidden, positions = model.embeddings(x), model.rope_embeddings(x)
        rows, columns = (side // self.strides[0] for side in x.shape[-2:])
        maps = []
        for depth, block in enumerate(self._blocks()[: self.levels[-1]], 1):
            hidden = self._run(block, hidden, None, positions)
            if depth in self.levels:
                patches = model.norm(hidden)[:, -rows * columns :]  # CLS and registers come first
                maps.append(patches.transpose(1, 2).unflatten(2, (rows, columns)))
        return maps

    def _stages(self, x: Tensor) -> list[Tensor]:
        maps = []
        for depth, stage in enumerate(self._blocks()[: self.levels[-1]], 1):
            for layer in (*stage.downsample_layers, *stage.layers):
                x = self._run(layer, x)
            if depth in self.levels:
                maps.append(x)
        return maps

    def _blocks(self) -> list[Any]:
        """The transformer's blocks or ConvNeXt's stages: the outermost list, whose name changes with transformers."""
        return [*next(part for part in self.model.modules() if isinstance(part, nn.ModuleList))]

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class BlurPool(nn.Module):
    """Blur of Zhang (arXiv:1904.11486) with the binomial window 1 3 3 1; the convolution behind it takes the stride.

    The border is reflected, so that a constant stays one; OMGSR pads with zeros.

    Args:
        channels: Number of channels of the input.
        grow: Pixels by which the output exceeds the input at each side, the padding of a following convolution.
    """

    window: Tensor

    def __init__(self, channels: int, grow: int = 0) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("window", torch.outer(taps, taps).repeat(channels, 1, 1, 1), persistent=False)
        self.padding = (1 + grow, 2 + grow, 1 + grow, 2 + grow)

    def forward(self, x: Tensor) -> Tensor:
        """Blur (B,C,h,w) to (B,C,h + 2 grow,w + 2 grow); h and w exceed 2 + grow."""
        return F.conv2d(F.pad(x, self.padding, mode="reflect"), self.window, groups=x.shape[1])


def conv_head(channels: int, hidden: int) -> nn.Sequential:
    """A head with logits at every fourth place: (B,channels,h,w) to (B,1,h/4,w/4), rounded up; h and w at least 5."""
    return nn.Sequential(
        BlurPool(channels, grow=1),
        spectral_norm(nn.Conv2d(channels, hidden, 3, stride=2)),
        nn.LeakyReLU(0.2),
        BlurPool(hidden),
        spectral_norm(nn.Conv2d(hidden, 1, 1, stride=2)),
    )


def token_head(channels: int, hidden: int) -> nn.Sequential:
    """A head with a logit for each token, by 1x1 convolutions: (B,channels,h,w) to (B,1,h,w)."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels, hidden, 1)), nn.LeakyReLU(0.2), spectral_norm(nn.Conv2d(hidden, 1, 1))
    )


class Discriminator(nn.Module):
    """D: DiffAugment, a frozen DINOv3, and a trained head on each of its levels, with spectral normalisation.

    A vision transformer has convolutional heads on all levels but the last, whose head takes each token alone. A
    ConvNeXt has convolutional heads on all levels (our reading). Trunk and heads compute in the dtype of their weights
    under any autocast. The loss is `bce_smooth` of `common.losses.adversarial`, summed over levels.

    Args:
        trunk: Hub id such as `facebook/dinov3-vitb16-pretrain-lvd1689m` or
            `facebook/dinov3-convnext-large-pretrain-lvd1689m` (gated), folder as transformers saves it, or
            `random:dinov3_vitb16`, `random:dinov3_convnext_l`, `random:dinov3_tiny`.
        augment: Change the trunk's input images, real and generated, at random.
        levels: Numbers of the blocks (ConvNeXt: stages) that have a head, from 1, increasing. Default: 5, 9 and 12 of
            12 blocks, in proportion for another number of them; ConvNeXt's stages 1, 2 and 3.
        hidden: Width of the heads.
        gradient_checkpointing: Recompute the trunk's activations in the backward pass: less memory, more time.
        seed: Random seed of the heads; a trunk with random weights, which stand in for pretrained ones, is always the
            same. The global generator is not used.

    Raises:
        ValueError: The trunk is not a DINOv3, or it has no such levels.
        WeightsNotFoundError: The trunk's weights are not there and cannot be fetched.
    """

    def __init__(
        self,
        trunk: str = "facebook/dinov3-vitb16-pretrain-lvd1689m",
        augment: bool = True,
        levels: Sequence[int] | None = None,
        hidden: int = 128,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.augment = augment
        self.trunk = DinoTrunk(trunk, levels, gradient_checkpointing)
        makers = [conv_head] * len(self.trunk.levels)
        if self.trunk.is_vit:
            makers[-1] = token_head
        with drawing_weights(seed):
            self.heads = nn.ModuleList(
                make(channels, hidden) for make, channels in zip(makers, self.trunk.channels, strict=True)
            )
        self.heads.to(self.trunk.model.device)

    def forward(self, x_pm1: Tensor, draws: Draws | None = None, stream: str = "augment") -> list[Tensor]:
        """Judge whether images are photos.

        Args:
            x_pm1: Images, (B,3,H,W), RGB in [-1,1]. H and W are multiples of the trunk's stride, at least 5 times it.
            draws: The batch's random numbers, of B samples; needed with `augment`.
            stream: Name of the random numbers, e.g. "generator/augment"; each stream has other changes.

        Returns:
            Logits of each level: (B,1,h/4,w/4) of convolutional heads, (B,1,h,w) of the token head; D(x) =
            sigmoid(logit).

        Raises:
            ValueError: The size does not fit, or `draws` is missing or not of B samples.
        """
        stride = self.trunk.strides[-1]
        if min(x_pm1.shape[-2:]) < 5 * stride:
            raise ValueError(f"x_pm1 is {tuple(x_pm1.shape[-2:])}; the heads need {5 * stride} px or more a side.")
        if self.augment:
            if draws is None or len(draws.index) != len(x_pm1):
                found = "None" if draws is None else f"of {len(draws.index)} samples"
                raise ValueError(f"draws is {found} for {len(x_pm1)} images; pass the batch's, or set augment=False.")
            x_pm1 = diff_augment(x_pm1, draws, stream)
        with no_autocast(x_pm1.device):
            dtype = next(self.heads.parameters()).dtype
            return [head(features.to(dtype)) for head, features in zip(self.heads, self.trunk(x_pm1), strict=True)]


def diff_augment(
    x_pm1: Tensor, draws: Draws, stream: str, translation: float = 0.125, cutout_side: float = 0.5
) -> Tensor:
    """DiffAugment (arXiv:2006.10738) with its colour, translation and cutout, drawn anew for each image.

    Args:
        x_pm1: Images, (B,3,H,W), in [-1,1]; the changed images may leave that range.
        draws: Random numbers of B samples.
        stream: Prefix of their names.
        translation: Largest shift, as a share of the side.
        cutout_side: Side of the hole, as a share of the image's.

    Returns:
        Changed images, same shape, fp32 at least; the gradient passes through.
    """
    x = x_pm1.to(torch.promote_types(x_pm1.dtype, torch.float32))
    brightness, saturation, contrast = (
        draws.uniform(f"{stream}/{name}").to(x) for name in ("brightness", "saturation", "contrast")
    )
    x = colour(x, brightness - 0.5, 2 * saturation, contrast + 0.5)
    height, width = x.shape[-2:]
    rows, columns = _share(height, translation), _share(width, translation)
    host = draws.on_host  # a shift is a padding, whose size is no tensor
    down, right = host.integers(f"{stream}/down", -rows, rows), host.integers(f"{stream}/right", -columns, columns)
    x = translate(x, down, right)
    size = _share(height, cutout_side), _share(width, cutout_side)
    row = draws.integers(f"{stream}/row", 0, height - size[0] % 2)
    column = draws.integers(f"{stream}/column", 0, width - size[1] % 2)
    return cutout(x, row, column, size)


def _share(side: int, share: float) -> int:
    """A share of a side in whole pixels, halves rounded up."""
    return int(side * share + 0.5)


def colour(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add to all pixels, then scale the distance from each pixel's grey, then that from the image's mean.

    Args:
        x: Images, (B,3,H,W).
        brightness: Summand, (B,).
        saturation: Factor on the distance from the mean of the pixel's three channels, (B,).
        contrast: Factor on the distance from the mean of all values, (B,).

    Returns:
        Images, same shape.
    """
    brightness, saturation, contrast = (factor.view(-1, 1, 1, 1) for factor in (brightness, saturation, contrast))
    x = x + brightness
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * saturation + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * contrast + mean


def translate(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Move each image by whole pixels and fill with zeros.

    Args:
        x: Images, (B,C,H,W).
        down: Rows to move by, int64 (B,); negative for up.
        right: Columns to move by, int64 (B,); negative for left.

    Returns:
        Images, same shape.
    """
    shifts = zip(x, down.tolist(), right.tolist(), strict=True)
    return torch.stack([F.pad(image, (columns, -columns, rows, -rows)) for image, rows, columns in shifts])


def cutout(x: Tensor, row: Tensor, column: Tensor, size: tuple[int, int]) -> Tensor:
    """Set the part of a rectangle that lies within each image to zero.

    Args:
        x: Images, (B,C,H,W).
        row: Row of the rectangle's centre (the row after it for even sizes), int64 (B,).
        column: Column of the centre (the column after it for even sizes), int64 (B,).
        size: Height and width of the rectangle, px.

    Returns:
        Images, same shape.
    """
    inside = []
    for axis, centre, length in ((-2, row, size[0]), (-1, column, size[1])):
        offset = torch.arange(x.shape[axis], device=x.device) - centre.to(x.device)[:, None] + length // 2
        inside.append((offset >= 0) & (offset < length))  # (B, H) and (B, W)
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x.masked_fill(hole, 0)
