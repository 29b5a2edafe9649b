"""The repository's prose by place, and the words and openings that it avoids: `python tests/prose.py` lists them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CODE = ("common", "papers", "data", "launch")
WORDS = re.compile(
    r"\b(?:told|tells?|said|says|mends?|mended|shall|besides|likewise|thereof|to be had|beats?|at hand|"
    r"neither here nor|is no [A-Z]\w+|as it were|wants? (?!to)|asks? after)\b",
)
OPENINGS = re.compile(
    r"(?:^|(?<=[.:;] ))(?:Of (?!course)|What |Whether |Whose |How (?!to\b)|Likewise|Likewise,|Besides)"
)
"""Openings of fragments; a question may open so."""


class Text(NamedTuple):
    """A piece of prose and the place where it stands."""

    path: Path
    line: int
    kind: str
    text: str


def _strings(node: ast.AST) -> Iterator[tuple[int, str]]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.lineno, inner.value


def of_code(path: Path) -> Iterator[Text]:
    """Docstrings, comments, and the texts of errors, logs and options of a module."""
    source = path.read_text()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield Text(path, node.lineno, "docstring", node.value.value)
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield from (Text(path, line, "error", text) for line, text in _strings(node.exc))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if re.match(r"log\.(info|warning|error)$|warnings\.warn$|(rank_zero_)?(print|warn)", name):
                yield from (Text(path, line, "log", text) for line, text in _strings(node))
            for keyword in node.keywords:
                if keyword.arg in ("help", "description", "epilog"):
                    yield from (Text(path, line, "help", text) for line, text in _strings(keyword.value))
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            yield from (
                Text(path, line, "constant", text) for line, text in _strings(node.value) if text.count(" ") > 2
            )
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(path, token.start[0], "comment", token.string.lstrip("#! "))


def of_page(path: Path) -> Iterator[Text]:
    """The paragraphs, list items and cells of a Markdown page, without code."""
    fenced = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and line.strip() and not line.startswith('| "'):  # the examples of CONTRIBUTING.md
            for cell in re.sub(r"`[^`]*`", "`", line).strip("| #-*").split(" | "):
                yield Text(path, number, "page", re.sub(r"^\d+\. ", "", cell))


def of_configuration(path: Path) -> Iterator[Text]:
    """The comments of a YAML file."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if comment := re.search(r"(?:^|\s)#\s*(.*)", line):
            yield Text(path, number, "config", comment[1])


def pages() -> list[Path]:
    """README, the contributor's page, the documentation and the cards."""
    return sorted(
        [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("papers/README.md"), *ROOT.glob("papers/*/*.md")]
    )


def everything() -> Iterator[Text]:
    """All prose of the repository but its tests'."""
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield from of_code(path)
        for path in sorted((ROOT / folder).rglob("*.yaml")):
            yield from of_configuration(path)
    for page in pages():
        yield from of_page(page)


def found(text: Text) -> Iterator[tuple[int, str]]:
    """Avoided words and openings of a text: their line and the line's words."""
    for offset, line in enumerate(text.text.splitlines() or [""]):
        plain = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"", "`", line).strip()
        content = re.sub(r"^[\w ,*()]+: (?=[A-Z])", "", plain)  # an argument's name
        if not plain.endswith("?") and (WORDS.search(plain) or OPENINGS.search(content)):
            yield text.line + offset, line.strip()


if __name__ == "__main__":
    from collections import Counter

    counts: Counter[str] = Counter()
    for text in everything():
        for line, words in found(text):
            counts[text.kind] += 1
            print(f"{text.path.relative_to(ROOT)}:{line}: {text.kind}: {words}")
    print(sum(counts.values()), dict(counts))
