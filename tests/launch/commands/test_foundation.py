"""The command that makes the embedded foundation."""

import pytest

from common.loading import load_unet, load_vae


@pytest.mark.slow
def test_the_recipe_runs_from_nothing_to_a_foundation_and_skips_what_is_there(tmp_path, monkeypatch) -> None:
    from launch.commands.foundation import run

    monkeypatch.chdir(tmp_path)
    assert run("foundation", ["--output", "out", "--steps", "1"]) == 0
    stages = tmp_path / "out" / "stages"
    before = {file: file.stat().st_mtime_ns for file in stages.rglob("*.safetensors")}
    assert len(before) == 12  # six VAEs, two U-Nets, a text encoder, a flow transformer, its T5, a ControlNet
    assert run("foundation", ["--output", "out", "--steps", "1"]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in stages.rglob("*.safetensors")}
    assert load_unet(str(tmp_path / "out")).config.in_channels == load_vae(str(tmp_path / "out")).config.latent_channels
