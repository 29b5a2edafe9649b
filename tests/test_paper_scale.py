"""The program for one GPU: its items are understood at paper scale and run with the demo's configurations."""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from common.loading import drawing_weights, network_device, random_on_device
from launch.parameters import parse

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def program() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("paper_scale")
    for name in ("paper_scale", "train_step", "report"):
        sys.modules.pop(name, None)


def test_every_items_configurations_and_overrides_are_understood(program: Any) -> None:
    for item in program.ITEMS:
        if isinstance(item, program.Feed):
            continue
        for configs, overrides in ((item.configs, item.overrides), ([item.demo], item.tiny)):
            filled = [re.sub(r"=\{(\w+)\}$", r"=\1.ckpt", text) for text in overrides]
            _, parsed = parse([ROOT / config for config in configs], filled)
            assert parsed.model.class_path.startswith(f"papers.{configs[0].split('/')[1]}."), item.name


def test_an_item_measures_steps_and_a_second_call_goes_on(
    program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["--device", "cpu", "--tiny", "--results", str(tmp_path), "--only", "dm_sr/estimator"]
    assert program.main(call) == 0
    (path,) = tmp_path.glob("*_tiny.json")
    (name, item), *others = json.loads(path.read_text())["items"].items()
    assert (name, others) == ("dm_sr/estimator", [])
    for size in ("1", "2"):
        figures = item["batches"][size]
        assert figures["images_per_s"] == pytest.approx(1e3 * int(size) / figures["ms_per_step"], rel=1e-2)
        assert figures["calls"]["timestep estimator, VGG19"] == 1
    flops = [item["batches"][size]["tflop_per_step"] for size in ("1", "2")]
    assert flops[1] == pytest.approx(2 * flops[0], abs=2e-3)
    assert program.main(call) == 0
    assert "dm_sr/estimator (" not in capsys.readouterr().out.partition("\n")[2].partition("results go to")[2]

    monkeypatch.setattr(program, "measure", lambda *_, **__: 1 / 0)
    assert program.main([*call, "--again"]) == 1
    assert json.loads(path.read_text())["items"][name]["failed"].startswith("ZeroDivisionError")


@pytest.mark.long
def test_every_item_runs_with_the_demos_configurations(program: Any, tmp_path: Path) -> None:
    assert program.main(["--device", "cpu", "--tiny", "--results", str(tmp_path), "--budget", "3000"]) == 0
    (path,) = tmp_path.glob("*_tiny.json")
    found = json.loads(path.read_text())["items"]
    assert set(found) == {item.name for item in program.ITEMS}


def test_the_page_is_made_of_the_results(program: Any) -> None:
    report = importlib.import_module("report")
    assert (ROOT / "docs" / "performance.md").read_text() == report.page()


def test_without_results_the_page_claims_nothing(program: Any, tmp_path: Path) -> None:
    page = importlib.import_module("report").page(tmp_path)
    assert "Not yet measured on a GPU." in page
    assert "|" not in page


def test_random_weights_stay_on_the_device_that_draws_them() -> None:
    """On the CPU this device draws what the CPU always draws."""
    with drawing_weights(3):
        here = nn.Linear(4, 4)
    with random_on_device("cpu"), torch.device("meta"):
        assert network_device() == torch.device("cpu")
        with drawing_weights(3):
            there = nn.Linear(4, 4)
    assert torch.equal(here.weight, there.weight)


def test_a_step_that_fails_leaves_no_mode_behind(program: Any) -> None:
    """A FLOP counter that stays on slows down what runs next, and its hooks keep the failed step's memory."""
    clock = importlib.import_module("train_step").Clock(1, count_flops=True)
    clock.on_train_batch_start(None, None, {"hq": torch.zeros(2, 3, 4, 4)}, 0)
    layer = nn.Linear(4, 4)
    assert any(type(mode).__name__ == "_FlopCounterMode" for mode in _get_current_dispatch_mode_stack())
    layer(torch.zeros(3, 4))
    clock.on_exception(None, None, torch.OutOfMemoryError())
    assert not _get_current_dispatch_mode_stack()


def test_operations_are_counted_without_the_modules(program: Any) -> None:
    clock = importlib.import_module("train_step").Clock(1, count_flops=True)
    batch = {"hq": torch.zeros(2, 3, 4, 4)}
    clock.on_train_batch_start(None, None, batch, 0)
    nn.Linear(4, 5, bias=False)(torch.ones(3, 4, requires_grad=True)).sum().backward()
    clock.on_train_batch_end(None, None, None, batch, 0)
    assert clock.found[2].flops == 3 * 2 * 3 * 4 * 5  # forward, and the gradients of input and weight


def test_a_stage_is_made_again_for_the_item_that_needs_it(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def measured(item: Any, place: Any) -> dict[str, Any]:
        called.append((item.name, tuple(item.sizes)))
        return {"batches": {}}

    monkeypatch.setattr(program, "_step", measured)
    call = ["--device", "cpu", "--tiny", "--results", str(tmp_path), "--only"]
    assert program.main([*call, "dnf_sr/kontext_sft"]) == 0
    (path,) = tmp_path.glob("*_tiny.json")
    before = json.loads(path.read_text())["items"]["dnf_sr/kontext_sft"]
    assert program.main([*call, "dnf_sr/kontext_nf2t"]) == 0
    assert called == [("dnf_sr/kontext_sft", (1, 2)), ("dnf_sr/kontext_sft", (1,)), ("dnf_sr/kontext_nf2t", (1,))]
    assert json.loads(path.read_text())["items"]["dnf_sr/kontext_sft"] == before


def test_memory_that_an_item_leaves_to_the_next_is_reported(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter([0.0, 1.5])
    monkeypatch.setattr(program, "_allocated", lambda device: next(left))
    monkeypatch.setattr(program, "_step", lambda item, place: {"batches": {}})
    call = ["--device", "cpu", "--tiny", "--results", str(tmp_path), "--only", "rfsr/seesr, early", "rfsr/seesr, late"]
    assert program.main(call) == 0
    (path,) = tmp_path.glob("*_tiny.json")
    found = json.loads(path.read_text())["items"]
    assert [item.get("allocated_before_gb") for item in found.values()] == [None, 1.5]
    assert "late: warning: 1.5 GB are still allocated" in capsys.readouterr().out


def test_torchs_warnings_of_a_wait_are_counted_by_line(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = importlib.import_module("train_step").Waits()
    assert waits.end() is None
    waits.begin()
    for _ in range(2):
        warnings.warn("called a synchronizing CUDA operation (Triggered internally at x.cpp:1)", stacklevel=1)
    warnings.warn("another warning", stacklevel=1)
    ((place, count),) = (waits.end() or {}).items()
    assert (place.split("/")[-1].split(":")[0], count) == ("test_paper_scale.py", 2)
    assert modes == ["warn", "default"]


@pytest.mark.gpu
def test_a_read_of_a_number_is_counted_as_a_wait(program: Any) -> None:
    waits = importlib.import_module("train_step").Waits()
    x = torch.ones(3, device="cuda")
    waits.begin()
    y = (x + 1).sum()
    assert waits.end() == {}
    waits.begin()
    float(y)
    (count,) = waits.end().values()
    assert count == 1
