"""Every command of the README, the cards and the contributor's page is understood as it is printed."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml

from common.images import write_png
from launch import parameters
from launch.cli import COMMANDS
from launch.commands import caption, compare, demo, foundation
from launch.comparison.measures import KNOWN
from launch.errors import UsageError
from launch.usage import EXAMPLES as EXAMPLES_OF_HELP
from launch.usage import classes

from .command_line import ROOT, ParseOnly

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("papers/README.md"), *ROOT.glob("papers/*/README.md")]
)
LIGHTNING = ("fit", "validate", "test", "predict")
EXAMPLES = {
    "CONFIG": "papers/f2idiff/configs/sr_f2i.yaml",
    "CKPT": "runs/f2idiff/sr_f2i/version_0/checkpoints/last.ckpt",
    "OUT": "upscaled",
}
RUNS = re.compile(r"runs/(?P<paper>\w+)/(?P<name>[\w-]+)/version_\d+/checkpoints/[\w=.*-]+\.ckpt")


def commands(page: Path) -> Iterator[str]:
    """The lines of a page's bash blocks, continued ones joined, and the whole commands in its text."""
    text = page.read_text()
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from filter(None, block.replace("\\\n", " ").splitlines())
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`((?:isr [a-z]+|make|\.venv/bin/[\w-]+) [^`]+)`", prose):
        yield re.sub(r"\b(?:CONFIG|CKPT|OUT)\b", lambda word: EXAMPLES[word[0]], " ".join(code.split()))


def words_of(lines: Iterator[str]) -> Iterator[list[str]]:
    """The words of each program's call, as a shell would give them: variables filled in, loops run once."""
    variables: dict[str, str] = {}
    for line in lines:
        for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line)):
            filled = re.sub(r"\$(\w+)", lambda name: variables[name[1]], part.strip())
            words = shlex.split(filled)
            if not words or words in (["do"], ["done"]):
                continue
            if words[0] == "for":
                variables[words[1]] = words[3]
            elif found := re.fullmatch(r"(\w+)=(.*)", words[0]):
                variables[found[1]] = found[2]
            else:
                yield words


DISTINCT = {tuple(words): page for page in PAGES for words in words_of(commands(page))}
CALLS = [
    pytest.param([*words], id=f"{page.parent.name if page.parent != ROOT else page.stem}: {' '.join(words)[:100]}")
    for words, page in DISTINCT.items()
]
CALLS += [
    pytest.param(shlex.split(example), id=f"help: {example[:100]}")
    for two in EXAMPLES_OF_HELP.values()
    for example in two
]
PRINTED = [call for call in CALLS if call.values[0][0] == "isr"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands find the repository's configurations and a user's photos, runs and weights."""
    root = tmp_path_factory.mktemp("place")
    for folder in ("papers", "data", "launch"):
        (root / folder).symlink_to(ROOT / folder)
    for folder in ("photos", "my_photos", "PHOTOS", "DIV2K/DIV2K_train_HR", "LSDIR/HR_merge", "osediff"):
        write_png(root / folder / "a.png", np.zeros((64, 64, 3), np.uint8))
    crops = ("RealSRVal_crop128", "DrealSRVal_crop128", "DIV2K_V2_val")
    for name in ("RealSR", "DRealSR", *(f"StableSR_testsets/{folder}" for folder in crops)):
        for part, side in (("test_LR", 16), ("test_HR", 64)):
            write_png(root / name / part / "a.png", np.zeros((side, side, 3), np.uint8))
    (root / "texts").mkdir()
    (root / "texts" / "a.txt").write_text("a photo")
    (root / "BSRGAN.pth").touch()
    return root


def settings_of(config: Path) -> dict[str, Any]:
    """What a checkpoint of this configuration holds of its model."""
    _, parsed = parameters.parse([config])
    model = parsed.model.as_dict()
    return {"_class_path": model["class_path"], **model["init_args"]}


@functools.cache
def make_run(place: Path, paper: str, name: str, file: str) -> None:
    """A run's checkpoint, as the configuration of its name would leave it."""
    configs = ROOT / "papers" / paper / "configs"
    (config,) = configs.glob(f"demo/*_{name[5:]}.yaml" if name.startswith("demo-") else f"{name}.yaml")
    path = place / "runs" / paper / name / "version_0" / "checkpoints" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "global_step": 1, "hyper_parameters": settings_of(config)}, path)
    shutil.copy(config, path.parents[1] / "config.yaml")


@pytest.mark.parametrize("words", PRINTED)
def test_a_printed_command_is_understood(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, command, *rest = words
    assert command in COMMANDS
    monkeypatch.chdir(place)
    if rest[-1:] == ["--help"]:
        assert len(rest) == 1 or "model" in classes(rest)
        return
    for word in rest:
        for run in RUNS.finditer(word):
            make_run(place, run["paper"], run["name"], Path(run[0]).name.replace("*", "0"))
    rest = [word.replace("*step=*", "0step=0") for word in rest]
    if command in LIGHTNING:
        assert ParseOnly([command, *rest]).config[command].model.class_path
    elif command == "parameters":
        assert rest[1:] in ([], ["--inference"], ["--memory"])
        parameters.parse(rest[:1])
    elif command == "compare":
        options = compare._parser(command).parse_args(rest)
        assert all(folder.is_dir() for folder in options.pairs)
        compare._named("weights", options.weights)
    elif command == "caption":
        options = caption._parse(command, rest)
        assert Path(options.source).is_dir()
    elif command == "export":
        assert re.fullmatch(r"(RUN|runs/\w+/\w+) -o \w+", " ".join(rest))
    elif command == "metrics":
        assert rest[0] in ("list", "doctor", "fetch")
    elif command in ("demo", "foundation"):
        {"demo": demo, "foundation": foundation}[command]._parser(command).parse_args(rest)
    else:
        assert not rest, f"{command} is not known here; teach this test how to read its arguments"


class Row(NamedTuple):
    """A line of a card's section Tables: which row of which table its last command measures."""

    paper: str
    table: str
    name: str
    test: list[str]


def rows() -> Iterator[Row]:
    for page in ROOT.glob("papers/*/README.md"):
        block = page.read_text().partition("\n## Tables\n")[2].partition("```bash\n")[2].partition("```")[0]
        lines = block.replace("\\\n", " ").splitlines()
        variables, table = [line for line in lines if re.match(r"\w+=", line)], ""
        for line in lines:
            if line.startswith("# "):
                table = line[2:]
            elif "  # " in line:
                *_, words = words_of(iter([*variables, line]))
                yield Row(page.parent.name, table, line.partition("  # ")[2], words)


ROWS = list(rows())


def given(words: list[str], section: str, *keys: str) -> Any:
    """A setting of the last config that has it."""
    found: Any = None
    for option, path in pairwise(words):
        tree: Any = yaml.safe_load((ROOT / path).read_text()) if option == "-c" else {}
        for key in (section, "init_args", *keys):
            tree = tree.get(key, {}) if isinstance(tree, dict) else {}
        found = tree or found
    return found


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.paper}, {row.table}: {row.name}" for row in ROWS])
def test_a_tables_row_is_tested_on_the_papers_sets_by_its_metrics(row: Row) -> None:
    results = yaml.safe_load((ROOT / "papers" / row.paper / "results.yaml").read_text())
    tables = [table for table in results["tables"] if table["table"].startswith(row.table)]
    tables = [table for table in tables if any(row.name in named for named in table["rows"].values())]
    assert tables, "results.yaml has no such row"
    assert row.test[:2] == ["isr", "test"]
    metrics = given(row.test, "model", "inference", "metrics")
    assert set(metrics) <= KNOWN.keys()
    flag = dict(pairwise(row.test)).get("--data.test")
    sets = yaml.safe_load(flag) if flag else given(row.test, "data", "test")
    folders = [re.sub(r"\W|_", "", Path(folder).name).lower() for folder in sets]
    for table in tables:
        for column in set(table["columns"]) - {"fid", "vq_r1"}:
            assert any(metric.removeprefix("pyiqa:").startswith(column) for metric in metrics), column
        for name, named in table["rows"].items():
            if row.name in named and name not in ("unnamed",):
                assert any(folder.startswith(name.partition("-")[0].lower()) for folder in folders), name


def test_every_overlay_of_a_papers_table_has_its_row() -> None:
    used = {word for words in DISTINCT for word in words if "/ablations/" in word}
    for paper in {row.paper for row in ROWS}:
        for path in (ROOT / "papers" / paper / "configs" / "ablations").glob("*.yaml"):
            of_a_table = re.match(r"# (Table|Supplement Table|D3SR Table 4a)", path.read_text())
            at_test = path.stem.startswith("steps_") or path.stem == "prompt_llava"  # rows by a flag
            assert not of_a_table or at_test or str(path.relative_to(ROOT)) in used, path


def test_each_benchmark_that_is_restored_whole_says_how_it_lies() -> None:
    path = ROOT / "data/configs/whole_benchmarks.yaml"
    listed = yaml.safe_load(path.read_text())["data"]["init_args"]["test"]
    assert all(f"# {folder}: " in path.read_text() for folder in listed)
    assert {Path(folder).name for folder in listed} >= {"RealSR", "DRealSR", "RealSet65", "RealSet80", "RealLQ250"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


def test_other_programs_of_the_pages_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for call in CALLS:
        program, *rest = call.values[0]
        if program == "make":
            assert {word for word in rest if "=" not in word} <= targets, rest
        elif program.startswith(".venv/bin/"):
            assert Path(program).name in ("tensorboard", "pytest", "pre-commit", "isr"), program
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), rest
        else:
            assert program in ("isr", "git", "cd", "mkdir", "sbatch", "python"), program


def test_the_pages_print_commands_of_every_kind() -> None:
    assert len(PRINTED) > 100
    assert {call.values[0][1] for call in PRINTED} >= {*LIGHTNING, "parameters", "compare", "caption", "export"}


@pytest.mark.parametrize(
    "wrong", ["-c papers/dfosd/configs/nix.yaml", "-c papers/dfosd/configs/sd21.yaml --model.nix 1"]
)
def test_a_command_that_is_wrong_is_found_out(wrong: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError):
        test_a_printed_command_is_understood(["isr", "fit", *wrong.split()], place, monkeypatch)
