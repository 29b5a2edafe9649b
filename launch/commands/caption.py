"""`isr caption SOURCE -o MANIFEST`: captions of photos' patches, the manifest that text-to-image training reads.

A caption is of its patch, not of the photo: a row of the manifest is a window (image_path, top, left, side) and its
prompt, and `data.SRData` with `train` set to the manifest trains on just these. The work survives being killed: every
batch is put on the disk, and the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import UsageError

if TYPE_CHECKING:
    from data.captions import Journal, Patches

LINE_EVERY = 60.0
"""Seconds from one line to the next where no bar can be drawn."""


def run(command: str, argv: Sequence[str]) -> int:
    """Caption what has no caption yet, write the manifest and return the exit code.

    Raises:
        UsageError: An argument is out of range.
        ValueError: The source holds nothing to caption, or the output was begun with other settings.
    """
    options = _parse(command, argv)
    output = Path(options.output).expanduser()
    part = output.with_name(f"{output.name}.part")

    from common.conditioning.captions import Captioner  # these take seconds, which --help need not
    from data.captions import Journal, Patches, check_manifest, write_manifest
    from data.images import first_five, list_images
    from data.inventory import Inventory, unused_files, write_unused

    check_manifest(output, "output")
    if output.exists() and not part.exists():
        raise UsageError(f"output={output} is there already; delete it, or give another")
    device = _device(options.device)
    paths = [path for path, _ in list_images(options.source, "source")]
    captioner = Captioner(options.model, options.instruction, options.max_new_tokens).to(device)
    settings = {
        "source": os.path.abspath(options.source),
        "model": options.model,
        "instruction": options.instruction,
        "max_new_tokens": options.max_new_tokens,
        "patch": options.patch,
        "stride": options.stride,
    }
    journal = Journal(part, settings)
    try:
        unused = unused_files(options.source, [paths], {}, "not used")
        found = Inventory("source", options.source, len(set(paths)), "photos to caption", unused, paths)
        table = output.with_name(f"{output.name}.skipped.csv")
        print(f"isr: {found}" + (f", named in {table}" if write_unused(table, [found]) else ""), file=sys.stderr)
        patches = Patches(paths, output.parent, options.patch, options.stride or 1)
        progress = _Progress(patches, journal)
        with progress:
            for keys, images_01 in patches.batches(journal.done, options.batch_size):
                journal.add(keys, captioner(images_01))
                progress.advance(len(keys))
        keys = patches.all_keys()
        if not keys:
            raise ValueError(
                f"source={options.source} leaves nothing to caption: {first_five(patches.skipped)}; give larger or "
                "other images, or a smaller --patch"
            )
        write_manifest(output, keys, journal.done)
        journal.remove()
    except BaseException:
        if journal.done:
            print(f"{part} keeps {len(journal.done)} captions; the same command goes on", file=sys.stderr)
        else:
            part.unlink(missing_ok=True)
        raise
    finally:
        journal.close()
    print(f"{output}: {len(keys)} captions of {len(patches.keys)} images")
    if patches.skipped:
        print(f"skipped {len(patches.skipped)} images: {first_five(patches.skipped)}", file=sys.stderr)
    return 0


def _parse(command: str, argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        f"isr {command}",
        description="Caption the patches of photos and write a manifest of them for training. It can be killed at any "
        "time: the same command goes on where it was, and only the batch under way is lost.",
        epilog="Unreadable images and images smaller than the patch are skipped, counted and named. To share the work "
        "among machines, give each a list of its own; training takes several manifests.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, image, txt list, csv or parquet manifest")
    parser.add_argument("-o", "--output", default="captions.parquet", help="manifest to write, .parquet or .csv")
    parser.add_argument(
        "--model",
        default="florence-community/Florence-2-large",
        help="hub id or folder of an image-to-text model (default: %(default)s, which transformers reads by itself)",
    )
    parser.add_argument(
        "--instruction",
        default="<MORE_DETAILED_CAPTION>",
        help="what the model is asked (default: %(default)s, a paragraph that about fills the 77 tokens of CLIP's text "
        "encoders; Florence-2's <CAPTION> is one short sentence, made several times as fast, which leaves most of what "
        "a patch shows unsaid; chat models need a question)",
    )
    parser.add_argument("--patch", type=int, help="side of a patch, px of the photo (default: 512)")
    parser.add_argument(
        "--stride",
        type=int,
        help="from one patch to the next, px (default: --patch); those at the right and lower border are moved inside, "
        "so that the whole photo is covered",
    )
    parser.add_argument("--whole", action="store_true", help="caption whole images of any size instead of patches")
    parser.add_argument("--batch-size", type=int, default=16, help="patches at once (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=77,
        help="a caption is cut there (default: %(default)s, as CLIP's text encoders read no more)",
    )
    parser.add_argument("--device", help="where the model runs (default: cuda if there is one, else cpu)")
    options = parser.parse_args(list(argv))
    if options.whole:
        for name in ("patch", "stride"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name} {getattr(options, name)} has no effect with --whole; leave one of them out")
    else:
        options.patch = 512 if options.patch is None else options.patch
        options.stride = options.patch if options.stride is None else options.stride
    for name in ("patch", "stride", "batch_size", "max_new_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is out of range; give 1 or more")
    if not options.whole and options.stride > options.patch:
        raise UsageError(
            f"--stride {options.stride} leaves gaps between patches of --patch {options.patch}; give {options.patch} "
            "or less"
        )
    return options


def _device(name: str | None) -> str:
    """The device asked for, or the best there is.

    Raises:
        UsageError: There is no such device here.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); give cpu or cuda") from error
    return name


class _Progress:
    """Counts and rate: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self, patches: Patches, journal: Journal) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._patches, self._new = patches, 0
        keys = {key for found in patches.keys.values() for key in found}
        self._total, self._before = len(keys), sum(key in journal.done for key in keys)
        console = Console(stderr=True)
        text = TextColumn("{task.fields[text]}")
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            text,
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=self._total, completed=self._before, text="")

    def __enter__(self) -> None:
        self._start = self._said = time.monotonic()
        self._bar.start()
        self._say()

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, captions: int) -> None:
        """Count new captions."""
        self._new += captions
        now = time.monotonic()
        rate = self._new / max(now - self._start, 1e-9)
        self._bar.update(self._task, completed=self._before + self._new, text=f"{rate:.1f}/s, {self._skipped()}")
        if now - self._said >= LINE_EVERY:
            self._said = now
            self._say(f", {rate:.1f}/s")

    def _skipped(self) -> str:
        return f"{len(self._patches.skipped)} images skipped"

    def _say(self, rate: str = "") -> None:
        if self._bar.disable:
            print(
                f"captioned {self._before + self._new} of {self._total}{rate}, {self._skipped()}",
                file=sys.stderr,
                flush=True,
            )
