import csv

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from common.figures import predicted_against_target, save_figure
from common.restoration import Score, write_scores
from launch.report import (
    NamedFigure,
    Scores,
    bootstrap_interval,
    draw_grid,
    gains_table,
    means_table,
    pairs_table,
    read_scores,
    spread,
    write_report,
)

NAMES = [f"{photo}_r0c{place}_s{seed}" for photo in ("cat", "hat") for place in range(4) for seed in range(3)]
BLUR = "bicubic + blur (best SSIM-Y, sigma 2)"
BASELINES = ["bicubic", BLUR]


def _scores(values, dataset="photos", metric="psnr_y", protocol="psnr | Y"):
    """Scores from {method: {image: value}}."""
    return [
        Score(method, dataset, image, metric, value, protocol)
        for method, images in values.items()
        for image, value in images.items()
    ]


def _example():
    rng = np.random.default_rng(0)
    bicubic = {name: float(rng.normal(24, 2)) for name in NAMES}
    gains = {name: float(rng.normal(0.3, 0.5)) for name in NAMES}
    values = {
        "bicubic": bicubic,
        BLUR: {name: value + 0.1 for name, value in bicubic.items()},
        "toy/net": {name: value + gains[name] for name, value in bicubic.items()},
        "toy/net (raw)": {name: value - 1 for name, value in bicubic.items()},
    }
    ssim = {method: {name: value / 50 for name, value in images.items()} for method, images in values.items()}
    return Scores(_scores(values) + _scores(ssim, metric="ssim_y", protocol="ssim | Y")), np.array(list(gains.values()))


def _image(value, size=8):
    return np.full((size, size, 3), value, np.uint8)


def _pictures(missing=False):
    return {
        name: {
            "LQ": _image(10, 2),
            "bicubic": _image(60),
            "toy/net": None if missing else _image(120),
            "HQ": _image(200),
        }
        for name in NAMES[:2]
    }


def _figure(folder, label, stem, caption="what one sees"):
    """A plot as a run leaves it."""
    path = folder / label / f"{stem}.png"
    save_figure(path, predicted_against_target([1.0, 2.0], [1.5, 2.5], 3, stem), caption)
    return NamedFigure(label, path)


@pytest.mark.parametrize("n", [5, 63])
def test_the_interval_agrees_with_scipys_bootstrap(n):
    differences = np.random.default_rng(n).normal(0.4, 1.0, n)
    interval = bootstrap_interval(differences)
    expected = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    tolerance = 0.03 * (expected.high - expected.low)
    assert interval.low == pytest.approx(expected.low, abs=tolerance)
    assert interval.high == pytest.approx(expected.high, abs=tolerance)


def test_the_interval_of_equal_differences_is_that_difference_and_of_one_image_there_is_none():
    assert bootstrap_interval(np.full(9, 0.25)) == (0.25, 0.25)
    assert bootstrap_interval(np.array([0.25])) is None


def test_gains_are_paired_over_the_images_both_have():
    scores = Scores(
        _scores({"bicubic": {"a": 20.0, "b": 30.0, "c": 40.0}, "net": {"a": 21.0, "b": 32.0}}),
    )
    gain = scores.gain("photos", "net", "bicubic", "psnr_y")
    assert (gain.mean, gain.n) == (1.5, 2)  # an unpaired difference would be -3.5
    assert scores.mean("photos", "net", "psnr_y") == 26.5
    assert scores.mean("photos", "bicubic", "psnr_y") == 30.0
    assert scores.gaps() == ["net was not scored on 1 image (c) of photos."]
    assert scores.gain("photos", "bicubic", "bicubic", "psnr_y") is None


def test_gains_do_not_depend_on_the_order_of_the_images():
    values = {"bicubic": dict.fromkeys(NAMES, 20.0), "net": {name: float(i**2 % 7) for i, name in enumerate(NAMES)}}
    turned = {method: dict(reversed(images.items())) for method, images in values.items()}
    one, two = (Scores(_scores(v)).gain("photos", "net", "bicubic", "psnr_y") for v in (values, turned))
    assert one == two


