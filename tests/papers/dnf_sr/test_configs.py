"""The paper-scale configurations measure the paper's protocol, and the card's commands are understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data import SRData
from launch.commands import caption
from launch.comparison.measures import KNOWN
from launch.parameters import build
from launch.runs import Given
from papers.dnf_sr.module import FlowRestorer

from ...command_line import ParseOnly

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "papers/dnf_sr/configs"
STAGES = ["kontext_sft.yaml", "kontext_nf2t.yaml"]
TABLE_1 = ["psnr_y", "pyiqa:lpips", "pyiqa:clipiqa", "pyiqa:musiq", "pyiqa:maniqa-pipal", "pyiqa:qalign"]


def card_commands() -> list[list[str]]:
    """The words of each `isr` command in the card's section Run, with its variables filled in."""
    card = (ROOT / "papers/dnf_sr/README.md").read_text()
    block = card.partition("## Run\n")[2].partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ")
    variables = {"$SEED": "1", **{f"${k}": v for k, v in re.findall(r'^(\w+)="(.+)"$', block, re.MULTILINE)}}
    commands = [shlex.split(part, comments=True) for line in block.splitlines() for part in line.split("&&")]
    return [
        [word for part in words[1:] for word in (variables[part].split() if part in variables else [part])]
        for words in commands
        if words and words[0] == "isr"
    ]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """As far as the command line reads one: stage 2's class and settings."""
    model = yaml.safe_load((CONFIGS / "kontext_nf2t.yaml").read_text())["model"]
    settings = {"_class_path": model["class_path"], "seed": 0, **model["init_args"]}
    path = tmp_path / "epoch=0-step=500.ckpt"
    torch.save({"hyper_parameters": settings, "state_dict": {}, "global_step": 500}, path)
    return str(path)


def test_the_cards_commands_are_understood(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found: dict[str, list[Any]] = {"fit": [], "validate": [], "test": [], "caption": [], "parameters": []}
    for command, *words in card_commands():
        arguments = [checkpoint if word == "$CKPT" else word for word in words]
        if command == "caption":
            found[command].append(caption._parse(command, arguments))
        elif command == "parameters":
            found[command].append(arguments)
        else:
            found[command].append(ParseOnly([command, *arguments]).config[command])
    assert {command: len(parsed) for command, parsed in found.items()} == {
        "fit": 5, "validate": 1, "test": 1, "caption": 1, "parameters": 1,
    }  # fmt: skip
    words = [[f"--name={f.name}"] * bool(f.name) + [f"-c={file}" for file in f.config] for f in found["fit"]]
    names = [Given(["fit", *given]).run_name() for given in words]
    assert names == ["kontext_sft", "kontext_nf2t", "flux_dev_sft", "demo-sft", "demo-nf2t"]
    assert len({str(fit.data.init_args.train) for fit in found["fit"][:3]}) == 1
    (chosen,), (tested,) = found["validate"], found["test"]
    assert chosen.model.init_args.inference.metrics == ["pyiqa:qalign"]
    assert tested.model.init_args.inference.metrics == TABLE_1
    assert tested.model.init_args.seed == 1
    assert tested.model.init_args.captioner == chosen.model.init_args.captioner == found["caption"][0].model
    assert len(tested.data.init_args.test) == 3


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_measures_table_1_and_restores_up_to_1024_px_whole(name: str) -> None:
    model = build([CONFIGS / name, CONFIGS / "metrics.yaml"])
    assert isinstance(model, FlowRestorer)
    inference = model.inference
    assert inference.metrics == TABLE_1
    assert set(TABLE_1) <= KNOWN.keys()
    assert (inference.tile, inference.overlap) == (1024, 512)
    model.check_tile()
    judged = {name.partition(":")[2] or name for name in getattr(model, "reward_names", ())}
    assert "qalign" not in judged  # by which checkpoints are chosen


def test_all_checkpoints_of_stage_two_are_kept() -> None:
    fit = ParseOnly(["fit", "-c", str(CONFIGS / "kontext_nf2t.yaml")]).config["fit"]
    assert (fit.checkpoint.save_top_k, fit.checkpoint.every_n_train_steps) == (-1, 100)
    assert fit.checkpoint.save_last is True
    assert fit.trainer.max_steps == 1000


def test_the_photos_are_manifests_with_captions_of_the_crops_size() -> None:
    """So forgotten captions are an error: the file is not there."""
    photos = yaml.safe_load((ROOT / "data/configs/df2k_8k_ffhq.yaml").read_text())["data"]["init_args"]
    sources = [source if isinstance(source, str) else source["source"] for source in photos["train"]]
    assert all(source.endswith(".csv") for source in sources)
    (patch,) = {caption._parse("caption", words[1:]).patch for words in card_commands() if words[0] == "caption"}
    assert patch == photos["crop_size"] == 512
    with pytest.raises(FileNotFoundError, match=r"DIV2K_train_HR\.csv does not exist"):
        SRData(**photos | {"train": sources}).setup("fit")
