"""`isr fit | test | predict`: where runs go, what beats what, and that every mistake is one line."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelSummary
from PIL import Image

from launch import lightning_cli
from launch.callbacks import EndOnSignal, HoldFolder, InitFrom, RunInfo
from launch.checkpoint import Checkpoint
from launch.cli import main
from launch.errors import plain
from launch.lightning_cli import IsrCLI
from launch.run_folder import SaveConfig
from launch.runs import Given, config_run_name, last_run, paper_of, run_folder_of

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "papers/dfosd/configs/demo/01_dfosd.yaml"
SMALL = [
    "--data.batch_size=1",
    "--data.crop_size=32",
    "--model.perceptual=none",
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
]


class NotRun(IsrCLI):
    """Everything is made and nothing run."""

    def _run_subcommand(self, subcommand: str) -> None:
        return


@pytest.fixture
def isr(monkeypatch: pytest.MonkeyPatch) -> Callable[..., IsrCLI]:
    """`isr` with these arguments, which must succeed; gives what it made."""

    def run(*arguments: object, made: type[IsrCLI] = IsrCLI) -> IsrCLI:
        caught: list[IsrCLI] = []

        class Caught(made):  # type: ignore[misc, valid-type]  # a class of the caller's choice
            def instantiate_trainer(self, **kwargs: Any) -> Any:
                caught.append(self)
                return super().instantiate_trainer(**kwargs)

        monkeypatch.setattr(lightning_cli, "IsrCLI", Caught)
        assert main([str(argument) for argument in (*arguments, "--debug")]) == 0
        return caught[0]

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """last.ckpt of a run of one step, at lambda_gan=0.02 and without average."""
    runs = tmp_path_factory.mktemp("runs")
    arguments = [
        "fit",
        "-c",
        str(DEMO),
        "--runs",
        str(runs),
        "--name=demo-dfosd",
        *SMALL,
        "--model.lambda_gan=0.02",
        "--model.ema_decay=null",
    ]
    assert main([*arguments, "--debug"]) == 0
    return last_run(runs, "dfosd", "demo-dfosd") / "checkpoints" / "last.ckpt"


def lq_folder(folder: Path, n: int = 2) -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        Image.fromarray(np.full((9, 11, 3), 40 * i, np.uint8)).save(folder / f"photo{i}.png")
    return folder


class TestRunFolder:
    def test_is_runs_paper_name_version_and_holds_what_repeats_the_run(self, trained: Path) -> None:
        folder = trained.parents[1]
        assert folder.parts[-3:] == ("dfosd", "demo-dfosd", "version_0")
        assert {"config.yaml", "run.json", "checkpoints"} <= {path.name for path in folder.iterdir()}
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["init_args"]["lambda_gan"] == 0.02
        assert "last.ckpt" in {path.name for path in trained.parent.iterdir()}

    def test_a_second_run_gets_the_next_version_and_a_name_of_its_own_if_wanted(self, isr: Any, tmp_path: Path) -> None:
        (tmp_path / "dfosd/x/version_0").mkdir(parents=True)
        cli = isr("fit", "-c", DEMO, "--runs", tmp_path, "--name", "x", *SMALL, made=NotRun)
        assert Path(cli.trainer.log_dir) == tmp_path / "dfosd" / "x" / "version_1"

    def test_a_resumed_fit_goes_on_in_its_own_folder_and_file(self, isr: Any, tmp_path: Path) -> None:
        common = ["-c", DEMO, "--runs", tmp_path, *SMALL]
        folder = Path(isr("fit", *common).trainer.log_dir)
        last = folder / "checkpoints" / "last.ckpt"
        cli = isr("fit", *common, "--trainer.max_steps=2", "--ckpt_path", last)
        assert Path(cli.trainer.log_dir) == folder
        assert cli.trainer.global_step == 2
        assert torch.load(last, weights_only=True)["global_step"] == 2, "last.ckpt is the last"
        assert not list(folder.glob("checkpoints/last-v*"))
        assert len(list(folder.parent.iterdir())) == 1

    def test_a_setting_that_names_a_run_becomes_its_newest_checkpoint(self, isr: Any, tmp_path: Path) -> None:
        runs = tmp_path / "elsewhere"
        for number in (2, 10):
            folder = runs / "dm_sr" / "one" / f"version_{number}" / "checkpoints"
            folder.mkdir(parents=True)
            (folder / "last.ckpt").touch()
        (runs / "dm_sr" / "one" / "version_11").mkdir()
        common = ["fit", "-c", ROOT / "papers/dm_sr/configs/demo/02_dm_sr.yaml", "--runs", runs, *SMALL[:2]]
        made = isr(*common, "--model.estimator=runs/dm_sr/one", made=NotRun)
        newest = str(runs / "dm_sr" / "one" / "version_10" / "checkpoints" / "last.ckpt")
        assert made.model.estimator_path == made.config.fit.model.init_args.estimator == newest
        for untouched in ("runs/dm_sr/none", "my.ckpt"):
            assert isr(*common, f"--model.estimator={untouched}", made=NotRun).model.estimator_path == untouched

    def test_a_tests_folder_is_the_checkpoints(self, isr: Any, trained: Path) -> None:
        cli = isr("test", "-c", DEMO, "--ckpt_path", trained, made=NotRun)
        assert Path(cli.trainer.log_dir) == trained.parents[1]

    def test_predict_skips_what_is_there_only_where_it_is_told_to_and_where(
        self, isr: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["predict", "-c", DEMO, "--runs", tmp_path / "runs", "--output", tmp_path / "out"]
        assert not isr(*command, made=NotRun).model.output.skip_existing
        assert isr(*command, "--skip_existing=true", made=NotRun).model.output.skip_existing
        assert main(["predict", "-c", str(DEMO), "--skip_existing=true", "--runs", str(tmp_path)]) == 2
        assert re.search(r"skip_existing=true needs .*; set --output", capsys.readouterr().err)

    def test_names_come_from_class_and_file(self, tmp_path: Path) -> None:
        assert paper_of("papers.a.B") == "a"
        assert paper_of("papers.a.module.B") == "a"
        assert config_run_name(Path("papers/a/configs/demo/03_long_name.yaml")) == "demo-long_name"
        assert config_run_name(Path("papers/a/configs/sd21.yaml")) == "sd21"
        (tmp_path / "photos.yaml").write_text("data: {class_path: data.SRData}")
        (tmp_path / "method.yaml").write_text("model: {class_path: papers.dfosd.DFOSD}")
        (tmp_path / "overlay.yaml").write_text("model: {init_args: {seed: 1}}")
        files = [word for name in ("photos", "method", "overlay") for word in ("-c", str(tmp_path / f"{name}.yaml"))]
        assert Given(["fit", *files[:4]]).run_name() == "method", "data may come first"
        assert Given(["fit", *files]).run_name() == "method-overlay"
        assert Given(["fit", *files[:2]]).run_name() == "photos"
        assert Given(["fit"]).run_name() == "default"
        assert run_folder_of("r/a/n/version_3/checkpoints/last.ckpt") == Path("r/a/n/version_3").absolute()
        assert run_folder_of("elsewhere/last.ckpt") is None

    def test_the_last_run_is_the_newest_by_number_that_has_a_checkpoint(self, tmp_path: Path) -> None:
        for version, complete in ((2, True), (10, True), (11, False)):
            folder = tmp_path / "p" / "n" / f"version_{version}" / "checkpoints"
            folder.mkdir(parents=True)
            if complete:
                (folder / "last.ckpt").touch()
        assert last_run(tmp_path, "p", "n").name == "version_10"
        with pytest.raises(FileNotFoundError, match="isr fit"):
            last_run(tmp_path, "p", "none")


class TestCheckpointsHyperparameters:
    def test_a_flag_beats_the_checkpoint_and_a_line_says_so(self, isr: Any, trained: Path, capsys: Any) -> None:
        cli = isr(
            "fit",
            "-c",
            DEMO,
            *SMALL,
            "--ckpt_path",
            trained,
            "--model.lambda_gan=0.5",
            "--model.ema_decay=null",
            made=NotRun,
        )
        assert cli.model.lambda_gan == 0.5
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("isr: model.")]
        assert said == ["isr: model.lambda_gan=0.5 as given, instead of the checkpoint's 0.02"]

    def test_a_config_beats_the_checkpoint_too(self, isr: Any, trained: Path, capsys: Any) -> None:
        cli = isr("test", "-c", DEMO, "--ckpt_path", trained, "--model.ema_decay=null", made=NotRun)
        assert cli.model.lambda_gan == 5e-3
        assert "model.lambda_gan=0.005 as given, instead of the checkpoint's 0.02" in capsys.readouterr().out

    def test_a_checkpoint_alone_suffices(self, isr: Any, trained: Path, capsys: Any) -> None:
        """No configuration: the model is the checkpoint's, and its scores and images go to its folder."""
        cli = isr(
            "test",
            f"--ckpt_path={trained}",
            "--data=data.Photos",
            "--trainer.limit_test_batches=2",
            "--trainer.enable_progress_bar=false",
            "--trainer.accelerator=cpu",
        )
        assert cli.model.lambda_gan == 0.02
        assert cli.model.ema is None
        assert "as given" not in capsys.readouterr().out
        folder = trained.parents[1] / "test"
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {row["method"] for row in rows} == {"demo-dfosd", "demo-dfosd (raw)"}
        assert {row["metric"] for row in rows} == {"psnr_y", "ssim_y", "psnr_rgb"}
        images = {path.stem for path in (folder / "photos").glob("*.png")}
        assert images == {row["image"] for row in rows}
        assert len(images) == 2

    def test_a_new_run_starts_from_its_weights_at_step_0(self, isr: Any, trained: Path, tmp_path: Path) -> None:
        frozen = ["--model.optimizer.init_args.lr=0", "--model.disc_optimizer.init_args.lr=0", "--model.ema_decay=null"]
        named = ["--runs", tmp_path, "--name", "demo-dfosd"]
        cli = isr("fit", "-c", DEMO, *named, *SMALL, "--init_from", trained, *frozen)
        saved = torch.load(trained, weights_only=True)["state_dict"]
        for name, value in cli.model.all_trainable().items():
            assert torch.equal(value.detach(), saved[name]), name
        assert cli.trainer.global_step == 1
        assert int(cli.model.train_step) == 1
        assert Path(cli.trainer.log_dir).parent == tmp_path / "dfosd" / "demo-dfosd"


