"""Count parameters: each once however often it is shared, adapters apart from their base."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn


class Count(NamedTuple):
    """Parameters of a module, and how many of them are trained."""

    total: int
    trainable: int


class CountBySource(NamedTuple):
    """Parameters of a module by where they come from, and how many of all are trained."""

    base: int
    lora_total: int
    trainable: int


@dataclass(frozen=True)
class Row:
    """One line of a table of parameters.

    Args:
        name: Name of the network, e.g. `U-Net`.
        kind: `base` for pretrained weights, `adapter` for LoRA on them, `module` for networks of the paper's own,
            `copy` for a frozen or slow copy of another row, `text` for networks that only make the condition.
        total: Number of parameters.
        trainable: Number of trained parameters.
        bytes_each: Bytes of one parameter, for text encoders alone, which are no part of the model.
    """

    name: str
    kind: Literal["base", "adapter", "module", "copy", "text"]
    total: int
    trainable: int
    bytes_each: int = 4


def is_lora(name: str) -> bool:
    """True if a parameter of this dotted name belongs to a LoRA adapter, by peft's naming."""
    return not {"lora_A", "lora_B"}.isdisjoint(name.split("."))


def count(module: nn.Module) -> Count:
    """Count a module's parameters; works on the meta device."""
    split = count_split(module)
    return Count(split.base + split.lora_total, split.trainable)


def count_split(module: nn.Module) -> CountBySource:
    """Count base and LoRA parameters apart; a parameter found under two names counts once, under the first."""
    named = dict(module.named_parameters())  # torch leaves out repeated ones
    lora = sum(parameter.numel() for name, parameter in named.items() if is_lora(name))
    total = sum(parameter.numel() for parameter in named.values())
    return CountBySource(total - lora, lora, sum(p.numel() for p in named.values() if p.requires_grad))


def rows_of(networks: Mapping[str, nn.Module], trained: Iterable[nn.Parameter], averaged: bool) -> list[Row]:
    """Rows of a method's networks: for each its own weights and its adapters, each parameter once.

    Args:
        networks: The networks by name; a parameter that several share counts for the first.
        trained: The trained parameters.
        averaged: Add a row for the average of what is trained.
    """
    trained_ids = {id(parameter) for parameter in trained}
    seen: set[int] = set()
    rows = []
    for network, module in networks.items():
        named = {name: p for name, p in module.named_parameters() if id(p) not in seen}
        seen.update(map(id, named.values()))
        for lora in (False, True):
            part = [p for name, p in named.items() if is_lora(name) is lora]
            learnt = sum(p.numel() for p in part if id(p) in trained_ids)
            if part and lora:
                rows.append(Row(f"{network} LoRA", "adapter", sum(p.numel() for p in part), learnt))
            elif part:
                rows.append(Row(network, "module" if learnt else "base", sum(p.numel() for p in part), learnt))
    if averaged:
        rows.append(Row("EMA of what is trained", "copy", sum(row.trainable for row in rows), 0))
    return rows
