"""A second device where there is none: tensors that lie in the CPU's memory, say that they do not, and are checked.

Operations that would fail with tensors on a GPU fail here: those that mix devices, `numpy()`, a generator of the CPU.
Without a generator they draw numbers of their own.
What it cannot show are kernels, autocast and memory. It takes the name of torch's lazy device, whose guard and
threads of the autograd engine it uses; every operation is computed by the CPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._lazy.ts_backend
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_MIXING = {aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Operations that take tensors of the CPU beside a GPU's."""
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
"""Operations that read the device only where a mask says which elements they take."""
_ROOT = Path(__file__).resolve().parents[1]
_random = torch.Generator().manual_seed(12345)
_waits: Counter[str] | None = None  # while they are counted


class Far(Tensor):
    """A tensor on the second device; `near` is where it really is."""

    near: Tensor

    def __new__(cls, data: Tensor, **attributes: Any) -> Any:
        """Wrap a tensor of the CPU; a meta tensor becomes a parameter, as accelerate rebuilds it by type and dict."""
        if data.is_meta:
            return nn.Parameter(data)
        far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # not in torch's stubs
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=device(),
        )
        far.near = data
        return far

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way to say so

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute by the CPU."""
        return _computed(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files hold it as a tensor of the CPU."""
        return self.near.detach().clone().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """Numbers, which torch gives of no subclass."""
        if _waits is not None:
            _count_wait()
        return self.near.tolist()


class _Everywhere(TorchDispatchMode):
    """Sees what no `Far` takes part in: new tensors, and tensors on their way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Autocast(torch.autocast):
    """The CPU's for the second device, which torch knows none of."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == device().type else device_type, *args, **kwargs)


class _SecondAccelerator(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        return

    def teardown(self) -> None:
        return

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [device()]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "second"


def device() -> torch.device:
    """The second device."""
    return torch.device("lazy", 0)


@cache
def _start() -> None:
    torch._lazy.ts_backend.init()  # not twice


@contextmanager
def second_device() -> Iterator[dict[str, Any]]:
    """Within this context there is a second device; gives a Trainer's arguments to use it."""
    _start()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as with a GPU
    strategy = SingleDeviceStrategy(device=device(), accelerator=_SecondAccelerator())
    try:
        with pytest.MonkeyPatch.context() as patch, _Everywhere():
            patch.setattr(torch, "autocast", _Autocast)
            patch.setattr(torch.amp, "autocast", _Autocast)
            # torch's inference mode refuses wrapped tensors
            yield {"strategy": strategy, "accelerator": "auto", "inference_mode": False}
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Within this context the operations for which a GPU makes the host wait are counted.

    They are reads of its numbers, shapes that follow from them, and copies from it and to it that are not
    `non_blocking`. Gives the counts by the line outside torch that led to each, e.g. `common/guard.py:86`.
    """
    global _waits
    before, _waits = _waits, Counter()
    try:
        yield _waits
    finally:
        _waits = before


def _makes_host_wait(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """True if an operation needs what the second device computes, or waits until a copy has arrived."""
    operation = func.overloadpacket
    if operation in (aten.copy_, aten._to_copy):
        goes = args[0].device if operation is aten.copy_ else torch.device(kwargs.get("device") or args[0].device)
        comes = args[1 if operation is aten.copy_ else 0].device
        blocks = not kwargs.get("non_blocking", len(args) > 2 and args[2])
        to_host = goes.type == "cpu"  # into memory that is not pinned, which waits in any case
        return {goes.type, comes.type} == {"cpu", device().type} and (to_host or blocks)
    if not any(isinstance(value, Far) for value in tree_leaves((args, kwargs))):
        return False
    if operation in _INDEXING:
        return any(isinstance(index, Far) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _count_wait() -> None:
    """Count a wait at the innermost line outside torch and this file."""
    assert _waits is not None
    frame: Any = sys._getframe(1)
    while Path(frame.f_code.co_filename) == Path(__file__) or frame.f_globals["__name__"].startswith("torch."):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    place = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else Path(*path.parts[-3:])
    _waits[f"{place}:{frame.f_lineno}"] += 1


@contextmanager
def _own_numbers() -> Iterator[None]:
    """Draw from the second device's own generator, which no seed of the CPU's reaches."""
    with torch.random.fork_rng(devices=()):
        torch.set_rng_state(_random.get_state())
        yield
        _random.set_state(torch.get_rng_state())


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check an operation's devices as a GPU would, compute it by the CPU, and wrap what then is on the second device.

    Raises:
        RuntimeError: Tensors or a generator are of the wrong device.
    """
    if _waits is not None and _makes_host_wait(func, args, kwargs):
        _count_wait()
    far: list[Tensor] = []
    beside: list[Tensor] = []

    def near(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.device == device():
            far.append(value)
            return value.near if isinstance(value, Far) else value.cpu()  # torch.tensor(device=...) asks nobody
        if value.dim() and not value.is_meta:
            beside.append(value)
        return value

    given, named, operation = tree_map(near, args), tree_map(near, kwargs), func.overloadpacket
    target = named.get("device")
    goes_far = bool(far) if target is None else torch.device(target).type == device().type
    if far and beside and operation not in _MIXING:
        shapes = [tuple(tensor.shape) for tensor in beside]
        raise RuntimeError(f"{func} takes tensors of the second device beside the CPU's, {shapes}")
    if goes_far and named.get("generator") is not None:
        raise RuntimeError(f"{func} draws on the second device by a generator of the CPU")
    if goes_far and target is not None:
        named |= {"device": torch.device("cpu")}
    if operation is aten.is_pinned:
        return False
    with _own_numbers() if goes_far and torch.Tag.nondeterministic_seeded in func.tags else nullcontext():
        found = func(*given, **named)
    if operation is aten.copy_:
        return args[0]
    if not goes_far:
        return found

    def wrapped(value: Any) -> Any:
        return Far(value) if isinstance(value, Tensor) and not isinstance(value, Far) and not value.is_meta else value

    found = tree_map(wrapped, found)
    if not far or not all(isinstance(tensor, Far) for tensor in far):
        return found
    return return_and_correct_aliasing(func, args, kwargs, found)