class TestCallbacks:
    def kinds(self, cli: IsrCLI) -> list[type]:
        return [type(callback) for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]

    def config(self, path: Path, text: str) -> Path:
        path.write_text(text)
        return path

    def test_the_always_on_ones_survive_a_second_config_with_its_own(self, isr: Any, tmp_path: Path) -> None:
        own = self.config(tmp_path / "own.yaml", "trainer: {callbacks: [{class_path: ModelSummary}]}")
        arguments = ["fit", "-c", DEMO, "-c", own, "--runs", tmp_path, "--trainer.enable_model_summary=true"]
        kinds = self.kinds(isr(*arguments, made=NotRun))
        for kind in (HoldFolder, EndOnSignal, RunInfo, LearningRateMonitor, Checkpoint, SaveConfig, ModelSummary):
            assert kinds.count(kind) == 1, kind

    def test_a_plus_appends_to_those_of_the_first_config(self, isr: Any, tmp_path: Path) -> None:
        stop = "{class_path: EarlyStopping, init_args: {monitor: train/loss}}"
        first = self.config(tmp_path / "a.yaml", f"trainer: {{callbacks: [{stop}]}}")
        second = self.config(
            tmp_path / "b.yaml", "trainer: {enable_model_summary: true, callbacks+: [{class_path: ModelSummary}]}"
        )
        kinds = self.kinds(isr("fit", "-c", DEMO, "-c", first, "-c", second, "--runs", tmp_path, made=NotRun))
        assert {EarlyStopping, ModelSummary, RunInfo, LearningRateMonitor, Checkpoint} <= set(kinds)

    def test_a_resumed_run_does_not_start_again_from_what_it_began_with(
        self, isr: Any, trained: Path, tmp_path: Path, capsys: Any
    ) -> None:
        begins = ["fit", "-c", DEMO, "--runs", tmp_path, f"--init_from={trained}"]
        assert InitFrom in self.kinds(isr(*begins, made=NotRun))
        assert InitFrom not in self.kinds(isr(*begins, f"--ckpt_path={trained}", made=NotRun))
        assert f"init_from={trained} is left out: the fit resumes ckpt_path={trained}" in capsys.readouterr().out


