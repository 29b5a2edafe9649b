"""Within `architecture_only()` no weights are read: each network chooses where it would read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from common.loading import architecture_only, weights_to_read
from common.losses import DISTS, EALPIPS, LPIPS, GramKL, LatentLPIPS
from common.rewards import NegatedDISTS, NegatedLPIPS


@pytest.mark.parametrize("make", [DISTS, LPIPS, EALPIPS, GramKL, LatentLPIPS, NegatedDISTS, NegatedLPIPS])
@pytest.mark.parametrize("weights", ["pretrained", "a/file/that/is/not/there.pth"])
def test_networks_with_weights_that_are_not_there_are_laid_out_on_the_meta_device(
    make: Callable[..., nn.Module], weights: str
) -> None:
    with architecture_only():
        network = make(weights=weights)
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    with pytest.raises(FileNotFoundError):
        make(weights="a/file/that/is/not/there.pth")


def test_weights_are_the_users_outside() -> None:
    assert weights_to_read("pretrained") == "pretrained"
    with architecture_only():
        assert weights_to_read("pretrained") == weights_to_read("x.pth") == "random"