def test_numbers_of_two_protocols_are_not_put_side_by_side():
    scores = _scores({"bicubic": {"a": 1.0}}) + _scores({"net": {"a": 1.0}}, protocol="psnr | RGB")
    with pytest.raises(ValueError, match=r"psnr_y of net was measured by 'psnr \| RGB', others by 'psnr \| Y'"):
        Scores(scores)


def test_a_number_that_is_there_twice_and_no_numbers_at_all_are_errors():
    with pytest.raises(ValueError, match="psnr_y of net on a is there twice"):
        Scores(_scores({"net": {"a": 1.0}}) * 2)
    with pytest.raises(ValueError, match="scores is empty"):
        Scores([])


def test_tables_hold_the_means_and_gains():
    values = {"bicubic": {"a": 20.0, "b": 30.0}, BLUR: {"a": 20.5, "b": 30.5}, "net": {"a": 21.0, "b": 31.0}}
    scores = Scores(_scores(values) + _scores({"net": {"a": 0.5, "b": 0.625}}, metric="ssim_y"))
    means = means_table(scores, "photos").splitlines()
    assert means == [
        "| method | images | psnr_y | ssim_y |",
        "| --- | ---: | ---: | ---: |",
        "| bicubic | 2 | 25.00 | - |",
        f"| {BLUR} | 2 | 25.50 | - |",
        "| net | 2 | 26.00 | 0.5625 |",
    ]
    gains = gains_table(scores, "photos", "psnr_y", BASELINES).splitlines()[2:]
    assert gains[0] == "| bicubic | - | -0.50 [-0.50, -0.50] |"
    assert gains[2] == "| net | +1.00 [+1.00, +1.00] | +0.50 [+0.50, +0.50] |"


def test_two_methods_of_one_paper_are_compared_image_by_image(tmp_path):
    names = NAMES[:3]
    values = {
        "bicubic": dict.fromkeys(names, 24.0),
        BLUR: dict.fromkeys(names, 24.0),
        "a/one": dict(zip(names, (25.0, 27.0, 29.0), strict=True)),
        "a/one (raw)": dict.fromkeys(names, 1.0),
        "a/two": dict(zip(names, (24.5, 26.5, 28.5), strict=True)),
        "b/three": dict.fromkeys(names, 20.0),
    }
    scores = Scores(_scores(values))
    expected = ["| methods of one paper | psnr_y |", "| --- | ---: |", "| a/one over a/two | +0.50 [+0.50, +0.50] |"]
    assert pairs_table(scores, "photos").splitlines() == expected
    assert "\n".join(expected) in write_report(tmp_path, scores, BASELINES, _pictures()).read_text()
    single = Scores(_scores({name: value for name, value in values.items() if name != "a/two"}))
    assert pairs_table(single, "photos") == ""
    assert "within a paper" not in write_report(tmp_path, single, BASELINES, _pictures()).read_text()


def test_summary_holds_means_counts_and_gains_over_bicubic(tmp_path):
    scores, gains = _example()
    write_report(tmp_path, scores, BASELINES, _pictures())
    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["bicubic", BLUR, "toy/net", "toy/net (raw)"]
    net = rows["toy/net"]
    assert (net["dataset"], net["n"], net["psnr_y_n"]) == ("photos", "24", "24")
    assert float(net["psnr_y_gain"]) == pytest.approx(gains.mean(), abs=1e-5)
    assert float(net["psnr_y_gain_low"]) < gains.mean() < float(net["psnr_y_gain_high"])
    spread_of_mean = 1.96 * gains.std() / np.sqrt(len(gains))
    assert float(net["psnr_y_gain_high"]) - gains.mean() == pytest.approx(spread_of_mean, rel=0.2)
    assert float(net["ssim_y_gain"]) == pytest.approx(gains.mean() / 50, abs=1e-5)
    assert rows["bicubic"]["psnr_y_gain"] == rows["bicubic"]["psnr_y_gain_low"] == ""
    assert float(rows[BLUR]["psnr_y_gain"]) == pytest.approx(0.1, abs=1e-5)


