"""`isr parameters CONFIG [OVERLAY ...] [--inference] [--json]`: how large a configuration is, network by network."""

from __future__ import annotations

import json
from collections.abc import Sequence

from launch import usage
from launch.errors import UsageError


def run(command: str, argv: Sequence[str]) -> int:
    """Print the table (or JSON) and return the exit code.

    Raises:
        UsageError: A config is missing or cannot be understood.
    """
    parser = usage.parser(
        command,
        "Count a configuration's parameters, network by network; without weights, data or network access.",
        "Further options of the form --model.ARG=VALUE override the configs.",
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="config files, later ones over earlier ones")
    parser.add_argument("--inference", action="store_true", help="only what a prediction builds")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options, overrides = parser.parse_known_args(list(argv))
    if not options.configs:
        raise UsageError(f"no config given; e.g. isr {command} papers/dfosd/configs/sd21.yaml")
    from launch.parameters import build, class_path, summary, table  # takes seconds, which --help need not

    model = build(options.configs, overrides, options.inference)
    counted = summary(model)
    if options.json:
        print(json.dumps({"model": class_path(model), "configs": options.configs, **counted}, indent=2))
    else:
        print(table(class_path(model), counted))
    return 0
