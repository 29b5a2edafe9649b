"""Parameters of a configuration, network by network, and the model that configurations describe.

The model section is parsed as `isr fit` parses it and built on the meta device: nothing is downloaded, nothing big is
allocated, and no data is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]  # exported at run time
from lightning.pytorch import LightningModule

from common.loading import architecture_only
from common.parameters import Row, count
from common.training import TrainingModule
from launch.errors import UsageError
from launch.parser import Parser

OTHER_SECTIONS = (
    "checkpoint", "ckpt_path", "data", "init_from", "name", "output", "return_predictions", "runs", "seed_everything",
    "skip_existing", "trainer", "verbose", "weights_only",
)  # fmt: skip
"""Top-level keys of the other commands' configs; their contents are not looked at."""


@runtime_checkable
class Planned(Protocol):
    """A model whose memory is worth a plan."""

    def memory_plan(self) -> dict[str, int]:
        """Bytes of what training holds, by what it is."""
        ...


def build(configs: Sequence[str | Path], overrides: Sequence[str] = (), inference: bool = False) -> LightningModule:
    """Build the model that config files describe, on the meta device.

    Args:
        configs: YAML files, later ones over earlier ones; only their model sections count.
        overrides: Further arguments, `--model.ARG=VALUE`.
        inference: Leave out what only training needs.

    Raises:
        UsageError: A config is missing or cannot be understood, or no model is named.
    """
    parser, parsed = parse(configs, overrides)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of weights that are random, which nobody runs here
    try:
        with architecture_only(), torch.device("meta"):
            model: LightningModule = parser.instantiate(parsed).model
            if isinstance(model, TrainingModule):
                model.inference_only = inference
            model.configure_model()
    finally:
        logging.disable(before)
    return model


def parse(configs: Sequence[str | Path], overrides: Sequence[str] = ()) -> tuple[Parser, Namespace]:
    """Read and check the model section of config files; arguments and errors as for `build`.

    Returns:
        The parser, and what it found: `model.class_path` and `model.init_args`.
    """
    parser = Parser(prog="isr")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True, required=False)
    for section in OTHER_SECTIONS:
        parser.add_argument(f"--{section}", type=Any)
    files: list[str] = []
    for config in configs:
        if not Path(config).is_file():
            raise UsageError(f"config {config}: no such file")
        files += ["--config", str(config)]
    parsed = parser.parse_args([*files, *overrides])
    if parsed.get("model") is None:
        raise UsageError(f"{', '.join(map(str, configs))}: no model section; give it model.class_path")
    for section in OTHER_SECTIONS:
        parsed.pop(section, None)
    return parser, parsed


def summary(model: LightningModule) -> dict[str, Any]:
    """Count a configured model.

    Returns:
        `networks`: rows as dicts; `sums`: the paper's own sums; `total` and `trainable` over all networks but text
        encoders; `optimizers`: how much each of them trains; `bytes`: its memory plan, empty where it has none. These
        two are of training, and empty where the model is `inference_only`.
    """
    trained = True
    if isinstance(model, TrainingModule):
        rows, sums, trained = model.parameter_rows(), model.parameter_sums(), not model.inference_only
        names = model.trainable_patterns() if trained else ()
        optimizers = {name: sum(p.numel() for p in model.trainable_parameters(name)) for name in names}
    else:
        rows, sums = _children(model), {}
        optimizers = {"all": sum(row.trainable for row in rows)}
    held = [row for row in rows if row.kind != "text"]
    return {
        "networks": [asdict(row) for row in rows],
        "sums": sums,
        "total": sum(row.total for row in held),
        "trainable": sum(row.trainable for row in held),
        "optimizers": optimizers,
        "bytes": model.memory_plan() if trained and isinstance(model, Planned) else {},
    }


def table(title: str, counted: dict[str, Any]) -> str:
    """Lay a `summary` out for reading."""
    lines: list[tuple[str, str, str, str]] = [("network", "kind", "parameters", "trained")]
    rows = counted["networks"]
    lines += [(r["name"], r["kind"], f"{r['total']:,}", f"{r['trainable']:,}") for r in rows if r["kind"] != "text"]
    rule = len(lines)
    lines.append(("all of these", "", f"{counted['total']:,}", f"{counted['trainable']:,}"))
    lines += [(f"optimiser: {name}", "", "", f"{number:,}") for name, number in counted["optimizers"].items()]
    lines += [(f"sum: {name}", "", f"{number:,}", "") for name, number in counted["sums"].items()]
    plan = [(name, "bytes", f"{number:,}", readable(number)) for name, number in counted["bytes"].items()]
    apart = [(r["name"], r["kind"], f"{r['total']:,}", f"{r['trainable']:,}") for r in rows if r["kind"] == "text"]
    widths = [max(len(line[column]) for line in [*lines, *apart, *plan]) for column in range(4)]

    def text(line: tuple[str, str, str, str]) -> str:
        name, kind, total, trained = line
        cells = (f"{name:<{widths[0]}}", f"{kind:<{widths[1]}}", f"{total:>{widths[2]}}", f"{trained:>{widths[3]}}")
        return "  ".join(cells).rstrip()

    dashes = "-" * (sum(widths) + 6)
    body = [text(lines[0]), dashes, *map(text, lines[1:rule]), dashes, *map(text, lines[rule:])]
    if apart:
        body += [dashes, *map(text, apart), "text encoders only make a condition and are not part of the totals"]
    if plan:
        body += [
            dashes,
            *map(text, plan),
            "memory of training, without activations and the networks of losses and rewards",
        ]
    return "\n".join([title, *body])


def readable(number: int) -> str:
    """A number of bytes in GB or MB."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _children(model: LightningModule) -> list[Row]:
    """Rows of a trainer that is no `TrainingModule`: its children."""
    rows = []
    for name, child in model.named_children():
        total, trainable = count(child)
        if isinstance(child, torch.optim.swa_utils.AveragedModel):
            rows.append(Row(name, "copy", total, 0))
        elif total:
            rows.append(Row(name, "module" if trainable else "base", total, trainable))
    return rows


def class_path(model: LightningModule) -> str:
    """Dotted name of a model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"
