"""What tests in several folders need: a machine without network, and what torch runs where."""

import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


class Calls(TorchDispatchMode):
    """Remembers each operator and the device of what came out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen.append((func.overloadpacket.__name__, out.device.type))
        return out


@pytest.fixture
def calls() -> Iterator[list[tuple[str, str]]]:
    """The operators that torch runs in this test, in order, each with the device of its result."""
    with Calls() as mode:
        yield mode.seen