def test_two_reports_of_the_same_numbers_are_equal_byte_by_byte(tmp_path):
    for folder in ("one", "two"):
        scores, _ = _example()
        write_report(tmp_path / folder, scores, BASELINES, _pictures(), ["a note"], ["net: config x"])
    for name in ("metrics.csv", "summary.csv", "report.md", "grid.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_scores_are_written_in_order_and_read_back(tmp_path):
    scores = [*_scores({"bicubic": {"b": 20.5, "a": 30.25}}), Score("net", "photos", "a", "musiq", None, "no weights")]
    write_report(tmp_path, Scores(scores), ["bicubic"], _pictures())
    read = read_scores(tmp_path / "metrics.csv")
    assert read == [scores[1], scores[0], scores[2]]
    write_scores(tmp_path / "again.csv", read)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such file; run isr test"):
        read_scores(tmp_path / "none.csv")


def test_the_report_says_what_a_reader_must_know(tmp_path):
    scores, _ = _example()
    path = write_report(
        tmp_path, scores, BASELINES, _pictures(), ["perceptual networks: random weights"], ["toy/net: config toy.yaml"]
    )
    text = path.read_text()
    assert "24 images" in text
    assert "- psnr_y: psnr | Y" in text
    assert "- perceptual networks: random weights" in text
    assert "- toy/net: config toy.yaml" in text
    assert "| toy/net (raw) | 24 |" in text
    assert "gain in ssim_y" in text
    assert "Nothing: every row has every image and metric." in text


def test_what_is_missing_is_named(tmp_path):
    scores = _scores({"bicubic": dict.fromkeys(NAMES, 20.0), "net": dict.fromkeys(NAMES[1:], 21.0)})
    scores += [Score("net", "photos", NAMES[1], "musiq", None, "not computed: no weights")]
    text = write_report(tmp_path, Scores(scores), ["bicubic"], _pictures(missing=True)).read_text()
    assert f"- net was not scored on 1 image ({NAMES[0]}) of photos." in text
    assert f"- toy/net has no picture of 2 images ({NAMES[0]}, {NAMES[1]})." in text
    assert "- musiq has empty cells: not computed: no weights" in text
    assert "gain in musiq" not in text


def test_a_baseline_without_scores_is_an_error():
    scores = Scores(_scores({"net": {"a": 1.0}}))
    with pytest.raises(ValueError, match="bicubic has no scores on photos"):
        write_report(None, scores, ["bicubic"], _pictures())


def test_the_grid_shows_each_image_twice_its_size_in_its_cell():
    gradient = np.arange(64, dtype=np.uint8).reshape(8, 8)[..., None].repeat(3, 2)
    pictures = {"cat": {"LQ": _image(10, 2), "net": gradient}, "hat": {"LQ": _image(20, 4), "net": None}}
    grid = draw_grid(pictures)
    pixels = np.asarray(grid)
    assert grid.width == 2 * (16 + 6) + 6
    head = grid.height - 2 * (18 + 16 + 6)
    assert head > 0
    top = head + 18
    np.testing.assert_array_equal(pixels[top : top + 16, 28:44], gradient.repeat(2, 0).repeat(2, 1))
    assert (pixels[top : top + 16, 6:22] == 10).all()
    assert (pixels[top + 40 : top + 56, 6:22] == 20).all()
    assert (pixels[top + 40 + 1, 29] == (211, 211, 211)).all()  # no image: light grey
    with pytest.raises(ValueError, match="pictures holds no image"):
        draw_grid({"cat": {"LQ": None}})


def test_a_long_title_is_wrapped_and_makes_the_head_higher():
    short, long = (draw_grid({"cat": {title: _image(0, 64)}}) for title in ("LQ", "bicubic and blur, sigma 2.5 px"))
    assert short.width == long.width
    assert (long.height - short.height) % 18 == 0
    assert long.height > short.height


def test_shown_images_are_spread_over_photos_places_and_seeds():
    chosen = spread(NAMES)
    assert len(set(chosen)) == 6
    assert [name[:3] for name in chosen] == ["cat"] * 3 + ["hat"] * 3
    assert {name[-2:] for name in chosen} == {"s0", "s1", "s2"}
    assert len({name[:8] for name in chosen}) == 6  # no place twice
    assert chosen == spread(list(reversed(NAMES)))
    assert spread(["b", "a"]) == ["a", "b"]
    assert len(spread([str(i) for i in range(100)], 4)) == 4


def test_tensorboard_gets_the_newest_picture_and_text_only(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scores, _ = _example()
    for _ in range(2):
        write_report(tmp_path, scores, BASELINES, _pictures())
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["grid"]
    (shown,) = events.Images("grid")
    with Image.open(tmp_path / "grid.png") as grid:
        assert (shown.width, shown.height) == grid.size
    (text,) = events.Tensors("report/text_summary")
    assert b"| toy/net (raw) | 24 |" in text.tensor_proto.string_val[0]


def test_figures_are_copied_and_shown_with_their_captions_before_the_pictures(tmp_path):
    scores, _ = _example()
    figures = [_figure(tmp_path, "toy/net", "blur", "predicted\n blur"), _figure(tmp_path, "toy/late", "eps", "noise")]
    report = tmp_path / "report"
    text = write_report(report, scores, BASELINES, _pictures(), figures=figures).read_text()
    section = text[text.index("## Figures") : text.index("## Pictures")]
    assert section.split("\n\n")[:-1] == [
        "## Figures",
        "### toy/net: blur",
        "![figures/toy/net/blur](figures/toy-net-blur.png)",
        "predicted blur",
        "### toy/late: eps",
        "![figures/toy/late/eps](figures/toy-late-eps.png)",
        "noise",
    ]
    assert text.rindex("| toy/net (raw) |") < text.index("## Figures")
    assert sorted(path.name for path in (report / "figures").iterdir()) == ["toy-late-eps.png", "toy-net-blur.png"]
    assert (report / "figures" / "toy-net-blur.png").read_bytes() == figures[0].path.read_bytes()


def test_without_figures_there_is_no_section_and_no_file_of_an_earlier_report(tmp_path):
    scores, _ = _example()
    report = tmp_path / "report"
    figures = [_figure(tmp_path, "toy/net", stem) for stem in ("blur", "eps")]
    write_report(report, scores, BASELINES, _pictures(), figures=figures)
    write_report(report, scores, BASELINES, _pictures(), figures=figures[1:])
    assert [path.name for path in (report / "figures").iterdir()] == ["toy-net-eps.png"]
    text = write_report(report, scores, BASELINES, _pictures()).read_text()
    assert "figures" not in text.lower()
    assert not list(report.glob("figures/*"))
    plain = tmp_path / "plain"
    write_report(plain, scores, BASELINES, _pictures())
    assert not (plain / "figures").exists()


def test_a_figure_of_another_hand_is_shown_without_a_caption(tmp_path):
    scores, _ = _example()
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    figures = [NamedFigure("toy/net", tmp_path / "plain.png")]
    text = write_report(tmp_path / "report", scores, BASELINES, _pictures(), figures=figures).read_text()
    assert "![figures/toy/net/plain](figures/toy-net-plain.png)\n\n## Pictures" in text


def test_two_figures_for_one_file_and_a_figure_that_is_not_there_are_errors_before_anything_is_written(tmp_path):
    scores, _ = _example()
    figures = [_figure(tmp_path, "toy/net", "a-b"), _figure(tmp_path, "toy/net-a", "b")]
    report = tmp_path / "report"
    with pytest.raises(ValueError, match=r"figures: two would be figures/toy-net-a-b\.png"):
        write_report(report, scores, BASELINES, _pictures(), figures=figures)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        write_report(report, scores, BASELINES, _pictures(), figures=[NamedFigure("x", tmp_path / "none.png")])
    assert not (report / "report.md").exists()


def test_tensorboard_gets_the_figures_under_the_names_that_its_text_says(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scores, _ = _example()
    figures = [_figure(tmp_path, "toy/net", "blur")]
    write_report(tmp_path / "report", scores, BASELINES, _pictures(), figures=figures)
    events = EventAccumulator(str(tmp_path / "report")).Reload()
    assert sorted(events.Tags()["images"]) == ["figures/toy/net/blur", "grid"]
    (shown,) = events.Images("figures/toy/net/blur")
    assert (shown.width, shown.height) == (600, 600)
    (text,) = events.Tensors("report/text_summary")
    assert b"See the image `figures/toy/net/blur`.\n\nwhat one sees" in text.tensor_proto.string_val[0]
    assert b"See the image `grid`." in text.tensor_proto.string_val[0]
    assert b"](" not in text.tensor_proto.string_val[0]
