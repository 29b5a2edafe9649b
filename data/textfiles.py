"""Text files of users: lists, tables, captions and prompts, in any encoding that can be recognised."""

from __future__ import annotations

import codecs
import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_MARKS = (  # the longer ones first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BLOCK = 1 << 20  # bytes that are read at once, a multiple of 4


def read_text(path: Path, argument: str) -> str:
    """Read a text in UTF-8, or in UTF-16 or UTF-32 with a mark at its beginning or zeros where Latin letters have them.

    Args:
        path: The file.
        argument: The user's argument it came from, for messages.

    Returns:
        The text with its original line ends.

    Raises:
        ValueError: The file has bytes that its encoding does not have; the message names the line. Other encodings
            cannot be recognised, and a wrong guess gives other words.
    """
    data = path.read_bytes()
    encoding = _encoding(io.BytesIO(data))
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, "replace")
        line = len(before.splitlines()) + (before == "" or before[-1] in "\r\n")
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(
            f"{argument}={path}: line {line} is not {name} (byte 0x{data[error.start]:02x}: {error.reason}); "
            "save the file as UTF-8"
        ) from None


def _encoding(file: BinaryIO) -> str:
    """The encoding of a text by its mark, else by its zeros: the high bytes of Latin letters and of line ends."""
    zeros: Counter[int] = Counter()
    block = file.read(_BLOCK)
    marked = next((name for mark, name in _MARKS if block.startswith(mark)), None)
    if marked is not None:
        return marked
    while block:
        zeros.update({place: block[place::4].count(0) for place in range(4)})
        block = file.read(_BLOCK)
    most = max(zeros.values(), default=0)
    if not most:
        return "utf-8"
    low = [place for place in range(4) if zeros[place] <= most // 2]
    return {(0,): "utf-32-le", (3,): "utf-32-be", (0, 2): "utf-16-le", (1, 3): "utf-16-be"}.get(tuple(low), "utf-8")


def _stream(path: Path, argument: str, newline: str | None) -> Iterator[str]:
    """The lines of a text, read one by one; `newline` as of `open`, arguments and errors as of `read_text`."""
    try:
        with path.open("rb") as file:
            encoding = _encoding(file)
            file.seek(0)
            yield from io.TextIOWrapper(file, encoding, newline=newline)
    except UnicodeDecodeError:
        read_text(path, argument)  # raises, and names the line
        raise


def read_lines(path: Path, argument: str) -> Iterator[str]:
    """The lines of a text, without their ends, read one by one; arguments and errors as of `read_text`.

    Only line feeds and carriage returns end a line: names of files hold the other characters that Unicode counts.
    """
    return (line.removesuffix("\n") for line in _stream(path, argument, None))


def read_csv(path: Path, argument: str) -> Iterator[dict[str, str]]:
    """The rows of a csv file with a header, read one by one; arguments and errors as of `read_text`.

    Raises:
        ValueError: A line is not valid csv.
    """
    reader = csv.DictReader(_stream(path, argument, ""))
    try:
        for row in reader:
            yield {key: value or "" for key, value in row.items() if key}
    except csv.Error as error:
        raise ValueError(f"{argument}={path}: line {reader.line_num + 1} is not valid csv ({error}); fix it") from None
