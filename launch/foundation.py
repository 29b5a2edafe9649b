"""`isr foundation`: train the embedded tiny foundation again, by the recipes in `common/foundation/configs`.

Stages, each a plain `isr fit`: the VAE in five parts, then in its latent space the U-Net with its text encoder, and the
feature-conditioned U-Net, which is F2IDiff's stage A. A stage whose folder is there is skipped, so an interrupted run
goes on.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import common.foundation
import papers

CONFIGS = Path(common.foundation.__file__).parent / "configs"
STAGES = ("vae", "vae_tune", "vae_decoder", "vae_long", "vae_noisy", "unet", "unet_features")
FEATURES = Path(papers.__file__).parent / "f2idiff" / "configs" / "foundation_tiny.yaml"


def run(command: str, argv: Sequence[str]) -> int:
    """Train what is missing in the output folder and return the exit code."""
    parser = argparse.ArgumentParser(f"isr {command}", description=__doc__)
    parser.add_argument("--output", default="runs/foundation/weights", help="folder of the new weights")
    parser.add_argument("--steps", type=int, help="steps of each stage, for a quick try (default: the recipes')")
    options = parser.parse_args(list(argv))
    output = Path(options.output)
    extra = [f"--data.steps={options.steps}", f"--trainer.val_check_interval={options.steps}"] if options.steps else []
    previous = None
    for stage in STAGES:
        folder = output / "stages" / stage
        if not folder.is_dir():
            _fit(stage, folder, previous, extra)
        previous = folder
    shutil.copytree(output / "stages" / "unet", output, dirs_exist_ok=True)
    shutil.copytree(output / "stages" / "unet_features", output, dirs_exist_ok=True)
    print(f"foundation written to {output}; to embed it, copy its six folders to common/foundation/weights")
    return 0


def _fit(stage: str, folder: Path, previous: Path | None, extra: list[str]) -> None:
    from launch.lightning_cli import IsrCLI  # imports Lightning, which --help need not

    argument = {"unet": "vae", "unet_features": "pretrained"}.get(stage, "start")
    start = [f"--model.{argument}={previous}"] if previous else []
    config = FEATURES if stage == "unet_features" else CONFIGS / f"{stage}.yaml"
    cli = IsrCLI(["fit", "-c", str(config), *start, *extra])
    unfinished = folder.with_name(f"{stage}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    if stage == "unet":
        cli.model.save_foundation(unfinished)
        assert previous is not None
        shutil.copytree(previous / "vae", unfinished / "vae")
    elif stage == "unet_features":
        cli.model.save_foundation(unfinished / stage)
    else:
        cli.model.save_foundation(str(unfinished / "vae"), itertools.islice(cli.datamodule.train_dataloader(), 40))
    unfinished.rename(folder)
