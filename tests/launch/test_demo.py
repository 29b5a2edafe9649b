import csv
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.figures import predicted_against_target, save_figure
from common.images import write_png
from common.metrics import build_metric
from common.restoration import Score, write_scores
from data.datamodules import Photos
from launch import baselines, demo, lightning_cli
from launch.errors import UsageError

DATA = {"class_path": "data.Photos", "init_args": {"test_seeds": 1, "crop_size": 64}}
PSNR_Y = build_metric("psnr_y").describe()


@pytest.fixture(scope="module")
def names():
    photos = Photos(**DATA["init_args"])
    photos.setup("test")
    images = photos.test_dataloader()[0].dataset
    return [images[i]["name"] for i in range(len(images))]


@pytest.fixture
def papers(tmp_path):
    """Three rows of two papers, in files made in another order."""
    for place in ("b_sr/configs/demo/02_late", "b_sr/configs/demo/01_soon", "a_sr/configs/demo/10_only"):
        path = tmp_path / "papers" / f"{place}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"model": {"class_path": "papers.dfosd.DFOSD"}, "data": DATA}))
    paper_scale = tmp_path / "papers" / "b_sr" / "configs" / "sd21.yaml"
    paper_scale.write_text("{}")
    return tmp_path / "papers"


class Lightning:
    """In place of `launch.lightning_cli.run`: leaves a run's files behind, and remembers the calls.

    Every run scores 40 dB, one more per fit of its row, on all images.
    """

    def __init__(self, names):
        self.names, self.calls, self.failing, self.without_image, self.figures = names, [], {}, set(), {}

    def __call__(self, command, args):
        self.calls.append((command, list(args)))
        config, runs = Path(args[args.index("-c") + 1]), Path(args[args.index("--runs") + 1])
        name = lightning_cli.config_run_name(config)
        if name in self.failing and command == self.failing[name][0]:
            raise self.failing[name][1]
        folder = runs / config.parents[2].name / name
        trained = "--ckpt_path" in args
        if trained:
            run = Path(args[args.index("--ckpt_path") + 1]).parents[1]
        else:  # a fit, or the test of a row that needs none
            run = folder / f"version_{len(list(folder.glob('version_*')))}"
            run.mkdir(parents=True)
            init_args = {"lpips": {"weights": "random", "width": 0.25}, "pretrained": "tiny"}
            if name == "demo-late":
                init_args |= {"condition": "features", "features": "tiny"}
            config = {"model": {"class_path": "x.X", "init_args": init_args}}
            (run / "config.yaml").write_text(yaml.safe_dump(config))
        if command == "fit":
            (run / "checkpoints").mkdir()
            steps = next((int(a.partition("=")[2]) for a in args if a.startswith("--trainer.max_steps=")), 200)
            torch.save({"state_dict": {}, "global_step": steps}, run / "checkpoints" / "last.ckpt")
            return 0
        value = 40.0 + int(run.name.removeprefix("version_"))
        methods = ((name, value), (f"{name} (raw)", value - 1))
        scores = [Score(m, "photos", n, "psnr_y", v, PSNR_Y) for m, v in methods for n in self.names]
        write_scores(run / "test" / "metrics.csv", scores)
        for stem in self.figures.get(name, []):
            figure = predicted_against_target([1.0, 2.0], [1.5, 2.5], 3, stem)
            save_figure(run / "test" / "figures" / f"{stem}.png", figure, f"{stem} of {name}")
        for image in self.names:
            if name not in self.without_image:
                picture = np.full((128, 128, 3), 77, np.uint8)
                write_png(run / "test" / "photos" / f"{image}.png", picture)
        return 0


@pytest.fixture
def lightning(monkeypatch, papers, names):
    fake = Lightning(names[::4])
    monkeypatch.setattr(lightning_cli, "run", fake)
    monkeypatch.setattr(demo, "find_rows", partial(demo.find_rows, papers=papers))
    monkeypatch.setattr(baselines, "choose_sigmas", lambda samples: {"psnr_y": 1.5, "ssim_y": len(samples) / 10})
    return fake


