"""Files and names that others made: none runs code, none is written elsewhere, none becomes markup.

The doors at which a pickle is tried: checkpoints (to resume, to start from, to test, of a stage, to export, to
compare), networks for `isr compare --weights`, weights of losses and rewards, torchvision's cache, folders of diffusers
and transformers, caches of texts and tags, configurations, and whatever a library, such as pyiqa or Lightning, reads.
"""

from __future__ import annotations

import csv
import html
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.checkpoints import read_checkpoint, read_stage
from common.conditioning.flux_text import _file, encode_flux_prompts
from common.evaluation import Score, write_scores
from common.files import safe_loading
from common.images import write_png
from common.loading import TINY, load_text_encoder, load_vae
from common.losses.latent_lpips import LatentLPIPS
from common.losses.vgg import _pretrained_state, read_state
from common.rewards.imagereward import _read
from launch.cli import main
from launch.comparison import compare
from launch.comparison.inputs import ImageSet
from launch.comparison.outputs import copy_figures
from launch.comparison.pictures import NamedFigure
from launch.comparison.report import Report
from launch.comparison.store import Store
from papers.rfsr.tags import TagFiles, fingerprint

DEMO = "papers/dfosd/configs/demo/01_dfosd.yaml"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.made,)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """The folder that is there once a trap has been unpickled."""
    return tmp_path / "sprung"


@pytest.fixture
def trap(tmp_path: Path, sprung: Path) -> Callable[[str], Path]:
    """Write a trap into a file of this name, as torch saves it."""

    def write(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": {}, "x": Trap(sprung)}, path)
        return path

    return write


def test_the_trap_springs_where_a_file_is_unpickled(trap: Any, sprung: Path) -> None:
    torch.load(trap("a.pt"), weights_only=False)
    assert sprung.is_dir()


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "-c", DEMO, "--ckpt_path", "{}"],
        ["fit", "-c", DEMO, "--ckpt_path={}", "--weights_only=false"],
        ["test", "--ckpt_path", "{}", "--data", "data.Photos"],
        ["export", "{}", "-o", "out"],
        ["compare", "--runs", "a={}", "-o", "out"],
    ],
)
def test_a_checkpoint_on_the_command_line(
    words: list[str], trap: Any, sprung: Path, tmp_path: Path, capsys: Any
) -> None:
    path = trap("runs/a/b/version_0/checkpoints/last.ckpt")
    words = [word.format(path) if word != "out" else str(tmp_path / "out") for word in words]
    assert main(words) == 1
    assert f"{path} cannot be read as a checkpoint" in capsys.readouterr().err
    assert not sprung.exists()


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "safetensors"])
def test_a_checkpoint_of_a_run_or_a_stage(suffix: str, trap: Any, sprung: Path) -> None:
    path = trap(f"last.{suffix}")
    for read in (read_checkpoint, lambda path: read_stage(path, "estimator", "papers.dm_sr.TimestepEstimation")):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            read(path)
    assert not sprung.exists()


@pytest.mark.parametrize("suffix", ["pth", "pt", "ckpt", "safetensors"])
def test_a_network_for_compare(suffix: str, trap: Any, sprung: Path, tmp_path: Path) -> None:
    pytest.importorskip("spandrel")
    write_png(tmp_path / "lq" / "a.png", np.zeros((8, 8, 3), np.uint8))
    options = {"metrics": ["sharpness"], "efficiency": False, "progress": False, "device": "cpu"}
    weights = {"gan": trap(f"gan.{suffix}")}
    data = compare(weights=weights, pairs=[tmp_path / "lq"], output=tmp_path / "out", **options).data  # type: ignore[arg-type]
    assert "cannot be read as tensors" in data.methods[1]["failures"][0]["reason"]
    assert not sprung.exists()


