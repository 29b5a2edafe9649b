"""The demo's report: every row that restores images, bicubic enlargement and two blurs under one protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import demo
from launch.demo import Outcome

if TYPE_CHECKING:
    from data.datamodules import Photos
    from launch.comparison import WrittenReport
    from launch.comparison.pictures import NamedFigure

_NOTE = (
    "This shows that everything runs, on a toy scale: tiny networks, trained for minutes on a few photos. It does not "
    "rank the papers' methods."
)


def write_report(data: Photos, outcomes: Sequence[Outcome], runs: Path, max_steps: int | None) -> WrittenReport:
    """Choose the blurs on the validation photos and put everything side by side."""
    from launch import baselines
    from launch.comparison import compare

    done = [outcome for outcome in outcomes if not outcome.failure]
    methods = [outcome for outcome in done if outcome.row.restores]
    data.val_crops = None  # rows may look at few crops while they train; the blurs are chosen on all
    data.setup("validate")
    (val,) = data.val_dataloader()
    choice = [val.dataset[i] for i in range(len(val.dataset))]  # type: ignore[arg-type]  # it has a length
    sigmas = baselines.choose_sigmas(choice)
    chosen = ", ".join(f"{baselines.CHOSEN_FOR[metric]} at sigma {sigma:g} px" for metric, sigma in sigmas.items())
    tried = f"sigma {baselines.SIGMAS[0]:g} to {baselines.SIGMAS[-1]:g} px"
    notes = [
        *(
            [f"A quick look: every fit ran {max_steps} steps instead of its configuration's number."]
            if max_steps
            else []
        ),
        *(f"The row {o.row.label} is left out, it failed in {o.failure}" for o in outcomes if o.failure),
        _NOTE,
        *_random_parts(done),
        *_toy_conditions(done),
        f"The blurs were chosen on {len(choice)} crops of the validation photos, among {tried}: {chosen}. A method "
        "above bicubic but not above the blurs has removed noise and restored no detail that these metrics see.",
    ]
    return compare(
        runs={outcome.row.label: outcome.checkpoint or outcome.folder for outcome in methods},
        images={outcome.row.label: outcome.folder / "test" for outcome in methods},
        blurs=baselines.blur_names(sigmas),
        data=data,
        output=runs / "demo" / "report",
        metrics=demo.METRICS,
        figures=_figures(done),
        notes=notes,
        sources=[
            *(outcome.source() for outcome in done),
            "A run folder holds the whole configuration, config.yaml, and of a fit versions and git commit, run.json.",
        ],
        title="Demo: the methods side by side",
        device="cpu",
        progress=False,
    )


def _figures(outcomes: Sequence[Outcome]) -> list[NamedFigure]:
    """Plots that the rows left in their run folders, row by row, by file name."""
    from launch.comparison.pictures import NamedFigure

    return [
        NamedFigure(outcome.row.label, path)
        for outcome in outcomes
        for path in sorted((outcome.folder / "test" / "figures").glob("*.png"))
    ]


def _random_parts(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each setting by which a row's model has random weights, from the runs' saved configurations."""
    rows: dict[str, list[str]] = {}
    for outcome in outcomes:
        for setting in _random_settings(outcome.model, "model"):
            rows.setdefault(setting, []).append(outcome.row.label)
    return [f"Random weights instead of trained ones: {setting} ({', '.join(rows[setting])})." for setting in rows]


def _toy_conditions(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each condition of the embedded foundation that rows use, from the runs' saved configurations."""
    rows: dict[str, list[str]] = {}
    for outcome in outcomes:
        settings = outcome.model.get("init_args", {})
        if settings.get("condition") == "features" and settings.get("features") == "tiny":
            toy = "image features come from a two-layer ViT with random weights"
        elif settings.get("pretrained") == "tiny":
            toy = "texts go through an encoder that has read seventeen captions"
        else:
            continue
        rows.setdefault(toy, []).append(outcome.row.label)
    return [f"Toy condition: {toy} ({', '.join(rows[toy])})." for toy in rows]


def _random_settings(tree: Mapping[str, Any], prefix: str) -> list[str]:
    found: list[str] = []
    for key, value in tree.items():
        path = prefix if key == "init_args" else f"{prefix}.{key}"
        if isinstance(value, Mapping):
            found += _random_settings(value, path)
        elif isinstance(value, str) and (value == "random" or value.startswith("random:")):
            width = tree.get(key.replace("weights", "width"))
            found.append(f"{path}={value}" + (f", width {width:g}" if isinstance(width, float) else ""))
    return found
