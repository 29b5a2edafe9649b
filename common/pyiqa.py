"""Networks of pyiqa, for metrics and rewards; pyiqa is an optional package and is imported at the first call."""

from __future__ import annotations

import difflib
from typing import Any

import torch

from common.draws import own_random_state
from common.files import safe_loading

PYIQA = "pyiqa:"
"""Prefix of the ids of pyiqa's metrics."""


class MetricUnavailableError(RuntimeError):
    """A metric is not available here; the message is the reason, on one line, for "not computed: <reason>"."""


def load_pyiqa(name: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Make the network of one of pyiqa's metrics, with its weights, downloaded where absent.

    The network is in evaluation mode. The global random states stay as they are.

    Args:
        name: pyiqa's name, e.g. "musiq", "lpips", "maniqa-pipal".
        device: Device of the network.

    Returns:
        pyiqa's `InferenceModel`, and the metric's options by name.

    Raises:
        ValueError: pyiqa has no metric of this name, or the metric scores folders, not images.
        MetricUnavailableError: pyiqa is not installed, or the metric's imports or weights are not available.
    """
    with own_random_state(device):
        try:
            import pyiqa  # takes 5 s and is an extra
            from pyiqa.default_model_configs import DEFAULT_CONFIGS
        except ImportError as error:
            raise MetricUnavailableError(
                f"{PYIQA}{name}: pyiqa cannot be imported ({_first_line(error)}); pip install 'isr-papers[metrics]'"
            ) from error
        if name not in DEFAULT_CONFIGS:
            close = ", ".join(difflib.get_close_matches(name, DEFAULT_CONFIGS, n=5)) or "no name close to it"
            raise ValueError(f"pyiqa has no metric {name!r}; it has {close}; pyiqa.list_models() lists all")
        if "fid" in name or name == "inception_score":
            raise ValueError(f"pyiqa's {name} judges a folder, not an image; it cannot be a per-image metric")
        try:
            with safe_loading():
                model = pyiqa.create_metric(name, device=device)
        except Exception as error:  # a download fails in as many ways as pyiqa has loaders
            raise MetricUnavailableError(f"{PYIQA}{name}: {_first_line(error)}") from error
    options = DEFAULT_CONFIGS[name]["metric_opts"].items()
    return model.eval(), {key: value for key, value in options if key != "type"}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
