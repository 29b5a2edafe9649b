"""The `isr` command. Nothing heavy is imported before the command is known: `isr --help` answers at once."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Sequence

from common.files import safe_loading
from launch.errors import UsageError, report
from launch.signals import Stopped, ending_on_signals, received

COMMANDS: dict[str, tuple[str, str]] = {  # module under launch.commands, line of the help
    "fit": ("fit", "train a method: isr fit -c CONFIG [-c OVERLAY ...] [--model.ARG=VALUE ...]"),
    "validate": ("fit", "score a checkpoint on the validation images"),
    "test": ("fit", "score a checkpoint on the test images, write metrics.csv and the images"),
    "predict": ("fit", "upscale a folder of images: --data.predict DIR [--output DIR]"),
    "parameters": ("parameters", "count a configuration's parameters, network by network, without weights"),
    "caption": ("caption", "caption the patches of photos for training: isr caption DIR -o captions.parquet"),
    "export": ("export", "write a trained model as a diffusers folder: isr export RUN -o DIR"),
    "compare": ("compare", "put runs, GANs and foreign results side by side: isr compare --runs RUN -o DIR"),
    "metrics": ("metrics", "the metrics' weights and licences: isr metrics list | doctor | fetch"),
    "demo": ("demo", "train and test every demo configuration on embedded photos, write the report"),
    "foundation": ("foundation", "train the embedded tiny foundation again (an hour or two)"),
}

HELP = (
    "usage: isr COMMAND [OPTIONS]\n\n"
    "Five papers on real-world image super-resolution under one protocol.\n\ncommands:\n"
    + "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    + "\n\n  isr COMMAND --help     its options\n"
    "  --debug                full tracebacks\n\n"
    "first steps: `make demo`, then README.md\n"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `isr` with these arguments (default: the process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    try:
        with ending_on_signals(), safe_loading():
            code = _run(arguments, debug)
            if (number := received()) is not None:  # and a library took the exception for its own
                raise Stopped(number)
            return code
    except Stopped as stop:
        print(f"isr: ended by {stop}; what was finished before is kept", file=sys.stderr)
        return stop.exit_code


def _run(arguments: Sequence[str], debug: bool) -> int:
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise UsageError(f"no command {command!r}; there are {', '.join(COMMANDS)} (isr --help has a line on each)")
        module = importlib.import_module(f"launch.commands.{COMMANDS[command][0]}")
        return int(module.run(command, rest) or 0)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (Exception, KeyboardInterrupt) as error:
        return report(error, debug)


def entry() -> None:
    """Console-script entry."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does: names of files may be no UTF-8
    sys.exit(main())


if __name__ == "__main__":
    entry()
