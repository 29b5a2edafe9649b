"""Errors as text."""

from __future__ import annotations


def one_line(error: object, longest: int | None = None) -> str:
    """An error's message on one line; the name of its class where it has no message.

    Args:
        error: The error.
        longest: Characters at most; None takes the whole message.
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:longest]
