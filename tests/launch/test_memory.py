"""`isr parameters --memory`: bytes by hand, for any training stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from common.training import TrainingModule
from launch.cli import main
from launch.errors import UsageError
from launch.memory import memory_plan, report
from launch.parameters import build

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "papers/dfosd/configs/demo/01_dfosd.yaml")

pytestmark = pytest.mark.usefixtures("no_network")


class Toy(TrainingModule):
    trainable: ClassVar = {"large": ("a.*",), "small": ("b.*",)}

    def __init__(self, momentum: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.momentum = momentum
        with torch.device("meta"):
            self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)  # 8 and 6 numbers
            self.c, self.d = nn.Linear(4, 4).bfloat16(), nn.Linear(1, 1)  # 20 and 2
            self.again = self.d

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.trainable_parameters("large"), fused=True)
        return [first, torch.optim.SGD(self.trainable_parameters("small"), lr=0.1, momentum=self.momentum)], []


@pytest.mark.parametrize(
    ("settings", "gradients", "states", "average"),
    [
        ({}, 32, 64, 0),  # by turns: those of `large` are gone when `small` has its own
        ({"accumulate": 2}, 56, 64, 0),
        ({"momentum": 0.9, "ema_decay": 0.9}, 32, 64 + 24, 56),
    ],
)
def test_each_part_by_hand(settings: dict[str, Any], gradients: int, states: int, average: int) -> None:
    assert memory_plan(Toy(**settings)) == {
        "frozen weights, bfloat16": 40,
        "frozen weights, float32": 8,
        "trained weights": 56,
        "gradients": gradients,
        "optimisers' states": states,
        "average of the trained weights": average,
    }


def test_dfosd_at_paper_scale() -> None:
    configs = [ROOT / "papers/dfosd/configs/sd21.yaml"]
    found = report(build(configs), configs)
    generator, discriminator = 4 * 16_301_696, 4 * 7_178_817
    plan = found["memory"]
    assert plan["trained weights"] == generator + discriminator
    assert plan["gradients"] == generator
    assert plan["optimisers' states"] == 2 * (generator + discriminator)
    assert plan["average of the trained weights"] == 0
    frozen = 865_910_724 + 83_653_863 + 351_662_080 + 14_714_688  # U-Net, VAE, discriminator trunk, VGG16
    halves, singles = plan["frozen weights, bfloat16"], plan["frozen weights, float32"]
    assert halves / 2 + singles / 4 == frozen
    assert 0.99 * 2 * (865_910_724 + 351_662_080) < halves <= 2 * (865_910_724 + 351_662_080)
    assert found["saves"]["frozen_dtype=bfloat16 instead of float32"] == halves
    assert found["text_encoders"] == 4 * 340_387_840
    assert found["total"] == sum(plan.values())


def test_the_table_says_what_it_leaves_out_and_c_is_taken_as_by_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parameters", "-c", DEMO, "--memory"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("not counted: activations")
    assert any(line.split()[:3] == ["held", "all", "the"] and line.split()[-2:] == ["39.4", "MB"] for line in lines)


def test_memory_is_of_training_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parameters", DEMO, "--memory", "--inference"]) == 2
    assert "--inference: not allowed with argument --memory" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--memory: LightningModule is not a TrainingModule"):
        report(LightningModule(), [])
