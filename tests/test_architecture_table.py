"""The table of docs/architecture.md: each measure by hand on a small source tree, and the page's rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]

TRAINING = '''"""A docstring."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common import evaluation


class Scores:
    """Inherited, so it counts."""

    def score(self):
        return """two
lines"""


class TrainingModule(Scores):
    """The base.

    Args:
        seed: First.
    """

    # a comment
    def step(self):

        return 1  # code


class RestorationModule(TrainingModule):
    def restore(self):
        from common import evaluation
        return evaluation
'''
EVALUATION = "import common.training\n"
MODULE = '''from dataclasses import dataclass


@dataclass
class Settings:
    """Settings.

    Args:
        rank: The rank.
    """

    rank: int = 4


class Method:
    """A method.

    Args:
        first: Text
            in two lines.

    Raises:
        ValueError: Never.
    """

    def __init__(self, first):
        self.first = first
'''


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architecture_table", ROOT / "docs" / "architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    texts = {
        "common/__init__.py": "",
        "common/training.py": TRAINING,
        "common/evaluation.py": EVALUATION,
        "data/images.py": "def read():\n    return 0\n",
        "launch/cli.py": "def main():\n    return 0\n" + "\n" * 399,
        "papers/sixth/__init__.py": '"""Sixth."""\n',
        "papers/sixth/module.py": MODULE,
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_each_measure_is_what_one_counts_by_hand(table: ModuleType, tree: Path) -> None:
    assert table.measure(tree) == {
        "code lines of `TrainingModule` (methods)": "7 (2)",  # 3 of its own, 4 of Scores
        "code lines of `RestorationModule` (methods)": "4 (1)",
        "code lines of papers/sixth": "7",
        "constructors and `Args` in papers/sixth": "42%",  # (2 + 1) + (3 + 2) of 19 lines
        "longest function of common/, code lines": "3 (common/training.py: Scores.score)",
        "longest function of data/, code lines": "2 (data/images.py: read)",
        "longest function of launch/, code lines": "2 (launch/cli.py: main)",
        "longest function of papers/, code lines": "2 (papers/sixth/module.py: Method.__init__)",
        "files over 400 lines": "1: launch/cli.py 401",
        "import circles": "1: common.evaluation - common.training",
    }


def test_an_import_for_type_checks_alone_makes_no_circle(table: ModuleType, tree: Path) -> None:
    text = TRAINING.replace("        from common import evaluation\n        return evaluation\n", "        return 1\n")
    (tree / "common" / "training.py").write_text(text)
    assert table.measure(tree)["import circles"] == "0"


def test_now_is_rewritten_and_before_is_kept(table: ModuleType) -> None:
    page = f"# Page\n\n{table.BEGIN}\n{table.END}\n\nEnd.\n"
    first = table.rewritten(page, {"a": "1"}, "before (c0)", {"a": "3", "gone": "2"})
    assert first.startswith("# Page\n\n")
    assert first.endswith(f"\n{table.END}\n\nEnd.\n")
    second = table.rewritten(first, {"a": "0", "new": "5"}, *table.column(first, 1))
    assert second.splitlines()[3:8] == [
        "| measure | before (c0) | now |",
        "|---|---|---|",
        "| a | 3 | 0 |",
        "| new | - | 5 |",
        "| gone | 2 | - |",
    ]


def test_the_column_now_of_the_page_can_be_made(table: ModuleType) -> None:
    """The page itself may be older than the source; `python docs/architecture.py` renews it."""
    page, now = table.PAGE.read_text(), table.measure()
    title, before = table.column(page, 1)
    made = table.rewritten(page, now, title, before)
    assert table.column(made, 1) == (title, {**dict.fromkeys(now, "-"), **before})
    assert table.column(made, 2) == ("now", {**dict.fromkeys(before, "-"), **now})
    assert title == "before (75134b4)"


@pytest.mark.parametrize(
    ("name", "file", "most"), [("TrainingModule", "training.py", 150), ("RestorationModule", "restoration.py", 120)]
)
def test_a_base_class_is_read_in_five_minutes(table: ModuleType, name: str, file: str, most: int) -> None:
    known = table.classes(table.read(path, ROOT) for path in (ROOT / "common").glob("*.py"))
    assert known[name][0].path.name == file
    assert table.base_lines(name, known)[0] < most
