"""Figures: numbers by hand, points where they belong, captions that come back, files that repeat."""

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from PIL import Image

from common.figures import (
    agreement,
    figure_to_tensor,
    moments,
    noise_distribution,
    predicted_against_target,
    read_caption,
    save_figure,
)


def normal(n: int) -> np.ndarray:
    """The quantiles of N(0, 1) at (i + 1/2) / n: as normal as n values can be."""
    return scipy.stats.norm.ppf((np.arange(n) + 0.5) / n)


def draw() -> Figure:
    return predicted_against_target([1.0, 2.0, 3.0], [1.5, 2.0, 2.5], 4, "blur (px)")


class TestAgreement:
    def test_is_what_one_computes_by_hand(self) -> None:
        found = agreement([0, 2, 4, 6], [1, 2, 3, 8])  # errors 1, 0, -1, 2; deviations -3, -1, 1, 3
        assert found.rmse == pytest.approx(1.5**0.5)
        assert found.r2 == pytest.approx(1 - 6 / 20)
        assert (found.mean, found.min, found.max) == (3, 0, 6)
        assert found.std == pytest.approx(5**0.5)

    def test_r2_is_1_for_the_target_0_for_its_mean_and_negative_for_worse(self) -> None:
        target = [1.0, 2.0, 6.0]
        assert agreement(target, target)[:2] == (0, 1)
        assert agreement(target, [3.0] * 3).r2 == pytest.approx(0)
        assert agreement(target, [6.0, 2.0, 1.0]).r2 == pytest.approx(1 - 50 / 14)

    def test_r2_of_a_constant_target_is_none(self) -> None:
        found = agreement([0.1] * 7, [0.1] * 6 + [0.2])  # the mean of seven 0.1 is not 0.1
        assert found.r2 is None
        assert found.rmse == pytest.approx(0.1 / 7**0.5)

    def test_tensors_do(self) -> None:
        assert agreement(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])).rmse == pytest.approx(0.5**0.5)

    def test_what_cannot_be_compared_is_refused(self) -> None:
        with pytest.raises(ValueError, match="predicted has 2 values, target 3"):
            agreement([1, 2, 3], [1, 2])
        with pytest.raises(ValueError, match=r"predicted has shape \(1, 2\)"):
            agreement([1, 2], [[1, 2]])
        with pytest.raises(ValueError, match=r"target has shape \(0,\)"):
            agreement([], [])
        with pytest.raises(ValueError, match="predicted holds 1 of 2 values that are not finite"):
            agreement([1, 2], [1, float("nan")])


class TestMoments:
    def test_are_what_one_computes_by_hand(self) -> None:
        found = moments([0, 0, 0, 4])  # deviations -1, -1, -1, 3: squares 12, cubes 24, fourth powers 84
        assert (found.n, found.mean) == (4, 1)
        assert found.std == pytest.approx(3**0.5)
        assert found.skewness == pytest.approx(6 / 3**1.5)
        assert found.kurtosis == pytest.approx(21 / 9 - 3)

    def test_equal_values_have_no_shape(self) -> None:
        assert moments([2.5] * 4) == (4, 2.5, 0, None, None)


class TestPredictedAgainstTarget:
    def test_shows_the_points_the_identity_and_the_numbers(self) -> None:
        (axes,) = draw().axes
        assert_allclose(axes.collections[0].get_offsets(), [[1, 1.5], [2, 2], [3, 2.5]])
        (identity,) = axes.lines
        assert_allclose(identity.get_xydata(), [[0, 0], [4, 4]])
        assert axes.get_xlim() == axes.get_ylim() == (0, 4)
        assert axes.get_title() == (
            "blur (px), n = 3: RMSE 0.4082, R^2 0.750\ntarget: mean 2, std 0.8165, range 1 to 3"
        )

    def test_a_negative_target_makes_the_axes_symmetric_and_a_negative_prediction_does_not(self) -> None:
        assert predicted_against_target([-1, 1], [0, 0], 2, "x").axes[0].get_xlim() == (-2, 2)
        assert predicted_against_target([0, 1], [-1, 0], 2, "x").axes[0].get_xlim() == (0, 2)

    def test_points_beyond_the_axes_are_drawn_at_the_edge_and_counted(self) -> None:
        (axes,) = predicted_against_target([0, 1, 9], [-5, 1, 1], 2, "x").axes
        assert_allclose(axes.collections[0].get_offsets(), [[0, 0], [1, 1], [2, 1]])
        assert axes.get_title().endswith("; 2 beyond the axes")

    def test_a_constant_target_is_said(self) -> None:
        assert "R^2 undefined (constant target)" in predicted_against_target([1, 1], [1, 2], 2, "x").axes[0].get_title()

    def test_a_limit_must_be_positive(self) -> None:
        with pytest.raises(ValueError, match="limit=0 is out of range"):
            predicted_against_target([1], [1], 0, "x")


