"""Errors as one line: the value given, what is wrong, what to do."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Iterable


class UsageError(Exception):
    """The command line or a configuration cannot be understood."""


def plain(message: str, options: Iterable[str] = ()) -> str:
    """Shorten a message of the parser to one line: `model.timestep=abc: expected int`, `data.sise=3: no such option`.

    Errors of nested classes come through here once a level, each time with their outcome as part of the message.

    Args:
        message: Message of the parser.
        options: Names that it knows, for the nearest one.
    """
    text = " ".join(line.strip(" -") for line in message.replace(_SEE, "").splitlines() if line.strip())
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: ", "", text)
    text, _, whole = text.partition(" Given value type: ")
    text = text.removesuffix(" Expected a <class 'NoneType'>")  # the other alternative of an Optional
    keys = ".".join(re.findall(r'Parser key "([^"]+)":', text))
    text = re.sub(r'Parser key "[^"]+": ?', "", text)
    value = re.search(r"\. Got value: (.*)$", text)
    given = value[1] if value else whole.partition(" Given value: ")[2] if "Expected a" in text else ""
    text = text[: value.start()] if value else text
    text = re.sub(r"typing\.Literal\[(.*?)\]", lambda m: m[1].replace("'", ""), text)
    text = (
        re.sub(r"<class '([\w.]+)'>", r"\1", text).replace(" Expected a ", " or ").replace("Expected a ", "expected ")
    )
    if unknown := re.search(r"(?:[Oo]ption '|unrecognized arguments: )(-*)([\w.]+)([^']*)", text):
        near = difflib.get_close_matches(unknown[1] + unknown[2], list(options), n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        text = f"{unknown[1]}{unknown[2]}{unknown[3]}: no such option{hint}"
    elif missing := re.search(r"File does not exist: '(.*)'", text):
        return f"{keys}={missing[1]}: no such file; give one that is there"
    elif missing := re.search(r"arguments are required: (.*)", text):
        names = ", ".join(sorted({name.rpartition(".")[2] for name in missing[1].split(", ")}))
        return f"nothing says what to take as {names}; give a config: -c papers/PAPER/configs/NAME.yaml"
    nested = re.match(r"([\w.]+)(=\S+)?: ", text)
    if keys and nested:
        text = f"{keys}.{text}"
        inner = re.search(rf"\b{nested[1].rpartition('.')[2]}'?[:=] ?([^,)}}]+)", whole)
        if not nested[2] and inner:
            text = text.replace(":", f"={inner[1]}:", 1)
    elif keys:
        text = f"{keys}{'=' + given if given else ''}: {text}"
    return text + _SEE


_SEE = "; see isr COMMAND --help"


def report(error: BaseException, debug: bool) -> int:
    """Print an error on one line, or with its traceback under `--debug`.

    Returns:
        The exit code: 2 for usage, 130 for an interrupt, else 1.
    """
    if debug:
        traceback.print_exception(error)
    text = str(error)
    if "Does not validate against" in text:  # jsonargparse, around the error of a constructor
        text = plain(text).removesuffix(_SEE)
    if "Original Traceback (most recent call last)" in text:  # from a data worker: its last line is the error
        text = re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
    text = " ".join(text.split()) or type(error).__name__
    expected = (ValueError, OSError, UsageError)
    label = "" if isinstance(error, expected) or type(error).__module__.split(".")[0] in _OURS else type(error).__name__
    print(f"isr: error: {label + ': ' if label else ''}{text}", file=sys.stderr)
    if label and not debug:
        print("isr: run the same command with --debug for the traceback", file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UsageError) else 1


_OURS = {"common", "data", "launch", "papers"}
