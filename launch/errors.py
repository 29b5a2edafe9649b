"""Errors as one line: what was given, what is wrong, what to do."""

from __future__ import annotations

import sys
import traceback


class UsageError(Exception):
    """The command line or a configuration cannot be understood."""


def report(error: BaseException, debug: bool) -> int:
    """Print an error on one line, or with its traceback under `--debug`.

    Returns:
        The exit code: 2 for usage, 130 for an interrupt, else 1.
    """
    if debug:
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or type(error).__name__
    expected = (ValueError, OSError, UsageError)
    label = "" if isinstance(error, expected) or type(error).__module__.split(".")[0] in _OURS else type(error).__name__
    print(f"isr: error: {label + ': ' if label else ''}{text}", file=sys.stderr)
    if label and not debug:
        print("isr: run the same command with --debug for the traceback", file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UsageError) else 1


_OURS = {"common", "data", "launch", "papers"}
