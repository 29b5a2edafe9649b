"""`isr fit | validate | test | predict`: LightningCLI in subclass mode, with the changes below.

Differences to plain LightningCLI:

* Runs go to `runs/<paper>/<name>/version_N`; a resumed fit goes on in its own folder.
* The run's folder holds what a command writes, whichever logger there is, none included.
* Settings given in a config or as a flag replace the hyper-parameters stored in `--ckpt_path`, and each difference is
  printed; the other settings come from the checkpoint. `--ckpt_path` may be `last` or `best`, of the run that configs,
  flags and `--name` give; `last` is the default of `validate`, `test` and `predict`.
* Any command takes the config that another one wrote, and leaves out options that only the other one has.
* `--seed_everything` is the random seed of model and data, too, unless `model.seed` or `data.seed` is set.
* A model's setting `runs/<paper>/<name>` is a run below `--runs`, of which the newest checkpoint is taken.
* On several devices `strategy: auto` is one that our methods train with.
* The checkpoint, run-information and learning-rate callbacks cannot be dropped by a second config.
* `predict` streams to files and keeps nothing in memory.
* Errors are one line.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from common.checkpoints import newest_checkpoint, read_checkpoint
from common.errors import one_line
from common.files import inside
from common.output import Output
from common.restoration import RestorationModule
from common.training import TrainingModule
from data.decoding import is_image
from launch.callbacks import EndOnSignal, HoldFolder, InitFrom, KeepScores, RunInfo, SayInputs
from launch.checkpoint import Checkpoint
from launch.errors import UsageError
from launch.parser import Parser, check_stored, dump
from launch.run_folder import RunLogger, RunTrainer, SaveConfig
from launch.runs import Given, best_checkpoint, find_stage, leaves, options, paper_of, run_folder_of, stored_model


class IsrCLI(LightningCLI):
    """See the file's head."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=RunTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,  # rules model.seed and data.seed as well, see `before_instantiate_classes`
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"prog": "isr"},
            trainer_defaults={
                "use_distributed_sampler": False,  # the data modules share samples out themselves, without repeats
                "num_sanity_val_steps": 0,
                "callbacks": [
                    HoldFolder(),
                    EndOnSignal(),
                    RunInfo(),
                    SayInputs(),
                    KeepScores(),
                    LearningRateMonitor(logging_interval="step"),
                ],
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what Lightning lacks."""
        parser.add_argument(
            "--runs",
            default="runs",
            help="Folder of all runs. A model's setting runs/PAPER/NAME means that run's newest checkpoint.",
        )
        parser.add_argument(
            "--name",
            type=str,
            default=None,
            help="Name of the run; default: the file names of the configs with a model, and the model's flags.",
        )
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        # a version counter would write last-v1.ckpt beside the old last.ckpt when a run goes on in its folder
        parser.set_defaults(
            {"checkpoint.save_last": True, "checkpoint.save_top_k": 1, "checkpoint.enable_version_counter": False}
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--init_from",
                type=str,
                default=None,
                help="Checkpoint whose trained weights to start from, in a new run (--ckpt_path resumes one).",
            )
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
            parser.add_argument(
                "--output",
                type=str,
                default=None,
                help="Folder of the upscaled images, or, for one image, a file that ends in .png, .tif or .tiff.",
            )
            parser.add_argument(
                "--skip_existing",
                type=bool,
                default=False,
                help="Leave images of OUTPUT as they are, e.g. to go on after a kill; whatever made them.",
            )
        return parser

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Let every command take the others' options in a config, hidden; `_drop_others` leaves them out again."""
        super()._add_subcommands(parser, **kwargs)
        own = {
            command: {action.dest.partition(".")[0] for action in of_command._actions}
            for command, of_command in self._subcommand_parsers.items()
        }
        defaults = {o: self._subcommand_parsers[c].get_defaults().get(o) for c in own for o in own[c]}
        self._others = {c: {o: value for o, value in defaults.items() if o not in own[c]} for c in own}
        for command, of_command in self._subcommand_parsers.items():
            for option in self._others[command]:
                of_command.add_argument(f"--{option}", type=Any, default=None, help=argparse.SUPPRESS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; with a checkpoint, on top of the checkpoint's hyper-parameters."""
        args = _null_as_path(list(args))
        self.given = Given(args)
        try:
            self._parse(parser, args)
        except UsageError as error:
            raise UsageError(_with_source(str(error), args)) from error

    def _parse(self, parser: LightningArgumentParser, args: list[str]) -> None:
        for option, value in options(args):
            if option.removeprefix("--") in self._others[args[0]]:
                raise UsageError(f"{option.removeprefix('--')}={value}: isr {args[0]} has no such option; leave it out")
        checkpoint = self._checkpoint(parser, args)
        stored = stored_model(checkpoint) if checkpoint else None
        if checkpoint:
            args = [*args, f"--ckpt_path={checkpoint}"]
        if stored is None:
            self.config = parser.parse_args(args)
        else:
            check_stored(stored, f"ckpt_path={checkpoint}")
            with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
                file.write(dump({"model": stored}))
                file.flush()
                self.config = parser.parse_args([args[0], "-c", file.name, *args[1:]])
            chosen = self.config[self.config.subcommand]
            chosen["config"] = [path for path in chosen.get("config") or [] if str(path) != file.name]
        self._drop_others()
        self._find_runs(stored)
        if stored is not None:
            self._print_differences(stored)

    def _drop_others(self) -> None:
        """Drop settings of a config that belong to another command, and print each."""
        command = self.config.subcommand
        config = self.config[command]
        for option, default in self._others[command].items():
            value = config.pop(option, None)
            if value not in (None, default):
                print(f"isr: {option}={value} of a config is left out: isr {command} has no such option")

    def _checkpoint(self, parser: LightningArgumentParser, args: list[str]) -> str | None:
        """The checkpoint that the command takes: the one given, or one of the run that the arguments give.

        Raises:
            UsageError: That run has no such checkpoint.
        """
        asked, command = self.given.ckpt_path, args[0]
        if asked == "null" or (asked is None and command == "fit"):
            return None
        if asked not in (None, "last", "best"):
            return asked
        run = self.given.own_version()
        if run is None:
            config = parser.parse_args(args)[command]
            run = Path(config.runs, paper_of(config.model.class_path), self.given.run_name())
        last = newest_checkpoint(run)
        if last is None:
            last = next(run.glob("checkpoints/last.ckpt"), None)
        if last is None and asked is None:
            print(f"isr: {run} has no checkpoint: the model is as its settings make it, with nothing trained")
            return None
        if last is None:
            others = ", ".join(sorted(path.name for path in run.parent.glob("*") if newest_checkpoint(path))) or "none"
            raise UsageError(f"ckpt_path={asked}: {run} has no checkpoint; set --name to one that has: {others}")
        found = best_checkpoint(last.parents[1]) if asked == "best" else last
        if found is None:
            raise UsageError(f"ckpt_path=best: no checkpoint.monitor chose one in {last.parent}; set --ckpt_path last")
        print(f"isr: ckpt_path={found}{'' if asked else ', the last of this run (--ckpt_path null: no checkpoint)'}")
        return str(found.absolute())

    def _find_runs(self, stored: dict[str, Any] | None = None) -> None:
        """Put a checkpoint in the place of a run that the model's settings name (a stage before this one)."""
        config = self.config[self.config.subcommand]
        own = run_folder_of(config.get("ckpt_path"))
        roots = [*([own.parents[2]] if own is not None else []), Path(config.runs)]
        settings, kept = _init_args(config, "model"), (stored or {}).get("init_args", {})
        for key, value in list(settings.items()):
            if isinstance(value, str):
                settings[key] = find_stage(value, kept.get(key), roots)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: `parse_arguments` has put the checkpoint's hyper-parameters below the given ones."""

    def _print_differences(self, stored: dict[str, Any]) -> None:
        given = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))[self.config.subcommand]["model"]
        before, now = dict(leaves(stored)), dict(leaves(given))
        for key in sorted(before.keys() | now.keys()):
            follows = key == "seed" and now.get(key) is None  # --seed_everything
            if key in now and before.get(key, now[key]) != now[key] and not follows:
                print(f"isr: model.{key}={now[key]} as given, instead of the checkpoint's {before[key]}")

    def before_instantiate_classes(self) -> None:
        """Give model and data the one random seed, where they have none of their own; a resumed run's data its own."""
        config = self.config[self.subcommand]
        kept = read_checkpoint(config.ckpt_path).get("seeds", {}) if self._resumes else {}
        seeds = {"model": config.seed_everything, "data": kept.get("data", config.seed_everything)}
        self._seeded = [part for part in seeds if _init_args(config, part).get("seed", 0) is None]
        for part in self._seeded:
            _init_args(config, part)["seed"] = int(seeds[part] or 0)

    @property
    def _resumes(self) -> bool:
        """True for a fit that goes on from a checkpoint's file."""
        path = self.config[self.subcommand].get("ckpt_path")
        return self.subcommand == "fit" and path is not None and Path(path).is_file()

    @property
    def _output(self) -> Output:
        """The output of the model; a foreign module's is not ours to set."""
        return self.model.output if isinstance(self.model, TrainingModule) else Output()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Give the run its folder, and add what depends on the command."""
        config = self.config[self.subcommand]
        self.model.awaits_checkpoint = config.get("ckpt_path") is not None
        for part in self._seeded:  # in config.yaml they go on following seed_everything; run.json has the numbers
            _init_args(config, part)["seed"] = None
        run_logger = self._run_logger(config)
        if config.trainer.logger in (None, True) and not config.trainer.barebones:
            kwargs["logger"] = run_logger
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, RunTrainer)
        trainer.run_logger = run_logger
        self._output.run_name = str(run_logger.name).rpartition("/")[2]
        if config.trainer.strategy == "auto":
            self._choose_strategy(trainer)
        self._adapt_callbacks(trainer, config)
        if config.get("output"):
            self._set_output(config.output)
        if config.get("skip_existing"):
            if not config.get("output"):
                raise UsageError("skip_existing=true needs the folder of the images that are there; set --output")
            self._output.skip_existing = True
        return trainer

    def _choose_strategy(self, trainer: Trainer) -> None:
        """On several devices let a fit of our methods leave parameters without a gradient, which plain `ddp` refuses.

        Two optimisers use different parameters in their turns, and dropped conditions use none.
        """
        strategy = trainer.strategy
        if (
            self.subcommand != "fit"
            or not isinstance(strategy, DDPStrategy)
            or not isinstance(self.model, TrainingModule)
        ):
            return
        strategy._ddp_kwargs["find_unused_parameters"] = True
        if trainer.is_global_zero:
            print(
                "isr: trainer.strategy=ddp_find_unused_parameters_true, since not every step uses every parameter; set "
                "--trainer.strategy=ddp where all are used, which is faster",
                file=sys.stderr,
            )

    def _set_output(self, output: str) -> None:
        """Take a folder, or the file of a single image.

        Raises:
            UsageError: It is a file of a kind that is not written, or the model writes no single image.
        """
        path = Path(output).expanduser()
        if path.is_dir() or output.endswith(("/", os.sep)) or not is_image(path):
            self._output.folder = path
            return
        if path.suffix.lower() not in (".png", ".tif", ".tiff"):
            raise UsageError(f"output={output} is of a kind that is not written; end it in .png, .tif or .tiff")
        if not isinstance(self.model, RestorationModule):
            raise UsageError(
                f"output={output} is a file, and {type(self.model).__name__} writes a folder; give a folder"
            )
        self._output.file = path

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        if config.get("barebones") or config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def _adapt_callbacks(self, trainer: RunTrainer, config: Any) -> None:
        """No learning rates without a logger; checkpoints in the run's folder; weights to start from."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's mixin
        if not trainer.loggers:
            callbacks[:] = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        if self.subcommand == "fit":
            for callback in callbacks:
                if isinstance(callback, ModelCheckpoint):
                    self._place_checkpoints(trainer, callback, config.ckpt_path)
        if config.get("init_from") and config.ckpt_path is None:
            callbacks.append(InitFrom(config.init_from))
        elif config.get("init_from"):
            print(f"isr: init_from={config.init_from} is left out: the fit resumes ckpt_path={config.ckpt_path}")

    def _place_checkpoints(self, trainer: RunTrainer, callback: ModelCheckpoint, resumed: str | Path | None) -> None:
        if callback.dirpath is None and trainer.run_logger not in trainer.loggers:
            assert trainer.run_logger is not None
            callback.dirpath = str(Path(trainer.run_logger.log_dir, "checkpoints"))
        elif callback.dirpath is not None and any(Path(callback.dirpath).glob("*.ckpt")):
            folder = Path(callback.dirpath).absolute()
            if resumed is None or Path(resumed).absolute().parent != folder:
                raise UsageError(f"checkpoint.dirpath={folder} holds checkpoints of another run; give an empty folder")

    def _run_logger(self, config: Any) -> TensorBoardLogger:
        """TensorBoard in the run's folder: a new version, or the checkpoint's own."""
        run = run_folder_of(config.get("ckpt_path"))
        if run is None or self.given.name or config.trainer.fast_dev_run:
            name = f"{paper_of(config.model.class_path)}/{self.given.run_name()}"
            runs = Path(config.runs).absolute()
            inside(runs, name)
            return RunLogger(runs, name, default_hp_metric=False)
        resumed: dict[str, Any] = {}
        if self.subcommand == "fit":  # curves go on where the checkpoint stands, not where the process died
            checkpoint = read_checkpoint(config.ckpt_path)  # which logs its next step under the number of those done
            resumed["purge_step"] = int(checkpoint["state_dict"].get("train_step", checkpoint["global_step"]))
        name = f"{run.parent.parent.name}/{run.parent.name}"
        return TensorBoardLogger(run.parents[2], name, run.name, default_hp_metric=False, **resumed)


