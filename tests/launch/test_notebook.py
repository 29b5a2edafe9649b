"""The notebook runs from its first cell to its last, and what it shows of training is what TensorBoard's files hold."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from launch.curves import Curve, draw_curves, read_curves

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "notebooks/compare_methods.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def execute(parameters: dict[str, Any]) -> dict[str, Any]:
    """Run all cells in one namespace; the cell tagged `parameters` is followed by others.

    Returns:
        Id of a cell -> what it shows: the value of the expression at its end, if it ends in one.
    """
    space: dict[str, Any] = {"__name__": "__main__"}
    shown = {}
    for cell in CODE:
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), space)
        if isinstance(last, ast.Expr):
            shown[cell["id"]] = eval(compile(ast.Expression(last.value), cell["id"], "eval"), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space |= parameters
    return shown


def test_its_outputs_are_cleared_and_jupyter_can_open_it() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in CODE) == 1


@pytest.mark.slow
def test_all_its_cells_run_on_fits_of_two_steps_of_all_five_papers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["dfosd/dfosd", "dm_sr/", "dnf_sr/sft", "f2idiff/f2idiff_sr", "rfsr/rfsr"]
    shown = execute({"RUNS": tmp_path / "runs", "ROWS": rows, "STEPS": 2})
    labels = ["dfosd/dfosd", "dm_sr/dm_sr", "dnf_sr/sft", "f2idiff/f2idiff_sr", "rfsr/rfsr"]
    assert list(shown["runs"]) == labels
    assert shown["compare"].is_file()
    table = capsys.readouterr().out
    assert all(f"| {label} | 1 of 1 |" in table for label in ("bicubic", *labels))
    assert shown["pictures"].width == 8 * (2 * 192 + 6) + 6  # LQ, bicubic, five methods, HQ
    assert shown["curves"].width == 1500
    for run in shown["runs"].values():
        assert len(list(run.glob("version_*"))) == 1


def test_curves_are_those_of_the_newest_version_by_step(tmp_path: Path) -> None:
    for version, offset in ((2, 0.0), (10, 0.5)):
        with SummaryWriter(str(tmp_path / f"version_{version}")) as writer:
            for step in (4, 0, 2):
                writer.add_scalar("train/loss", step + offset, step)
    with SummaryWriter(str(tmp_path / "version_10"), filename_suffix=".resumed") as writer:
        writer.add_scalar("train/loss", 9.0, 6)
        writer.add_scalar("val/photos/psnr_y", 25.0, 6)
    (tmp_path / "version_11").mkdir()
    curves = read_curves(tmp_path)
    assert curves == {"train/loss": Curve([0, 2, 4, 6], [0.5, 2.5, 4.5, 9.0]), "val/photos/psnr_y": Curve([6], [25.0])}
    assert read_curves(tmp_path / "version_2") == {"train/loss": Curve([0, 2, 4], [0.0, 2.0, 4.0])}
    with pytest.raises(FileNotFoundError, match="version_11 has no event files"):
        read_curves(tmp_path / "version_11")


def test_a_panel_holds_a_tag_and_a_line_is_a_run_in_its_colour() -> None:
    one, two = Curve([0, 1], [3.0, 1.0]), Curve([0, 5], [2.0, 4.0])
    figure = draw_curves({"a": {"train/loss": one, "lr": one}, "b": {"train/loss": two, "train/gan": two}}, "train/*")
    panels = {panel.get_title(): panel.get_lines() for panel in figure.axes if panel.axison}
    assert panels.keys() == {"train/gan", "train/loss"}
    first, second = panels["train/loss"]
    assert (list(first.get_xdata()), list(first.get_ydata()), first.get_label()) == ([0, 1], [3.0, 1.0], "a")
    assert second.get_color() == panels["train/gan"][0].get_color() != first.get_color()
    with pytest.raises(ValueError, match=r"fit no tag of a; give e\.g\. train/loss"):
        draw_curves({"a": {"lr": one}}, "train/*", "val/*")


def test_values_that_differ_by_far_and_are_above_zero_are_drawn_by_their_logarithm() -> None:
    scales = []
    for low in (0.1, 1.0, 0.0, -3.0):
        (panel, *_) = draw_curves({"a": {"x": Curve([0], [low])}, "b": {"x": Curve([0], [3.0])}}, "x").axes
        scales.append(panel.get_yscale())
    assert scales == ["log", "linear", "linear", "linear"]
