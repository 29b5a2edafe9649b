"""Signals that end a command: SIGINT, SIGTERM and, where it exists, SIGHUP raise `Stopped`.

A fit holds a signal back until its step is done, see `launch.callbacks.EndOnSignal`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_ONE_EVENT = 1.0
"""Seconds within which a repeated signal counts as the same one: `timeout` signals a process and then its group."""


class Stopped(BaseException):
    """A signal ends the command. It is not an `Exception`, so that nothing takes it for the failure of one part.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@dataclass
class _State:
    """Which process answers signals, the one that has come and when, and whether it waits."""

    owner: int = 0
    number: int | None = None
    when: float = 0.0
    held_back: bool = False


_state = _State()


def received() -> int | None:
    """The signal that ends the command under way, if one has come."""
    return _state.number


def hold_back(wait: bool) -> None:
    """Let a first signal wait for whoever asks `received`, or no longer."""
    _state.held_back = wait


def install() -> None:
    """Put the handlers in place, in the main thread; signals that are ignored, as under nohup, stay ignored."""
    if threading.current_thread() is threading.main_thread() and _state.owner == os.getpid():
        for number in _ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _end)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Within this context a signal raises `Stopped`."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    _state.owner, _state.number, _state.held_back = os.getpid(), None, False
    install()
    try:
        yield
    finally:
        _state.owner, _state.number = 0, None
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.owner:
        raise KeyboardInterrupt  # a data worker ends quietly on it
    now = time.monotonic()
    again = _state.number is not None
    if again and now - _state.when < _ONE_EVENT:
        return
    _state.number, _state.when = number, now
    if again or not _state.held_back:
        raise Stopped(number)
    name = signal.Signals(number).name
    os.write(2, f"isr: {name}: the fit ends after this step; send it again to end at once\n".encode())
