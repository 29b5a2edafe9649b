"""Class paths of earlier versions, which the checkpoints and configurations of old runs hold."""

from __future__ import annotations

from typing import Any

MOVED = {
    "papers.rfsr.base": "papers.rfsr.pretraining",
    "papers.rfsr.bases": "papers.rfsr.base_models",
}
"""Modules whose classes configurations name: earlier name -> today's."""


def current(settings: Any) -> Any:
    """Replace the class paths of earlier versions by today's.

    Args:
        settings: A value of a configuration or of a checkpoint: mappings, lists and single values.

    Returns:
        The same settings; text that names a class in a moved module names it where it is now.
    """
    if isinstance(settings, dict):
        return {key: current(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [current(value) for value in settings]
    if isinstance(settings, str):
        module, _, name = settings.rpartition(".")
        return f"{MOVED[module]}.{name}" if module in MOVED else settings
    return settings
