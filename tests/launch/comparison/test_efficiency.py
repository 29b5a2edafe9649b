"""Costs counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data.decoding import Pixels
from launch.comparison.efficiency import measure
from launch.comparison.inputs import Item
from launch.comparison.methods import Method


class Toy(Method):
    """A "U-Net" called three times an image, with a block within, and a part that no image sees."""

    kind = "run"

    def __init__(self) -> None:
        super().__init__("toy")
        self.unet = type("ToyUNet", (nn.Conv2d,), {})(3, 3, 3, padding=1)
        self.net = nn.ModuleDict({"unet": self.unet, "critic": nn.Linear(5, 5)})

    def key(self, item: Item) -> str:
        return "toy"

    def network(self) -> nn.Module:
        return self.net

    def trained(self) -> set[int]:
        return {id(self.unet.bias), id(self.net["critic"].weight)}

    def restore(self, item: Item) -> Pixels:
        with torch.no_grad():
            x = torch.zeros(1, 3, 10, 20)
            for _ in range(3):
                x = self.unet(x)
            torch.cat([x, x])
        return np.zeros((40, 40, 3), np.uint8)


def test_costs_are_counted_by_hand() -> None:
    item = Item("set", "a", "", Path(), None, "", "", (40, 40), 4)
    cost = measure(Toy(), item, torch.device("cpu"))
    weights = 3 * 3 * 9
    assert (cost.total, cost.trainable) == (weights + 3, 3)
    assert cost.macs == 3 * weights * 10 * 20
    assert cost.denoiser_calls == 3
    assert cost.seconds is not None
    assert cost.seconds > 0
    image = 3 * 10 * 20 * 4
    assert cost.memory_mb == pytest.approx((3 * image + 4 * (weights + 3)) / 1e6)  # the last output and twice its size
