"""Two processes on the CPU are one process with twice the batch, in training and in test, for every paper."""

from __future__ import annotations

import csv
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.photos import CAPTIONS, PHOTOS, photo_paths
from launch.cli import main

from ..command_line import ENVIRONMENT, ROOT, run, shell, shell_of_all

TWO = ["--trainer.devices=2", "--trainer.accelerator=cpu"]  # trainer.strategy is chosen for the method
QUIET = ["--trainer.enable_progress_bar=false"]


@dataclass(frozen=True)
class Case:
    """A demo's row, and how it is fitted here."""

    demo: str
    optimizers: tuple[str, ...] = ("optimizer",)
    options: tuple[str, ...] = ()
    before: tuple[str, str] | None = None
    """The case whose checkpoint this one needs, and the argument that names it."""
    rel: float = 2e-3
    """By which curves may differ."""
    weights: tuple[float, float] = (1e-3, 1e-6)
    """By which weights may, relatively and absolutely."""

    def fit(self, runs: Path, batch_size: int, steps: int = 3) -> list[str]:
        paper, row = self.demo.split("/")
        (config,) = (ROOT / "papers" / paper / "configs/demo").glob(f"??_{row}.yaml")
        stage = (
            [f"--model.{self.before[1]}={checkpoint(runs.parent / 'before', self.before[0])}"] if self.before else []
        )
        return [
            *("fit", "-c", str(config), "--runs", str(runs), f"--name=demo-{row}", *QUIET, *stage),
            f"--data.batch_size={batch_size}",
            "--data.crop_size=40",  # what DNF-SR's discriminator needs
            f"--data.batches_per_epoch={steps}",
            "--data.val_crops=3",
            f"--trainer.max_steps={steps}",
            f"--trainer.val_check_interval={steps}",
            "--trainer.log_every_n_steps=1",
            f"--checkpoint.every_n_train_steps={steps}",
            # Plain descent is linear in the gradient; Adam would blow rounding up where a gradient is next to nothing.
            *(f"--model.{name}=torch.optim.SGD" for name in self.optimizers),
            *(f"--model.{name}.init_args.lr=0.1" for name in self.optimizers),
            *(option.replace("{runs}", str(runs)) for option in self.options),
        ]


DNF = (2e-3, 1e-5)
NFT = ("--model.group_size=2", "--trainer.limit_val_batches=0")
CASES = {
    "dfosd": Case("dfosd/dfosd", ("optimizer", "disc_optimizer")),
    "estimator": Case("dm_sr/estimator"),
    "dm_sr": Case("dm_sr/dm_sr", ("optimizer", "disc_optimizer"), before=("estimator", "estimator")),
    "sft": Case(
        "dnf_sr/sft", ("optimizer", "disc_optimizer"), ("--trainer.limit_val_batches=0",), rel=5e-3, weights=DNF
    ),
    "nf2t": Case("dnf_sr/nf2t", options=NFT, before=("sft", "sft"), rel=5e-3, weights=DNF),
    "nf2t, K updates": Case(
        "dnf_sr/nf2t",
        options=(*NFT, "--model.updates_per_rollout=K", "--model.eta_schedule=type1", "--name=k"),
        before=("sft", "sft"),
        rel=5e-3,
        weights=DNF,
    ),
    "f2idiff_sr": Case("f2idiff/f2idiff_sr", ("optimizer", "reg_optimizer"), ("--trainer.limit_val_batches=0",)),
    "f2idiff_sr, held in bfloat16": Case(
        "f2idiff/f2idiff_sr",
        ("optimizer", "reg_optimizer"),
        ("--trainer.limit_val_batches=0", "--model.frozen_dtype=bfloat16", "--name=held"),
    ),
    "rfsr": Case("rfsr/rfsr", options=("--trainer.limit_val_batches=0",)),
}
PART = "{{source: {runs}/../photos, first: {first}, weight: {weight}}}"
LONG_CASES = {
    "nft_kl": Case(
        "dnf_sr/nf2t",
        options=(*NFT, "--model.variant=nft", "--model.nft_kl=1", "--model.updates_per_rollout=K", "--name=kl"),
        before=("sft", "sft"),
        rel=5e-3,
        weights=DNF,
    ),
    "text_cache": Case(
        "dnf_sr/sft",
        ("optimizer", "disc_optimizer"),
        (
            "--trainer.limit_val_batches=0",
            "--model.keep_text_encoders=false",
            "--model.text_cache={runs}/texts",
            "--name=texts",
        ),
        rel=5e-3,
        weights=DNF,
    ),
    **{
        flips: Case(
            "dm_sr/estimator",
            options=(
                f"--data.flips={flips}",
                f"--data.train=[{PART.format(runs='{runs}', first=2, weight=3)}, "
                f"{PART.format(runs='{runs}', first=1, weight=1)}]",
                f"--name={flips}",
            ),
        )
        for flips in ("none", "horizontal")
    },
}


def version(runs: Path, case: str) -> Path:
    """Folder of a case's run."""
    here = (CASES | LONG_CASES)[case]
    paper, row = here.demo.split("/")
    named = [option.partition("=")[2] for option in here.options if option.startswith("--name=")]
    return runs / paper / (named[0] if named else f"demo-{row}") / "version_0"


