"""Every paper-scale fit of the cards starts: sampler, loaders, limits and optimisers on the papers' lists of photos.

Nothing is trained: the lists have their real lengths and no files, eight processes are a number, networks are on the
meta device.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch.utils.data import Dataset

from common.loading import architecture_only
from data.datamodules import SRData
from launch.lightning_cli import IsrCLI

from .command_line import ROOT, ParseOnly
from .test_commands import PRINTED

PHOTOS = {  # by the config that names the training data
    "lsdir_ffhq": 84_991 + 10_000,
    "df2k_lsdir": 800 + 2_650 + 84_991,
    "df2k_8k_ffhq": 243_400,  # patches, each with its caption
    "seesr": 800 + 1_500 + 2_650 + 10_324 + 10_000,
    "lsdir_ffhq_patches": 1_500_000,  # the F2IDiff paper's patches
}
VALIDATION_CROPS = 100
CONFIGS = {
    path for path in ROOT.glob("papers/*/configs/*.yaml") if path.stem != "metrics" and not path.stem.endswith("_tiny")
}


class Fit(NamedTuple):
    """A fit as a card prints it."""

    words: list[str]
    configs: tuple[str, ...]

    @property
    def photos(self) -> int:
        """How many photos or patches the paper's training data has."""
        return next(PHOTOS[Path(word).stem] for word in self.words if Path(word).stem in PHOTOS)


def fits() -> list[Fit]:
    """The first command of each stack of paper-scale configs that the cards train; ablations change no limits."""
    found: dict[tuple[str, ...], Fit] = {}
    for call in PRINTED:
        words = call.values[0]
        configs = tuple(after for word, after in itertools.pairwise(words) if word == "-c")
        models = tuple(c for c in configs if c.startswith("papers/") and "/ablations/" not in c and "/demo/" not in c)
        if words[1] == "fit" and models and PHOTOS.keys() & {Path(word).stem for word in words}:
            found.setdefault(models, Fit(words[1:], configs))
    return list(found.values())


FITS = [pytest.param(fit, id=" ".join(Path(config).stem for config in fit.configs)) for fit in fits()]


class Listed(Dataset[Any]):
    """So many photos, of which none is read."""

    texts = ("a caption",)

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


class Started(IsrCLI):
    """`isr fit` up to its first step, as one of several processes that are only counted."""

    def _run_subcommand(self, subcommand: str) -> None:
        return


def start(fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *more: str) -> Any:
    """The trainer of a fit, with its loaders and limits."""
    monkeypatch.setattr(SRData, "_train_images", lambda _: Listed(fit.photos))
    monkeypatch.setattr(SRData, "_val_sets", lambda _: [("val", Listed(VALIDATION_CROPS))])
    monkeypatch.chdir(ROOT)
    eight = [] if "launch/configs/ddp8.yaml" in fit.words else ["-c", "launch/configs/ddp8.yaml"]
    cli = Started(
        [*fit.words, *eight, f"--runs={tmp_path}", "--trainer.accelerator=cpu", "--data.num_workers=0", *more]
    )
    trainer: Any = cli.trainer
    trainer.strategy.set_world_ranks()
    trainer.strategy.connect(cli.model)
    trainer._data_connector.attach_data(cli.model, datamodule=cli.datamodule)
    trainer.state.fn, trainer.state.stage = TrainerFn.FITTING, RunningStage.TRAINING
    cli.datamodule.setup("fit")
    trainer.fit_loop.setup_data()
    trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return trainer


@pytest.mark.parametrize("fit", FITS)
def test_a_paper_scale_fit_starts_on_its_papers_photos(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = start(fit, monkeypatch, tmp_path)
    data, model = trainer.datamodule, trainer.lightning_module
    whole, processes = data.global_batch_size, trainer.world_size
    assert whole is not None
    parts = f"{data.batch_size} x {processes} x {model.accumulate}"
    assert f"global batch {whole} = {parts} " in capsys.readouterr().err
    assert whole == data.batch_size * processes * model.accumulate
    assert processes == 8 or whole < 8
    sampler = trainer.fit_loop._combined_loader.flattened[0].batch_sampler
    assert (sampler.world_size, sampler.batch_size, sampler.dataset_size) == (processes, data.batch_size, fit.photos)
    epoch = math.ceil(fit.photos / (data.batch_size * processes))
    assert trainer.fit_loop.max_batches == epoch
    assert trainer.fit_loop.epoch_loop.val_loop.max_batches == [math.ceil(VALIDATION_CROPS / processes)]
    counts_epochs = trainer.check_val_every_n_epoch is not None
    first = epoch if counts_epochs and trainer.val_check_batch >= epoch else trainer.val_check_batch
    assert first <= trainer.max_steps * model.accumulate, "no validation before the end"


def test_the_cards_train_every_paper_scale_config() -> None:
    trained = {ROOT / config for fit in fits() for config in fit.configs}
    tested = {ROOT / word for call in PRINTED for word in call.values[0] if call.values[0][1] == "test"}
    assert trained | tested >= CONFIGS


@pytest.mark.long
@pytest.mark.parametrize("fit", FITS)
def test_its_networks_and_optimisers_can_be_made(fit: Fit) -> None:
    """On the meta device, which has no fused kernels."""
    parsed = ParseOnly(fit.words)
    with architecture_only(), torch.device("meta"):
        model = parsed.parser.instantiate(parsed.config)["fit"].model
        model.configure_model()
    assert model.configure_optimizers()
