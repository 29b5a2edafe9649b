"""Counts of section 4 of the spec and the memory plan, by `isr parameters` on the meta device."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.errors import UsageError
from launch.parameters import build, parse, summary
from papers.dnf_sr import DNFSR

CONFIGS = Path(__file__).resolve().parents[3] / "papers/dnf_sr/configs"
DIT, DIT_LORA, ENCODER_LORA, VAE = 11_901_408_320, 179_507_200, 5_910_208, 83_819_683
NORMS = 128 * (19 * 4 + 38 * 2)  # of queries and keys; they stay in float32
KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"


def counted(name: str, *overrides: str) -> dict[str, Any]:
    return summary(build([CONFIGS / name], overrides))


def rows(found: dict[str, Any]) -> dict[str, tuple[str, int, int]]:
    return {row["name"]: (row["kind"], row["total"], row["trainable"]) for row in found["networks"]}


def test_stage_one() -> None:
    found = counted("kontext_sft.yaml")
    table = rows(found)
    assert table["transformer"] == ("base", DIT, 0)
    assert table["transformer LoRA (343 layers)"] == ("adapter", DIT_LORA, DIT_LORA)
    assert table["VAE"] == ("base", VAE, 0)
    assert table["VAE LoRA (31 layers)"] == ("adapter", ENCODER_LORA, ENCODER_LORA)
    assert table["discriminator heads"] == ("module", 1_868_547, 1_868_547)
    assert table[f"T5 of {KONTEXT}"] == ("text", 4_762_310_656, 0)
    assert table[f"CLIP of {KONTEXT}"] == ("text", 123_060_480, 0)
    assert found["optimizers"] == {"generator": DIT_LORA + ENCODER_LORA, "discriminator": 1_868_547}
    assert found["bytes"]["transformer, bfloat16, once"] == 2 * DIT + 2 * NORMS
    moments = found["bytes"]["generator: two moments of Adam"]
    assert moments == found["bytes"]["generator: weights and gradients"] == 8 * (DIT_LORA + ENCODER_LORA)


def test_stage_two_has_two_policies_of_which_one_is_trained_and_a_merged_encoder() -> None:
    found = counted("kontext_nf2t.yaml")
    table = rows(found)
    assert table["transformer"] == ("base", DIT, 0)
    assert table["transformer LoRA theta (343 layers)"] == ("adapter", DIT_LORA, DIT_LORA)
    assert table["transformer LoRA old (343 layers)"] == ("copy", DIT_LORA, 0)
    assert table["VAE"] == ("base", VAE, 0)
    assert not [name for name in table if name.startswith(("VAE LoRA", "discriminator"))]
    assert found["trainable"] == DIT_LORA
    plan = found["bytes"]
    assert plan["transformer, bfloat16, once"] == 2 * DIT + 2 * NORMS
    assert plan["theta: weights and gradients"] + plan["theta: two moments of Adam"] == 16 * DIT_LORA
    assert plan["old: weights"] == 4 * DIT_LORA
    assert plan["instead of adapters: three copies of the transformer"] == 3 * (2 * DIT + 2 * NORMS)
    assert plan["text of one caption (the encoders need not stay)"] == 2 * 512 * 4096 + 4 * 768


@pytest.mark.parametrize("keep", [True, False])
def test_text_encoders_that_stay_are_in_the_plan(keep: bool) -> None:
    """T5 in bfloat16, CLIP in float32, as they are loaded."""
    plan = counted("kontext_sft.yaml", f"--model.keep_text_encoders={str(keep).lower()}")["bytes"]
    assert plan.get("text encoders, kept") == (2 * 4_762_310_656 + 4 * 123_060_480 if keep else None)


@pytest.mark.parametrize("overlay", ["prompt_none", "prompt_wrong", "t_025"])
def test_an_overlay_for_both_stages_leaves_stage_two_what_it_is(overlay: str) -> None:
    path = CONFIGS / "ablations" / f"{overlay}.yaml"
    model = parse([CONFIGS / "kontext_nf2t.yaml", path])[1].model
    assert model.class_path == "papers.dnf_sr.NF2T"
    for key, value in yaml.safe_load(path.read_text())["model"]["init_args"].items():
        assert model.init_args[key] == value


def test_no_overlay_changes_the_stage_and_one_of_the_other_stage_is_refused() -> None:
    for path in sorted((CONFIGS / "ablations").glob("*.yaml")):
        for part in yaml.safe_load(path.read_text()).values():
            assert "class_path" not in part, path.name
    with pytest.raises(UsageError, match="no such option"):
        parse([CONFIGS / "kontext_nf2t.yaml", CONFIGS / "ablations" / "no_gan.yaml"])


def test_the_plan_is_printed_in_bytes_and_for_reading(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "kontext_nf2t.yaml")
    assert main(["parameters", config]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[-4:] == ["bytes", "23,802,855,552", "23.80", "GB"] for line in lines)
    assert any(line.split()[-4:] == ["bytes", "4,197,376", "4.2", "MB"] for line in lines)
    assert main(["parameters", config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"]["old: weights"] == 718_028_800


@pytest.mark.parametrize(("rank", "dit", "encoder"), [(32, 89_753_600, None), (16, 44_876_800, 1_477_552)])
def test_smaller_ranks(rank: int, dit: int, encoder: int | None) -> None:
    table = rows(counted("kontext_sft.yaml", f"--model.lora_rank={rank}", "--model.lambda_gan=0"))
    assert table["transformer LoRA (343 layers)"][1] == dit
    assert encoder is None or table["VAE LoRA (31 layers)"][1] == encoder


def test_flux_dev_has_kontexts_shapes() -> None:
    model = build([CONFIGS / "kontext_sft.yaml", CONFIGS / "flux_dev_sft.yaml"])
    assert isinstance(model, DNFSR)
    assert rows(summary(model))["transformer"] == ("base", DIT, 0)
    assert model.size_multiple == 4  # 16 px of output: 8 by the VAE, 2 by a token
