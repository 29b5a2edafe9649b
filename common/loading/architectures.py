"""Architectures of public models without their weights, by name and by hub id."""

import json
from functools import cache
from pathlib import Path
from typing import Any

ARCHITECTURES = Path(__file__).parents[1] / "architectures"


def hub_table() -> dict[str, dict[str, Any]]:
    """Known hub ids in diffusers' layout: architecture, licence, whether gated, and a note if any."""
    return {repo: entry for repo, entry in known_ids().items() if entry.get("layout", "diffusers") == "diffusers"}


@cache
def known_ids() -> dict[str, dict[str, Any]]:
    """All of `hub.json`: those of `hub_table`, and the single models with `layout` transformers."""
    return json.loads((ARCHITECTURES / "hub.json").read_text())


def architectures() -> list[str]:
    """The names of all architectures."""
    return sorted(path.name for path in ARCHITECTURES.iterdir() if path.is_dir())


def architecture(name: str, asked_by: str) -> Path:
    """The folder of an architecture's configs.

    Args:
        name: Name of the architecture.
        asked_by: Argument and value that name it, for the message.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in architectures():
        raise ValueError(f"{asked_by}: no architecture '{name}'; there are {architectures()}.")
    return ARCHITECTURES / name
