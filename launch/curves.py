"""Training curves of runs, read from TensorBoard's event files, as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 3
_PANEL = (5.0, 3.2)  # inches
_FAR = 20


class Curve(NamedTuple):
    """A scalar over training steps, by step."""

    steps: list[int]
    values: list[float]


def read_curves(run: Path) -> dict[str, Curve]:
    """All scalars of a run, by tag; of a step that was logged twice the later value.

    Args:
        run: A run's folder, `<runs>/<paper>/<name>` of which the newest version with events is taken, or a version's.

    Raises:
        FileNotFoundError: There are no event files.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes a second

    versions = [path for path in run.glob("version_*") if any(path.glob("events.out.tfevents.*"))]
    folder = max(versions, key=lambda path: int(path.name.removeprefix("version_")), default=run)
    if not any(folder.glob("events.out.tfevents.*")):
        raise FileNotFoundError(f"run={run} has no event files; give a run that isr fit made")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    curves = {}
    for tag in sorted(events.Tags()["scalars"]):
        points = {event.step: event.value for event in events.Scalars(tag)}
        curves[tag] = Curve(sorted(points), [points[step] for step in sorted(points)])
    return curves


def draw_curves(runs: Mapping[str, Mapping[str, Curve]], *patterns: str) -> Figure:
    """Draw a panel for each tag with a line for each run that has it; logarithmic where values differ by far.

    Args:
        runs: Name -> what `read_curves` gave.
        *patterns: Tags, as in file names: `train/loss`, `val/*`.

    Raises:
        ValueError: No run has such a tag.
    """
    from matplotlib.figure import Figure

    everything = {tag for curves in runs.values() for tag in curves}
    tags = sorted(tag for tag in everything if any(fnmatchcase(tag, pattern) for pattern in patterns))
    if not tags:
        raise ValueError(f"patterns={patterns} fit no tag of {', '.join(runs) or 'no runs'}; give e.g. train/loss")
    rows = -(-len(tags) // _COLUMNS)
    figure = Figure(figsize=(_COLUMNS * _PANEL[0], rows * _PANEL[1]), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for panel, tag in zip(panels, tags, strict=False):
        for number, (name, curves) in enumerate(runs.items()):
            if tag in curves:
                panel.plot(*curves[tag], ".-", color=f"C{number}", label=name, linewidth=1, markersize=3)
        values = [value for curves in runs.values() if tag in curves for value in curves[tag].values]
        if 0 < _FAR * min(values) < max(values):
            panel.set_yscale("log")
        panel.set_title(tag, fontsize=10)
        panel.set_xlabel("step")
        panel.legend(fontsize=8)
    for panel in panels[len(tags) :]:
        panel.set_axis_off()
    return figure
