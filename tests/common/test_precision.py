"""Frozen weights held in 16 bits: the same bits under bf16-mixed, the rounded weights in float32, and no casts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.adapters import add_lora, lora_parameters, merge
from common.denoisers.unet import UNetDenoiser
from common.diffusion import NoiseSchedule
from common.precision import computing, hold, input_dtype

from .networks import small_unet

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CPU = torch.device("cpu")


class Casts(TorchDispatchMode):
    """Counts the casts of a network's weights, by their shape."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes, self.counted = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted += "_to_copy" in str(func) and args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


def unet() -> UNet2DConditionModel:
    """A U-Net with an adapter that acts, and a trained `conv_in`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = small_unet().requires_grad_(False)
        add_lora(net, 2, 2, ["conv_in", "to_q", "conv1"])
        for parameter in lora_parameters(net):
            parameter.data = 0.3 * torch.randn(parameter.shape)
    net.conv_in.base_layer.requires_grad_(True)
    return net


def pair() -> tuple[UNetDenoiser, UNetDenoiser]:
    """The same denoiser in float32 and held in bfloat16."""
    plain, held = unet(), unet()
    hold(held, "bfloat16")
    return UNetDenoiser(plain, NoiseSchedule(SD)), UNetDenoiser(held, NoiseSchedule(SD))


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 3, 32, generator=g)


def gradients(denoiser: UNetDenoiser, z: Tensor, c: Tensor) -> list[Tensor]:
    z = z.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        denoiser(z, 999, c).x0.square().mean().backward()
    return [z.grad, *(p.grad for p in denoiser.parameters() if p.requires_grad)]  # type: ignore[list-item]


def test_frozen_linear_and_convolutional_layers_alone_are_held() -> None:
    _, held = pair()
    for name, layer in held.unet.named_modules():
        for parameter in layer.parameters(recurse=False):
            is_held = isinstance(layer, nn.Linear | nn.Conv2d) and not parameter.requires_grad
            assert parameter.dtype == (torch.bfloat16 if is_held else torch.float32), name
    assert input_dtype(held.unet.conv_in) == input_dtype(held.unet.conv_out) == torch.float32


def test_float32_leaves_a_network_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)).requires_grad_(False)
    hold(net, "float32")
    assert type(net[0]) is nn.Conv2d
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_under_bf16_autocast_outputs_and_gradients_are_the_same_bit_by_bit(inputs: tuple[Tensor, Tensor]) -> None:
    plain, held = pair()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(held(inputs[0], 999, inputs[1]).eps, plain(inputs[0], 999, inputs[1]).eps)
    expected, found = gradients(plain, *inputs), gradients(held, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(bool(gradient.abs().max() > 0) for gradient in found)


def test_in_float32_it_is_the_network_of_the_rounded_weights(inputs: tuple[Tensor, Tensor]) -> None:
    plain, held = pair()
    frozen = {name for name, p in held.named_parameters() if p.dtype == torch.bfloat16}
    rounded = copy.deepcopy(plain)
    for name, parameter in rounded.named_parameters():
        if name in frozen:
            parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        found = held(inputs[0], 999, inputs[1]).eps
        assert torch.equal(found, rounded(inputs[0], 999, inputs[1]).eps)
        exact = plain(inputs[0], 999, inputs[1]).eps
        with torch.autocast("cpu", torch.bfloat16):
            rough = held(inputs[0], 999, inputs[1]).eps
    assert 0 < float((found - exact).norm()) < float((rough - exact).norm())


@pytest.mark.parametrize(("make", "per_call"), [(lambda: pair()[0], True), (lambda: pair()[1], False)])
def test_autocast_casts_frozen_float32_weights_at_every_call_and_held_ones_never(
    inputs: tuple[Tensor, Tensor], make: Callable[[], UNetDenoiser], per_call: bool
) -> None:
    denoiser = make()
    denoiser.unet.conv_in.requires_grad_(False)
    frozen = [p for p in denoiser.unet.parameters() if not p.requires_grad and p.ndim > 1]
    with torch.autocast("cpu", torch.bfloat16), Casts({p.shape for p in frozen if p.numel() > 300}) as casts:
        for _ in range(2):
            denoiser(inputs[0], 999, inputs[1])
    large = [p for p in frozen if p.numel() > 300]
    assert casts.counted == (2 * len(large) if per_call else 0)
    assert len(large) > 10


def test_adapters_are_merged_into_a_held_base_in_float32(inputs: tuple[Tensor, Tensor]) -> None:
    _, held = pair()
    with torch.no_grad():
        expected = held(inputs[0], 999, inputs[1]).eps
        merge(held.unet)
        torch.testing.assert_close(held(inputs[0], 999, inputs[1]).eps, expected, rtol=1e-4, atol=1e-5)


def test_each_precision_holds_within_its_context() -> None:
    layer, x = nn.Linear(3, 3), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for precision in ("float32", "bfloat16", "float16"):
            with computing(precision, CPU):
                assert layer(x).dtype == getattr(torch, precision)
        assert layer(x).dtype == torch.bfloat16
