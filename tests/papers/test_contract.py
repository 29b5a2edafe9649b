"""Every paper keeps the same promises. Papers and demo configurations are found, so a new one needs no line here."""

from __future__ import annotations

import importlib
import json
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import ControlNetModel, FluxTransformer2DModel, UNet2DConditionModel
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from transformers import Dinov2Model

from common.metrics import to_uint8
from launch import lightning_cli
from launch.cli import main
from launch.demo import DemoRow
from launch.lightning_cli import IsrCLI
from launch.parameters import build
from launch.runs import config_run_name

from ..command_line import ParseOnly, run, shell_of_all
from ..second_device import device, second_device

ROOT = Path(__file__).resolve().parents[2]
PAPERS = sorted(path.parent for path in (ROOT / "papers").glob("*/__init__.py"))
DEMOS = sorted((ROOT / "papers").glob("*/configs/demo/*.yaml"))
METHODS = [path for path in DEMOS if DemoRow(path.parents[2].name, path.stem, path).restores]  # others are stages
CONFIGS = sorted((ROOT / "papers").glob("*/configs/**/*.yaml"))
SMALL = [
    "--data.batch_size=2",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--checkpoint.every_n_train_steps=1",
]
PACKAGES = ("papers", "common", "data", "launch")


def label(path: Path) -> str:
    return str(path.relative_to(ROOT / "papers"))


def test_there_are_papers_and_each_has_a_demo_configuration() -> None:
    assert PAPERS
    assert {demo.parents[2] for demo in DEMOS} == set(PAPERS)


class Recorder(Callback):
    """The weights a fit starts from, and what it logs."""

    def __init__(self) -> None:
        self.initial: dict[str, Tensor] = {}
        self.metrics: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.initial = weights(pl_module)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@dataclass
class Run:
    """What `isr` did in this process."""

    module: Any
    trainer: Any
    initial: dict[str, Tensor]
    metrics: list[dict[str, float]]
    final: dict[str, Tensor] = field(default_factory=dict)

    @property
    def last(self) -> Path:
        return Path(self.trainer.log_dir) / "checkpoints" / "last.ckpt"


def isr(*arguments: object, **trainer_arguments: Any) -> Run:
    """`isr` as the shell would run it, caught on the way; with a Trainer's arguments that have no flag."""
    caught: list[IsrCLI] = []
    recorder = Recorder()

    class Caught(IsrCLI):
        def instantiate_trainer(self, **kwargs: Any) -> Any:
            caught.append(self)
            trainer = super().instantiate_trainer(**kwargs, **trainer_arguments)
            trainer.callbacks.append(recorder)
            return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning_cli, "IsrCLI", Caught)
        assert main([str(argument) for argument in (*arguments, "--debug")]) == 0
    (cli,) = caught
    return Run(cli.model, cli.trainer, recorder.initial, recorder.metrics, weights(cli.model))


@dataclass
class Fits:
    config: Path
    runs: Path
    whole: Run
    half: Run
    resumed: Run


@pytest.fixture(scope="module", params=DEMOS, ids=label)
def fits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fits:
    """Two steps at once, and one step with another after a resume; before them the stages that the row builds on."""
    config, runs = request.param, tmp_path_factory.mktemp("runs")
    for before in DEMOS:
        if f"runs/{before.parents[2].name}/{config_run_name(before)}" in config.read_text():
            isr("fit", "-c", before, "--runs", runs, *SMALL, "--trainer.max_steps=1")
    common = ["fit", "-c", config, "--runs", runs, *SMALL]
    whole = isr(*common, "--trainer.max_steps=2")
    half = isr(*common, "--trainer.max_steps=1")
    checkpoint = torch.load(half.last, weights_only=True)
    assert checkpoint["global_step"] == 1
    resumed = isr(*common, "--trainer.max_steps=2", "--ckpt_path", half.last)
    return Fits(config, runs, whole, half, resumed)


