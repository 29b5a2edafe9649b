"""The rules of the house that a reader relies on: who may import whom, plain files, commands that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "common": {"common"},
    "data": {"data", "common"},
    "papers": {"papers", "common"},
    "launch": {"launch", "papers", "data", "common"},
}
FOLDERS = (*MAY_IMPORT, "tests", "benchmarks", "docs", "notebooks", ".ci")
WEIGHTS = Path("common/foundation/weights")
INSIDE_FUNCTIONS_ONLY = {"pyiqa", "torchvision"}  # one is non-commercial and optional, both are slow
NOWHERE = {"data": {"pyiqa", "torchvision"}}  # the data workers are many and should be light
GIVEN_UP = {"basicsr", "xformers"}  # their installs break
OF_NO_MODULE = {
    "tests/launch/test_ddp.py": "several processes, over all papers",
    "tests/launch/test_notebook.py": "the notebook",
    "tests/launch/test_nothing_gets_in.py": "files of others, over all readers",
    "tests/launch/test_odd_names.py": "odd names of files, over all commands",
    "tests/launch/test_outputs.py": "the files that the commands leave",
    "tests/launch/test_resume.py": "resumed fits, over all papers",
    "tests/launch/test_seeds.py": "seeds, over all commands",
    "tests/launch/test_stages.py": "a run in the place of a stage's checkpoint, over all commands",
    "tests/papers/*/test_counts.py": "a paper's counts of parameters, over its modules and configurations",
    "tests/papers/test_contract.py": "the contract of every paper",
    "tests/papers/test_cuda.py": "every demo row on a GPU",
    "tests/papers/test_fixed_texts.py": "embeddings of fixed texts, over all papers",
    "tests/papers/test_losses.py": "added losses, over all papers",
    "tests/papers/test_prompts.py": "missing texts, over all papers",
    "tests/papers/test_steady_steps.py": "waits of the host in a steady step, over all papers",
    "tests/papers/test_seeds.py": "seeds of weights, over all papers",
    "tests/test_architecture.py": "imports, names and files of the repository",
    "tests/test_architecture_table.py": "the table of docs/architecture.md",
    "tests/test_commands.py": "the commands that the pages print",
    "tests/test_packaging.py": "the installation",
    "tests/test_paper_fits.py": "every paper-scale fit",
    "tests/test_paper_scale.py": "benchmarks/paper_scale.py",
    "tests/test_prose.py": "the words of the repository",
    "tests/test_second_device.py": "tests/second_device.py",
}
"""Test files, or patterns of them, that belong to no single module, and what they test."""


def files(folders: tuple[str, ...] = FOLDERS) -> Iterator[Path]:
    """The project's files, relative to its root; runs, environments and caches are not among them."""
    yield from (path.relative_to(ROOT) for path in ROOT.iterdir() if path.is_file())
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for path in files(folders or FOLDERS) if path.suffix == ".py")


