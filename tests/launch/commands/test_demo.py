import csv
import signal
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
from data.datamodules import Photos
from launch import baselines, demo
from launch.cli import main
from launch.commands import demo as command
from launch.commands import fit
from launch.comparison import efficiency, measures
from launch.comparison.efficiency import Cost
from launch.errors import UsageError
from launch.runs import config_run_name
from launch.signals import Stopped

MODEL = "papers.dfosd.DFOSD"
DATA = {"class_path": "data.Photos", "init_args": {"test_seeds": 1, "crop_size": 64}}


@pytest.fixture(scope="module")
def photos():
    """Name of a test image -> its reference."""
    data = Photos(**DATA["init_args"])
    data.setup("test")
    images = data.test_dataloader()[0].dataset
    return {images[i]["name"]: images[i]["hq"].permute(1, 2, 0).numpy() for i in range(len(images))}


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
    """In place of `launch.commands.fit.run`: leaves a run's files behind, and remembers the calls.

    Every run's images are the references off by 10 grey levels, one more for each fit of its row.
    """

    def __init__(self, photos):
        self.photos, self.calls, self.failing, self.without_image, self.figures = photos, [], {}, set(), {}

    def __call__(self, command, args):
        self.calls.append((command, list(args)))
        config, runs = Path(args[args.index("-c") + 1]), Path(args[args.index("--runs") + 1])
        name = config_run_name(config)
        if name in self.failing and command == self.failing[name][0]:
            raise self.failing[name][1]
        folder = runs / config.parents[2].name / name
        init_args = {"lpips": {"weights": "random", "width": 0.25}, "pretrained": "tiny"}
        if name == "demo-late":
            init_args |= {"condition": "features", "features": "tiny"}
        if "--ckpt_path" in args and "null" not in args:
            run = Path(args[args.index("--ckpt_path") + 1]).parents[1]
        else:  # a fit, or the test of a row that needs none
            run = folder / f"version_{len(list(folder.glob('version_*')))}"
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": MODEL, "init_args": init_args}}))
        if command == "fit":
            (run / "checkpoints").mkdir()
            steps = next((int(a.partition("=")[2]) for a in args if a.startswith("--trainer.max_steps=")), 200)
            checkpoint = {"state_dict": {}, "global_step": steps}
            checkpoint["hyper_parameters"] = {"_class_path": MODEL, **init_args}
            torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
            return 0
        for stem in self.figures.get(name, []):
            figure = predicted_against_target([1.0, 2.0], [1.5, 2.5], 3, stem)
            save_figure(run / "test" / "figures" / f"{stem}.png", figure, f"{stem} of {name}")
        for image, hq in self.photos.items():
            if name not in self.without_image:
                write_png(run / "test" / "photos" / f"{image}.png", shifted(hq, int(run.name.removeprefix("version_"))))
        return 0


def shifted(hq, version):
    """The result of a run's version: every value is off by as much."""
    return np.where(hq > 127, hq - 10 - version, hq + 10 + version).astype(np.uint8)


def psnr_rgb(version):
    return 20 * np.log10(255 / (10 + version))


@pytest.fixture
def lightning(monkeypatch, papers, photos):
    fake = Lightning(photos)
    monkeypatch.setattr(fit, "run", fake)
    monkeypatch.setattr(demo, "find_rows", partial(demo.find_rows, papers=papers))
    monkeypatch.setattr(demo, "METRICS", ("psnr_rgb", "sharpness"))
    monkeypatch.setattr(baselines, "choose_sigmas", lambda samples: {"psnr_y": 1.5, "ssim_y": len(samples) / 10})
    monkeypatch.setattr(efficiency, "measure", lambda method, item, device: Cost(method.name))
    return fake