class TestDemo:
    def test_training_counts_steps_not_optimiser_calls(self, fits: Fits) -> None:
        assert fits.whole.trainer.global_step == 2
        assert int(fits.whole.module.train_step) == 2
        assert len(fits.whole.metrics) == 2

    def test_everything_logged_is_finite_and_there_is_a_loss_for_each_optimiser(self, fits: Fits) -> None:
        for metrics in fits.whole.metrics:
            assert all(math.isfinite(value) for value in metrics.values()), metrics
        losses = [name for name in fits.whole.metrics[0] if name.startswith("train/")]
        norms = {name for name in fits.whole.metrics[0] if name.startswith("grad_norm/")}
        assert len(losses) >= len(fits.whole.module.trainable_patterns())
        assert norms == {f"grad_norm/{name}" for name in fits.whole.module.trainable_patterns()}
        assert all(fits.whole.metrics[-1][name] > 0 for name in norms)

    def test_the_optimisers_hold_exactly_what_is_declared_trainable_each_once(self, fits: Fits) -> None:
        module = fits.whole.module
        optimisers = fits.whole.trainer.optimizers
        assert len(optimisers) == len(module.trainable_patterns())
        names = {id(p): name for name, p in module.named_parameters()}
        held: list[str] = []
        for optimizer, name in zip(optimisers, module.trainable_patterns(), strict=True):
            inside = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            declared = {names[id(p)] for p in module.trainable_parameters(name)}
            assert set(inside) == declared
            held += inside
        assert len(held) == len(set(held))
        assert set(held) == set(module.all_trainable())
        assert {name for name, p in module.named_parameters() if p.requires_grad} == set(held)

    def test_what_is_trained_moves_and_everything_else_stays_bit_by_bit(self, fits: Fits) -> None:
        run = fits.whole
        names = {id(p): name for name, p in run.module.named_parameters()}
        moving = {
            names[id(p)]
            for optimizer in run.trainer.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if group["lr"] > 0
        }
        assert moving
        moved = {name for name, value in run.final.items() if not torch.equal(value, run.initial[name])}
        assert moved == moving

    def test_stopping_and_resuming_changes_no_bit(self, fits: Fits) -> None:
        assert fits.resumed.trainer.log_dir == fits.half.trainer.log_dir
        for one, other in zip(fits.half.metrics + fits.resumed.metrics, fits.whole.metrics, strict=True):
            # a method may log other numbers at another step, which the whole run's last metrics then hold as well
            assert one
            assert one.items() <= other.items()
        for name, value in fits.whole.final.items():
            assert torch.equal(value, fits.resumed.final[name]), name
        if fits.whole.module.ema is not None:
            one, other = fits.whole.module.ema, fits.resumed.module.ema
            assert one.updates == other.updates == 2
            assert all(torch.equal(value, other.average[name]) for name, value in one.average.items())
        states = [[o.state_dict()["state"] for o in run.trainer.optimizers] for run in (fits.whole, fits.resumed)]
        for one, other in zip(*states, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other[key][k])) for k, v in one[key].items())

    def test_another_seed_is_another_run_on_the_same_frozen_networks(self, fits: Fits) -> None:
        """That the same seed is the same run, the resumed fit shows."""
        small = ["--runs", fits.runs, *SMALL, "--trainer.max_steps=1"]
        other = isr("fit", "-c", fits.config, *small, "--seed_everything=5")
        assert other.metrics != fits.half.metrics
        trained = set(other.module.all_trainable())
        for name, value in fits.half.initial.items():
            is_constant = value.numel() == 1 or float(value.std()) == 0
            is_adapter = "lora_A" in name and "runs/" not in fits.config.read_text()  # else it is the stage's before
            is_drawn = not is_constant and (is_adapter or name.startswith("discriminator"))
            if name not in trained or is_drawn:
                assert torch.equal(other.initial[name], value) is (name not in trained), name
        folder = Path(other.trainer.log_dir)
        seeds = json.loads((folder / "run.json").read_text())["seeds"]
        assert seeds == {"seed_everything": 5, "model": 5, "data": 5}
        assert torch.load(other.last, weights_only=True)["seeds"] == seeds
        again = yaml.safe_load((folder / "config.yaml").read_text())
        assert again["seed_everything"] == 5
        assert again["model"]["init_args"]["seed"] is again["data"]["init_args"]["seed"] is None

    def test_on_another_device_it_starts_draws_logs_and_restores_the_same(self, fits: Fits) -> None:
        """As on a GPU: nothing is left behind, and neither weights nor noise come from another generator there."""
        x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with second_device() as arguments:
            run = isr("fit", "-c", fits.config, "--runs", fits.runs, *SMALL, "--trainer.max_steps=1", **arguments)
            if fits.config in METHODS:
                sr = run.module.to(device()).upscale(x.to(device()), ["a photo"]).sr
                assert sr.device == device()
                expected = fits.half.module.upscale(x, ["a photo"]).sr
                assert_close(sr.cpu(), expected, atol=0.02, rtol=0)  # a step is not quite the same
        assert run.initial.keys() == fits.half.initial.keys()
        for name, value in run.initial.items():
            assert value.device == device()
            assert torch.equal(value.cpu(), fits.half.initial[name]), name
        # NF2T's sum of 2r - 1 is a small difference of numbers near 1, whose own error is 1e-4
        apart = {name: value for name, value in fits.half.metrics[0].items() if name != "train/sum_2r-1"}
        assert run.metrics[0].keys() == fits.half.metrics[0].keys()
        assert {name: run.metrics[0][name] for name in apart} == pytest.approx(apart, rel=1e-3, abs=1e-5)
        for name in run.metrics[0].keys() - apart:
            assert run.metrics[0][name] == pytest.approx(fits.half.metrics[0][name], abs=5e-4)

    def test_the_checkpoint_holds_what_is_trained_and_no_frozen_weight(self, fits: Fits) -> None:
        checkpoint = torch.load(fits.whole.last, weights_only=True)
        module = fits.whole.module
        assert set(checkpoint["state_dict"]) == module.checkpoint_keys()
        parameters = set(dict(module.named_parameters()))
        assert set(checkpoint["state_dict"]) & parameters == set(module.all_trainable())
        for name in module.all_trainable():
            assert torch.equal(checkpoint["state_dict"][name], fits.whole.final[name])

    def test_predict_upscales_every_image_to_a_file_of_its_name(self, fits: Fits, tmp_path: Path) -> None:
        if fits.config not in METHODS:
            return  # a stage restores no images
        scale = fits.whole.module.scale
        sizes = {"a.png": (24, 17), "sub/b.jpg": (33, 30)}
        for name, (width, height) in sizes.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            y, x = np.mgrid[:height, :width]
            Image.fromarray(np.stack([x * 7, y * 7, x + y], -1).astype(np.uint8)).save(path)
        images = []
        for turn in ("one", "two"):
            out = tmp_path / turn
            common = ["predict", "-c", fits.config, "--runs", fits.runs, "--trainer.enable_progress_bar=false"]
            isr(*common, "--ckpt_path", fits.whole.last, "--data.predict", tmp_path / "in", "--output", out)
            files = {str(p.relative_to(out)): p for p in out.rglob("[!.]*") if p.is_file()}
            assert set(files) == {"a.png", "sub/b.png"}
            images.append([np.asarray(Image.open(files[name])) for name in sorted(files)])
        for one, other, (width, height) in zip(*images, sizes.values(), strict=True):
            assert one.shape == (scale * height, scale * width, 3)
            assert one.std() > 0
            assert np.array_equal(one, other)

    def test_a_prediction_builds_nothing_that_only_training_needs_and_misses_none_of_it(
        self, fits: Fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if fits.config not in METHODS:
            return
        module = fits.whole.module
        y, x = np.mgrid[:22, :19]
        photo = np.stack([x * 7, y * 7, x + y], -1).astype(np.uint8)
        (tmp_path / "in").mkdir()
        Image.fromarray(photo).save(tmp_path / "in" / "a.png")
        monkeypatch.setattr(type(module), "configure_training", lambda self: pytest.fail("built for a prediction"))
        common = ["predict", "-c", fits.config, "--runs", fits.runs, "--trainer.enable_progress_bar=false"]
        files = ["--ckpt_path", fits.whole.last, "--data.predict", tmp_path / "in", "--output", tmp_path / "out"]
        lean = isr(*common, *files, "--trainer.precision=bf16-mixed").module  # predicts in test_precision all the same
        assert not {name for name, _ in lean.named_children()} & set(module.training_only)
        x_lq = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
        with module.ema.swapped(module.all_trainable()) if module.ema is not None else nullcontext():
            expected = to_uint8(module.upscale(x_lq, [""]).sr)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), expected)

    @pytest.mark.long
    def test_frozen_weights_held_in_bfloat16_train_as_float32_ones_do_and_resume(
        self, fits: Fits, tmp_path: Path
    ) -> None:
        """Bit by bit under bf16-mixed, but for DINOv2, which computes in float32 otherwise, and FLUX's new adapters."""

        def fit(config: Path, dtype: str, steps: int, *more: object) -> Run:
            held = [] if "TimestepEstimation" in config.read_text() else [f"--model.frozen_dtype={dtype}"]
            common = ["fit", "-c", config, "--runs", tmp_path / dtype, *SMALL, "--trainer.precision=bf16-mixed"]
            return isr(*common, *held, f"--trainer.max_steps={steps}", f"--name={config_run_name(config)}", *more)

        for before in DEMOS:
            if f"runs/{before.parents[2].name}/{config_run_name(before)}" in fits.config.read_text():
                fit(before, "float32", 1)
                fit(before, "bfloat16", 1)
        plain, held = fit(fits.config, "float32", 2), fit(fits.config, "bfloat16", 2)
        half = fit(fits.config, "bfloat16", 1)
        resumed = fit(fits.config, "bfloat16", 2, "--ckpt_path", half.last)
        for name, value in held.final.items():
            assert torch.equal(value, resumed.final[name]), name
        for one, other in zip(half.metrics + resumed.metrics, held.metrics, strict=True):
            assert one.items() <= other.items()
        trained = held.module.all_trainable()
        assert {held.final[name].dtype for name in trained} == {torch.float32}
        if fits.config.parents[2].name in ("dfosd", "dm_sr", "rfsr") or "t2idiff" in fits.config.name:
            assert held.metrics == plain.metrics
            assert all(torch.equal(held.final[name], plain.final[name]) for name in trained)

    def test_the_output_lies_in_0_to_1(self, fits: Fits) -> None:
        if fits.config not in METHODS:
            return
        x = torch.rand(1, 3, 19, 21, generator=torch.Generator().manual_seed(0))
        for image in fits.whole.module.upscale(x, ["a photo"]):
            assert image.shape == (1, 3, 19 * fits.whole.module.scale, 21 * fits.whole.module.scale)
            assert bool(torch.isfinite(image).all())
            assert float(image.min()) >= 0
            assert float(image.max()) <= 1


