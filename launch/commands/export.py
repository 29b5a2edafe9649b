"""`isr export RUN -o DIR`: take a trained model away as a diffusers folder, with its averaged weights (EMA)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import check_free, held
from launch import usage
from launch.errors import UsageError


def run(command: str, argv: Sequence[str]) -> int:
    """Write the folder and return the exit code.

    Raises:
        UsageError: The checkpoint does not say what it is of, its method has nothing to take away, or the folder holds
            files.
    """
    parser = usage.parser(command, __doc__)
    parser.add_argument("run", metavar="RUN", help="checkpoint, or a run's folder, of which the newest is taken")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the networks")
    options = parser.parse_args(list(argv))
    from common.checkpoints import newest_checkpoint  # these take seconds, which --help need not
    from launch.export import load

    check_free(options.output)
    path = newest_checkpoint(Path(options.run)) or Path(options.run)
    export: Any = getattr(load(path), "export", None)
    if export is None:
        raise UsageError(f"{path}: its method has nothing to export; what it trains is in the checkpoint")
    with held(options.output):
        export(options.output)
    print(f"written: {', '.join(sorted(str(folder) for folder in Path(options.output).iterdir()))}")
    return 0
