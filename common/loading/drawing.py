"""New weights: where and from which seed networks draw them, and the context in which none are read or drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_architecture_only: ContextVar[bool] = ContextVar("architecture_only", default=False)
_random_device: ContextVar[torch.device | None] = ContextVar("random_device", default=None)


@contextmanager
def architecture_only() -> Iterator[None]:
    """Within this context the loaders build on the meta device: no weights, no network, no memory."""
    token = _architecture_only.set(True)
    try:
        yield
    finally:
        _architecture_only.reset(token)


def is_architecture_only() -> bool:
    """True within `architecture_only()`, where the loaders build on the meta device."""
    return _architecture_only.get()


def weights_to_read(weights: str) -> str:
    """Replace weights that would be read by random ones within `architecture_only()`, where nothing is read.

    Args:
        weights: `random`, `pretrained` or a path, as the user gives it.

    Returns:
        `weights`, or `random` within `architecture_only()`.
    """
    return "random" if is_architecture_only() else weights


@contextmanager
def random_on_device(device: torch.device | str) -> Iterator[None]:
    """Within this context random weights are drawn and stay on a device: seconds for FLUX, minutes on the CPU.

    The values repeat on one kind of device and differ from the CPU's. Benchmarks use it; everything else draws on the
    CPU, so that a seed means the same weights everywhere.
    """
    token = _random_device.set(torch.device(device))
    try:
        yield
    finally:
        _random_device.reset(token)


@contextmanager
def drawing_weights(seed: int) -> Iterator[None]:
    """Within this context networks are made on the CPU, from this seed; in `architecture_only()` on the meta device.

    The default device does not matter: Lightning runs `configure_model` with the GPU as such, which draws from a
    generator of its own and other numbers. The global random state is neither read nor changed. The caller moves the
    network to its device. In `random_on_device()` that device draws.
    """
    device = _random_device.get()
    if device is not None and device.type == "cuda" and not is_architecture_only():
        with torch.random.fork_rng(devices=[device]), device:
            torch.manual_seed(seed)
            yield
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta" if is_architecture_only() else "cpu"):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; torch.manual_seed would reseed CUDA too
        yield


def network_device() -> torch.device:
    """Where networks belong: on the default device, or that of `random_on_device()` or `architecture_only()` (meta)."""
    if is_architecture_only():
        return torch.device("meta")
    return _random_device.get() or torch.empty(0).device