class TestConfigs:
    @pytest.mark.parametrize("config", CONFIGS, ids=label)
    def test_is_understood_alone_or_over_what_its_head_names(self, config: Path, tmp_path: Path) -> None:
        """A file that has no model or no data of its own, or says `over X.yaml`, is an overlay."""
        text = config.read_text()
        tree = yaml.safe_load(text)
        base = re.search(r"\bover ([\w/.-]+\.yaml)", text)
        files = [config]
        paper = next(paper for paper in PAPERS if paper in config.parents)
        if base:
            (below,) = [path for path in CONFIGS if paper in path.parents and path.name == Path(base[1]).name]
            files = [below, config]
        elif not {"model", "data"} <= tree.keys():
            files = [next(demo for demo in DEMOS if paper in demo.parents), config]
        stacked = [part for file in files for part in ("-c", str(file))]
        # where no run is: one of `make demo` would take the place of the name that a setting gives it
        parsed = ParseOnly(["fit", *stacked, "--runs", str(tmp_path)]).config["fit"]
        assert parsed.model.class_path.startswith(f"papers.{paper.name}")
        for section in ("model", "data"):
            given = tree.get(section, {}).get("init_args", {})
            assert set(given) <= set(parsed[section].init_args.as_dict())
            for key, value in given.items():
                if isinstance(value, str | int | bool):
                    assert parsed[section].init_args[key] == value, key

    @pytest.mark.long
    @pytest.mark.parametrize(
        "config", [config for config in CONFIGS if "precision: bf16-mixed" in config.read_text()], ids=label
    )
    def test_at_paper_scale_frozen_denoisers_and_dinov2_are_held_in_bfloat16(self, config: Path) -> None:
        for network in build([config]).modules():
            if isinstance(network, UNet2DConditionModel | ControlNetModel | FluxTransformer2DModel | Dinov2Model):
                weights = [p for p in network.parameters() if p.ndim > 1]
                frozen = [p for p in weights if not p.requires_grad]
                held = sum(p.numel() for p in frozen if p.dtype == torch.bfloat16)
                assert held >= 0.98 * sum(p.numel() for p in frozen), type(network).__name__
                assert {p.dtype for p in weights if p.requires_grad} <= {torch.float32}