def _summary(runs):
    with (runs / "demo" / "report" / "summary.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file) if row["metric"] == "psnr_rgb"}


def test_rows_are_found_by_paper_and_then_by_file_name(papers):
    rows = demo.find_rows(papers=papers)
    assert [row.label for row in rows] == ["a_sr/only", "b_sr/soon", "b_sr/late"]
    assert [row.run_name for row in rows] == ["demo-only", "demo-soon", "demo-late"]
    assert [row.run_name for row in rows] == [config_run_name(row.config) for row in rows]
    assert [row.label for row in demo.find_rows(["late", "a_sr"], papers)] == ["a_sr/only", "b_sr/late"]


def test_a_filter_that_matches_nothing_names_the_rows(papers):
    with pytest.raises(UsageError, match=r"--only nix matches none of the rows; rows: a_sr/only, b_sr/soon, b_sr/late"):
        demo.find_rows(["nix"], papers)


def test_the_demo_configurations_of_the_package_are_found_and_share_their_test_images():
    rows = demo.find_rows()
    assert all(row.config.is_file() for row in rows)
    _, failures = demo.open_data(rows)
    assert failures == {}


def test_the_demo_fits_and_tests_every_row_and_reports(lightning, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert command.run("demo", ["--runs", str(runs)]) == 0
    assert [command for command, _ in lightning.calls] == ["fit", "test"] * 3
    fit, test = lightning.calls[2][1], lightning.calls[3][1]
    config = str(tmp_path / "papers" / "b_sr" / "configs" / "demo" / "01_soon.yaml")
    assert fit == ["-c", config, "--runs", str(runs)]
    last = str(runs / "b_sr" / "demo-soon" / "version_0" / "checkpoints" / "last.ckpt")
    assert test == ["-c", config, "--runs", str(runs), "--ckpt_path", last]

    summary = _summary(runs)
    assert list(summary) == [
        "bicubic",
        "bicubic + blur (best PSNR-Y, sigma 1.5)",
        "bicubic + blur (best SSIM-Y, sigma 2.8)",  # a tenth of the validation crops, see `lightning`
        *("a_sr/only", "b_sr/soon", "b_sr/late"),
    ]
    assert float(summary["b_sr/soon"]["mean"]) == pytest.approx(psnr_rgb(0), abs=1e-4)
    gain = psnr_rgb(0) - float(summary["bicubic"]["mean"])
    assert float(summary["b_sr/soon"]["gain"]) == pytest.approx(gain, abs=1e-4)
    assert 15 < float(summary["bicubic"]["mean"]) < psnr_rgb(0)

    text = (runs / "demo" / "report" / "report.md").read_text()
    assert "200 train steps" in text
    assert "model.lpips.weights=random, width 0.25 (a_sr/only, b_sr/soon, b_sr/late)" in text
    assert "Toy condition: texts go through an encoder that has read seventeen captions (a_sr/only, b_sr/soon)." in text
    assert "Toy condition: image features come from a two-layer ViT with random weights (b_sr/late)." in text
    assert "quick look" not in text
    assert "photos: its 21 images show 2 photos. Of fewer than 6 photos the intervals draw the images" in text
    assert "| b_sr/late over a_sr/only | +0.00 [+0.00, +0.00] |" in text  # both are of DFOSD's class
    assert "| b_sr/late over bicubic + blur (best PSNR-Y, sigma 1.5) |" in text
    assert "psnr_rgb: " in text.partition("## How it was measured")[2]
    said = capsys.readouterr().out
    for line in (
        "demo: row 2 of 3: b_sr/soon",
        f"tensorboard --logdir {runs}",
        "| b_sr/late | 21 of 21 | 28.13 |",
        "set-up",
    ):
        assert line in said
    report = runs / "demo" / "report"
    assert f"demo: report: {report / 'report.html'}" in said
    assert str(report / "report.md") in said
    assert "b_sr/late over a_sr/only" in (report / "report.html").read_text()
    with Image.open(report / "grid.png") as grid:
        assert grid.width == 8 * (256 + 6) + 6


@pytest.mark.parametrize(
    ("stage", "error"),
    [("fit", KeyError("weights")), ("test", SystemExit(2)), ("fit", RuntimeError("out\nof memory"))],
)
def test_a_failing_row_is_named_and_the_others_run_and_are_reported(lightning, tmp_path, capsys, stage, error):
    lightning.failing["demo-soon"] = stage, error
    runs = tmp_path / "runs"
    assert command.run("demo", ["--runs", str(runs)]) == 1
    assert [method for method in _summary(runs) if "/" in method] == ["a_sr/only", "b_sr/late"]
    said = capsys.readouterr().out
    assert f"row b_sr/soon FAILED in {stage}: {type(error).__name__}: " in said
    assert f"isr {stage} -c " in said
    assert "2 of 3 rows done" in said
    text = (runs / "demo" / "report" / "report.md").read_text()
    assert f"The row b_sr/soon is left out, it failed in {stage}: {type(error).__name__}" in text


def test_a_signal_ends_the_demo_and_rows_that_are_done_are_kept_and_named(lightning, tmp_path, capsys):
    lightning.failing["demo-soon"] = "fit", Stopped(signal.SIGTERM)
    runs = tmp_path / "runs"
    with pytest.raises(Stopped):
        command.run("demo", ["--runs", str(runs)])
    assert [command for command, _ in lightning.calls] == ["fit", "test", "fit"]
    assert (runs / "a_sr/demo-only/version_0/checkpoints/last.ckpt").is_file()
    assert not (runs / "demo" / "report").exists()
    said = capsys.readouterr().out
    assert f"ended in row b_sr/soon, without a report; 1 of 3 rows are done and kept under {runs}: a_sr/only" in said


def test_an_older_run_does_not_stand_in_for_a_fit_that_left_no_checkpoint(lightning, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    only = ["--runs", str(runs), "--only", "soon"]
    assert command.run("demo", only) == 0
    monkeypatch.setattr(fit, "run", lambda command, args: 0)
    assert command.run("demo", only) == 1
    assert "the fit left no checkpoints/last.ckpt" in capsys.readouterr().out
    assert "b_sr/soon" not in _summary(runs)


def test_running_again_makes_a_new_version_and_reports_that_one(lightning, tmp_path):
    runs = tmp_path / "runs"
    for _ in range(2):
        assert command.run("demo", ["--runs", str(runs), "--only", "soon"]) == 0
    assert float(_summary(runs)["b_sr/soon"]["mean"]) == pytest.approx(psnr_rgb(1), abs=1e-4)
    text = (runs / "demo" / "report" / "report.md").read_text()
    assert str(runs / "b_sr" / "demo-soon" / "version_1") in text
    assert "version_0" not in text


def test_a_quick_look_says_so(lightning, tmp_path):
    runs = tmp_path / "runs"
    assert command.run("demo", ["--runs", str(runs), "--only", "soon", "--max-steps", "3"]) == 0
    quick = ["--trainer.max_steps=3", "--checkpoint.every_n_train_steps=3", "--trainer.log_every_n_steps=1"]
    assert lightning.calls[0][1][-3:] == quick
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
    assert command.run("demo", ["--runs", str(tmp_path / "runs")]) == 1
    assert all("10_only" in args[1] for _, args in lightning.calls)
    said = capsys.readouterr().out
    assert "row b_sr/soon FAILED in set-up: ValueError: data: its test images are" in said
    assert "row b_sr/late FAILED in set-up: ValueError: data: SRData as configured" in said


def test_images_that_a_row_lacks_are_named(lightning, tmp_path):
    lightning.without_image.add("demo-soon")
    runs = tmp_path / "runs"
    assert command.run("demo", ["--runs", str(runs), "--only", "soon"]) == 0
    text = (runs / "demo" / "report" / "report.md").read_text()
    assert "- b_sr/soon has no result of 21 of 21 images of photos:\n  - chelsea_" in text


def test_a_training_stage_gives_figures_and_no_row_of_scores(lightning, tmp_path, papers):
    stage = papers / "b_sr" / "configs" / "demo" / "01_soon.yaml"
    stage.write_text(yaml.safe_dump({"model": {"class_path": "papers.dm_sr.TimestepEstimation"}, "data": DATA}))
    lightning.figures = {"demo-soon": ["timesteps"]}

    runs = tmp_path / "runs"
    assert command.run("demo", ["--runs", str(runs)]) == 0
    assert [command for command, _ in lightning.calls] == ["fit", "test"] * 3
    assert [method for method in _summary(runs) if "/" in method] == ["a_sr/only", "b_sr/late"]
    text = (runs / "demo" / "report" / "report.md").read_text()
    assert "### b_sr/soon: timesteps" in text
    assert "b_sr/soon: " in text.partition("## Where the methods come from")[2]
    assert "b_sr/soon" not in text.partition("## Pictures")[2].partition("## Files")[0]


def test_figures_of_the_rows_that_succeeded_are_in_the_report_in_order(lightning, tmp_path, monkeypatch):
    lightning.figures = {"demo-soon": ["noise", "blur"], "demo-only": ["blur"], "demo-late": ["lost"]}

    def late_fails_after_its_figures(command, args):
        code = lightning(command, args)
        return 1 if command == "test" and "02_late" in args[1] else code

    monkeypatch.setattr(fit, "run", late_fails_after_its_figures)
    runs = tmp_path / "runs"
    assert command.run("demo", ["--runs", str(runs)]) == 1
    text = (runs / "demo" / "report" / "report.md").read_text()
    section = text.partition("## Figures")[2].partition("## Pictures")[0]
    headings = [line for line in section.splitlines() if line.startswith("### ")]
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
        assert command.run("demo", ["--runs", str(runs), "--only", "b_sr", *quick]) == 0
        assert [command for command, _ in lightning.calls] == ["test", "fit", "test"]
        assert lightning.calls[0][1] == ["-c", str(row), "--runs", str(runs), "--ckpt_path", "null"]
        mean = float(_summary(runs)["b_sr/soon"]["mean"])
        assert mean == pytest.approx(psnr_rgb(turn), abs=1e-4)  # of the newest test
        text = (runs / "demo" / "report" / "report.md").read_text()
        assert str(runs / "b_sr" / "demo-soon" / f"version_{turn}") in text


def test_a_failing_test_of_a_row_of_no_steps_says_how_to_repeat_it(lightning, tmp_path, papers, capsys):
    row = papers / "b_sr" / "configs" / "demo" / "01_soon.yaml"
    tree = {"model": {"class_path": "papers.dfosd.DFOSD"}, "data": DATA, "trainer": {"max_steps": 0}}
    row.write_text(yaml.safe_dump(tree))
    lightning.failing["demo-soon"] = "test", KeyError("weights")
    assert command.run("demo", ["--runs", str(tmp_path / "runs"), "--only", "b_sr"]) == 1
    said = capsys.readouterr().out
    assert "row b_sr/soon FAILED in test: KeyError: " in said
    assert f"isr test -c {row}" in said
    assert "b_sr/soon" not in _summary(tmp_path / "runs")
    assert "b_sr/late" in _summary(tmp_path / "runs")


def test_runs_that_are_there_are_taken_and_others_fitted(lightning, tmp_path, papers):
    base = papers / "b_sr" / "configs" / "demo" / "01_soon.yaml"
    base.write_text(yaml.safe_dump({"model": {"class_path": MODEL}, "data": DATA, "trainer": {"max_steps": 0}}))
    stage = papers / "a_sr" / "configs" / "demo" / "10_only.yaml"
    stage.write_text(yaml.safe_dump({"model": {"class_path": "papers.dm_sr.TimestepEstimation"}, "data": DATA}))
    for expected in (["fit", "fit"], []):
        lightning.calls.clear()
        assert demo.ready(demo.find_rows(), tmp_path, 2) == {"b_sr/late": tmp_path / "b_sr" / "demo-late"}
        assert [command for command, _ in lightning.calls] == expected
    lightning.failing["demo-only"] = "fit", KeyError("weights")
    with pytest.raises(KeyError):
        demo.ready(demo.find_rows(), tmp_path / "new")


@pytest.fixture
def tiny(tmp_path):
    """A paper's two demo rows, the first of no steps, on two small test images."""
    model = {
        "class_path": MODEL,
        "init_args": {
            **{"pretrained": "tiny", "embedding_tokens": 32, "perceptual": "none", "disc_hidden": 8, "ema_decay": 0.5},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3.0e-3}},
            "disc_optimizer": {"class_path": "torch.optim.AdamW"},
            "inference": {"color_fix": "wavelet"},
        },
    }
    small = {"crop_size": 32, "eval_crop_size": 64, "batch_size": 1, "test_seeds": 1, "test_crops": 2, "val_crops": 1}
    folder = tmp_path / "papers" / "dfosd" / "configs" / "demo"
    folder.mkdir(parents=True)
    for name, steps in (("01_base", 0), ("02_tuned", 1)):
        tree = {"model": model, "data": {"class_path": "data.Photos", "init_args": small}}
        tree["trainer"] = {"max_steps": steps, "accelerator": "cpu", "limit_val_batches": 0}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**tree, "checkpoint": {"every_n_train_steps": 1}}))
    return tmp_path / "papers"