def imports(source: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Every module a file imports, by its full name, and whether that happens as soon as the file is imported."""

    def visit(node: ast.AST, at_once: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(path.parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            # The names may be modules themselves: `from papers import dfosd`.
            yield from ((f"{module}.{alias.name}", at_once) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (found for child in node.body for found in visit(child, False))
            yield from (found for child in node.orelse for found in visit(child, at_once))
        else:
            inner = at_once and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from (found for child in ast.iter_child_nodes(node) for found in visit(child, inner))

    yield from visit(ast.parse(source), True)


def breaches(source: str, path: Path) -> list[str]:
    """What a file's imports do against the rules."""
    package = path.parts[0]
    found = []
    for module, at_once in imports(source, path):
        first, *rest = module.split(".")
        foreign_paper = package == "papers" and first == "papers" and rest[:1] != list(path.parts[1:2])
        if (
            (first in MAY_IMPORT and first not in MAY_IMPORT[package])
            or foreign_paper
            or first in GIVEN_UP | NOWHERE.get(package, set()) | {"tests"}
            or (at_once and first in INSIDE_FUNCTIONS_ONLY)
        ):
            found.append(f"{path}: {module}")
    return found


class TestImports:
    def test_go_one_way(self) -> None:
        paths = python_files(*MAY_IMPORT)
        packages = {path.parts[0] for path in paths if len(path.parts) > 1}
        assert packages == set(MAY_IMPORT)
        found = [
            breach for path in paths if len(path.parts) > 1 for breach in breaches((ROOT / path).read_text(), path)
        ]
        assert not found, "\n".join(found)

    @pytest.mark.parametrize(
        ("path", "source"),
        [
            ("common/x.py", "import papers"),
            ("common/losses/x.py", "from data.decoding import read"),
            ("common/x.py", "def f():\n    import launch.cli"),
            ("common/losses/x.py", "from ...papers import a"),
            ("data/x.py", "from papers.a.module import A"),
            ("data/x.py", "def f():\n    import torchvision"),
            ("papers/a/x.py", "from papers.b import B"),
            ("papers/a/x.py", "from papers import b"),
            ("papers/a/x.py", "from ..b import B"),
            ("papers/a/x.py", "import data"),
            ("papers/a/x.py", "if True:\n    import pyiqa.utils"),
            ("common/x.py", "class A:\n    from torchvision import models"),
            ("common/x.py", "def f():\n    from basicsr import archs"),
        ],
    )
    def test_every_kind_of_breach_is_seen(self, path: str, source: str) -> None:
        assert len(breaches(source, Path(path))) == 1

    @pytest.mark.parametrize(
        ("path", "source"),
        [
            (
                "papers/a/x.py",
                "from papers.a import losses\nfrom . import networks\nfrom .losses import f\nimport common",
            ),
            ("common/x.py", "def f():\n    import pyiqa, torchvision"),
            ("common/x.py", "if TYPE_CHECKING:\n    import torchvision"),
            ("launch/x.py", "import papers.a, data.decoding, common.metrics"),
            ("data/x.py", "import common.images, datasets"),
        ],
    )
    def test_what_is_allowed_passes(self, path: str, source: str) -> None:
        assert breaches(source, Path(path)) == []


class TestFiles:
    def test_python_is_ascii(self) -> None:
        found = [str(path) for path in python_files() if not (ROOT / path).read_bytes().isascii()]
        assert not found

    def test_none_is_large_but_the_embedded_weights(self) -> None:
        sizes = {path: (ROOT / path).stat().st_size for path in files()}
        assert not [f"{path}: {size}" for path, size in sizes.items() if size > 2**20 and WEIGHTS not in path.parents]
        assert sum(size for path, size in sizes.items() if WEIGHTS in path.parents) < 20 * 2**20


def strays(tests: Iterable[Path], root: Path) -> list[Path]:
    """Test files that are named after no module or package of the source in the place that mirrors theirs."""
    found = []
    for path in tests:
        module = root.joinpath(*path.parts[1:-1], path.stem.removeprefix("test_"))
        if not (module.with_suffix(".py").is_file() or module.is_dir()):
            found.append(path)
    return found


class TestMirror:
    """tests/ mirrors the source: the tests of `data/prompts.py` are `tests/data/test_prompts.py`."""

    def strays(self) -> set[str]:
        return {str(path) for path in strays((p for p in python_files("tests") if p.name.startswith("test_")), ROOT)}

    def test_every_test_file_is_named_after_its_module(self) -> None:
        found = [path for path in self.strays() if not any(fnmatchcase(path, pattern) for pattern in OF_NO_MODULE)]
        assert not found, f"{found}: name each after the module it tests, in the same place, or add it to OF_NO_MODULE"

    def test_every_exception_is_needed(self) -> None:
        found = self.strays()
        assert not [pattern for pattern in OF_NO_MODULE if not any(fnmatchcase(path, pattern) for path in found)]

    def test_a_stray_is_found(self, tmp_path: Path) -> None:
        (tmp_path / "data" / "degradations").mkdir(parents=True)
        (tmp_path / "data" / "prompts.py").touch()
        names = ["data/test_prompts.py", "data/test_degradations.py", "data/test_gone.py", "test_prompts.py"]
        tests = [Path("tests", name) for name in names]
        assert strays(tests, tmp_path) == [Path("tests/data/test_gone.py"), Path("tests/test_prompts.py")]


def class_names(source: str) -> Iterator[str]:
    """Names of a file's classes, and of its types that are assigned: `Pixels = NDArray[np.uint8]`."""
    tree = ast.parse(source)
    yield from (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for node in tree.body:
        for target in node.targets if isinstance(node, ast.Assign) else []:
            if isinstance(target, ast.Name) and target.id[0].isupper() and not target.id.isupper():
                yield target.id


class TestNames:
    def test_no_two_classes_share_a_name(self) -> None:
        """In the source; tests have their small stand-ins, and pytest groups its test classes by file."""
        places: dict[str, list[str]] = {}
        for path in python_files(*MAY_IMPORT, "benchmarks", "docs"):
            for name in class_names((ROOT / path).read_text()):
                places.setdefault(name, []).append(str(path))
        shared = {name: found for name, found in places.items() if len(found) > 1}
        assert not shared, f"{shared}: give each a name that tells what it is"

    def test_classes_and_types_are_found(self) -> None:
        source = "class A:\n    class B: ...\nPixels = list[int]\nLIMIT = 3\nx = 1\ndef f():\n    class C: ..."
        assert sorted(class_names(source)) == ["A", "B", "C", "Pixels"]


def commands(text: str, program: str) -> set[str]:
    """The sub-commands of a program in a page's code, be it a block or within a line."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [part.strip() for code in blocks + spans for line in code.splitlines() for part in line.split("&&")]
    pattern = rf"(?:\$ )?(?:\w+=\S+ )*(?:\.venv/bin/)?{program} ([a-z_]+)(?![\w=/.-])"
    return {match[1] for match in (re.match(pattern, line) for line in lines) if match}


class TestDocumentedCommands:
    """What a page tells the reader to type exists."""

    def pages(self) -> dict[Path, str]:
        paths = [path for path in files() if path.suffix == ".md"] + [Path("launch/cli.py")]
        return {path: (ROOT / path).read_text() for path in paths}

    def test_are_found_in_blocks_and_lines_and_not_in_prose(self) -> None:
        block = "```bash\n$ cd x && make test PYTHON=p\nA=1 .venv/bin/isr fit -c a\n```"
        text = f"make sure, `make demo`\n{block}\nisr runs `isr --help`"
        assert commands(text, "make") == {"demo", "test"}
        assert commands(text, "isr") == {"fit"}

    def test_make_targets_are_in_the_makefile(self) -> None:
        makefile = (ROOT / "Makefile").read_text()
        targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
        phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
        assert phony is not None
        assert set(phony[1].split()) == targets
        named = {path: commands(text, "make") for path, text in self.pages().items()}
        assert "demo" in named[Path("README.md")]
        assert not {path: found - targets for path, found in named.items() if found - targets}

    def test_isr_commands_are_known(self) -> None:
        from launch.cli import COMMANDS

        named = {path: commands(text, "isr") for path, text in self.pages().items()}
        assert not {path: found - set(COMMANDS) for path, found in named.items() if found - set(COMMANDS)}

    def test_configurations_exist(self) -> None:
        named = {
            (name, path)
            for path, text in self.pages().items()
            for name in re.findall(r"(?<![\w/.])(?:papers|data|launch|common)/[\w./*-]+\.yaml", text)
        }
        assert not [f"{path}: {name}" for name, path in named if not list(ROOT.glob(name.replace("PAPER", "*")))]
