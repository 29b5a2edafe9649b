"""Text files of users: lists, tables, captions and prompts, in any encoding that says what it is."""

from __future__ import annotations

import codecs
import csv
import io
from pathlib import Path

_MARKS = (  # the longer ones first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path, argument: str) -> str:
    """Read a text in UTF-8, or in UTF-16 or UTF-32 with a mark at its beginning or zeros where Latin letters have them.

    Args:
        path: The file.
        argument: The user's argument it came from, for messages.

    Returns:
        The text, its line ends as they are.

    Raises:
        ValueError: The file has bytes that its encoding does not have; the message names the line. Other encodings
            cannot be told apart, and a wrong guess gives other words.
    """
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _by_zeros(data)
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


def _by_zeros(data: bytes) -> str:
    """The encoding of a text without a mark: zeros are the high bytes of Latin letters and of line ends."""
    zeros = [data[place::4].count(0) for place in range(4)]
    if not any(zeros):
        return "utf-8"
    low = [place for place in range(4) if zeros[place] <= max(zeros) // 2]
    return {(0,): "utf-32-le", (3,): "utf-32-be", (0, 2): "utf-16-le", (1, 3): "utf-16-be"}.get(tuple(low), "utf-8")


def read_lines(path: Path, argument: str) -> list[str]:
    """The lines of a text, without their ends; arguments and errors as of `read_text`.

    Only line feeds and carriage returns end a line: names of files hold the other characters that Unicode counts.
    """
    return read_text(path, argument).replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_csv(path: Path, argument: str) -> list[dict[str, str]]:
    """The rows of a csv file with a header; arguments and errors as of `read_text`.

    Raises:
        ValueError: A line is no csv.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, argument), newline=""))
    try:
        return [{key: value or "" for key, value in row.items() if key} for row in reader]
    except csv.Error as error:
        raise ValueError(f"{argument}={path}: line {reader.line_num + 1} is no csv ({error}); correct it") from None
