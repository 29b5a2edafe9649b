"""`isr fit | validate | test | predict`: the commands that LightningCLI runs."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Sequence

from launch import signals, usage


def run(command: str, args: Sequence[str]) -> int:
    """Run one of the four commands with these arguments and return the exit code.

    Raises:
        UsageError: The arguments or a config cannot be understood.
        Stopped: A signal ends the command.
    """
    if _asks_for_help(args) and not (named := usage.classes(args)):
        print(usage.page(command))
        return 0
    from launch import lightning_cli  # takes seconds, which the short help need not

    if _asks_for_help(args):
        for section, class_path in named.items():
            with contextlib.suppress(SystemExit):
                lightning_cli.IsrCLI([command, f"--{section}.help", class_path])
        print(f"\n{usage.examples(command)}")
        return 0
    args = ["--help" if argument == "--help-all" else argument for argument in args]
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertising)
    lightning_cli.IsrCLI([command, *args])
    if (number := signals.received()) is not None:  # after the last step, so that nothing waited for it
        raise signals.Stopped(number)
    return 0


def _asks_for_help(args: Sequence[str]) -> bool:
    return "-h" in args or "--help" in args


def _no_advertising(record: logging.LogRecord) -> bool:
    return "Tip: " not in record.getMessage()


_NOISE = (
    ".*isinstance.treespec, LeafSpec.*",  # Lightning 2.6 on torch 2.15
    ".*module.s. in eval mode at the start of training.*",  # the frozen base is meant to be
    ".*overridden `on_after_batch_transfer` in `LightningModule`.*",  # on purpose: uint8 becomes float on the device
    ".*overridden `transfer_batch_to_device` in `LightningModule`.*",  # on purpose: `index` stays on the host
    ".*does not have many workers.*",  # the embedded photos are quick to degrade; SRData has num_workers=4
    ".*Using ModelCheckpoint with manual optimization.*",  # its checkpoint holds the weights after the step
    ".*but returned no dataloaders.*",  # no validation set was asked for
)