def _summary(runs):
    with (runs / "demo" / "report" / "summary.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_rows_are_found_by_paper_and_then_by_file_name(papers):
    rows = demo.find_rows(papers=papers)
    assert [row.label for row in rows] == ["a_sr/only", "b_sr/soon", "b_sr/late"]
    assert [row.run_name for row in rows] == ["demo-only", "demo-soon", "demo-late"]
    assert [row.run_name for row in rows] == [lightning_cli.config_run_name(row.config) for row in rows]
    assert [row.label for row in demo.find_rows(["late", "a_sr"], papers)] == ["a_sr/only", "b_sr/late"]


def test_a_filter_that_matches_nothing_names_the_rows(papers):
    with pytest.raises(UsageError, match=r"--only nix matches none of the rows; rows: a_sr/only, b_sr/soon, b_sr/late"):
        demo.find_rows(["nix"], papers)


def test_the_demo_configurations_of_the_package_are_found_and_share_their_test_images():
    rows = demo.find_rows()
    assert all(row.config.is_file() for row in rows)
    _, failures = demo._open_data(rows)
    assert failures == {}


def test_the_demo_fits_and_tests_every_row_and_reports(lightning, names, tmp_path, capsys):
    lightning.names = names
    runs = tmp_path / "runs"
    assert demo.run("demo", ["--runs", str(runs)]) == 0
    assert [command for command, _ in lightning.calls] == ["fit", "test"] * 3
    fit, test = lightning.calls[2][1], lightning.calls[3][1]
    config = str(tmp_path / "papers" / "b_sr" / "configs" / "demo" / "01_soon.yaml")
    assert fit == ["-c", config, "--runs", str(runs)]
    last = str(runs / "b_sr" / "demo-soon" / "version_0" / "checkpoints" / "last.ckpt")
    assert test == ["-c", config, "--runs", str(runs), "--ckpt_path", last]

    summary = _summary(runs)
    rows = [label + raw for label in ("a_sr/only", "b_sr/soon", "b_sr/late") for raw in ("", " (raw)")]
    assert next(iter(summary)) == "bicubic"
    assert list(summary)[3:] == rows
    assert list(summary)[1:3] == [
        "bicubic + blur (best PSNR-Y, sigma 1.5)",
        "bicubic + blur (best SSIM-Y, sigma 2.8)",  # a tenth of the validation crops, see `lightning`
    ]
    assert float(summary["b_sr/soon"]["psnr_y"]) == 40.0
    gain = 40.0 - float(summary["bicubic"]["psnr_y"])
    assert float(summary["b_sr/soon"]["psnr_y_gain"]) == pytest.approx(gain, abs=1e-5)
    assert 15 < float(summary["bicubic"]["psnr_y"]) < 35

    text = (runs / "demo" / "report" / "report.md").read_text()
    assert "200 train steps" in text
    assert "model.lpips.weights=random, width 0.25 (a_sr/only, b_sr/soon, b_sr/late)" in text
    assert "Toy condition: texts go through an encoder that has read seventeen captions (a_sr/only, b_sr/soon)." in text
    assert "Toy condition: image features come from a two-layer ViT with random weights (b_sr/late)." in text
    assert "quick look" not in text
    said = capsys.readouterr().out
    for line in ("demo: row 2 of 3: b_sr/soon", f"tensorboard --logdir {runs}", "| b_sr/late | 21 | 40.00 |", "set-up"):
        assert line in said
    assert str(runs / "demo" / "report" / "report.md") in said
    with Image.open(runs / "demo" / "report" / "grid.png") as grid:
        pixels = np.asarray(grid)
    assert grid.width == 7 * (256 + 6) + 6
    assert (pixels[-100, 6 + 3 * 262 : 262 + 3 * 262] == 77).all()  # the first method's column


@pytest.mark.parametrize(
    ("stage", "error"),
    [("fit", KeyError("weights")), ("test", SystemExit(2)), ("fit", RuntimeError("out\nof memory"))],
)
def test_a_failing_row_is_named_and_the_others_run_and_are_reported(lightning, tmp_path, capsys, stage, error):
    lightning.failing["demo-soon"] = stage, error
    runs = tmp_path / "runs"
    assert demo.run("demo", ["--runs", str(runs)]) == 1
    assert [method for method in _summary(runs) if "/" in method and "raw" not in method] == ["a_sr/only", "b_sr/late"]
    said = capsys.readouterr().out
    assert f"row b_sr/soon FAILED in {stage}: {type(error).__name__}: " in said
    assert f"isr {stage} -c " in said
    assert "2 of 3 rows done" in said
    text = (runs / "demo" / "report" / "report.md").read_text()
    assert f"The row b_sr/soon is left out, it failed in {stage}: {type(error).__name__}" in text


def test_an_older_run_does_not_stand_in_for_a_fit_that_left_no_checkpoint(lightning, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    only = ["--runs", str(runs), "--only", "soon"]
    assert demo.run("demo", only) == 0
    monkeypatch.setattr(lightning_cli, "run", lambda command, args: 0)
    assert demo.run("demo", only) == 1
    assert "the fit left no checkpoints/last.ckpt" in capsys.readouterr().out
    assert "b_sr/soon" not in _summary(runs)


def test_running_again_makes_a_new_version_and_reports_that_one(lightning, tmp_path):
    runs = tmp_path / "runs"
    for _ in range(2):
        assert demo.run("demo", ["--runs", str(runs), "--only", "soon"]) == 0
    assert float(_summary(runs)["b_sr/soon"]["psnr_y"]) == 41.0
    text = (runs / "demo" / "report" / "report.md").read_text()
    assert str(runs / "b_sr" / "demo-soon" / "version_1") in text
    assert "version_0" not in text


def test_a_quick_look_says_so(lightning, tmp_path):
    runs = tmp_path / "runs"
    assert demo.run("demo", ["--runs", str(runs), "--only", "soon", "--max-steps", "3"]) == 0
    assert lightning.calls[0][1][-2:] == ["--trainer.max_steps=3", "--checkpoint.every_n_train_steps=3"]
    text = (runs / "demo" / "report" / "report.md").read_text()
    assert "A quick look: every fit ran 3 steps" in text
    assert "3 train steps" in text


def test_a_row_with_other_test_images_fails_before_it_trains(lightning, tmp_path, papers, capsys):
    other = {"class_path": "data.Photos", "init_args": {"test_seeds": 1, "degradation": "bicubic"}}
    (papers / "b_sr" / "configs" / "demo" / "01_soon.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "papers.dfosd.DFOSD"}, "data": other})
    )
    foreign = {"class_path": "data.SRData", "init_args": {"test": "somewhere"}}
    (papers / "b_sr" / "configs" / "demo" / "02_late.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "papers.dfosd.DFOSD"}, "data": foreign})
    )
    assert demo.run("demo", ["--runs", str(tmp_path / "runs")]) == 1
    assert all("10_only" in args[1] for _, args in lightning.calls)
    said = capsys.readouterr().out
    assert "row b_sr/soon FAILED in set-up: ValueError: data: its test images are" in said
    assert "row b_sr/late FAILED in set-up: ValueError: data: SRData as configured" in said


def test_pictures_that_a_row_lacks_are_named(lightning, tmp_path):
    lightning.without_image.add("demo-soon")
    runs = tmp_path / "runs"
    assert demo.run("demo", ["--runs", str(runs), "--only", "soon"]) == 0
    assert "- b_sr/soon has no picture of 5 images (chelsea_" in (runs / "demo" / "report" / "report.md").read_text()


def test_a_training_stage_gives_figures_and_no_row_of_scores(lightning, tmp_path, papers):
    stage = papers / "b_sr" / "configs" / "demo" / "01_soon.yaml"
    stage.write_text(yaml.safe_dump({"model": {"class_path": "papers.dm_sr.TimestepEstimation"}, "data": DATA}))
    lightning.figures = {"demo-soon": ["timesteps"]}

    runs = tmp_path / "runs"
    assert demo.run("demo", ["--runs", str(runs)]) == 0
    assert [command for command, _ in lightning.calls] == ["fit", "test"] * 3
    assert [method for method in _summary(runs) if "/" in method and "raw" not in method] == ["a_sr/only", "b_sr/late"]
    text = (runs / "demo" / "report" / "report.md").read_text()
    assert "### b_sr/soon: timesteps" in text
    assert "b_sr/soon: " in text.partition("## Where the rows come from")[2]
    assert "b_sr/soon" not in text.partition("## Pictures")[2].partition("## Files")[0]


def test_figures_of_the_rows_that_succeeded_are_in_the_report_in_order(lightning, tmp_path, monkeypatch):
    lightning.figures = {"demo-soon": ["noise", "blur"], "demo-only": ["blur"], "demo-late": ["lost"]}

    def late_fails_after_its_figures(command, args):
        code = lightning(command, args)
        return 1 if command == "test" and "02_late" in args[1] else code

    monkeypatch.setattr(lightning_cli, "run", late_fails_after_its_figures)
    runs = tmp_path / "runs"
    assert demo.run("demo", ["--runs", str(runs)]) == 1
    text = (runs / "demo" / "report" / "report.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("### ") and "gain" not in line]
    assert headings == ["### a_sr/only: blur", "### b_sr/soon: blur", "### b_sr/soon: noise"]
    assert "![figures/b_sr/soon/noise](figures/b_sr-soon-noise.png)\n\nnoise of demo-soon\n" in text
    files = sorted(path.name for path in (runs / "demo" / "report" / "figures").iterdir())
    assert files == ["a_sr-only-blur.png", "b_sr-soon-blur.png", "b_sr-soon-noise.png"]


@pytest.mark.parametrize("quick", [[], ["--max-steps", "3"]])
def test_a_row_of_no_steps_is_tested_as_it_is_and_not_fitted(lightning, tmp_path, papers, quick):
    row = papers / "b_sr" / "configs" / "demo" / "01_soon.yaml"
    tree = {"model": {"class_path": "papers.dfosd.DFOSD"}, "data": DATA, "trainer": {"max_steps": 0}}
    row.write_text(yaml.safe_dump(tree))
    runs = tmp_path / "runs"
    for turn in (0, 1):
        lightning.calls.clear()
        assert demo.run("demo", ["--runs", str(runs), "--only", "b_sr", *quick]) == 0
        assert [command for command, _ in lightning.calls] == ["test", "fit", "test"]
        assert lightning.calls[0][1] == ["-c", str(row), "--runs", str(runs)]
        assert float(_summary(runs)["b_sr/soon"]["psnr_y"]) == 40.0 + turn  # of the newest test
        text = (runs / "demo" / "report" / "report.md").read_text()
        assert str(runs / "b_sr" / "demo-soon" / f"version_{turn}") in text


def test_a_failing_test_of_a_row_of_no_steps_says_how_to_repeat_it(lightning, tmp_path, papers, capsys):
    row = papers / "b_sr" / "configs" / "demo" / "01_soon.yaml"
    tree = {"model": {"class_path": "papers.dfosd.DFOSD"}, "data": DATA, "trainer": {"max_steps": 0}}
    row.write_text(yaml.safe_dump(tree))
    lightning.failing["demo-soon"] = "test", KeyError("weights")
    assert demo.run("demo", ["--runs", str(tmp_path / "runs"), "--only", "b_sr"]) == 1
    said = capsys.readouterr().out
    assert "row b_sr/soon FAILED in test: KeyError: " in said
    assert f"isr test -c {row}" in said
    assert "b_sr/soon" not in _summary(tmp_path / "runs")
    assert "b_sr/late" in _summary(tmp_path / "runs")


def test_baselines_are_scored_on_the_images_that_the_rows_were_tested_on(lightning, names, tmp_path):
    lightning.names = names[:4]
    runs = tmp_path / "runs"
    assert demo.run("demo", ["--runs", str(runs), "--only", "soon"]) == 0
    assert {row["n"] for row in _summary(runs).values()} == {"4"}


def test_help_answers_without_heavy_imports():
    code = (
        "import sys; from launch.cli import main; code = main(['demo', '--help']); "
        "print(code, sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--max-steps" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_a_number_of_steps_out_of_range_is_refused(steps, capsys):
    with pytest.raises(SystemExit):
        demo.run("demo", ["--max-steps", steps])
    assert "--max-steps" in capsys.readouterr().err