def resolve(dotted: str) -> object:
    """The object that a dotted path names."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if importlib.util.find_spec(parts[0]) and is_module(parts[:end]):
            found: object = importlib.import_module(name)
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    raise LookupError(dotted)


def is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def table(card: str) -> list[list[str]]:
    """Rows of the card's table `| paper | here | specified by |`."""
    found = re.search(r"\| paper \| here \| specified by \|\n\|[-| ]+\|\n((?:\|.*\|\n)+)", card)
    assert found, "the card has no table | paper | here | specified by |"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


CARD = [
    "Equation -> code",
    "Before you start",
    "Run",
    "Tables",
    "Parameters",
    "Measured here",
    "Deviations",
    "Licences",
]


@pytest.fixture(scope="module")
def from_a_shell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one step of each paper's first row, all in one fresh process."""
    folder = tmp_path_factory.mktemp("shell")
    first = [next(demo for demo in DEMOS if paper in demo.parents) for paper in PAPERS]
    small = ["--runs", str(folder), *SMALL, "--trainer.max_steps=1"]
    run(shell_of_all([["fit", "-c", str(demo), *small] for demo in first]), timeout=600)
    return folder


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
class TestCard:
    def test_each_equation_has_its_function_and_its_test(self, paper: Path) -> None:
        rows = table((paper / "README.md").read_text())
        assert len(rows) >= 3, "the card's table | paper | here | specified by | needs three rows"
        for _, here, test in rows:
            assert re.fullmatch(r"`[\w.]+`", here), f"{here}: the column `here` holds one dotted path in backticks"
            assert callable(resolve(here.strip("`"))), here
            path = re.fullmatch(r"`(tests/[\w/]+\.py)(?:::\w+)*`", test)
            assert path, f"{test}: the column `specified by` holds one file of tests/ in backticks"
            assert (ROOT / path[1]).is_file(), f"{test} does not exist"

    def test_every_name_of_code_in_it_exists(self, paper: Path) -> None:
        text = (paper / "README.md").read_text()
        for name in re.findall(rf"`((?:{'|'.join(PACKAGES)})\.[\w.]+)`", text):
            assert resolve(name) is not None
        for path in re.findall(rf"`((?:{'|'.join(PACKAGES)}|tests)/[\w/.-]+)`", text):
            assert (ROOT / path).exists(), path

    def test_its_sections_are_those_of_every_card_in_one_order(self, paper: Path) -> None:
        sections = re.findall(r"^## (.+)$", (paper / "README.md").read_text(), re.MULTILINE)
        assert [name for name in CARD if name != "Parameters" or name in sections] == sections

    def test_it_says_where_it_deviates(self, paper: Path) -> None:
        text = (paper / "README.md").read_text()
        section = text.partition("## Deviations")[2].partition("\n## ")[0]
        assert section.count("\n|") > 3, "Deviations needs a table | what | paper | here | why | of two rows"

    def test_published_rows_have_a_number_for_each_column(self, paper: Path) -> None:
        results = yaml.safe_load((paper / "results.yaml").read_text())
        assert results["paper"]
        if results["arxiv"] is None:
            assert results["source"]  # what it is instead: a submission under review, say
        else:
            assert re.fullmatch(r"\d{4}\.\d{5}", results["arxiv"])
        for published in results["tables"]:
            columns = published["columns"]
            assert len(set(columns)) == len(columns)
            assert published["table"]
            assert published["protocol"]
            assert set(published.get("higher_better", {})) <= set(columns)
            for rows in published["rows"].values():
                for name, row in rows.items():
                    assert len(row) == len(columns), (published["table"], name)
                    assert all(value is None or isinstance(value, int | float) for value in row)

    def test_a_published_table_has_each_method_on_each_set_or_says_what_is_not_at_hand(self, paper: Path) -> None:
        for published in yaml.safe_load((paper / "results.yaml").read_text())["tables"]:
            methods = {tuple(sorted(rows)) for rows in published["rows"].values()}
            assert len(methods) == 1 or "not at hand: " in published["protocol"], published["table"]

    def test_it_says_before_a_run_what_the_run_needs(self, paper: Path) -> None:
        """Memory, time, disk, licences, a test, and each hub repository that a paper-scale configuration names."""
        section = (paper / "README.md").read_text().partition("\n## Before you start\n")[2].partition("\n## ")[0]
        for row in ("GPU memory", "seconds a step", "a checkpoint on disk", "licences", "test of the trained run"):
            assert re.search(rf"^\| {row}\b.* \| .+ \|$", section, re.MULTILINE), f"Before you start has no row {row}"
        for config in (paper / "configs").glob("*.yaml"):
            model = yaml.dump(yaml.safe_load(config.read_text())["model"])
            for repo in re.findall(r"^ +\w+: ([\w-]+/[\w.-]+)$", model, re.MULTILINE):
                assert f"`{repo}`" in section, f"Before you start does not name {repo} of {config.name}"

    @pytest.mark.long
    def test_one_step_runs_from_the_shell(self, paper: Path, from_a_shell: Path) -> None:
        assert len(list(from_a_shell.glob(f"{paper.name}/*/version_0/checkpoints/last.ckpt"))) == 1


def test_a_name_that_is_not_there_is_found_out() -> None:
    with pytest.raises(AttributeError):
        resolve("common.draws.Draws.nothing")
    with pytest.raises((LookupError, AttributeError)):
        resolve("common.nothing.x")
