"""What an installation holds: a light command line, a core that stands without the extras, pins that fit."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "data", "papers", "launch")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(*names: str) -> dict[str, Requirement]:
    """The requirements of the core (`core`) and of extras, by canonical name."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [
        line for name in names for line in (PROJECT["project"]["dependencies"] if name == "core" else extras[name])
    ]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)]
    return dict(line.split("==") for line in lines)


def run_python(code: str) -> list[str]:
    """Run code in a fresh interpreter at the root and read the JSON list it prints last."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


class TestCommandLine:
    def test_help_loads_nothing_heavy(self) -> None:
        loaded = run_python(
            "import json, sys\nfrom launch.cli import main\nassert main(['--help']) == 0\n"
            "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
        )
        assert "launch" in loaded
        heavy = {"torch", "lightning", "jsonargparse", "diffusers", "transformers", "numpy", "cv2", "yaml", "papers"}
        assert not heavy & set(loaded)

    def test_the_installed_command_exists(self) -> None:
        module, function = PROJECT["project"]["scripts"]["isr"].split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.slow
def test_every_module_imports_without_the_optional_metrics() -> None:
    paths = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    assert set(PACKAGES) < set(modules)
    imported = run_python(
        "import importlib, json, sys\nsys.modules['pyiqa'] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(json.dumps([name for name in {modules!r} if name in sys.modules]))"
    )
    assert imported == modules


class TestRequirements:
    def test_whatever_the_code_imports_is_required_by_name(self) -> None:
        required = set(requirements("core")) | {"pyiqa", "spandrel", "timm"}
        providers = packages_distributions()
        missing = set()
        for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                for first in {name.split(".")[0] for name in names} - set(PACKAGES) - sys.stdlib_module_names:
                    if not {canonicalize_name(name) for name in providers.get(first, [first])} & required:
                        missing.add(f"{path.relative_to(ROOT)}: {first}")
        assert not missing

    def test_every_requirement_is_pinned_within_its_bounds(self) -> None:
        pinned = pins()
        for name, requirement in requirements("core", "dev", "metrics", "compare", "tagger").items():
            assert name in pinned
            assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"

    def test_only_the_metrics_extra_holds_pyiqa(self) -> None:
        assert "pyiqa" in requirements("metrics")
        assert "pyiqa" not in requirements("core", "dev")

    def test_setuptools_still_has_the_pkg_resources_that_pyiqa_needs(self) -> None:
        installed = {canonicalize_name(found.name): found.version for found in distributions()}
        assert int(pins()["setuptools"].split(".")[0]) < 82
        if "pyiqa" in installed:
            assert int(installed["setuptools"].split(".")[0]) < 82

    def test_package_data_covers_every_file_beside_the_code(self) -> None:
        patterns = PROJECT["tool"]["setuptools"]["package-data"]
        for package in PACKAGES:
            covered = {path for pattern in patterns.get(package, []) for path in (ROOT / package).glob(pattern)}
            others = {
                path
                for path in (ROOT / package).rglob("*")
                if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
            }
            assert not others - covered