def _null_as_path(args: list[str]) -> list[str]:
    """`--data.train null` means a folder of that name where there is one; else no folder."""
    for place, arg in enumerate(args):
        option, equals, value = arg.partition("=")
        if option.startswith("--data.") and os.path.lexists("null"):
            if value == "null":
                args[place] = f"{option}=./null"
            elif not equals and args[place + 1 : place + 2] == ["null"]:
                args[place + 1] = "./null"
    return args


def _with_source(message: str, args: list[str]) -> str:
    """Add the parts that jsonargparse leaves out: the file that is not valid YAML, the value of an unknown flag."""
    unknown = re.match(r"([\w.]+): no such option", message)
    for flag, value in zip(args, [*args[1:], ""], strict=True):
        path = Path(value if flag in ("-c", "--config") else flag.removeprefix("--config="))
        if message.startswith("Problems parsing config") and path.is_file():
            try:
                yaml.safe_load(path.read_text())
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                return f"config={path} is not valid YAML ({one_line(error)}). Fix that line"
        if unknown and flag.partition("=")[0] == f"--{unknown[1]}":
            return message.replace(":", f"={flag.partition('=')[2] or value}:", 1)
    return message


def _init_args(config: Any, part: str) -> Any:
    """Settings of a command's `model` or `data`; empty where there are none."""
    return (config.get(part) or {}).get("init_args") or {}
