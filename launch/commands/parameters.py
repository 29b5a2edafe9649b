"""`isr parameters CONFIG [OVERLAY ...] [--inference | --memory] [--json]`: how large a configuration is."""

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
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="CONFIG", help="the same, as for isr fit"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--inference", action="store_true", help="only what a prediction builds")
    what.add_argument("--memory", action="store_true", help="also the memory that training holds, without activations")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options, overrides = parser.parse_known_args(list(argv))
    configs = [*options.configs, *options.config]
    if not configs:
        raise UsageError(f"no config given; e.g. isr {command} papers/dfosd/configs/sd21.yaml")
    from launch import memory
    from launch.parameters import build, class_path, summary, table  # takes seconds, which --help need not

    model = build(configs, overrides, options.inference)
    counted = summary(model)
    planned = memory.report(model, configs, overrides) if options.memory else None
    if options.json:
        more = {} if planned is None else {"memory": planned}
        print(json.dumps({"model": class_path(model), "configs": configs, **counted, **more}, indent=2))
    else:
        print(table(class_path(model), counted))
        if planned is not None:
            print("", memory.table(planned), sep="\n")
    return 0
