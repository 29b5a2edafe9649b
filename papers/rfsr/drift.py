"""A figure of reward training's effect on images: gain in reward over drift of style from the base's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.figures import save_figure


def plot_drift(path: Path, rows: Sequence[Mapping[str, Any]], reward: str) -> None:
    """Draw each image's gain in a reward over its Gram distance to the base's image.

    Args:
        path: PNG to write.
        rows: One row for each image, with the columns `gram`, the reward's name, and that name with `_base`.
        reward: Name of the reward.
    """
    from matplotlib.figure import Figure

    gram = np.array([row["gram"] for row in rows])
    gain = np.array([row[reward] - row[f"{reward}_base"] for row in rows])
    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="gray", linewidth=1)
    axes.scatter(gram, gain, s=8, alpha=0.5, linewidths=0)
    axes.set(xlabel="Gram distance to the base's image", ylabel=f"gain in {reward}")
    axes.set_title(f"n = {len(rows)}: mean gain {gain.mean():+.4f}, mean Gram distance {gram.mean():.4g}", fontsize=10)
    caption = (
        f"Each test image's gain in the raw reward {reward} over the base with the same noise, over the distance of "
        "the two images' Gram matrices (weighted sum over VGG19's layers), the drift of style."
    )
    save_figure(path, figure, caption)