def checkpoint(runs: Path, case: str) -> Path:
    return version(runs, case) / "checkpoints" / "last.ckpt"


def in_two(commands: list[list[str]]) -> None:
    """Run commands one after the other, each in both of two processes, as a cluster would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = shell_of_all([[*one, *TWO] for one in commands])
    environment = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            words, cwd=ROOT, env={**environment, "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-3000:] for text in said)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs of `one` process and of `two`; those start once, since that takes longer than the fits."""
    return in_one_and_in_two(tmp_path_factory.mktemp("runs"), CASES)


@pytest.fixture(scope="module")
def long_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the long cases, with a folder of photos."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "photos").mkdir()
    for path in list(photo_paths("train").values())[:3]:
        shutil.copy(path, folder / "photos")
    return in_one_and_in_two(folder, LONG_CASES)


def in_one_and_in_two(folder: Path, cases: dict[str, Case]) -> Path:
    """Fit what the cases build on, then each of them in one process and in two."""
    for stage in sorted({case.before[0] for case in cases.values() if case.before}):
        assert main(CASES[stage].fit(folder / "before", 4, steps=1)) == 0
    for case in cases.values():
        assert main(case.fit(folder / "one", 4)) == 0
    in_two([case.fit(folder / "two", 2) for case in cases.values()])
    return folder


def curves(folder: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_twice_the_batch(case: str, runs: Path) -> None:
    compare(case, CASES[case], runs)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG_CASES)
def test_two_processes_are_one_with_an_option_too(case: str, long_runs: Path) -> None:
    compare(case, LONG_CASES[case], long_runs)


@pytest.mark.long
@pytest.mark.parametrize("case", ["nft_kl", "text_cache", "none", "horizontal"])
def test_a_resumed_run_is_the_one_that_went_on(case: str, long_runs: Path) -> None:
    fit = [*LONG_CASES[case].fit(long_runs / "half", 4), "--checkpoint.every_n_train_steps=1"]
    assert main([*fit, "--trainer.max_steps=1"]) == 0
    half = checkpoint(long_runs / "half", case)
    assert int(torch.load(half, weights_only=True)["state_dict"]["train_step"]) == 1
    assert main([*fit, "--ckpt_path", str(half)]) == 0
    newest = max(version(long_runs / "half", case).parent.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    states = [torch.load(path, weights_only=True) for path in (checkpoint(long_runs / "one", case), newest)]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(states[1]["state_dict"][name], value), name


@pytest.mark.long
def test_processes_share_the_texts_that_they_encode(long_runs: Path) -> None:
    one, two = ({file.name: load_file(file) for file in (long_runs / n / "texts").iterdir()} for n in ("one", "two"))
    assert two.keys() == one.keys()
    assert len(one) == len(set(CAPTIONS[photo.name] for split in ("train", "val") for photo in PHOTOS[split]))
    for name, parts in one.items():
        for part, value in parts.items():
            torch.testing.assert_close(two[name][part], value)


def compare(case: str, of: Case, runs: Path) -> None:
    """Curves and weights of one process and of two."""
    one, two = (version(runs / name, case) for name in ("one", "two"))
    assert (two / "run.json").is_file()
    expected, got = curves(one), curves(two)
    assert set(got) == set(expected)
    for tag, values in expected.items():
        assert got[tag] == pytest.approx(values, rel=of.rel, abs=1e-5), tag
    states = [torch.load(checkpoint(runs / name, case), weights_only=True)["state_dict"] for name in ("one", "two")]
    assert [int(state["train_step"]) for state in states] == [3, 3]
    assert states[0].keys() == states[1].keys()
    rtol, atol = of.weights
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=rtol, atol=atol)


def rows(folder: Path) -> dict[tuple[str, ...], float]:
    with (folder / "test" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    found = {(row["method"], row["image"], row["metric"]): float(row["value"]) for row in table}
    assert len(found) == len(table), "an image has two rows"
    return found


@pytest.mark.slow
def test_a_test_that_starts_its_second_process_itself_scores_every_image_once(runs: Path, tmp_path: Path) -> None:
    """Of an odd number of images the last is seen twice and counts once."""
    rng = np.random.default_rng(0)
    for name, size in (("test_LR", 12), ("test_HR", 48)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(3):
            image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "set" / name / f"{i}.png")
    folder = version(tmp_path / "tested", "dfosd")  # a copy: a test adds to the run's curves
    shutil.copytree(version(runs / "two", "dfosd"), folder)
    trained = checkpoint(tmp_path / "tested", "dfosd")
    command = ["test", "--data=data.SRData", f"--data.test={tmp_path / 'set'}", *QUIET, "--ckpt_path", str(trained)]
    run(shell(*command, *TWO))
    scores = rows(folder)
    assert {image for _, image, _ in scores} == {"0", "1", "2"}
    (folder / "test" / "metrics.csv").unlink()
    assert main([*command, "--trainer.accelerator=cpu"]) == 0
    alone = rows(folder)
    assert scores.keys() == alone.keys()
    assert [scores[key] for key in alone] == pytest.approx(list(alone.values()), abs=1e-3)
