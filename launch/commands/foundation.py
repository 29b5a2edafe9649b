"""`isr foundation`: train the embedded tiny foundation again, by the recipes in `common/foundation/configs`.

Stages, each a plain `isr fit`: the VAE in five parts, then in its latent space the U-Net with its text encoder. Then on
these the feature-conditioned U-Net, which is F2IDiff's stage A, the flow transformer, and the ControlNet that RFSR
starts from. A stage whose folder is there is skipped, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import common
import papers
from common.files import check_free, held
from launch import usage

CONFIGS = Path(common.__file__).parent / "foundation" / "configs"
PAPERS = Path(papers.__file__).parent


class RecipeStage(NamedTuple):
    """A stage: its name, its recipe, and the setting of the model that takes the folder of an earlier stage."""

    name: str
    config: Path
    argument: str = "start"
    after: str | None = None


STAGES = (
    RecipeStage("vae", CONFIGS / "vae.yaml"),
    RecipeStage("vae_tune", CONFIGS / "vae_tune.yaml", after="vae"),
    RecipeStage("vae_decoder", CONFIGS / "vae_decoder.yaml", after="vae_tune"),
    RecipeStage("vae_long", CONFIGS / "vae_long.yaml", after="vae_decoder"),
    RecipeStage("vae_noisy", CONFIGS / "vae_noisy.yaml", after="vae_long"),
    RecipeStage("unet", CONFIGS / "unet.yaml", "vae", after="vae_noisy"),
    RecipeStage("unet_features", PAPERS / "f2idiff" / "configs" / "foundation_tiny.yaml", "pretrained", after="unet"),
    RecipeStage("flow", CONFIGS / "flow.yaml", "pretrained", after="unet"),
    RecipeStage(
        "controlnet", PAPERS / "rfsr" / "configs" / "base_tiny.yaml", "base.init_args.pretrained", after="unet"
    ),
)


def run(command: str, argv: Sequence[str]) -> int:
    """Train what is missing in the output folder and return the exit code."""
    options = _parser(command).parse_args(list(argv))
    output = Path(options.output)
    check_free(output, own="stages")
    with held(output):
        for stage in STAGES:
            if not (output / "stages" / stage.name).is_dir():
                _fit(stage, output / "stages", options.steps)
        for name in ("unet", "unet_features", "flow", "controlnet"):
            shutil.copytree(output / "stages" / name, output, dirs_exist_ok=True)
    print(f"foundation written to {output}; to embed it, copy its folders to common/foundation/weights")
    return 0


def _parser(command: str) -> argparse.ArgumentParser:
    parser = usage.parser(command, __doc__)
    parser.add_argument("--output", default="runs/foundation/weights", help="folder of the new weights")
    parser.add_argument("--steps", type=int, help="steps of each stage, for a quick try (default: the recipes')")
    return parser


def _fit(stage: RecipeStage, stages: Path, steps: int | None) -> None:
    from launch.lightning_cli import IsrCLI  # imports Lightning, which --help need not

    start = [f"--model.{stage.argument}={stages / stage.after}"] if stage.after else []
    cli = IsrCLI(["fit", "-c", str(stage.config), *start, *_quick(stage, steps)])
    unfinished = stages / f"{stage.name}.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    if stage.name == "unet":
        cli.model.save_foundation(unfinished)
        shutil.copytree(stages / "vae_noisy" / "vae", unfinished / "vae")
    elif stage.name == "flow":
        cli.model.save_foundation(unfinished)
    elif stage.name in ("unet_features", "controlnet"):
        cli.model.save_foundation(unfinished / stage.name)
    else:
        cli.model.save_foundation(str(unfinished / "vae"), itertools.islice(cli.datamodule.train_dataloader(), 40))
    unfinished.rename(stages / stage.name)


def _quick(stage: RecipeStage, steps: int | None) -> list[str]:
    """Flags that end a stage after a few steps."""
    if steps is None:
        return []
    length = "trainer.max_steps" if stage.name == "controlnet" else "data.steps"
    return [f"--{length}={steps}", f"--trainer.val_check_interval={steps}"]