class TestPredict:
    def test_streams_to_files_and_keeps_nothing(
        self, isr: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []
        predict = lightning_cli.Trainer.predict

        @functools.wraps(predict)  # the parser reads its arguments
        def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = predict(self, *args, **kwargs)
            asked.append((kwargs["return_predictions"], result))
            return result

        monkeypatch.setattr(lightning_cli.Trainer, "predict", spy)
        lq = lq_folder(tmp_path / "in")
        (lq / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        isr(
            "predict",
            "-c",
            DEMO,
            "--ckpt_path",
            trained,
            "--model.ema_decay=null",
            "--data.predict",
            lq,
            "--output",
            tmp_path / "out",
        )
        assert asked == [(False, None)]
        names = ["photo0.png", "photo1.png", "skipped.csv"]  # which names broken.png
        assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == names
        with Image.open(tmp_path / "out" / "photo1.png") as image:
            assert image.size == (44, 36)

    def test_names_a_corrupt_image_and_goes_on(self, trained: Path, tmp_path: Path, caplog: Any) -> None:
        lq = lq_folder(tmp_path / "in", 1)
        (lq / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        assert (
            main(
                [
                    "predict",
                    "--ckpt_path",
                    str(trained),
                    "--data=data.Photos",
                    f"--data.predict={lq}",
                    f"--output={tmp_path / 'o'}",
                ]
            )
            == 0
        )
        assert any("skipped 1" in record.message and "broken.png" in record.message for record in caplog.records)


class TestWrongInput:
    """Each is one line that begins with `isr: error:`, an exit code, and no traceback without --debug."""

    def check(self, capsys: Any, arguments: list[Any], *says: str, code: int | None = None) -> str:
        capsys.readouterr()
        given = [str(argument) for argument in arguments]
        returned = main(given)
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("isr: ")]
        assert len(lines) == 1, err
        assert lines[0].startswith("isr: error: ")
        assert "Traceback" not in err
        assert returned == code if code is not None else returned != 0
        for text in says:
            assert text in lines[0], lines[0]
        assert len(lines[0]) < 500, lines[0]
        return lines[0]

    def fit(self, tmp_path: Path, *more: str) -> list[Any]:
        return ["fit", "-c", DEMO, "--runs", tmp_path / "runs", *SMALL, *more]

    def test_debug_shows_the_traceback(self, capsys: Any, tmp_path: Path) -> None:
        assert main([str(a) for a in self.fit(tmp_path, "--data.train=/nowhere", "--debug")]) == 1
        assert "Traceback (most recent call last)" in capsys.readouterr().err

    def test_a_missing_folder(self, capsys: Any, tmp_path: Path) -> None:
        gone = tmp_path / "gone"
        for split, command in (("train", "fit"), ("test", "test"), ("predict", "predict")):
            self.check(capsys, [command, *self.fit(tmp_path)[1:5], f"--data.{split}={gone}"], f"{split}={gone}", "give")

    def test_an_empty_folder(self, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        self.check(
            capsys,
            self.fit(tmp_path, f"--data.train={tmp_path / 'empty'}"),
            f"train={tmp_path / 'empty'}",
            "put files there",
        )

    def test_a_text_file_that_is_called_png(self, capsys: Any, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.png").write_text("no picture")
        command = ["predict", "-c", DEMO, "--runs", tmp_path, f"--data.predict={tmp_path / 'in'}"]
        self.check(capsys, command, f"predict={tmp_path / 'in'}", "a.png", code=1)

    def test_sizes_that_do_not_match(self, capsys: Any, tmp_path: Path) -> None:
        for name, size in (("test_LR", 16), ("test_HR", 48)):
            (tmp_path / "set" / name).mkdir(parents=True)
            Image.new("RGB", (size, size)).save(tmp_path / "set" / name / "a.png")
        command = ["test", "-c", DEMO, "--runs", tmp_path, f"--data.test={tmp_path / 'set'}"]
        self.check(capsys, command, "scale=4", "16x16", "48x48", "set scale", code=1)

    @pytest.mark.parametrize(
        ("flag", "says"),
        [
            ("--model.lora_rnk=3", ("model.lora_rnk=3", "nearest: lora_rank")),
            ("--data.bath_size=3", ("data.bath_size=3", "nearest: batch_size")),
            ("--trainer.maxsteps=3", ("--trainer.maxsteps=3", "nearest: --trainer.max_steps")),
            ("--model.inference.tilt=3", ("model.inference.tilt=3", "nearest: tile")),
            ("--model.timestep=abc", ("model.timestep=abc", "expected int")),
            ("--model.perceptual=foo", ("model.perceptual=foo", "expected none, lpips, ea_lpips, dists, ea_dists")),
            ("--model.class_path=papers.nothing.X", ("papers.nothing.X",)),
        ],
    )
    def test_an_argument_that_is_not_understood(
        self, capsys: Any, tmp_path: Path, flag: str, says: tuple[str, ...]
    ) -> None:
        self.check(capsys, self.fit(tmp_path, flag), *says, code=2)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("model: {class_path: papers.dfosd.DFOSD, init_args: {lora_rnk: 3}}", ("model.lora_rnk=3", "lora_rank")),
            (
                "data: {class_path: data.Photos, init_args: {batch_size: many}}",
                ("data.batch_size=many", "expected int"),
            ),
            ("trainer: {maxsteps: 3}", ("trainer.maxsteps", "trainer.max_steps")),
            ("model: [", ("overlay.yaml", "not valid YAML")),
        ],
    )
    def test_a_config_that_is_not_understood(
        self, capsys: Any, tmp_path: Path, text: str, says: tuple[str, ...]
    ) -> None:
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(text)
        self.check(capsys, self.fit(tmp_path, "-c", str(overlay)), *says, code=2)

    def test_a_config_that_is_not_there_and_none(self, capsys: Any, tmp_path: Path) -> None:
        self.check(capsys, ["fit", "-c", tmp_path / "x.yaml"], f"config={tmp_path / 'x.yaml'}", "no such file", code=2)
        self.check(capsys, ["fit"], "data, model", "-c papers/", code=2)
        self.check(capsys, ["fitt"], "'fitt'", "fit, validate", code=2)

    def test_a_value_that_the_class_refuses(self, capsys: Any, tmp_path: Path) -> None:
        line = self.check(capsys, self.fit(tmp_path, "--data.degradation=foo"), "'foo'", "osediff")
        assert "Namespace" not in line
        self.check(capsys, self.fit(tmp_path, "--model.accumulate=0"), "accumulate=0", "set 1")
        self.check(capsys, self.fit(tmp_path, "--model.timestep=1000"), "timestep=1000", "0 .. 999")
        self.check(capsys, self.fit(tmp_path, "--model.inference.tile=100"), "inference.tile=100", "inference.tile=96")

    def test_weights_that_are_nowhere(self, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gone = tmp_path / "sd"
        self.check(capsys, self.fit(tmp_path, f"--model.pretrained={gone}"), f"pretrained='{gone}'", "give", code=1)

    def test_a_checkpoint_that_is_nowhere_or_none(self, capsys: Any, tmp_path: Path) -> None:
        for flag in ("--ckpt_path", "--init_from"):
            self.check(
                capsys, self.fit(tmp_path, f"{flag}={tmp_path / 'x.ckpt'}"), f"{tmp_path / 'x.ckpt'}", "no such file"
            )
        (tmp_path / "text.ckpt").write_text("no weights")
        self.check(
            capsys, self.fit(tmp_path, f"--ckpt_path={tmp_path / 'text.ckpt'}"), "text.ckpt", "cannot be read", code=1
        )

    def test_a_checkpoint_of_another_shape(self, capsys: Any, trained: Path, tmp_path: Path) -> None:
        command = ["test", f"--ckpt_path={trained}", "--data=data.Photos", "--model.lora_rank=3"]
        self.check(capsys, command, "the checkpoint does not fit", "config.yaml", code=1)


def test_a_message_of_nested_classes_becomes_one_key_value_and_type() -> None:
    inner = plain("Parser key \"color_fix\":\n  Expected a typing.Literal['a', 'b']. Got value: c")
    alternatives = "Does not validate against any of the Union subtypes\n  Subtypes: [x, y]\n  Errors:\n"
    given = "Given value type: dict\n  Given value: {}"
    middle = plain(
        f"Parser key \"inference\":\n  {alternatives}    - {inner}\n    - Expected a <class 'NoneType'>\n  {given}"
    )
    assert middle == "inference.color_fix=c: expected a, b; see isr COMMAND --help"
