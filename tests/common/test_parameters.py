"""Counting: each parameter once, adapters apart from their base, the papers' sums."""

import torch
from torch import nn

from common.adapters import OSEDIFF_TARGETS, add_lora
from common.conditioning.text import LearnedEmbedding
from common.loading import architecture_only, load_unet, load_vae
from common.parameters import Row, count, count_split, is_lora


def test_a_count_by_hand() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # 6 + 2, 2 + 2; running statistics are no parameters
    net[0].requires_grad_(False)
    assert count(net) == (12, 4)


def test_shared_modules_and_tied_parameters_count_once() -> None:
    shared = nn.Linear(3, 2)
    other = nn.Linear(3, 2, bias=False)
    other.weight = shared.weight
    assert count(nn.ModuleList([shared, shared, other])) == (8, 8)


def test_adapters_count_apart_from_their_base() -> None:
    net = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 1))
    assert count_split(net) == (73, 0, 73)
    add_lora(net, 2, 2, ["0"])
    assert count_split(net) == (73, 2 * (10 + 6), 2 * (10 + 6))
    assert count(net) == (73 + 32, 32)


def test_a_head_trained_beside_an_adapter_is_base_and_trainable() -> None:
    net = add_lora(nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 1)), 2, 2, ["0"])
    net[1].requires_grad_(True)
    assert count_split(net) == (73, 32, 32 + 7)


def test_only_whole_name_parts_mark_an_adapter() -> None:
    assert is_lora("down.0.to_q.lora_A.default.weight")
    assert is_lora("lora_B.default.weight")
    assert not is_lora("flora_A.weight")
    assert not is_lora("to_q.base_layer.weight")


def test_dfosds_generator_has_its_published_size() -> None:
    with architecture_only(), torch.device("meta"):
        unet = add_lora(load_unet("random:sd21"), 16, 16, OSEDIFF_TARGETS)
        generator = nn.ModuleList([unet, load_vae("random:sd21"), LearnedEmbedding(77, 1024)])
    total, trainable = count(generator)
    assert total == 965_866_283  # published: 966.3 M
    assert trainable == 16_222_848 + 78_848
    row = Row("generator", "adapter", total, trainable)
    assert (row.total, row.trainable) == (total, trainable)