@pytest.mark.parametrize("read", [read_state, LatentLPIPS, _read])
def test_weights_of_losses_and_rewards(read: Callable[[str], object], trap: Any, sprung: Path) -> None:
    for name in ("a.pt" if read is _read else "a.pth", "a.safetensors"):
        with pytest.raises(ValueError, match="cannot be read as tensors"):
            read(str(trap(name)))
    assert not sprung.exists()


def test_a_file_in_torchvision_s_cache(trap: Any, sprung: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    trap("checkpoints/vgg16-397923af.pth")  # where the message about missing weights sends a file
    with pytest.raises((ValueError, FileNotFoundError, pickle.UnpicklingError)):
        _pretrained_state("vgg16")
    assert not sprung.exists()


def test_bin_files_of_diffusers_and_transformers(trap: Any, sprung: Path, tmp_path: Path) -> None:
    for part, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        shutil.copytree(TINY / part, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
        trap(f"{part}/{file}.bin")
    for load in (load_vae, load_text_encoder):
        with pytest.raises(Exception, match=r"(?i)weights.only|cannot be read|unsupported|unpickl"):
            load(str(tmp_path))
    assert not sprung.exists()


def test_a_config_that_names_another_class_than_a_model(tmp_path: Path) -> None:
    shutil.copytree(TINY / "text_encoder", tmp_path / "text_encoder")
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(re.sub(r'"CLIPText\w+"', '"PreTrainedTokenizerFast"', config.read_text()))
    with pytest.raises(ValueError, match=r"config\.json names 'PreTrainedTokenizerFast', no model of transformers"):
        load_text_encoder(str(tmp_path))


def test_caches_of_texts_and_tags(trap: Any, sprung: Path, tmp_path: Path) -> None:
    trap(_file("texts", "tiny", 8, "a cat").as_posix())
    with pytest.raises(Exception, match=r"(?i)header"):
        encode_flux_prompts("tiny", ["a cat"], max_tokens=8, folder=tmp_path / "texts")
    x_lq = torch.zeros(1, 3, 4, 4)
    trap(f"tags/{fingerprint(x_lq[0])}.safetensors")
    with pytest.raises(Exception, match=r"(?i)header"):
        TagFiles(str(tmp_path / "tags"))(x_lq)
    assert not sprung.exists()


def test_a_configuration(sprung: Path, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"model: !!python/object/apply:os.mkdir [{sprung}]\n")
    assert main(["fit", "-c", str(tmp_path / "a.yaml")]) == 2
    assert main(["parameters", str(tmp_path / "a.yaml")]) in (1, 2)
    assert not sprung.exists()


def test_whatever_a_library_reads_within_the_command_line(trap: Any, sprung: Path, monkeypatch: Any) -> None:
    path = trap("musiq.pth")
    seen = []

    def run(command: str, rest: list[str]) -> int:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(path, weights_only=False)  # as pyiqa does
        seen.append(command)
        return 0

    monkeypatch.setattr("launch.commands.metrics.run", run)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert main(["metrics"]) == 0
    assert seen == ["metrics"]
    with safe_loading(), pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert not sprung.exists()


NASTY = [
    '<script>alert("x")</script>',
    "![x](http://e.vil/x.png)",
    "`a` | *b* [c](d)",
    "=1+1",
    r"\input{x} 50% & $y_1^2$ #~",
]


def nasty_report(folder: Path) -> Report:
    """Write a report whose methods' names, test set, images and reasons are nasty, and give what it shows."""
    lq = np.zeros((8, 8, 3), np.uint8)
    samples = folder / "in" / NASTY[1].replace("/", ":")
    for name in NASTY:
        write_png(samples / f"{name.replace('/', ':')}.png", lq)
        (folder / "results" / "none").mkdir(parents=True, exist_ok=True)
    write_png(folder / "results" / "other.png", np.zeros((32, 32, 3), np.uint8))
    options = {"metrics": ["sharpness"], "efficiency": False, "progress": False, "device": "cpu"}
    return compare(
        results={name: folder / "results" for name in NASTY},
        pairs=[samples],
        output=folder / "out",
        notes=NASTY,
        sources=NASTY,
        title=NASTY[0],
        **options,  # type: ignore[arg-type]
    ).data


def test_names_are_text_in_every_file_of_the_report(tmp_path: Path) -> None:
    data = nasty_report(tmp_path)
    out = tmp_path / "out"
    assert [method["name"] for method in data.methods] == ["bicubic", *NASTY]

    markdown = (out / "report.md").read_text()
    events = EventAccumulator(str(out)).Reload()
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("report/text_summary"))
    for source in (markdown, text):
        rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(source)
        assert "<script" not in rendered
        assert "e.vil" not in re.sub(r">[^<]*<", "><", rendered), "no link and no picture"
        shown = html.unescape(re.sub(r"<[^>]+>", "", rendered))
        for name in NASTY:
            assert name.replace("|", "/") in shown.replace("|", "/")
        assert rendered.count("<img") == (source is markdown)  # the grid

    page = (out / "report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<script") == 2

    for name in ("metrics.csv", "summary.csv"):
        with (out / name).open(newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "@", "+", "\t"))]
    assert "'=1+1" in (out / "metrics.csv").read_text()

    table = (out / "table.tex").read_text()
    assert r"\textbackslash{}input\{x\} 50\% \& \$y\_1\textasciicircum{}2\$ \#\textasciitilde{}" in table
    assert r"\textless{}script\textgreater{}alert(\textquotedbl{}x\textquotedbl{})" in table
    assert r"\input{" not in table


