"""`isr foundation`: train the embedded tiny foundation again, by the recipes in `common/foundation/configs`.

Two stages, each a plain `isr fit`: the VAE, then the U-Net with its text encoder in the VAE's latent space. A finished
stage is skipped when its part is already in the output folder, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import common.foundation

CONFIGS = Path(common.foundation.__file__).parent / "configs"


def run(command: str, argv: Sequence[str]) -> int:
    """Train what is missing in the output folder and return the exit code."""
    parser = argparse.ArgumentParser(f"isr {command}", description=__doc__)
    parser.add_argument("--output", default="runs/foundation/weights", help="folder of the new weights")
    parser.add_argument("--steps", type=int, help="steps of each stage, for a quick try (default: the recipes')")
    options = parser.parse_args(list(argv))
    output = Path(options.output)
    from launch.lightning_cli import IsrCLI

    extra = [f"--data.steps={options.steps}"] if options.steps else []
    if not (output / "vae" / "config.json").is_file():
        cli = IsrCLI(["fit", "-c", str(CONFIGS / "vae.yaml"), *extra])
        batches = itertools.islice(cli.datamodule.train_dataloader(), 40)
        cli.model.save_foundation(str(output / "vae"), batches)
    if not (output / "unet" / "config.json").is_file():
        cli = IsrCLI(["fit", "-c", str(CONFIGS / "unet.yaml"), f"--model.vae={output}", *extra])
        cli.model.save_foundation(output)
    print(f"foundation written to {output}; to embed it, copy its folders to common/foundation/weights")
    return 0
