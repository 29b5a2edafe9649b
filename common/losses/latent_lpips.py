"""LPIPS on latents as InvSR trains it (arXiv:2412.09013); DM-SR's L_per."""

import logging
from typing import Any, Self

import torch
from torch import Tensor, nn

from common.errors import one_line
from common.loading import network_device, weights_to_read
from common.losses.lpips import mean_square
from common.losses.vgg import build_features, random_state, read_state, stage_channels

logger = logging.getLogger(__name__)

# torchvision's `features` indices of the five slices; 4, 9 and 16 are the removed pools, 23 the one that is kept.
_SLICES = (range(4), range(5, 9), range(10, 16), range(17, 23), range(23, 30))
_FILE = "InvSR's vgg16_sdturbo_lpips.pth of https://huggingface.co/OAOA/InvSR"


class LatentLPIPS(nn.Module):
    """Learned perceptual distance of two latents, 0 for equal ones; nothing in it is trainable.

    With f_k(z) in R^C the outputs of relu1_2, relu2_2, relu3_3, relu4_3 (h x w) and relu5_3 (h/2 x w/2) of a VGG16
    without its first three poolings (zsyOAOA/InvSR, `latent_lpips/`):

        sum_k mean_pixels sum_C w_k (u_k(x) - u_k(y))^2,   u = f / (|f| + 1e-10)

    Where |f| = 0 its gradient is taken as 0. State-dict keys are those of the released file. The module is always in
    eval mode, so dropout is left out. It computes in the dtype of its weights, also under autocast.

    Args:
        weights: `random` (He initialisation from `seed`, linear weights 1/C, for tests and demos) or the path of the
            released .pth or a .safetensors of its layout; the network and the linear weights both come from it.
        in_channels: Channels of the latents; the released file has 4.
        width: Factor on the number of channels, above 0; other than 1 only with `random` weights.
        seed: Seed of the `random` weights; the global generator is not used.

    Raises:
        ValueError: `width` or `in_channels` do not fit, or the file does not hold this network.
        FileNotFoundError: There is no such file.
    """

    def __init__(self, weights: str = "random", in_channels: int = 4, width: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        weights = weights_to_read(weights)
        if width <= 0 or (width != 1.0 and weights != "random"):
            raise ValueError(f"width={width} does not fit weights={weights!r}; use width=1.0, or weights='random'.")
        if in_channels < 1:
            raise ValueError(f"in_channels={in_channels} must be at least 1; SD's latents have 4.")
        self.in_channels = in_channels
        channels = stage_channels(width)
        layers = build_features("vgg16", channels, "max", in_channels)
        self.net = nn.Module()
        for k, indices in enumerate(_SLICES):
            slice_k = nn.Sequential()
            for index in indices:
                slice_k.add_module(str(index), layers[index])
            self.net.add_module(f"slice{k + 1}", slice_k)
            linear = nn.Conv2d(channels[k], 1, 1, bias=False, device="meta")
            self.add_module(f"lin{k}", nn.ModuleDict({"model": nn.ModuleDict({"1": linear})}))
        if weights == "random":
            logger.warning("latent LPIPS has random weights (width %g): a stand-in for tests and demos.", width)
            state = {f"net.{key}": value for key, value in random_state(self.net, seed).items()}
            state |= {_linear_key(k): torch.full((1, num, 1, 1), 1 / num) for k, num in enumerate(channels)}
        else:
            state = _released_state(weights, in_channels)
        try:
            self.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as err:
            reason = one_line(err, 300)
            raise ValueError(f"weights={weights!r} is not a latent LPIPS; pass {_FILE}: {reason}") from err
        self.to(memory_format=torch.channels_last).to(network_device(), torch.float32)
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also when the parent module enters train mode."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compare latents with targets; only `x` gets a gradient.

        Args:
            x: Scaled latents, (B, in_channels, h, w), sides of at least 2; nothing is shifted, scaled or clamped.
            y: Targets, same shape and scale.

        Returns:
            Distance per latent, (B,), fp32.

        Raises:
            ValueError: The shapes differ or are wrong, or the module was cast to 16 bits.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; pass two batches of latents of one "
                f"(B, {self.in_channels}, h, w), sides of at least 2."
            )
        linear = torch.cat([self.get_parameter(_linear_key(k)).flatten() for k in range(len(_SLICES))])
        if linear.dtype.itemsize < 4:
            raise ValueError(f"the latent LPIPS was cast to {linear.dtype}; train with precision 'bf16-mixed' or '32'.")
        with torch.autocast(x.device.type, enabled=False):
            maps_x = self.maps(x.to(linear.dtype))
            with torch.no_grad():
                maps_y = self.maps(y.to(linear.dtype))
            diffs = [mean_square(_unit(a) - _unit(b)) for a, b in zip(maps_x, maps_y, strict=True)]  # (B, C_k) each
            return (torch.cat(diffs, 1) * linear).sum(1)

    def maps(self, z: Tensor) -> list[Tensor]:
        """The five maps of latents (B, in_channels, h, w): (B, C_k, h, w) each, the last (B, C_5, h/2, w/2)."""
        found = []
        h = z.contiguous(memory_format=torch.channels_last)
        for slice_k in self.net.children():
            h = slice_k(h)
            found.append(h)
        return found


def _linear_key(k: int) -> str:
    return f"lin{k}.model.1.weight"


def _released_state(weights: str, in_channels: int) -> dict[str, Any]:
    """Read the released layout, without the buffers that nothing uses and the repeated linear weights.

    Raises:
        ValueError: The repeats differ from what they repeat, or the file is for other latents.
        FileNotFoundError: There is no such file.
    """
    found: dict[str, Any] = read_state(weights, f"'random', or get {_FILE}")
    found = found.get("state_dict", found)  # InvSR's trainer takes both forms, and the prefixes of its wrappers
    state = {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in found.items()}
    for key in ("scaling_layer.shift", "scaling_layer.scale"):
        state.pop(key, None)
    for k in range(len(_SLICES)):
        repeat = state.pop(f"lins.{k}.model.1.weight", None)
        if repeat is not None and _linear_key(k) in state and not torch.equal(repeat, state[_linear_key(k)]):
            raise ValueError(f"weights={weights!r} has a lins.{k} that is not its lin{k}; pass {_FILE}.")
    first = state.get("net.slice1.0.weight")
    if first is not None and first.ndim == 4 and first.shape[1] != in_channels:
        raise ValueError(
            f"in_channels={in_channels}, but weights={weights!r} is for latents of {first.shape[1]} channels; "
            f"use in_channels={first.shape[1]}, or weights='random'."
        )
    return state


def _unit(features: Tensor) -> Tensor:
    """Divide f by |f| + 1e-10 at every pixel; (B, C, h, w). A lower bound of |f|^2 keeps the slope at 0 finite."""
    power = (features * features).sum(1, keepdim=True)
    return features / (power.clamp_min(torch.finfo(power.dtype).tiny).sqrt() + 1e-10)
