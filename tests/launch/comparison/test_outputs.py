"""Files of the report: TensorBoard, costs and figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.figures import predicted_against_target, save_figure
from launch.comparison import compare
from launch.comparison.outputs import copy_figures
from launch.comparison.pictures import NamedFigure

from ..conftest import QUICK, photo, rows, save


def test_tensorboard_gets_the_newest_figures_under_the_names_that_its_text_says(pairs: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plot = tmp_path / "blur.png"
    save_figure(plot, predicted_against_target([1.0, 2.0], [1.5, 2.5], 3, "blur"), "what one sees")
    for _ in range(2):
        compare(pairs=[pairs], output=tmp_path / "out", figures=[NamedFigure("a/b", plot)], **QUICK)
    assert len(list((tmp_path / "out").glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path / "out")).Reload()
    (shown,) = events.Images("figures/a/b/blur")
    assert (shown.width, shown.height) == (600, 600)
    (text,) = events.Tensors("report/text_summary")
    assert b"See the image `figures/a/b/blur`.\n\nwhat one sees" in text.tensor_proto.string_val[0]
    assert b"See the image `grid`." in text.tensor_proto.string_val[0]
    assert b"](" not in text.tensor_proto.string_val[0]


def test_tensorboard_gets_means_and_images(pairs: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = compare(pairs=[pairs], output=tmp_path / "out", **QUICK).data
    events = EventAccumulator(str(tmp_path / "out")).Reload()
    mean = data.means["shots"]["bicubic"]["psnr_y"]["mean"]
    assert events.Scalars("shots/psnr_y/bicubic")[0].value == pytest.approx(mean, abs=1e-4)
    assert {"grid", "cat/LQ", "cat/bicubic", "cat/HQ"} <= set(events.Tags()["images"])


def test_efficiency_is_in_a_file_of_its_own(pairs: Path, foreign: Path, tmp_path: Path) -> None:
    quick = {**QUICK, "efficiency": True}
    compare(results={"GAN": foreign}, pairs=[pairs], output=tmp_path / "out", **quick)
    bicubic, gan = rows(tmp_path / "out" / "efficiency.csv")
    assert (bicubic["method"], bicubic["total"], bicubic["macs"], bicubic["denoiser_calls"]) == ("bicubic", *"000")
    assert float(bicubic["seconds"]) > 0
    assert set(gan.values()) == {"GAN", ""}


def test_figures_are_copied_and_captioned(pairs: Path, tmp_path: Path) -> None:
    plot = tmp_path / "blur.png"
    save_figure(plot, predicted_against_target([1.0, 2.0], [1.5, 2.5], 3, "blur"), "what one sees")
    output = tmp_path / "out"
    made = compare(pairs=[pairs], output=output, figures=[NamedFigure("a/b", plot)], notes=["a note"], **QUICK)
    shown = {"label": "a/b: blur", "caption": "what one sees", "path": "figures/a-b-blur.png"}
    assert made.data.figures == [shown]
    assert (output / "figures/a-b-blur.png").read_bytes() == plot.read_bytes()
    assert "- a note" in made.markdown.read_text()
    compare(pairs=[pairs], output=output, **QUICK)
    assert not list((output / "figures").iterdir())


def test_two_figures_for_one_file_and_a_figure_that_is_not_there_are_errors(tmp_path: Path) -> None:
    for path in ("a/b-c.png", "a-b/c.png"):
        save(tmp_path / path, photo(0))
    figures = [NamedFigure("a", tmp_path / "a/b-c.png"), NamedFigure("a-b", tmp_path / "a-b/c.png")]
    with pytest.raises(ValueError, match=r"figures: two would be figures/a-b-c\.png"):
        copy_figures(tmp_path / "out", figures)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        copy_figures(tmp_path / "out", [NamedFigure("x", tmp_path / "none.png")])
    assert not (tmp_path / "out").exists()
