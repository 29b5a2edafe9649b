"""The paper's configurations fit together: what is compared sees the same data, and stage B finds its stage A."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.runs import run_name_of

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "papers" / "f2idiff" / "configs"
NEGATIVE = (  # OSEDiff's scripts/train/train_osediff.sh
    "painting, oil painting, illustration, drawing, art, sketch, cartoon, CG Style, 3D render, unreal engine, "
    "blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg artifacts, deformed, "
    "lowres, over-smooth"
)


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return config


def settings(name: str) -> dict[str, Any]:
    found: dict[str, Any] = read(name)["model"]["init_args"]
    return found


@pytest.mark.parametrize("stage", ["foundation", "sr"])
def test_all_foundations_of_table_1_and_2_train_on_the_same_patches(stage: str) -> None:
    names = [f"{stage}_{kind}" for kind in ("f2i", "t2i", "eff")]
    commands = [re.findall(r"^# isr fit (.+)$", (CONFIGS / f"{name}.yaml").read_text(), re.M) for name in names]
    for name, command in zip(names, commands, strict=True):
        assert command == [f"-c data/configs/lsdir_ffhq_patches.yaml -c papers/f2idiff/configs/{name}.yaml"]
    data, trainers = ([read(name)[part] for name in names] for part in ("data", "trainer"))
    assert data[0] == data[1] == data[2]
    assert trainers[0] == trainers[1] == trainers[2]
    photos = yaml.safe_load((ROOT / "data/configs/lsdir_ffhq_patches.yaml").read_text())["data"]["init_args"]
    assert all(source.endswith(".parquet") for source in [*photos["train"], photos["val"]])


@pytest.mark.parametrize("name", ["tokens_cls", "tokens_patch", "size_224"])
def test_an_ablation_of_tokens_or_size_stands_on_a_stage_a_of_its_own(name: str) -> None:
    before, after = settings(f"ablations/foundation_{name}"), settings(f"ablations/{name}")
    files = ("foundation_f2i", f"ablations/foundation_{name}")
    run = run_name_of([(CONFIGS / f"{file}.yaml", read(file)) for file in files], {})
    assert after == {"foundation": f"runs/f2idiff/{run}", **before}


def test_osediffs_guidance_leads_away_from_its_own_negative_prompt() -> None:
    assert settings("osediff_sd21")["negative_prompt"] == NEGATIVE
    assert settings("ablations/reg_mid_block") == {"reg_targets": "mid_block"}
    assert {settings(name)["reg_targets"] for name in ("osediff_sd21", "sr_f2i", "sr_t2i", "sr_eff")} == {"all"}


def test_t2idiff_captions_at_test_with_the_model_that_isr_caption_has_for_training() -> None:
    from launch.commands.caption import _parse

    assert settings("sr_t2i")["captioner"] == _parse("caption", ["photos"]).model
