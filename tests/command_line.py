"""`isr` for tests: as far as it understands its arguments, and in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from launch.lightning_cli import IsrCLI

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
_ALL = """
import json, sys
from launch.cli import main

for command in json.loads(sys.argv[1]):
    if main(command):
        sys.exit(f"failed: {command}")
"""


class ParseOnly(IsrCLI):
    """The command line as far as its arguments are understood; nothing is built. All share a parser."""

    _made: ClassVar[dict[str, Any]] = {}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        names = ("parser", "_subcommand_method_arguments", "_subcommand_parsers", "_others")
        if not self._made:
            super().setup_parser(*args, **kwargs)
            self._made.update({name: getattr(self, name) for name in names})
        vars(self).update(self._made)

    def instantiate_classes(self) -> None:
        return

    def _run_subcommand(self, subcommand: str) -> None:
        return


def shell(*arguments: str) -> list[str]:
    """The words that start a process of one `isr` command."""
    return [sys.executable, "-m", "launch.cli", *arguments]


def shell_of_all(commands: Sequence[Sequence[str]]) -> list[str]:
    """The words that start a process of several, one after the other: starting takes longer than a small fit."""
    return [sys.executable, "-c", _ALL, json.dumps(commands)]


def run(words: Sequence[str], timeout: int = 300) -> None:
    """Run a process at the root, on one thread; it must succeed within so many seconds."""
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
