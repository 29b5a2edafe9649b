"""The trunk that all feature losses share: VGG16, VGG19 or AlexNet, frozen, in eval mode, in fp32."""

import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoints import read_tensors
from common.errors import one_line
from common.loading import drawing_weights, network_device, weights_to_read

logger = logging.getLogger(__name__)

Arch = Literal["vgg16", "vgg19", "alexnet"]
Pooling = Literal["max", "l2"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CONVS_PER_STAGE = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_CHANNELS_PER_STAGE = (64, 128, 256, 512, 512)
_ALEXNET_CHANNELS = (64, 192, 384, 256, 256)  # torchvision's AlexNet, which the LPIPS metric uses
_ALEXNET_CONVS = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))  # kernel, stride, padding
_ALEXNET_POOLED = (0, 1, 4)  # convolutions followed by a pooling
_TORCHVISION = {"vgg16": "VGG16", "vgg19": "VGG19", "alexnet": "AlexNet"}


class L2Pool(nn.Module):
    """L2 pooling of DISTS (arXiv:2004.07728, Eq. 2): sqrt(blur(h^2)) at every second pixel.

    Args:
        channels: Number of channels of the input.
    """

    hann: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        taps = torch.tensor([0.25, 0.5, 0.25])  # Hann window of 5 without its zeros
        self.register_buffer("hann", torch.outer(taps, taps).expand(channels, 1, 3, 3).clone(), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        """Pool (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""
        power = F.conv2d(h * h, self.hann, stride=2, padding=1, groups=h.shape[1])
        return (power + 1e-12).sqrt()


class VGGTrunk(nn.Module):
    """Convolutions of VGG16, VGG19 or AlexNet with torchvision's `features.*` keys; returns the asked layers' outputs.

    The trunk is frozen, always in eval mode, and computes in the dtype of its weights (fp32), also under autocast. The
    ReLUs are not in-place, so a convolution's output before its ReLU can be returned.

    Args:
        layers: torchvision `features` indices of the outputs to return, increasing; for VGG16 3, 8, 15, 22, 29 are
            relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
        arch: The network.
        weights: `pretrained` (torchvision's IMAGENET1K_V1, downloaded once), `random` (He initialisation from `seed`,
            for tests and demos) or the path of a .pth or .safetensors state dict in torchvision's layout.
        width: Factor on the number of channels, above 0; other than 1 only with `random` weights.
        pooling: `max` as in VGG, or `l2` as in DISTS.
        seed: Seed of the `random` weights; the global generator is not used.

    Raises:
        ValueError: `width` or `layers` do not fit, or a file does not hold this network.
        FileNotFoundError: The weights are not available.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        layers: Sequence[int],
        arch: Arch = "vgg16",
        weights: str = "random",
        width: float = 1.0,
        pooling: Pooling = "max",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.channels = stage_channels(width, arch)
        self.features = build_features(arch, self.channels, pooling)
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < len(self.features):
            raise ValueError(f"layers={list(layers)} must increase within 0..{len(self.features) - 1} for {arch}.")
        self.layers = tuple(layers)
        load_features(self, arch, weights, width, seed)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last).to(network_device()).requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also when the parent module enters train mode."""
        return super().train(False)

    def normalise(self, x_01: Tensor) -> Tensor:
        """Subtract ImageNet's mean and divide by its standard deviation; (B, 3, H, W) in [0, 1] in, same shape out."""
        return (x_01 - self.mean) / self.std

    def forward(self, x_01: Tensor) -> list[Tensor]:
        """Run the network up to the last asked layer.

        Args:
            x_01: Images, (B, 3, H, W), RGB in [0, 1]; values outside are taken as they are.

        Returns:
            The outputs of `layers`, (B, C_i, H_i, W_i) each.

        Raises:
            ValueError: The trunk was cast to 16 bits.
        """
        if self.mean.dtype.itemsize < 4:
            raise ValueError(f"the VGG trunk was cast to {self.mean.dtype}; train with precision 'bf16-mixed' or '32'.")
        outputs = []
        with torch.autocast(x_01.device.type, enabled=False):
            h = self.normalise(x_01.to(self.mean.dtype)).contiguous(memory_format=torch.channels_last)
            for index, layer in enumerate(self.features[: self.layers[-1] + 1]):
                h = layer(h)
                if index in self.layers:
                    outputs.append(h)
        return outputs


def stage_channels(width: float, arch: Arch = "vgg16") -> tuple[int, ...]:
    """The number of channels in each of the five stages (AlexNet: convolutions), times `width`."""
    channels = _ALEXNET_CHANNELS if arch == "alexnet" else _CHANNELS_PER_STAGE
    return tuple(max(1, round(width * number)) for number in channels)


