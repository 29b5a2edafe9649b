"""Write docs/performance.md: `python benchmarks/report.py`.

Figures come from benchmarks/results/DEVICE.json, notes from DEVICE.md beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
HEAD = """# Performance

`make gpu` fills this page on one GPU: it runs every demo row on CUDA against the CPU, then
[benchmarks/paper_scale.py](../benchmarks/paper_scale.py), then `python benchmarks/report.py`. A second call measures
what is missing. Networks have the paper's size and random weights, images are noise, one text is encoded and kept. A
step holds everything that the configuration trains, discriminators and teachers too. TF32 is as torch and so `isr fit`
have it, on in float32 convolutions; some rows have another setting in their name. Frozen denoisers are held in
bfloat16, and the VAE works in float32, as configured ([precision](precision.md)).
"""
NONE = "\nNot yet measured on a GPU.\n"
COLUMNS = (
    "| configuration | crop | batch | ms a step | images a second | peak memory | bf16 rate reached | most time in |\n"
)


def page(results: Path = RESULTS) -> str:
    """Text of the page."""
    sections = []
    for path in sorted(results.glob("*.json")):
        sections.append(_device(json.loads(path.read_text())))
        if (notes := path.with_suffix(".md")).is_file():
            sections.append(f"\n{notes.read_text()}")
    return HEAD + ("".join(sections) or NONE)


def _device(found: Mapping[str, Any]) -> str:
    about, items = found["about"], found["items"]
    memory = f" {about['memory_gb']:.0f} GB," if "memory_gb" in about else ""
    lines = [
        f"\n## {about['device']}\n\n{about['date']},{memory} driver {about.get('driver', 'none')}, "
        f"torch {about['torch']}, diffusers {about['diffusers']},\n"
        f"Python {about['python']}, commit {about['commit']}. A bf16 matrix product of "
        f"this card reaches {about['bf16_matmul_tflop_per_s']:.0f} TFLOP a second;\nthe rate below is the share of "
        f"it that a step reaches, operations counted by torch.\n\n{COLUMNS}|{'---|' * 8}\n",
    ]
    for name, item in items.items():
        lines += [_step(name, item, size, figures, about) for size, figures in item.get("batches", {}).items()]
        if "failed" in item or item.get("stopped"):
            lines.append(f"| {name} | | | {item.get('failed') or item['stopped']} | | | | |\n")
    restored = [
        f"| {name.removeprefix('restore ')} | {side} | {figures.get('ms_per_image', figures.get('stopped'))} | "
        f"{figures.get('peak_gb', '')} | {_most(figures.get('ms_by_part', {}))} |\n"
        for name, item in items.items()
        for side, figures in item.get("sides", {}).items()
    ]
    if restored:
        lines += ["\n| restoring | size | ms an image | peak GB | most time in |\n|---|---|---|---|---|\n", *restored]
    for key, figures in items.get("feeding", {}).items():
        if key.endswith("workers"):
            lines.append(f"\nFeeding, {key}: {figures['pairs_per_s']} training pairs a second.\n")
    lines += [
        f"\n{name}, batch {size}: the host waits {sum(figures['host_waits'].values())} times in a step.\n"
        for name, item in items.items()
        for size, figures in item.get("batches", {}).items()
        if figures.get("host_waits") is not None
    ]
    missing = [name for name in _names() if name not in items]
    if missing:
        lines.append(f"\nNot measured: {'; '.join(missing)}.\n")
    return "".join(lines)


def _step(name: str, item: Mapping[str, Any], size: str, figures: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    share = figures["tflop_per_s"] / about["bf16_matmul_tflop_per_s"]
    return (
        f"| {name} | {item['crop']} px | {size} | {figures['ms_per_step']:.0f} | {figures['images_per_s']:.2f} | "
        f"{figures['peak_gb']:.1f} GB | {share:.1%} | {_most(figures['ms_by_part'])} |\n"
    )


def _most(parts: Mapping[str, float]) -> str:
    """The three parts that take the most time."""
    total = sum(parts.values())
    longest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{part.partition(':')[0]} {ms / total:.0%}" for part, ms in longest)


def _names() -> list[str]:
    from paper_scale import ITEMS

    return [item.name for item in ITEMS]


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
