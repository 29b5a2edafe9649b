"""The benchmark of training steps: it counts the calls that the method's card states, and says what is random."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.parameters import parse

ROOT = Path(__file__).resolve().parents[1]
DNF_SR = ROOT / "papers/dnf_sr/configs/demo"
Figures = dict[str, tuple[int, float]]
"""By part: calls in a step, and milliseconds."""


@pytest.fixture
def measure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, Figures]]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("train_step")

    def measured(config: Path, *arguments: str) -> tuple[str, Figures]:
        threads = str(torch.get_num_threads())
        module.main(["-c", str(config), "--steps", "1", "--batch", "1", "--threads", threads, *arguments])
        printed = capsys.readouterr().out
        lines = re.findall(r"^  (\S.*?)  +(?:(\d+) x)? +([\d.]+) ms", printed, re.MULTILINE)
        return printed, {part: (int(calls or 0), float(ms)) for part, calls, ms in lines}

    return measured


def test_stage_one_encodes_twice_and_calls_the_transformer_once(measure: Callable[..., tuple[str, Figures]]) -> None:
    printed, figures = measure(DNF_SR / "01_sft.yaml")
    calls = {part: calls for part, (calls, _) in figures.items()}
    assert (calls["VAE, encoder"], calls["transformer"], calls["VAE, decoder"]) == (2, 1, 1)
    assert (calls["discriminator trunk (DINOv3)"], calls["backward"], calls["optimisers"]) == (3, 2, 2)
    assert figures.pop("one step")[1] > 0
    step = figures.pop("one step, by part")[1]
    assert sum(ms for _, ms in figures.values()) == pytest.approx(step, abs=0.1 * len(figures))
    assert "1 x 64 px, 32-true, CPU" in printed
    assert "random weights: disc=random:dinov3_tiny, dists_weights=random; random images" in printed
    assert float(re.findall(r"([\d.]+) GB", printed)[0]) > 0.1


def test_checkpointing_calls_no_network_twice_but_in_the_backward_pass(
    measure: Callable[..., tuple[str, Figures]],
) -> None:
    _, figures = measure(DNF_SR / "01_sft.yaml", "--model.gradient_checkpointing=true", "--model.lambda_gan=0")
    assert [figures[part][0] for part in ("VAE, encoder", "transformer", "VAE, decoder")] == [2, 1, 1]


def test_stage_two_calls_the_transformer_three_times_a_restoration(
    measure: Callable[..., tuple[str, Figures]], tmp_path: Path
) -> None:
    parser, parsed = parse([DNF_SR / "01_sft.yaml"])
    stage_one = parser.instantiate(parsed).model
    stage_one.configure_model()
    state = stage_one.state_dict()
    settings = {"_class_path": "papers.dnf_sr.DNFSR", "lora_rank": 32, "lora_alpha": 64}
    kept = {key: state[key] for key in stage_one.checkpoint_keys()}
    torch.save({"state_dict": kept, "hyper_parameters": settings}, tmp_path / "last.ckpt")
    arguments = ["--model.group_size=2", f"--model.sft={tmp_path / 'last.ckpt'}"]
    _, figures = measure(DNF_SR / "02_nf2t.yaml", *arguments)
    assert [figures[part][0] for part in ("VAE, encoder", "transformer", "VAE, decoder")] == [1, 2 * 3, 2 * 3]
