"""Trained models, loaded from their checkpoints for inference."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.checkpoints import load_trained_weights, read_checkpoint
from common.training import TrainingModule
from launch.errors import UsageError
from launch.parameters import parse
from launch.parser import check_stored, dump
from launch.runs import stored_model


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
    checkpoint = read_checkpoint(path)
    model.stages.take(checkpoint, model.restore_stage)
    model.stages.check()
    model.fixed_texts.take(model, checkpoint)
    model.fixed_texts.encode(model)
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
