"""The learning rate of the embedded parts."""

import math

import pytest
import torch

from common.foundation.schedule import Anneal, anneal


def test_the_learning_rate_warms_up_stays_and_decays_to_a_twentieth() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    factor = Anneal(optimizer, 1000, warmup=20, tail=0.3).lr_lambdas[0]
    assert factor(0) == pytest.approx(1 / 20)
    assert factor(500) == factor(700) == 1
    assert factor(850) == pytest.approx(math.sqrt(0.05))
    assert factor(1000) == pytest.approx(0.05)
    assert anneal(optimizer, 1000, tail=0.0)["lr_scheduler"]["scheduler"].lr_lambdas[0](999) == 1
