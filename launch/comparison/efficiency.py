"""Costs of a method: parameters, multiplications, time, memory and denoiser calls, all on one image in one run."""

from __future__ import annotations

import re
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from launch.comparison.inputs import Item
from launch.comparison.methods import Method

REPEATS = 5
_DENOISER = re.compile(r"UNet\w*Model|\w*UNet|\w*Transformer2DModel|\w*Denoiser")  # not a VAE's UNetMidBlock2D


@dataclass(frozen=True)
class Cost:
    """Costs of a method on one image; None where a cost is unknown.

    Args:
        method: Its name.
        trainable: Parameters that take part in restoring and were trained.
        total: Parameters that take part in restoring.
        macs: Multiply-accumulate operations of matrix products and convolutions.
        seconds: Median time of `REPEATS` calls after two that do not count.
        spread: Standard deviation of these.
        memory_mb: Peak of what the restoring holds, weights included, 10^6 bytes.
        denoiser_calls: Calls of a U-Net or diffusion transformer, tiles included.
    """

    method: str
    trainable: int | None = None
    total: int | None = None
    macs: int | None = None
    seconds: float | None = None
    spread: float | None = None
    memory_mb: float | None = None
    denoiser_calls: int | None = None

    def row(self) -> dict[str, Any]:
        """As a dict."""
        return asdict(self)


class _Watch(TorchDispatchMode):
    """Sees every operation: the storages alive at a time, and which parameters take part."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.parameters = {id(parameter): parameter for parameter in parameters}
        self.used: set[int] = set()
        self.peak = self._alive = 0
        self._own = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if id(leaf) in self.parameters:
                self.used.add(id(leaf))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes and key not in self._own:
            self._sizes[key] = storage.nbytes()
            self._alive += storage.nbytes()
            self.peak = max(self.peak, self._alive)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._alive -= self._sizes.pop(key, 0)


@contextmanager
def _counted_calls(network: nn.Module | None) -> Iterator[list[str]]:
    """Collect the names of the denoisers as they are called; one inside another does not count."""
    calls: list[str] = []
    found: list[str] = []
    handles = []
    for name, module in network.named_modules() if network is not None else ():
        kinds = {parent.__name__ for parent in type(module).__mro__}
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and any(map(_DENOISER.fullmatch, kinds)):
            found.append(name)
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: calls.append(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def measure(method: Method, item: Item, device: torch.device) -> Cost:
    """Measure a method on one image.

    Args:
        method: The method.
        item: The image, the same for all methods.
        device: Where its network runs.

    Returns:
        Its cost; all None where it restores nothing here.
    """
    if not method.measurable:
        return Cost(method.name)
    network = method.network()
    method.make(item)  # once for what is set up at the first call
    parameters = list(network.parameters()) if network is not None else []
    watch = _Watch(parameters)
    with _counted_calls(network) as calls, FlopCounterMode(display=False) as flops, watch:
        method.make(item)
    used = [watch.parameters[key] for key in watch.used]
    held = sum(parameter.numel() * parameter.element_size() for parameter in used)
    trained = method.trained()
    times = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(REPEATS):
        start = time.perf_counter()
        method.make(item)  # gives pixels on the CPU, so it has waited for the device
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else watch.peak + held
    return Cost(
        method.name,
        sum(parameter.numel() for parameter in used if id(parameter) in trained),
        sum(parameter.numel() for parameter in used),
        flops.get_total_flops() // 2,
        float(np.median(times)),
        float(np.std(times)),
        peak / 1e6,
        len(calls),
    )
