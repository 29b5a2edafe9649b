"""Runs: which name, folder and checkpoint a command line means, and that no mode of the trainer leaves the folder."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launch import parameters
from launch.cli import main
from launch.comparison.methods import Run
from launch.errors import UsageError
from launch.export import load
from launch.parser import dump
from launch.runs import Given, differing_versions

from ..command_line import ParseOnly

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "papers/dfosd/configs"
DEMO = CONFIGS / "demo/01_dfosd.yaml"


def stored(folder: Path, **settings: Any) -> Path:
    """last.ckpt of a version as far as the command line reads it: settings, and a best checkpoint beside it."""
    (folder / "checkpoints").mkdir(parents=True)
    best = {"monitor": "val/psnr", "best_model_path": "/moved/from/checkpoints/best.ckpt"}
    hparams = {"_class_path": "papers.dfosd.DFOSD", "pretrained": "tiny", **settings}
    content = {
        "state_dict": {},
        "global_step": 1,
        "hyper_parameters": hparams,
        "callbacks": {"Checkpoint{}": best},
    }
    for name in ("best", "last"):
        torch.save(content, folder / "checkpoints" / f"{name}.ckpt")
    return folder / "checkpoints" / "last.ckpt"


@functools.cache
def command_line() -> ParseOnly:
    """Made once: making the parsers takes longer than parsing."""
    return ParseOnly(["fit", "-c", str(DEMO)])


def parsed(command: str, *arguments: object) -> Any:
    cli = command_line()
    cli.parse_arguments(cli.parser, [command, *map(str, arguments)])
    return cli.config[command]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestName:
    def name(self, *arguments: object) -> str:
        return Given(["fit", *map(str, arguments)]).run_name()

    def test_overlays_of_the_model_join_and_others_do_not(self, tmp_path: Path) -> None:
        photos, inference = tmp_path / "photos.yaml", tmp_path / "tiles.yaml"
        photos.write_text("data: {class_path: data.SRData}\ntrainer: {max_steps: 3}\ncheckpoint: {save_top_k: 2}")
        inference.write_text("model: {init_args: {inference: {tile: 96}}}")
        base = ["-c", CONFIGS / "sd21.yaml"]
        assert self.name("-c", photos, *base, "-c", inference, "--trainer.max_steps=2") == "sd21"
        assert self.name(*base, "-c", CONFIGS / "d3sr.yaml") == "sd21-d3sr"
        assert self.name(*base, "--config", CONFIGS / "ablations/d3sr/disc_none.yaml") == "sd21-disc_none"
        assert self.name("-c", DEMO, "--data.batch_size=1") == "demo-dfosd"
        dotted = tmp_path / "dotted.yaml"
        dotted.write_text("model.init_args.lora_rank: 2")
        assert self.name(*base, "-c", dotted) == "sd21-dotted"

    def test_flags_of_the_model_join_in_both_spellings(self) -> None:
        base = ["-c", CONFIGS / "sd21.yaml"]
        for flags in (["--model.lora_rank=8"], ["--model.init_args.lora_rank", "8"]):
            assert self.name(*base, *flags) == "sd21-lora_rank_8"
        assert self.name(*base, "--model.pretrained=/a/b c", "--model.inference.tile=96") == "sd21-pretrained_a_b_c"
        assert self.name(*base, "--model.optimizer.init_args.lr", "1e-4") == "sd21-optimizer.lr_1e-4"

    def test_a_given_name_wins_and_is_the_name_of_one_folder(self) -> None:
        base = ["-c", CONFIGS / "sd21.yaml", "--model.lora_rank=8"]
        assert self.name(*base, "--name", "a: b") == "a: b"
        for wrong in ("../x", "a/b", "..", "/tmp"):
            with pytest.raises(UsageError, match="one folder"):
                self.name(*base, "--name", wrong)
        with pytest.raises(UsageError, match="set --name"):
            self.name(*base, "--model.pretrained=/" + 40 * "long/")

    def test_a_runs_own_config_names_that_run(self, tmp_path: Path) -> None:
        own = tmp_path / "dfosd" / "mine" / "version_3" / "config.yaml"
        own.parent.mkdir(parents=True)
        own.write_text("name: given\nmodel: {class_path: papers.dfosd.DFOSD}")
        assert self.name("-c", own) == "mine"
        assert self.name("-c", own, "--model.lora_rank=8") == "mine-lora_rank_8", "not the old name"


class TestCheckpointOfTheRun:
    def test_last_and_best_are_those_of_the_run_that_config_and_name_give(self, tmp_path: Path) -> None:
        runs = ["--runs", tmp_path]
        stored(tmp_path / "dfosd/demo-dfosd/version_2", timestep=50)
        last = stored(tmp_path / "dfosd/demo-dfosd/version_10", timestep=60)
        other = stored(tmp_path / "dfosd/other/version_0", timestep=70)
        for command in ("fit", "test"):
            assert parsed(command, "-c", DEMO, *runs, "--ckpt_path", "last").ckpt_path == str(last)
        assert parsed("test", "-c", DEMO, *runs, "--ckpt_path=best").ckpt_path == str(last.with_name("best.ckpt"))
        found = parsed("test", "-c", DEMO, *runs, "--name", "other", "--ckpt_path", "last")
        assert found.ckpt_path == str(other)

    @pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
    def test_where_there_is_none_it_is_refused(self, command: str, tmp_path: Path) -> None:
        stored(tmp_path / "dfosd/other/version_0")
        said = f"ckpt_path=last: {tmp_path}/dfosd/demo-dfosd has no checkpoint; set --name to one that has: other"
        with pytest.raises(UsageError, match=said):
            parsed(command, "-c", DEMO, "--runs", tmp_path, "--ckpt_path", "last")

    def test_best_without_a_monitor_is_refused(self, tmp_path: Path) -> None:
        last = stored(tmp_path / "dfosd/demo-dfosd/version_0")
        torch.save({**torch.load(last), "callbacks": {}}, last)
        with pytest.raises(UsageError, match=r"no checkpoint\.monitor"):
            parsed("test", "-c", DEMO, "--runs", tmp_path, "--ckpt_path=best")

    def test_without_one_given_a_test_takes_the_runs_last_and_a_fit_none(self, tmp_path: Path, capsys: Any) -> None:
        common = ["-c", DEMO, "--runs", tmp_path]
        assert parsed("test", *common).ckpt_path is None
        assert "has no checkpoint: the model is as its settings make it" in capsys.readouterr().out
        last = stored(tmp_path / "dfosd/demo-dfosd/version_0")
        assert parsed("test", *common).ckpt_path == str(last)
        assert f"isr: ckpt_path={last}, the last of this run" in capsys.readouterr().out
        assert parsed("test", *common, "--ckpt_path", "null").ckpt_path is None
        assert parsed("fit", *common).ckpt_path is None

    def test_in_a_config_it_is_as_the_flag(self, tmp_path: Path, capsys: Any) -> None:
        """The settings of the checkpoint are taken; configs and flags beat them, the later ckpt_path the earlier."""
        first = stored(tmp_path / "a/version_0", timestep=50, lora_rank=3)
        second = stored(tmp_path / "b/version_0", timestep=60, lora_rank=3)
        config = tmp_path / "config.yaml"
        config.write_text(f"ckpt_path: {first}\ndata: {{class_path: data.Photos}}")
        given = parsed("test", "-c", config, "--model.lora_rank=5")
        assert (given.model.init_args.timestep, given.model.init_args.lora_rank) == (50, 5)
        assert "model.lora_rank=5 as given, instead of the checkpoint's 3" in capsys.readouterr().out
        assert parsed("test", "-c", config, "--ckpt_path", second).model.init_args.timestep == 60
        assert parsed("test", "--ckpt_path", second, "-c", config).model.init_args.timestep == 50

    def test_a_setting_that_is_gone_names_the_checkpoint(self, tmp_path: Path) -> None:
        last = stored(tmp_path / "dfosd/demo-dfosd/version_0", lora_rnk=3)
        said = f"{last}: the checkpoint holds a setting that this version does not take, model.lora_rnk=3"
        with pytest.raises(UsageError, match=said):
            parsed("test", "--ckpt_path", last, "--data=data.Photos")
        with pytest.raises(UsageError, match=said):
            load(last)
        with pytest.raises(UsageError, match=said):
            Run("x", last, torch.device("cpu")).network()

    def test_settings_that_look_like_numbers_stay_texts(self) -> None:
        settings = {"a": "1e3", "b": 1e-5, "c": "null", "d": ["a: b", "on"], "e": 1000.0}
        from launch.parser import _load

        assert _load(dump(settings)) == settings


class TestOwnConfig:
    @pytest.fixture
    def own(self, tmp_path: Path) -> Path:
        """config.yaml of a fit that started from other weights, as it was saved."""
        config = parsed("fit", "-c", DEMO, "--runs", tmp_path, "--init_from=x.ckpt", "--name=given")
        path = tmp_path / "dfosd" / "given" / "version_0" / "config.yaml"
        path.parent.mkdir(parents=True)
        command_line()._subcommand_parsers["fit"].save(config, path)
        stored(path.parent)
        stored(path.parents[1] / "version_1")
        return path

    def test_works_with_every_command(self, own: Path, capsys: Any) -> None:
        last = str(own.parent / "checkpoints" / "last.ckpt")
        assert parsed("fit", "-c", own).init_from == "x.ckpt"
        for command in ("validate", "test", "predict"):
            found = parsed(command, "-c", own)
            assert found.ckpt_path == last, "the version's own, not the newest"
            assert "init_from" not in found
            assert f"init_from=x.ckpt of a config is left out: isr {command}" in capsys.readouterr().out
        assert main(["parameters", str(own), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == "papers.dfosd.module.DFOSD"

    def test_anothers_option_as_a_flag_is_refused(self) -> None:
        with pytest.raises(UsageError, match=r"init_from=x.ckpt: isr test has no such option"):
            parsed("test", "-c", DEMO, "--init_from", "x.ckpt")

    def test_parameters_knows_the_options_of_all_commands(self) -> None:
        parsers = command_line()._subcommand_parsers.values()
        known = {action.dest.split(".")[0] for parser in parsers for action in parser._actions}
        assert known - {"help", "config", "print_config", "model"} == set(parameters.OTHER_SECTIONS)


class TestNamesThatYamlTakesForSomethingElse:
    @pytest.mark.parametrize("name", ["a: b", "1e3", "null", "on", "[x]", "{a: b}", "~", "#x", "- x", "'q'"])
    def test_reach_the_command_as_they_are(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / name).mkdir()
        config = tmp_path / name / "c.yaml"
        config.write_text(DEMO.read_text())
        given = [
            f"-c=./{name}/c.yaml",
            f"--output={name}",
            f"--name={name}",
            f"--runs={name}",
            f"--data.predict={name}",
        ]
        both = json.dumps([name, f"./{name}"])
        found = parsed("predict", *given, "--data.train", name, f"--data.test={both}")
        assert (found.output, found.name, found.runs) == (name, name, name)
        data = found.data.init_args
        assert Path(data.predict) == Path(data.train) == Path(name)
        assert [Path(path) for path in data.test] == [Path(name), Path(name)]

    def test_null_without_such_a_folder_still_takes_a_setting_away(self, tmp_path: Path) -> None:
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text("data: {init_args: {test: somewhere}}")
        assert (
            parsed("test", "-c", DEMO, "-c", overlay, "--runs", tmp_path, "--data.test", "null").data.init_args.test
            is None
        )


class TestNothingIsWrittenElsewhere:
    SMALL = (
        "--data.batch_size=1", "--data.crop_size=32", "--model.perceptual=none", "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--name=x",
    )  # fmt: skip

    def fit(self, *arguments: str) -> None:
        common = ["fit", "-c", str(DEMO), "--trainer.max_steps=1", *self.SMALL, *arguments]
        assert main([*common, "--debug"]) == 0

    def check(self, folder: Path, *modes: list[str]) -> Path:
        """Fits without a logger and then in these modes; gives the folder of the newest version."""
        for mine in ("config.yaml", "run.json", "checkpoints/last.ckpt", "test/metrics.csv"):
            (folder / mine).parent.mkdir(exist_ok=True)
            (folder / mine).write_text("mine")
        before = files(folder)
        self.fit("--trainer.logger=false")
        version = folder / "runs/dfosd/x/version_0"
        for name in ("config.yaml", "run.json", "checkpoints/last.ckpt"):
            assert (version / name).is_file(), name
        assert not list(version.glob("events*"))
        before |= files(version)
        for mode in modes:
            self.fit(*mode)
        after = files(folder)
        assert {path: after[path] for path in before} == before
        for path in after.keys() - before.keys():
            assert path.is_relative_to(folder / "runs/dfosd/x") or path.is_relative_to(folder / "logs"), path
        return max(folder.glob("runs/dfosd/x/version_*"), key=lambda path: int(path.name.removeprefix("version_")))

    def test_without_a_logger_and_with_a_foreign_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        newest = self.check(
            tmp_path, ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.log_every_n_steps=1"]
        )
        assert newest.name == "version_1"
        assert (newest / "checkpoints" / "last.ckpt").is_file(), "a foreign logger's run is a run too"
        assert list(tmp_path.glob("logs/**/metrics.csv"))

    @pytest.mark.long
    def test_in_modes_that_stop_early_or_write_little(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        last = str(tmp_path / "runs/dfosd/x/version_0/checkpoints/last.ckpt")
        self.check(
            tmp_path, ["--trainer.fast_dev_run=true"], ["--trainer.fast_dev_run=true", "--ckpt_path", last],
            ["--trainer.max_steps=0", "--trainer.logger=false"], ["--trainer.limit_train_batches=0"],
            ["--trainer.enable_checkpointing=false"], ["--trainer.logger=true"],
            ["--trainer.barebones=true", "--trainer.log_every_n_steps=0"],
        )  # fmt: skip

    @pytest.mark.long
    def test_a_resumed_run_keeps_its_earlier_config(self, tmp_path: Path) -> None:
        self.fit("--runs", str(tmp_path), "--trainer.logger=false")
        (version,) = tmp_path.glob("dfosd/x/version_*")
        first = files(version)
        common = ["fit", "-c", str(DEMO), "--runs", str(tmp_path), *self.SMALL[:-1], "--trainer.max_steps=1"]
        assert main([*common, "--ckpt_path", str(version / "checkpoints" / "last.ckpt"), "--debug"]) == 0
        for name in ("config", "run"):
            (kept,) = version.glob(f"{name}.1.*")
            assert kept.read_bytes() == first[version / f"{name}{kept.suffix}"]
        assert yaml.safe_load((version / "config.yaml").read_text())["ckpt_path"] is None
        assert (version / "checkpoints" / "last.ckpt").read_bytes() == first[version / "checkpoints" / "last.ckpt"]

    def test_a_folder_of_another_runs_checkpoints_is_refused(self, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "last.ckpt").write_text("precious")
        command = ["fit", "-c", str(DEMO), "--runs", str(tmp_path / "runs"), *self.SMALL]
        assert main([*command, f"--checkpoint.dirpath={tmp_path}"]) == 2
        assert "holds checkpoints of another run" in capsys.readouterr().err


def test_versions_of_a_name_that_differ_in_model_or_data_are_named(tmp_path: Path) -> None:
    run = tmp_path / "dfosd" / "x"
    for number, (rank, photos, seed) in enumerate([(4, "a", 1), (8, "a", 2), (4, "b", 3), (4, "a", 4)]):
        stored(run / f"version_{number}")
        config = {"model": {"init_args": {"lora_rank": rank}}, "data": {"init_args": {"train": photos}}}
        (run / f"version_{number}" / "config.yaml").write_text(json.dumps({**config, "seed_everything": seed}))
    assert differing_versions(run) == ["version_1 has model.lora_rank=8", "version_2 has data.train=b"]
    notes = Run("x", run, torch.device("cpu")).notes([])
    assert notes[0] == "x: its newest version, version_3, is taken; version_1 has model.lora_rank=8."
    assert Run("x", run / "version_3", torch.device("cpu")).notes([]) == [], "a version is what it is"