class TestNoiseDistribution:
    @pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 2.0)])
    def test_the_quantiles_of_a_normal_noise_lie_on_a_line_of_its_mean_and_std(self, mean: float, std: float) -> None:
        eps = mean + std * normal(1001)
        np.random.default_rng(0).shuffle(eps)
        _, right = noise_distribution(eps).axes
        identity, quantiles = right.lines
        slope, offset = np.polyfit(quantiles.get_xdata(), quantiles.get_ydata(), 1)
        assert (slope, offset) == (pytest.approx(std), pytest.approx(mean, abs=1e-9))
        assert_allclose(identity.get_xdata(), identity.get_ydata())

    def test_the_histogram_is_a_density_beside_the_normal_one(self) -> None:
        left, _ = noise_distribution(normal(20_000)).axes
        bars = [(bar.get_x() + bar.get_width() / 2, bar.get_width(), bar.get_height()) for bar in left.patches]
        assert sum(width * height for _, width, height in bars) == pytest.approx(1)
        centres, _, heights = np.array(bars).T
        assert_allclose(heights, scipy.stats.norm.pdf(centres), atol=0.005)
        assert_allclose(left.lines[0].get_ydata(), scipy.stats.norm.pdf(left.lines[0].get_xdata()))

    def test_the_title_holds_the_moments(self) -> None:
        assert noise_distribution([0, 0, 0, 4]).get_suptitle() == (
            "mean 1.0000, std 1.7321, skewness 1.155, excess kurtosis -0.667, n = 4"
        )
        assert "skewness undefined, excess kurtosis undefined" in noise_distribution([1.0, 1.0]).get_suptitle()

    def test_far_values_stay_in_sight(self) -> None:
        left, right = noise_distribution([-1, 0, 50]).axes
        assert sum(bar.get_height() > 0 for bar in left.patches) == 3
        assert right.get_ylim()[1] > 50

    def test_of_many_values_every_kth_is_taken(self) -> None:
        figure = noise_distribution(np.tile([1.0, 7.0, 7.0], 150_000))  # k = 3 meets the ones alone
        assert figure.get_suptitle().startswith("mean 1.0000, std 0.0000")
        assert figure.get_suptitle().endswith("n = 150000 of 450000")
        assert noise_distribution(np.arange(200_000) / 1e5).get_suptitle().endswith("n = 200000")

    def test_values_that_are_not_finite_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="eps holds 2 of 3 values that are not finite"):
            noise_distribution([0, float("inf"), float("nan")])


class TestFiles:
    def test_a_caption_comes_back(self, tmp_path: Path) -> None:
        caption = "RMSE of the blur,\nin px; 100 % \N{GREEK SMALL LETTER SIGMA}"
        save_figure(tmp_path / "new" / "blur.png", draw(), caption)
        assert read_caption(tmp_path / "new" / "blur.png") == caption
        with Image.open(tmp_path / "new" / "blur.png") as image:
            assert image.size == (600, 600)
            assert set(image.info) == {"Description", "dpi"}
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["blur.png"]

    def test_a_png_of_another_hand_has_no_caption(self, tmp_path: Path) -> None:
        Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
        assert read_caption(tmp_path / "plain.png") == ""
        with pytest.raises(FileNotFoundError):
            read_caption(tmp_path / "none.png")

    def test_equal_figures_give_equal_bytes_and_another_caption_others(self, tmp_path: Path) -> None:
        figure = noise_distribution(normal(100))
        for name, drawn in (("one", figure), ("again", figure), ("two", noise_distribution(normal(100)))):
            save_figure(tmp_path / name, drawn, "noise")
        save_figure(tmp_path / "other", figure, "Noise")
        one, again, two, other = ((tmp_path / name).read_bytes() for name in ("one", "again", "two", "other"))
        assert one == again == two != other

    def test_a_caption_must_say_something(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"caption of .*blur\.png is empty"):
            save_figure(tmp_path / "blur.png", draw(), " ")

    def test_what_fails_leaves_the_old_file_and_no_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "blur.png").write_bytes(b"old")

        def full(path: Path, content: bytes) -> None:
            path.touch()
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="disk full"):
            save_figure(tmp_path / "blur.png", draw(), "blur")
        assert (tmp_path / "blur.png").read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 1

    def test_the_tensor_holds_the_files_pixels(self, tmp_path: Path) -> None:
        save_figure(tmp_path / "blur.png", draw(), "blur")
        with Image.open(tmp_path / "blur.png") as image:
            expected = np.asarray(image.convert("RGB"))
        tensor = figure_to_tensor(draw())
        assert tensor.shape == (3, 600, 600)
        assert (tensor.min() >= 0, tensor.max(), tensor.dtype) == (True, 1, torch.float32)
        assert_allclose(tensor.permute(1, 2, 0) * 255, expected, atol=1e-4)
        assert tensor[:, 0, 0].tolist() == [1, 1, 1]  # the margin is white
        assert tensor.std() > 0.05

    def test_pyplot_stays_out_of_it(self) -> None:
        loaded = "matplotlib.pyplot" in sys.modules
        figure_to_tensor(draw())
        assert ("matplotlib.pyplot" in sys.modules) == loaded
