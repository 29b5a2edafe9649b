"""Memory that a process takes for a training set of many rows: manifests, folders and prompts beside photos.

    python benchmarks/manifests.py --rows 1000000

Each kind is opened as a training run opens it (`SRData.setup`, inventory, check of the output folder, search for
prompts, first batch of the order) in a process of its own. `held` is what stays, `peak` the most on the way, both
beyond the process before; `text` is what paths and prompts take on the disk. Photos are links to one file a folder.
"""

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KINDS = ("windows.csv", "photos.csv", "photos.txt", "photos", "texts")
_IN_FOLDER = 1000  # photos
_WINDOWS = 10  # of a photo
_PROMPT = "A photograph of a long street, number {}, with many houses, some trees and a red bicycle against a wall."


def _photo(number: int) -> str:
    return f"photos/{number // _IN_FOLDER:05d}/{number:07d}.png"


def make(root: Path, rows: int) -> None:
    """Write the photos and what lists them."""
    for number in range(rows):
        path = root / _photo(number)
        if number % _IN_FOLDER == 0:
            path.parent.mkdir(parents=True)
            path.touch()
        else:
            os.link(root / _photo(number // _IN_FOLDER * _IN_FOLDER), path)
    (root / "photos.txt").write_text("".join(f"{_photo(i)}\n" for i in range(rows)))
    (root / "photos.csv").write_text(
        "image_path,prompt\n" + "".join(f'{_photo(i)},"{_PROMPT.format(i)}"\n' for i in range(rows))
    )
    windows = (f'{_photo(i // _WINDOWS)},{i % 8},{i % 5},512,"{_PROMPT.format(i)}"\n' for i in range(rows))
    (root / "windows.csv").write_text("image_path,top,left,side,prompt\n" + "".join(windows))
    (root / "texts.csv").write_text("name,prompt\n" + "".join(f'{i:07d},"{_PROMPT.format(i)}"\n' for i in range(rows)))


def _memory(field: str) -> int:
    """A field of this process's status, bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def open_set(root: Path, kind: str) -> None:
    """Open one kind in this process and print a line."""
    from data import SRData
    from data.sampler import StreamSampler

    source, prompts = (root / "photos", root / "texts.csv") if kind == "texts" else (root / kind, None)
    before, start = _memory("VmRSS"), time.perf_counter()
    data = SRData(str(source), prompts=None if prompts is None else str(prompts))
    data.setup("fit")
    assert data.train_images is not None
    rows = len(data.train_images)
    print(data.inventories("fit")[0], file=sys.stderr)
    data.check_apart("fit", root.parent / "no output")
    data.has_prompts("train")
    sampler = StreamSampler(rows, 4)
    sampler.batch(0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    took = time.perf_counter() - start
    held, peak = ((_memory(field) - before) / rows for field in ("VmRSS", "VmHWM"))
    text = sum(_text(root, kind, rows)) / rows
    print(f"| {kind} | {rows:,} | {text:.0f} | {held:.0f} | {peak:.0f} | {took:.0f} |", flush=True)


def _text(root: Path, kind: str, rows: int) -> Iterator[int]:
    photos = range(rows // _WINDOWS if kind == "windows.csv" else rows)
    yield sum(len(str(root / _photo(0))) for _ in photos)
    if kind in ("windows.csv", "photos.csv", "texts"):
        yield sum(len(_PROMPT.format(i)) for i in range(rows))


def main() -> int:
    """Measure each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--root", type=Path, help="folder to keep the photos in; without it they are deleted")
    parser.add_argument("--open", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        open_set(options.root, options.open)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder) / "set"
        if not root.exists():
            make(root, options.rows)
        print(
            "| kind | rows | text, bytes a row | held, bytes a row | peak, bytes a row | s |\n|---|---|---|---|---|---|"
        )
        for kind in options.kinds:
            command = [sys.executable, __file__, "--root", str(root), "--open", kind]
            subprocess.run(command, check=True, stdout=None, stderr=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
