"""`isr caption SOURCE -o MANIFEST`: captions of photos' patches, the manifest that text-to-image training reads.

A caption is of its patch, not of the photo: a row of the manifest is a window (image_path, top, left, side) and its
prompt, and `data.SRData` with `train` set to the manifest trains on just these. The work survives being killed: every
batch is put on the disk, and the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch import usage
from launch.errors import UsageError

if TYPE_CHECKING:
    from data.captions import Journal, Key, Patches, Shard

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

    from common.conditioning.captions import Captioner  # these take seconds, which --help need not
    from data.captions import Journal, Patches, Shard, check_manifest
    from data.sources import Part, list_images

    check_manifest(output, "output")
    shard = Shard(*options.shard)
    part, journals = shard.journal(output), shard.journals(output)
    if output.exists() and not any(path.exists() for path in journals):
        raise UsageError(f"output={output} is there already; delete it, or give another")
    device = _device(options.device)
    paths = [path for path, _ in list_images(Part(options.source, options.first), "source")]
    captioner = Captioner(options.model, options.instruction, options.max_new_tokens).to(device)
    settings = {
        "source": os.path.abspath(options.source),
        **{name: getattr(options, name) for name in ("model", "instruction", "max_new_tokens", "patch", "stride")},
        **{name: getattr(options, name) for name in ("first", "per_photo")},
    }

    def cut(images: list[Path]) -> Patches:
        return Patches(images, output.parent, options.patch, options.stride or 1, options.per_photo)

    journal = Journal(part, settings)
    try:
        if shard.number == 1:
            _report_inventory(options.source, paths, output)
        mine = list(dict.fromkeys(paths))[shard.number - 1 :: shard.of]
        patches = cut(paths if shard.of == 1 else mine)
        progress = _Progress(patches, journal)
        with progress:
            for keys, images_01 in patches.batches(journal.done, options.batch_size):
                journal.add(keys, captioner(images_01))
                progress.advance(len(keys))
        journal.leave_out(patches.unreadable)
        _finish(options.source, output, shard, journal, patches, lambda: cut(paths))
    except BaseException:
        if journal.done:
            print(f"{part} keeps {len(journal.done)} captions; the same command goes on", file=sys.stderr)
        else:
            part.unlink(missing_ok=True)
        raise
    finally:
        journal.close()
    return 0


def _report_inventory(source: str, paths: list[Path], output: Path) -> None:
    """Print what the source holds, and write the names of files that are not used."""
    from data.inventory import Inventory, unused_files, write_unused

    unused = unused_files(source, [paths], {}, "not used")
    found = Inventory("source", source, len(set(paths)), "photos to caption", unused, paths)
    table = output.with_name(f"{output.name}.skipped.csv")
    print(f"isr: {found}" + (f", named in {table}" if write_unused(table, [found]) else ""), file=sys.stderr)


def _finish(
    source: str, output: Path, shard: Shard, journal: Journal, patches: Patches, everything: Callable[[], Patches]
) -> None:
    """Write the manifest, where several processes share the work once the last of them is done, and say so.

    Raises:
        ValueError: There is nothing to caption.
    """
    from common.files import first_five
    from data.captions import joined, one_at_a_time, write_manifest

    done: dict[Key, str] | None = journal.done
    with one_at_a_time(output.parent):
        if shard.of > 1:
            print(f"{journal.path}: {len(journal.done)} captions of {len(patches.keys)} images", flush=True)
            if not journal.path.exists():
                return  # another process has joined all
            patches = everything()
            done = joined(shard.journals(output), patches)
        if done is None:
            return
        keys = patches.all_keys()
        if not keys:
            raise ValueError(
                f"source={source} leaves nothing to caption: {first_five(patches.skipped)}; give larger or other "
                "images, or a smaller --patch"
            )
        write_manifest(output, keys, done)
        for path in shard.journals(output):
            if path != journal.path:
                path.unlink()
        journal.remove()
    print(f"{output}: {len(keys)} captions of {len(patches.keys)} images")
    if patches.skipped:
        print(f"skipped {len(patches.skipped)} images: {first_five(patches.skipped)}", file=sys.stderr)


def _parse(command: str, argv: Sequence[str]) -> argparse.Namespace:
    options = _parser(command).parse_args(list(argv))
    if options.shard is None:
        processes = int(os.environ.get("WORLD_SIZE", 1))
        options.shard = (int(os.environ["RANK"]) + 1 if processes > 1 else 1), processes
    if not options.whole:
        options.patch = 512 if options.patch is None else options.patch
        options.stride = options.patch if options.stride is None else options.stride
    _check(options)
    return options


def _parser(command: str) -> argparse.ArgumentParser:
    parser = usage.parser(
        command,
        description="Caption the patches of photos and write a manifest of them for training. It can be killed at any "
        "time: the same command goes on where it was, and only the batch under way is lost.",
        epilog="Unreadable images and images smaller than the patch are skipped, counted and named. Several GPUs: "
        "torchrun --nproc-per-node 8 -m launch.cli caption ..., or one call with --shard for each; the last process to "
        "end writes the manifest, which is that of a single process.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, image, txt list, csv or parquet manifest")
    parser.add_argument("-o", "--output", default="captions.parquet", help="manifest to write, .parquet or .csv")
    parser.add_argument(
        "--model",
        default="florence-community/Florence-2-large",
        help="hub id or folder of an image-to-text model (default: %(default)s, which transformers reads by itself), "
        "or dape:FOLDER or ram:FOLDER for tags by DAPE or RAM; --instruction and --max-new-tokens are not for these",
    )
    parser.add_argument(
        "--instruction",
        default="<MORE_DETAILED_CAPTION>",
        help="text that the model gets (default: %(default)s, a paragraph that about fills the 77 tokens of CLIP's "
        "text encoders; Florence-2's <CAPTION> gives one short sentence, several times as fast, and leaves out most "
        "of a patch; chat models need a question)",
    )
    _add_patches(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="patches at once (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=77,
        help="longest caption, in tokens (default: %(default)s, as CLIP's text encoders read no more)",
    )
    parser.add_argument("--device", help="where the model runs (default: cuda if there is one, else cpu)")
    return parser


def _add_patches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--patch", type=int, help="side of a patch, px of the photo (default: 512)")
    parser.add_argument(
        "--stride",
        type=int,
        help="distance from one patch to the next, px (default: --patch); patches at the right and lower border are "
        "moved inside, so that the whole photo is covered",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="one caption for each whole image of any size, which all of its training crops take",
    )
    parser.add_argument("--first", type=int, help="caption the first images of the source alone (default: all)")
    parser.add_argument(
        "--per-photo", type=int, help="largest number of patches of an image, spread evenly over it (default: all)"
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=None,
        metavar="I/N",
        help="caption the I-th of N parts of the images (default: all of them; under torchrun the part of its rank)",
    )


def _check(options: argparse.Namespace) -> None:
    """Refuse options that are out of range or exclude each other.

    Raises:
        UsageError: One is, or two do.
    """
    for name in ("patch", "stride", "per_photo") if options.whole else ():
        if getattr(options, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)} has no effect with --whole; leave one of them out"
            )
    for name in ("patch", "stride", "batch_size", "max_new_tokens", "first", "per_photo"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} is out of range; give 1 or more")
    if not options.whole and options.stride > options.patch:
        raise UsageError(
            f"--stride {options.stride} leaves gaps between patches of --patch {options.patch}; give {options.patch} "
            "or less"
        )


def _shard(text: str) -> tuple[int, int]:
    """`3/8` as numbers."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text} is no part; give I/N with 1 <= I <= N, e.g. 1/8")
    return int(found[1]), int(found[2])


def _device(name: str | None) -> str:
    """The device asked for, or the best there is.

    Raises:
        UsageError: There is no such device here.
    """
    import torch

    if name is None:
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
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
        self._start = self._printed = time.monotonic()
        self._bar.start()
        self._print()

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, captions: int) -> None:
        """Count new captions."""
        self._new += captions
        now = time.monotonic()
        rate = self._new / max(now - self._start, 1e-9)
        self._bar.update(self._task, completed=self._before + self._new, text=f"{rate:.1f}/s, {self._skipped()}")
        if now - self._printed >= LINE_EVERY:
            self._printed = now
            self._print(f", {rate:.1f}/s")

    def _skipped(self) -> str:
        return f"{len(self._patches.skipped)} images skipped"

    def _print(self, rate: str = "") -> None:
        if self._bar.disable:
            print(
                f"captioned {self._before + self._new} of {self._total}{rate}, {self._skipped()}",
                file=sys.stderr,
                flush=True,
            )