def test_scores_of_a_test_hold_no_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    write_scores(tmp_path / "metrics.csv", [Score("=cmd()", "+set", "-a.png", "psnr_y", -1.5, "@p")])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["'=cmd()", "'+set", "'-a.png", "psnr_y", "-1.500000", "'@p"]


OUT = ["../escaped", "/tmp/escaped-from-the-output", "a/../../escaped", "..\\escaped", "C:\\escaped"]


@pytest.mark.parametrize("name", OUT)
def test_no_image_s_name_leaves_the_output_folder(name: str, tmp_path: Path) -> None:
    from papers.dfosd import DFOSD

    out = tmp_path / "out"
    sample = {"name": name, "lq": torch.zeros(3, 8, 8, dtype=torch.uint8), "prompt": ""}
    with pytest.raises(ValueError, match="not a name of a file inside"):
        Store(out).items(ImageSet("set", [sample], 4))
    model = DFOSD(pretrained="tiny", perceptual="none")
    model.output.folder = out
    batch = {"name": [name], "lq": torch.zeros(1, 3, 8, 8), "prompt": [""]}
    with pytest.raises(ValueError, match="not a name of a file inside"):
        model.predict_step(batch, 0)
    with pytest.raises(ValueError, match="not a name of a file inside"):
        model.targets(out, [name])
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == []


def test_no_link_in_the_output_folder_leads_a_result_out_of_it(tmp_path: Path) -> None:
    from papers.dfosd import DFOSD

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday").symlink_to(tmp_path / "elsewhere")
    model = DFOSD(pretrained="tiny", perceptual="none")
    with pytest.raises(ValueError, match="by a link"):
        model.targets(tmp_path / "out", ["holiday/a"])
    assert not list((tmp_path / "elsewhere").iterdir())


def test_no_run_s_name_and_no_figure_leaves_its_folder(tmp_path: Path, capsys: Any) -> None:
    words = ["fit", "-c", DEMO, "--runs", str(tmp_path / "runs"), "--name", "../../escaped"]
    assert main(words) == 2
    assert "name=../../escaped is not the name of one folder" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "figures").symlink_to(tmp_path / "elsewhere")
    write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="by a link"):
        copy_figures(tmp_path / "out", [NamedFigure("a/b", tmp_path / "a.png")])
    assert not list((tmp_path / "elsewhere").iterdir())