@pytest.mark.slow
def test_true_rows_with_and_without_steps_end_in_the_true_report(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_rows", partial(demo.find_rows, papers=tiny))
    monkeypatch.setattr(baselines, "choose_sigmas", lambda samples: {"psnr_y": 1.0, "ssim_y": 2.0})
    runs = tmp_path / "runs"
    assert main(["demo", "--runs", str(runs), "--debug"]) == 0
    text = (runs / "demo" / "report" / "report.md").read_text()
    for method in ("bicubic", "dfosd/base", "dfosd/tuned"):
        assert f"| {method} | 2 of 2 |" in text
    assert "Nothing: every method has every image and metric." in text
    assert "| dfosd/tuned over dfosd/base |" in text
    assert "efficiency of" not in text
    with (runs / "demo" / "report" / "efficiency.csv").open(newline="") as file:
        costs = {row["method"]: row for row in csv.DictReader(file)}
    assert costs["dfosd/tuned"]["denoiser_calls"] == costs["dfosd/base"]["denoiser_calls"] == "1"
    assert 0 < int(costs["dfosd/tuned"]["trainable"]) < int(costs["dfosd/tuned"]["total"])
    for name in ("base", "tuned"):  # our PSNR of the report is the test's own
        with (runs / "dfosd" / f"demo-{name}" / "version_0" / "test" / "metrics.csv").open(newline="") as file:
            scores = [row for row in csv.DictReader(file) if row["metric"] == "psnr_rgb" and "raw" not in row["method"]]
        mean = np.mean([float(row["value"]) for row in scores])
        assert float(_summary(runs)[f"dfosd/{name}"]["mean"]) == pytest.approx(mean, abs=1e-5)


def test_the_reports_metrics_need_neither_weights_nor_an_extra():
    assert all(not measures.KNOWN[name].weights and not name.startswith("pyiqa:") for name in demo.METRICS)


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
        command.run("demo", ["--max-steps", steps])
    assert "--max-steps" in capsys.readouterr().err
