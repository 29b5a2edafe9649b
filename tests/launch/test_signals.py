"""A signal ends a whole command, what is done is kept and said, and no two processes write into one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from common.files import held
from common.training import TrainingModule
from launch import cli, signals
from launch.callbacks import EndOnSignal, HoldFolder
from launch.cli import main
from launch.run_folder import RunLogger

from ..command_line import ENVIRONMENT, ROOT, shell

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], object]], int]]:
    """Run a function as an `isr` command, under the handlers of a command that a shell runs in the foreground."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}

    def run(function: Callable[[], object]) -> int:
        module = SimpleNamespace(run=lambda name, rest: function())
        monkeypatch.setitem(sys.modules, "launch.commands.a_test", module)  # type: ignore[arg-type]  # as good as one
        monkeypatch.setitem(cli.COMMANDS, "a_test", ("a_test", ""))
        return main(["a_test"])

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_a_command_that_goes_on_after_failures(
    command: Any, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []

    def rows() -> None:
        for row in range(3):
            try:
                done.append(row)
                if row == 1:
                    os.kill(os.getpid(), number)
                    time.sleep(5)
            except (Exception, SystemExit, KeyboardInterrupt):
                done.append("failed")

    before = signal.getsignal(number)
    assert command(rows) == 128 + number
    assert done == [0, 1]
    assert capsys.readouterr().err == f"isr: ended by {number.name}; what was finished before is kept\n"
    assert signal.getsignal(number) is before


def test_a_signal_that_a_library_takes_for_its_own_still_decides_the_exit_code(command: Any) -> None:
    def swallowing() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            sys.exit(0)

    assert command(swallowing) == 143


def test_an_ignored_signal_stays_ignored_as_under_nohup(command: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_ends_a_fit_at_once(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    reached = []

    def fit() -> None:
        signals.hold_back(True)
        for when in (0.0, 0.5, 2.0):
            now[0] = when
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append(when)

    assert command(fit) == 143
    assert reached == [0.0, 0.5]


class Counting(TrainingModule):
    """Learns one number; a signal comes in one of its steps, or in a validation."""

    trainable = {"all": ("weight",)}  # noqa: RUF012  # as in the methods

    def __init__(self, train: int | None = None, val: int | None = None, accumulate: int = 1) -> None:
        super().__init__(accumulate=accumulate, ema_decay=0.5, clip=None)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.signal_in, self.val, self.validations = train, val, 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        with self.optimizer_turn("all") as update:
            if int(self.train_step) == self.signal_in:
                os.kill(os.getpid(), signal.SIGTERM)
            update((self.weight - 1).square().sum())
        self.log("train/weight", self.weight.detach())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validations += 1
        if self.validations == self.val:
            os.kill(os.getpid(), signal.SIGTERM)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.weight], lr=0.1)


def fit(folder: Path, model: Counting, steps: int = 8, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=RunLogger(folder, "x"),
        callbacks=[HoldFolder(), EndOnSignal(), ModelCheckpoint(save_last=True, every_n_train_steps=100)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    samples: Any = [{"lq": torch.zeros(1)}] * 8
    batches, few = DataLoader(samples, batch_size=None), DataLoader(samples[:2], batch_size=None)
    trainer.fit(model, batches, few if model.val else None, **options)
    return trainer


class TestFit:
    @pytest.fixture(autouse=True)
    def _as_it_comes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TrainingModule, "on_after_batch_transfer", lambda self, batch, index: batch)

    @pytest.mark.filterwarnings("ignore")
    def test_finishes_its_step_keeps_it_and_goes_on_from_it_as_if_nothing_had_happened(
        self, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = Counting(train=3)
        assert command(lambda: fit(tmp_path, model)) == 143
        last = tmp_path / "x/version_0/checkpoints/last.ckpt"
        assert f"{last} is of step 3; go on with --ckpt_path {last}" in capsys.readouterr().err
        assert torch.load(last, weights_only=True)["global_step"] == 3
        assert float(model.weight) == pytest.approx(1 - 0.8**3)  # by hand: w <- w - 0.1 * 2 (w - 1)
        resumed = Counting()
        fit(tmp_path, resumed, ckpt_path=last)
        assert float(resumed.weight) == pytest.approx(1 - 0.8**8)
        assert int(resumed.train_step) == 8

    @pytest.mark.filterwarnings("ignore")
    def test_waits_for_the_update_that_several_batches_make(self, command: Any, tmp_path: Path) -> None:
        assert command(lambda: fit(tmp_path, Counting(train=3, accumulate=2))) == 143
        state = torch.load(tmp_path / "x/version_0/checkpoints/last.ckpt", weights_only=True)
        assert (state["global_step"], int(state["state_dict"]["train_step"])) == (2, 4)

    @pytest.mark.filterwarnings("ignore")
    def test_in_validation_ends_at_once_and_writes_no_averages_for_weights(self, command: Any, tmp_path: Path) -> None:
        model = Counting(val=1)
        assert command(lambda: fit(tmp_path, model, steps=16)) == 143
        assert model.validations == 1
        assert not list(tmp_path.rglob("last.ckpt"))
        assert not list(tmp_path.rglob(".lock")), "the folder is free"

    @pytest.mark.filterwarnings("ignore")
    def test_a_second_process_cannot_go_on_in_the_same_folder(self, tmp_path: Path) -> None:
        fit(tmp_path, Counting(), steps=1)
        last = tmp_path / "x/version_0/checkpoints/last.ckpt"
        before = last.read_bytes()
        logger = RunLogger(tmp_path, "x", version=0)
        trainer = Trainer(logger=logger, callbacks=[HoldFolder()], enable_progress_bar=False, accelerator="cpu")
        with (
            held(last.parents[1]),
            pytest.raises(OSError, match=rf"x/version_0 is in use by process {os.getpid()} on ") as caught,
        ):
            trainer.fit(Counting(), DataLoader([]), ckpt_path=last)  # type: ignore[arg-type]  # a list is a data set
        assert "\n" not in str(caught.value)
        assert last.read_bytes() == before


def test_fits_that_start_at_once_take_versions_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger._get_next_version", lambda self: 0)
    assert [RunLogger(tmp_path, "x").version for _ in range(3)] == [0, 1, 2]  # all three have seen an empty folder


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["demo", "--only", "dfosd", "--runs", "."], "demo"),
        (["compare", "--results", "a=results", "--pairs", "results", "-o", "report"], "report"),
        (["foundation", "--output", "weights"], "weights"),
    ],
)
def test_a_second_process_gets_one_line_that_names_folder_and_holder(
    arguments: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from common.images import write_png

    write_png(tmp_path / "results" / "a.png", torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
    monkeypatch.chdir(tmp_path)
    with held(tmp_path / folder):
        assert main(arguments) == 1
        assert [path.name for path in (tmp_path / folder).iterdir()] == [".lock"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("isr:")]
    assert f"{folder} is in use by process {os.getpid()} on {os.uname().nodename}" in line


@pytest.mark.long
def test_two_processes_end_after_the_same_step_and_leave_a_checkpoint(tmp_path: Path) -> None:
    words = shell(
        *("fit", "-c", "papers/dfosd/configs/demo/01_dfosd.yaml", "--runs", str(tmp_path), "--data.batch_size=1"),
        *("--data.crop_size=32", "--model.perceptual=none", "--trainer.max_steps=100000"),
        *("--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false", "--trainer.devices=2"),
        *("--trainer.strategy=ddp_find_unused_parameters_true", "--trainer.accelerator=cpu"),
        "--checkpoint.every_n_train_steps=1",
    )
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not list(tmp_path.rglob("last.ckpt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.terminate()  # the first process alone
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err[-3000:]
    (last,) = tmp_path.rglob("last.ckpt")
    step = torch.load(last, weights_only=True)["global_step"]
    assert f"{last} is of step {step}" in err
