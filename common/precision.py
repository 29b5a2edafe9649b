"""The dtype of frozen weights, and the precision of validation, test and prediction; docs/precision.md has figures.

Autocast casts a frozen float32 weight at every call. A held layer has 16-bit weights at all times: under bf16-mixed its
output is the same, bit by bit, with half the memory and no cast. Norms, embeddings and all else that autocast leaves in
float32 stay in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from common.autoencoder import no_autocast
from common.parameters import is_lora

FrozenDtype = Literal["float32", "bfloat16"]
"""Dtype of frozen weights."""
TestPrecision = Literal["float32", "bfloat16", "float16"]
"""Precision of validation, test and prediction."""

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class _HeldLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *_as_computed(self, x))


class _HeldConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *_as_computed(self, x))


_HELD: dict[type, type] = {nn.Linear: _HeldLinear, nn.Conv2d: _HeldConv2d}


def hold(network: nn.Module, dtype: FrozenDtype) -> None:
    """Hold the frozen linear and convolutional layers of a network in a dtype, in place, and the rest in float32.

    A held layer computes in the dtype of autocast, else in that of its input. Adapters stay as they are.

    Args:
        network: The network; its trained parameters must require gradients already.
        dtype: The dtype; `float32` leaves the network as it is.
    """
    if dtype == "float32":
        return
    for name, layer in network.named_modules():
        own = list(layer.parameters(recurse=False))
        if type(layer) in _HELD and not is_lora(name) and own and not any(p.requires_grad for p in own):
            layer.__class__ = _HELD[type(layer)]
            layer.to(getattr(torch, dtype))
        elif type(layer) not in _HELD.values():
            for parameter in own:
                parameter.data = parameter.data.float()


def input_dtype(layer: Any) -> torch.dtype:
    """The dtype of a layer's input: that of its weight, and float32 for a held layer; adapters do not count."""
    layer = getattr(layer, "base_layer", layer)
    return torch.float32 if type(layer) in _HELD.values() else layer.weight.dtype


def _as_computed(layer: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a held layer in the dtype of its computation; under autocast that casts them if it must."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return layer.weight, layer.bias
    return layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype)


@contextmanager
def computing(precision: TestPrecision, device: torch.device) -> Iterator[None]:
    """Within this context a device computes in a precision, also inside another autocast.

    Args:
        precision: `float32`, or 16 bits by autocast.
        device: The device.
    """
    inside = no_autocast(device) if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))
    torch.clear_autocast_cache()  # it may hold copies in another dtype
    with inside:
        yield
    torch.clear_autocast_cache()


def log_precision(trained: str, tested: TestPrecision) -> None:
    """Log that training's mixed precision does not hold for validation, test and prediction.

    Args:
        trained: The trainer's precision.
        tested: Precision of validation, test and prediction.
    """
    if trained.endswith("-mixed"):
        rank_zero_info(
            f"trainer.precision={trained} holds for training steps; validation, test and prediction compute in {tested}"
        )


def in_test_precision(method: Decorated) -> Decorated:
    """Run a method of a `TrainingModule` in its `test_precision`, also under a trainer of another precision."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with computing(self.test_precision, self.device):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]  # wraps keeps the signature
