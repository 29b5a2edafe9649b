"""`isr export RUN -o DIR`: take a trained model away as a diffusers folder, with its averaged weights (EMA)."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoints import load_trained_weights, newest_checkpoint, read_checkpoint
from common.files import check_free, held
from common.training import TrainingModule
from launch.errors import UsageError
from launch.lightning_cli import check_stored, dump
from launch.parameters import parse
from launch.runs import stored_model


def run(command: str, argv: Sequence[str]) -> int:
    """Write the folder and return the exit code.

    Raises:
        UsageError: The checkpoint does not say what it is of, its method has nothing to take away, or the folder holds
            files.
    """
    parser = argparse.ArgumentParser(f"isr {command}", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="checkpoint, or a run's folder, of which the newest is taken")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the networks")
    options = parser.parse_args(list(argv))
    check_free(options.output)
    path = newest_checkpoint(Path(options.run)) or Path(options.run)
    export: Any = getattr(load(path), "export", None)
    if export is None:
        raise UsageError(f"{path}: its method has nothing to export; what it trains is in the checkpoint")
    with held(options.output):
        export(options.output)
    print(f"written: {', '.join(sorted(str(folder) for folder in Path(options.output).iterdir()))}")
    return 0


def load(path: Path) -> TrainingModule:
    """The model of a checkpoint, configured for inference, with its averaged weights where it has them.

    Raises:
        UsageError: The checkpoint holds no settings: it was not written by `isr fit`.
    """
    settings = stored_model(path)
    if settings is None:
        raise UsageError(f"{path} holds no settings of a model; give a checkpoint that isr fit wrote")
    check_stored(settings, str(path))
    model = configured(settings, awaits_checkpoint=True)
    load_trained_weights(model, path, model.checkpoint_keys(), model.left_out)
    model.take_stages(read_checkpoint(path))
    model.check_stages()
    return model


def configured(settings: Mapping[str, Any], awaits_checkpoint: bool = False) -> TrainingModule:
    """A model for inference as its settings (class_path, init_args) make it, with nothing loaded on top."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump({"model": dict(settings)}))
        file.flush()
        parser, parsed = parse([file.name])
    model: TrainingModule = parser.instantiate(parsed).model
    model.inference_only, model.awaits_checkpoint = True, awaits_checkpoint
    model.configure_model()
    return model
