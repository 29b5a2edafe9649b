"""LoRA on any module: add, switch, count, merge, save. peft does the work."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from common.loading import drawing_weights
from common.parameters import is_lora

ATTENTION_TARGETS: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
"""The four projections of every attention layer."""

OSEDIFF_TARGETS: tuple[str, ...] = (
    *ATTENTION_TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out",
)  # fmt: skip
"""Layers that OSEDiff adapts in a U-Net: all attention, ResNet, down- and up-sampler, in and out layers.

Not `time_emb_proj`, not `time_embedding`; `conv` is the one inside down- and up-samplers.
"""

TIME_TARGETS: tuple[str, ...] = ("time_emb_proj",)
"""The projection of the time embedding in each ResNet block, to add to one of the above."""


class LoraCount(NamedTuple):
    """Numbers of an adapter's layers and parameters."""

    layers: int
    parameters: int


def add_lora(
    module: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    name: str = "default",
    init: Literal["gaussian", "kaiming"] = "gaussian",
    seed: int = 0,
) -> nn.Module:
    """Add an adapter W + alpha / rank * B A to a module in place, and freeze everything but adapters.

    B starts at zero, so the module's output does not change. The adapter's parameters are float32 for any base.

    Args:
        module: A network without or with other adapters; its own parameters are frozen here.
        rank: Inner width of the adapter.
        alpha: Numerator of its scale. It has no default, as peft's default of 8 would double a rank-4 adapter.
        targets: Names of the layers (nn.Linear or nn.Conv2d) or endings of their dotted names, at a dot.
        name: Name of the adapter, which becomes the active one.
        init: Initialisation of A: `gaussian` has standard deviation 1 / rank, `kaiming` is nn.Linear's.
        seed: Random seed of A. A is drawn on the CPU; the global random state is neither read nor changed.

    Returns:
        The same module.

    Raises:
        ValueError: rank or alpha is not positive, the name is taken, or no layer matches `targets`.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank={rank} and alpha={alpha} must be positive.")
    if name in adapter_names(module):
        raise ValueError(f"name='{name}' is already an adapter of this module; it has {adapter_names(module)}.")
    if not any(_matches(layer, targets) for layer, _ in module.named_modules()):
        raise ValueError(f"targets={list(targets)} match no layer of {type(module).__name__}; see named_modules().")
    flags = {key: p.requires_grad for key, p in module.named_parameters() if is_lora(key)}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        init_lora_weights="gaussian" if init == "gaussian" else True,
        bias="none",
    )
    with drawing_weights(seed), warnings.catch_warnings():  # peft moves the new adapter to the device of the layer
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is intended
        inject_adapter_in_model(config, module, adapter_name=name)
    _use(module, [name])
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(flags.get(key, is_lora(key)))
        if is_lora(key) and key not in flags:
            parameter.data = parameter.data.float()
    return module


def vae_encoder_targets(vae: nn.Module) -> tuple[str, ...]:
    """Layers that OSEDiff and OMGSR adapt in an `AutoencoderKL`: the encoder's convolutions, attention and quant_conv.

    FLUX's VAE has no quant_conv; that target then matches nothing.
    """
    return (*targets_in(vae, "encoder"), "quant_conv")


def targets_in(module: nn.Module, part: str) -> tuple[str, ...]:
    """`OSEDIFF_TARGETS` in one part of a network, by full names, as endings would match layers of other parts."""
    endings = tuple(f".{target}" for target in OSEDIFF_TARGETS)
    names = (f"{part}.{name}" for name, _ in module.get_submodule(part).named_modules())
    return tuple(name for name in names if name.endswith(endings))


def adapter_names(module: nn.Module) -> list[str]:
    """Names of a module's adapters, sorted."""
    return sorted({key for layer in _layers(module) for key in layer.lora_A})


def set_adapter(module: nn.Module, name: str | Sequence[str] | None) -> None:
    """Choose the adapter, or the sum of adapters, that takes part in the forward pass; None for the base alone.

    Unlike peft's own switch, it does not change `requires_grad`.

    Raises:
        ValueError: The module has no adapter of that name.
    """
    names = [] if name is None else [name] if isinstance(name, str) else list(name)
    unknown = set(names) - set(adapter_names(module))
    if unknown:
        raise ValueError(f"name={sorted(unknown)}: no such adapter; the module has {adapter_names(module)}.")
    _use(module, names)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """Within this context the module is its frozen base, e.g. the teacher of its own adapter."""
    before = [(layer, layer._disable_adapters) for layer in _layers(module)]
    for layer, _ in before:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in before:
            layer._disable_adapters = disabled


def lora_parameters(module: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """The parameters of one adapter, in the module's order; for an optimiser.

    Raises:
        ValueError: The module has no adapter of that name.
    """
    if name not in adapter_names(module):
        raise ValueError(f"name='{name}': no such adapter; the module has {adapter_names(module)}.")
    marks = (f"lora_A.{name}.", f"lora_B.{name}.")
    return [parameter for key, parameter in module.named_parameters() if any(mark in key for mark in marks)]


def count_lora(module: nn.Module, name: str = "default") -> LoraCount:
    """Layers and parameters of one adapter."""
    parameters = lora_parameters(module, name)
    layers = sum(name in layer.lora_A for layer in _layers(module))
    return LoraCount(layers, sum(parameter.numel() for parameter in parameters))


def merge(module: nn.Module) -> nn.Module:
    """Fold the active adapters into the base weights and take all adapters off, in place.

    The module then has the base's architecture, speed and state-dict layout.

    Raises:
        ValueError: The module has no adapter.
    """
    layers = [(key, layer) for key, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has no adapter to merge.")
    for key, layer in layers:
        layer.get_base_layer().float()  # of a base that is held in 16 bits, which would round the sum
        layer.merge(safe_merge=True, adapter_names=list(layer.active_adapters))
        parent, _, child = key.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    del module.peft_config
    return module


def adapter_state(module: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, e.g. `conv_in.lora_A.weight`; for safetensors."""
    lora_parameters(module, name)  # raises when there is none
    return {key: value.detach() for key, value in get_peft_model_state_dict(module, adapter_name=name).items()}


def load_adapter_state(module: nn.Module, state: dict[str, Tensor], name: str = "default") -> None:
    """Load an existing adapter's tensors from a dict that `adapter_state` returned.

    Raises:
        ValueError: Its keys are not exactly this adapter's.
    """
    own = adapter_state(module, name)
    if own.keys() != state.keys():
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise ValueError(
            f"the adapter's state lacks {len(missing)} keys {missing[:3]} and has {len(extra)} unknown ones "
            f"{extra[:3]}; add the adapter with the targets it was trained with."
        )
    set_peft_model_state_dict(module, state, adapter_name=name)


def _matches(layer: str, targets: Sequence[str]) -> bool:
    """True if a list of targets matches this layer, by peft's rule."""
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _use(module: nn.Module, names: list[str]) -> None:
    """Activate adapters on every layer without peft's change of requires_grad."""
    for layer in _layers(module):
        flags = {key: p.requires_grad for key, p in layer.named_parameters()}
        layer.set_adapter(names)
        layer._disable_adapters = not names
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(flags[key])
