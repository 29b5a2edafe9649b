"""Weights that are drawn and trained follow the run's seed; those that stand in for pretrained ones never change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from common.loading import load_unet
from papers.dfosd import DFOSD
from papers.dnf_sr.networks import Discriminator
from papers.f2idiff import Foundation
from papers.rfsr import BaseSR, ControlNet

Make = Callable[[int | None], nn.Module]


def configured(model: Any) -> nn.Module:
    model.configure_model()
    return model


def dfosd(pretrained: str, seed: int | None, **options: Any) -> nn.Module:
    small: dict[str, Any] = {"lora_rank": 2, "disc_hidden": 4, "perceptual": "none"}
    return configured(DFOSD(pretrained, seed=seed, **small, **options))


MAKERS: dict[str, Callable[[str, int | None], nn.Module]] = {
    "DFOSD": lambda sd, seed: dfosd(sd, seed, disc_prompt="own_learned"),
    "DFOSD, latent": lambda sd, seed: dfosd(sd, seed, discriminator="latent"),
    "DNF-SR's discriminator": lambda sd, seed: Discriminator("random:dinov3_tiny", hidden=4, seed=seed or 0),
    "F2IDiff's foundation": lambda sd, seed: configured(
        Foundation("tiny", "f2idiff_tiny", features="tiny", seed=seed, ema_decay=None)
    ),
    "a grown ControlNet": lambda sd, seed: configured(BaseSR(ControlNet(sd, grow=True), seed=seed)),
}
FROM_BASE = {"a grown ControlNet": "controlnet_cond_embedding"}  # all else of it is the U-Net's


@pytest.mark.parametrize("which", MAKERS)
def test_what_is_drawn_and_trained_follows_the_seed_and_what_is_frozen_does_not(
    which: str, make_sd: Callable[..., str]
) -> None:
    sd = make_sd()
    unset, zero, one = (dict(MAKERS[which](sd, seed).named_parameters()) for seed in (None, 0, 1))
    drawn = 0
    for name, value in zero.items():
        assert torch.equal(unset[name], value)
        if value.numel() == 1:
            continue
        is_constant = float(value.detach().std()) == 0  # zeros, ones
        if not value.requires_grad or is_constant or FROM_BASE.get(which, "") not in name:
            assert torch.equal(one[name], value), name
        else:
            drawn += 1
            assert not torch.equal(one[name], value), name
    assert drawn


def test_a_random_stand_in_is_always_the_same_unless_it_is_to_be_trained() -> None:
    one, same, other = (
        load_unet("random:f2idiff_tiny", **options).conv_in.weight for options in ({}, {"trainable": True}, {"seed": 1})
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