def build_features(arch: Arch, channels: Sequence[int], pooling: Pooling, in_channels: int = 3) -> nn.Sequential:
    """Lay out torchvision's `features` on the meta device, which draws no random numbers."""
    features: list[nn.Module] = []
    channels_in = in_channels
    if arch == "alexnet":
        for index, (channels_out, (kernel, stride, padding)) in enumerate(zip(channels, _ALEXNET_CONVS, strict=True)):
            features += [nn.Conv2d(channels_in, channels_out, kernel, stride, padding, device="meta"), nn.ReLU()]
            features += [nn.MaxPool2d(3, 2)] if index in _ALEXNET_POOLED else []
            channels_in = channels_out
        return nn.Sequential(*features)
    for num_convs, channels_out in zip(_CONVS_PER_STAGE[arch], channels, strict=True):
        for _ in range(num_convs):
            features += [nn.Conv2d(channels_in, channels_out, 3, padding=1, device="meta"), nn.ReLU()]
            channels_in = channels_out
        features.append(L2Pool(channels_out) if pooling == "l2" else nn.MaxPool2d(2))
    return nn.Sequential(*features)


def load_features(net: nn.Module, arch: Arch, weights: str, width: float, seed: int) -> None:
    """Load or draw the weights of the layers that `build_features` laid out, in fp32.

    Args:
        net: Holder of the layout as its attribute `features`, and of no other parameter yet.
        arch: The network.
        weights: `pretrained`, `random` or a path, as for `VGGTrunk`; `empty` leaves them to a checkpoint.
        width: The factor that the layout was made with.
        seed: Seed of the `random` weights.

    Raises:
        ValueError: `width` does not fit, or a file does not hold this network.
        FileNotFoundError: The weights are not available.
    """
    weights = weights if weights == "empty" else weights_to_read(weights)
    if width <= 0 or (width != 1.0 and weights not in ("random", "empty")):
        raise ValueError(f"width={width} does not fit weights={weights!r}; use width=1.0, or weights='random'.")
    if weights == "empty":
        net.get_submodule("features").to_empty(device="cpu")
        return
    if weights == "random":
        logger.warning("%s trunk has random weights (width %g): a stand-in for tests and demos.", arch, width)
        state = random_state(net, seed)
    else:
        state = _pretrained_state(arch) if weights == "pretrained" else read_state(weights)
    state = {key: value.float() for key, value in state.items() if key.startswith("features.")}
    try:
        net.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as err:
        reason = one_line(err, 300)
        raise ValueError(f"weights={weights!r} is not a torchvision {arch} state dict: {reason}") from err


def random_state(trunk: nn.Module, seed: int) -> dict[str, Tensor]:
    """He initialisation over the fan-in, zero biases; on the CPU, see `drawing_weights`."""
    state = {}
    with drawing_weights(seed):
        for key, meta in trunk.state_dict().items():
            if key.endswith("weight"):
                std = math.sqrt(2 / math.prod(meta.shape[1:]))
                state[key] = torch.randn(meta.shape, dtype=torch.float32) * std
            else:
                state[key] = torch.zeros(meta.shape)
    return state


def _pretrained_state(arch: Arch) -> dict[str, Tensor]:
    """Get the ImageNet weights of torchvision, from its cache or the network."""
    from torchvision.models import get_weight

    entry = get_weight(f"{_TORCHVISION[arch]}_Weights.IMAGENET1K_V1")
    try:
        return entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as err:
        raise FileNotFoundError(
            f"weights='pretrained': cannot get {entry.url} ({err}); put that file into "
            f"{torch.hub.get_dir()}/checkpoints, or pass its path as weights, or weights='random' for a demo."
        ) from err


def read_state(weights: str, instead: str = "'pretrained', or 'random'") -> dict[str, Tensor]:
    """Read a .pth or .safetensors state dict.

    Args:
        weights: Path of the file.
        instead: Other values that the caller's `weights` may have, for the message.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(weights)
    if path.suffix not in (".pth", ".safetensors") or not path.is_file():
        raise FileNotFoundError(
            f"weights={weights!r} is not an existing .pth or .safetensors file; pass one, or {instead}."
        )
    state: dict[str, Tensor] = read_tensors(path)
    return state


def read_torchmetrics_weights(name: str) -> dict[str, Tensor]:
    """Read one of the small official weight files that torchmetrics' wheel carries, without importing the package.

    Args:
        name: Path below torchmetrics/functional/image.

    Raises:
        FileNotFoundError: torchmetrics is not installed or no longer carries the file.
    """
    spec = importlib.util.find_spec("torchmetrics")
    folder = Path(next(iter(spec.submodule_search_locations or []), "")) if spec else Path()
    path = folder / "functional" / "image" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it comes with torchmetrics: pip install 'torchmetrics>=1.8'.")
    state: dict[str, Tensor] = read_tensors(path)
    return state
