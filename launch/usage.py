"""Help pages: the short ones of the commands that LightningCLI runs, and two examples for each command."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.errors import UsageError
from launch.moved import current

EXAMPLES: dict[str, tuple[str, str]] = {
    "fit": (
        "isr fit -c papers/dfosd/configs/sd21.yaml -c data/configs/lsdir_ffhq.yaml -c launch/configs/ddp8.yaml",
        "isr fit -c papers/dfosd/configs/demo/01_dfosd.yaml --data data.SRData --data.train photos --data.crop_size 64",
    ),
    "validate": (
        "isr validate -c papers/dfosd/configs/sd21.yaml -c data/configs/lsdir_ffhq.yaml",
        "isr validate --ckpt_path runs/dfosd/sd21/version_0/checkpoints/last.ckpt -c data/configs/lsdir_ffhq.yaml",
    ),
    "test": (
        "isr test --ckpt_path runs/dfosd/sd21/version_0/checkpoints/last.ckpt -c data/configs/real_benchmarks.yaml",
        "isr test -c papers/dfosd/configs/sd21.yaml -c papers/dfosd/configs/metrics.yaml --data data.SRData "
        "--data.test RealSR",
    ),
    "predict": (
        "isr predict -c papers/dfosd/configs/sd21.yaml --data data.SRData --data.predict photos --output upscaled",
        "isr predict --ckpt_path runs/dfosd/sd21/version_0/checkpoints/last.ckpt --data data.SRData "
        "--data.predict photos/a.png --output upscaled.png",
    ),
    "parameters": (
        "isr parameters papers/dfosd/configs/sd21.yaml",
        "isr parameters papers/f2idiff/configs/sr_f2i.yaml --inference",
    ),
    "caption": (
        "isr caption photos -o captions.parquet",
        "isr caption photos -o tags.csv --whole --batch-size 4 --model dape:preset/models",
    ),
    "export": (
        "isr export runs/rfsr/seesr -o seesr_rfsr",
        "isr export runs/dfosd/sd21 -o dfosd",
    ),
    "compare": (
        "isr compare --runs runs/dfosd/sd21 runs/rfsr/seesr --pairs RealSR DRealSR --metrics psnr,ssim,lpips",
        "isr compare --results mine=osediff --weights BSRGAN=BSRGAN.pth --pairs RealSR -o runs/mine",
    ),
    "metrics": ("isr metrics list", "isr metrics fetch pyiqa:musiq"),
    "demo": ("isr demo", "isr demo --only dfosd --max-steps 20"),
    "foundation": ("isr foundation", "isr foundation --steps 2 --output runs/try"),
}

_PAGE = """usage: isr {command} -c CONFIG [-c OVERLAY ...] [--model.ARG VALUE ...] [--data.ARG VALUE ...]

{does}

configuration:
  -c, --config CONFIG         file with settings; give several, later ones win
  --model.ARG VALUE           setting of the method
  --data CLASS, --data.ARG    data module (data.SRData, data.Photos) and its settings
  --trainer.ARG VALUE         setting of Lightning's Trainer, e.g. --trainer.devices 4
  --seed_everything N         random seed of weights, data and draws (default: 0)
  --print_config              print the resulting configuration and stop

run:
  --runs DIR                  folder of all runs (default: runs)
  --name NAME                 name of the run (default: names of the configurations and the model's flags)
  --ckpt_path PATH            {checkpoint}
{more}
more help:
  isr {command} -c CONFIG --help    settings of that configuration's method and data module
  isr {command} --help-all          every option, those of Lightning's Trainer among them
"""
_COMMANDS = {
    "fit": (
        "Train a method.",
        "checkpoint of a run to resume",
        "  --init_from PATH            checkpoint whose trained weights a new run starts from\n"
        "  --checkpoint.keep N         checkpoints kept in addition to the last one (default: 4)\n"
        "  --checkpoint.monitor NAME   keep the best checkpoints by this metric instead, e.g. val/psnr_y\n",
    ),
    "validate": ("Score a checkpoint on the validation images.", "", ""),
    "test": ("Score a checkpoint on the test images; write metrics.csv and the images.", "", ""),
    "predict": (
        "Upscale images: --data.predict takes a folder, an image, a list or a manifest.",
        "",
        "  --output DIR                folder of the upscaled images, or, for one image, a file\n"
        "  --skip_existing true        leave out the images that are already there\n",
    ),
}
_SCORED = "checkpoint to load (default: the last one of the run; null: untrained)"


def examples(command: str) -> str:
    """The end of a command's help."""
    return "examples:\n" + "\n".join(f"  {example}" for example in EXAMPLES[command])


def parser(command: str, description: str | None, epilog: str = "", **options: Any) -> argparse.ArgumentParser:
    """A command's parser, whose help ends in examples.

    Args:
        command: Name of the command.
        description: Text above the options.
        epilog: Text below them.
        **options: For `argparse.ArgumentParser`.
    """
    return argparse.ArgumentParser(
        f"isr {command}",
        description=_filled(description or ""),
        epilog=f"{_filled(epilog)}\n\n{examples(command)}" if epilog else examples(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def _filled(text: str) -> str:
    """A paragraph in lines of 100 columns; text that has lines keeps them."""
    return text if "\n" in text else textwrap.fill(text, 100)


def page(command: str) -> str:
    """The short help of `fit`, `validate`, `test` or `predict`."""
    does, checkpoint, more = _COMMANDS[command]
    text = _PAGE.format(command=command, does=does, checkpoint=checkpoint or _SCORED, more=more)
    return f"{text}\n{examples(command)}"


def classes(arguments: Sequence[str]) -> dict[str, str]:
    """The classes of `model` and `data` that configurations and flags name, by section.

    Raises:
        UsageError: A configuration cannot be read.
    """
    found: dict[str, str] = {}
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option in ("-c", "--config"):
            try:
                settings = current(yaml.safe_load(Path(value).read_text()))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise UsageError(f"{option} {value} cannot be read: {' '.join(str(error).split())}") from None
            sections = settings if isinstance(settings, dict) else {}
            for section in ("model", "data"):
                named = sections.get(section)
                if isinstance(named, dict) and "class_path" in named:
                    found[section] = named["class_path"]
        elif option in ("--model", "--data"):
            found[option[2:]] = value
    return found
