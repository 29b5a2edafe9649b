"""Pairs of low-quality images and their references: by name or by a table, as a data set for validation and test."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import Dataset

from common.files import first_five, printable
from data.datasets import ImageSample, OnError, check_on_error, to_tensor
from data.decoding import ImageError, image_size, read_image
from data.inventory import Inventory, unused_files
from data.prompts import GivenPrompts, Texts
from data.sources import list_images, read_table, unique_names

log = logging.getLogger(__name__)

LQ_STEM = re.compile(r"(?P<base>.+?)(?:[_-](?:LR|LQ)(?:[_-]?x?(?P<a>\d{1,2}))?|[_-]?x(?P<b>[2-9]|1\d)[mdw]?\d?)$", re.I)
HQ_STEM = re.compile(r"(?P<base>.+?)(?:[_-](?:HR|HQ|GT)|_?x1)$", re.I)


def explicit(lq: object, hq: object, argument: str) -> str:
    """The two folders as values of this argument, for messages."""
    if argument in {"val", "test"}:
        return f"set data.init_args.{argument} to {{lq: {lq}, hq: {hq}}}"
    if argument == "pairs":
        return f"give --data a configuration whose data.init_args.test is {{lq: {lq}, hq: {hq}}}"
    return f"give {hq if argument == 'train' else lq} alone"


def _lq_base(stem: str, scale: int) -> str | None:
    """Stem of an LQ image of this factor without its suffix: Canon_001 of Canon_001_LR4, 0001 of 0001x4."""
    found = LQ_STEM.match(stem)
    factor = (found["a"] or found["b"]) if found else None
    return found["base"] if found and factor in (None, str(scale)) else None


def _hq_base(stem: str) -> str | None:
    """Stem of an HQ image without its suffix: Canon_001 of Canon_001_HR, Canon_10 of Canon_10_x1."""
    found = HQ_STEM.match(stem)
    return found["base"] if found else None


def _in_one_folder(files: Sequence[Path], scale: int) -> tuple[list[Path], list[Path]]:
    """LQ files of this factor and HQ files of a folder that holds both; those of other factors are left out."""
    wanted: dict[Path, set[bool]] = {}  # stem without suffix -> True if its LQ files are of this factor
    lqs, hqs = [], []
    for file in files:
        if found := LQ_STEM.match(file.stem):
            right = _lq_base(file.stem, scale) is not None
            wanted.setdefault(file.with_name(found["base"]), set()).add(right)
            lqs += [file] if right else []
    named = {file: file.with_name(base) for file in files if (base := _hq_base(file.stem)) is not None}
    hqs += [file for file, base in named.items() if wanted.get(base) != {False}]
    bases = {base for base, rights in wanted.items() if True in rights} - set(named.values())
    hqs += [file for file in files if file.with_suffix("") in bases]
    return lqs, hqs


def _by_stem(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    stems: dict[str, list[Path]] = {}
    for file in files:
        stems.setdefault(file.relative_to(folder).with_suffix("").as_posix(), []).append(file)
    return stems


def match_pairs(lq_dir: Path, hq_dir: Path, scale: int) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Pair the files of two folders by name: equal stems first, then stems without the usual suffixes, in any case.

    Both may be one folder (RealSR's own layout); then suffixes alone mark LQ and HQ.

    Args:
        lq_dir: Folder of LQ images.
        hq_dir: Folder of HQ images.
        scale: Super-resolution factor, part of some suffixes.

    Returns:
        (LQ, HQ) pairs in order of the LQ names, and a complaint about each file without a partner of its own.
    """
    lq_files = [path for path, _ in list_images(lq_dir, "lq_dir")]
    hq_files = [path for path, _ in list_images(hq_dir, "hq_dir")]
    if lq_dir.resolve() == hq_dir.resolve():
        lq_files, hq_files = _in_one_folder(lq_files, scale)
    lq_stems, hq_stems = _by_stem(lq_dir, lq_files), _by_stem(hq_dir, hq_files)

    pairs: list[tuple[Path, Path]] = []
    complaints: list[str] = []

    def settle(lqs: list[Path], hqs: list[Path]) -> None:
        if len(lqs) == len(hqs) == 1:
            pairs.append((lqs[0], hqs[0]))
        elif lqs and hqs:
            complaints.append("ambiguous " + " / ".join(str(path) for path in (*lqs, *hqs)))
        else:
            side = "LQ without HQ" if lqs else "HQ without LQ"
            complaints.extend(f"{side} {path}" for path in (*lqs, *hqs))

    for stem in sorted(lq_stems.keys() & hq_stems.keys()):
        settle(lq_stems.pop(stem), hq_stems.pop(stem))
    lq_bases: dict[str, list[Path]] = {}
    hq_bases: dict[str, list[Path]] = {}
    for stem, files in lq_stems.items():
        lq_bases.setdefault((_lq_base(stem, scale) or stem).casefold(), []).extend(files)
    for stem, files in hq_stems.items():
        hq_bases.setdefault((_hq_base(stem) or stem).casefold(), []).extend(files)
    for base in sorted(lq_bases.keys() | hq_bases.keys()):
        settle(lq_bases.get(base, []), hq_bases.get(base, []))
    return sorted(pairs), complaints


@dataclasses.dataclass(frozen=True)
class Pair:
    """A low-quality file, its reference, and the name of both."""

    lq: Path
    hq: Path
    name: str
    prompt: str | None = None


def _pairs_of_csv(table: Path, lq_dir: Path, hq_dir: Path) -> tuple[list[tuple[Path, Path, str | None]], list[str]]:
    """Pairs of a csv with the columns lq and hq, relative to the two folders, and the files in it that do not exist."""
    if not table.is_file():
        raise FileNotFoundError(f"csv={table} does not exist; give a table with the columns lq and hq")
    columns, rows = read_table(table, "csv")
    if not {"lq", "hq"} <= set(columns):
        raise ValueError(f"csv={table} has columns {', '.join(columns)}; it needs lq and hq")
    pairs: list[tuple[Path, Path, str | None]] = []
    complaints: list[str] = []
    for row in rows:
        lq, hq = lq_dir / row["lq"], hq_dir / row["hq"]
        absent = [f"missing {path}" for path in (lq, hq) if not path.is_file()]
        complaints += absent
        if not absent:
            pairs.append((lq, hq, row.get("prompt")))
    return pairs, complaints


class Pairs(Dataset[ImageSample]):
    """Low-quality images with their references, whole, for validation and test.

    Files are paired by name (equal stem; then without suffixes like _LR4 and _HR, x4, _x1) or by a csv, never by their
    position in a listing. Names are those of the LQ files.

    Args:
        lq_dir: Folder of LQ images.
        hq_dir: Folder of HQ images.
        scale: Super-resolution factor.
        csv: Table with the columns `lq` and `hq` (paths relative to the two folders) and optionally `prompt`; only
            listed files are paired.
        prompts: Prompts of the LQ images; without it they are empty.
        on_error: Action for unreadable, unmatched and ambiguous files and pairs of a wrong size: "raise", or "skip"
            and name them.
        argument: Name of the user's argument, for messages.

    Attributes:
        sources: The folders whose files `inventory` counts.
        layout: Their layout in the inventory.

    Raises:
        FileNotFoundError: A folder or the csv does not exist.
        ValueError: Files do not pair up, or a pair's sizes do not fit the scale; the first five are named.
    """

    def __init__(
        self,
        lq_dir: str | Path,
        hq_dir: str | Path,
        scale: int = 4,
        csv: str | Path | None = None,
        prompts: GivenPrompts = None,
        on_error: OnError = "raise",
        argument: str = "test",
    ) -> None:
        check_on_error(on_error)
        lq_root, hq_root = Path(lq_dir).expanduser(), Path(hq_dir).expanduser()
        for side, folder in (("lq_dir", lq_root), ("hq_dir", hq_root)):
            if not folder.is_dir():
                raise FileNotFoundError(f"{side}={folder} is not a folder; give the folder of the images")
        if csv is None:
            matched, complaints = match_pairs(lq_root, hq_root, scale)
            found: list[tuple[Path, Path, str | None]] = [(lq, hq, None) for lq, hq in matched]
        else:
            found, complaints = _pairs_of_csv(Path(csv).expanduser(), lq_root, hq_root)
        where = f"lq_dir={lq_dir}, hq_dir={hq_dir}"
        self.sources: list[Path] = [lq_root, hq_root]
        self.layout = f"pairs of {lq_dir} and {hq_dir}" if csv is None else f"pairs of {csv}"
        if complaints and on_error == "raise":
            raise ValueError(
                f"{where}: {len(complaints)} files do not pair up: {first_five(complaints)}; rename them, give "
                f"csv=<table with columns lq,hq> ({explicit(lq_dir, hq_dir, argument)} with csv beside hq), or set "
                "on_error=skip there"
            )
        self._broken: dict[Path, str] = {}
        found = self._without_broken(found, scale, on_error)
        complaints += self._broken.values()
        if not found:
            raise ValueError(f"{where}: no pairs found; name LQ and HQ files alike, or give csv=<table>")
        if complaints:
            log.warning("%s: skipped %d: %s", where, len(complaints), first_five(complaints))
        self.scale, self.skipped = scale, complaints
        lqs = [lq for lq, _, _ in found]
        if len(set(lqs)) < len(lqs):
            twice = [path for path, times in Counter(lqs).items() if times > 1]
            raise ValueError(f"csv={csv} pairs {first_five(twice)} more than once; keep one pair each")
        names = unique_names(lqs, lq_root if csv is None else None)
        self.pairs = [Pair(lq, hq, name, prompt) for (lq, hq, prompt), name in zip(found, names, strict=True)]
        self.texts = Texts([pair.prompt for pair in self.pairs], names, prompts)

    def inventory(self, argument: str) -> Inventory:
        """Inventory of the folders; an image without a partner is not used."""
        used = [path for pair in self.pairs for path in (pair.lq, pair.hq)]
        unused = unused_files(self.sources, [used, self.texts.files], self._broken, "is in no pair")
        return Inventory(argument, self.sources, len(self.pairs), self.layout, unused, used)

    def _without_broken(
        self, found: list[tuple[Path, Path, str | None]], scale: int, on_error: OnError
    ) -> list[tuple[Path, Path, str | None]]:
        """Check that every pair can be read and has the right sizes."""
        good: list[tuple[Path, Path, str | None]] = []
        same: dict[Path, str] = {}
        wrong: dict[Path, str] = {}
        factors: set[float] = set()
        for lq, hq, prompt in found:
            try:
                (lq_h, lq_w), (hq_h, hq_w) = (
                    (image_size(path) if on_error == "raise" else read_image(path).shape[:2]) for path in (lq, hq)
                )
            except ImageError as error:
                if on_error == "raise":
                    raise
                self._broken[lq if str(error).startswith(f"cannot read image {printable(lq)}: ") else hq] = str(error)
                continue
            if (hq_h, hq_w) == (lq_h * scale, lq_w * scale):
                good.append((lq, hq, prompt))
            elif (hq_h, hq_w) == (lq_h, lq_w):
                same[lq] = f"{lq} ({lq_w}x{lq_h})"
            else:
                wrong[lq] = f"{lq} is {lq_w}x{lq_h}, {hq} is {hq_w}x{hq_h}"
                factors |= {hq_h / lq_h, hq_w / lq_w}
        if good and on_error == "skip":
            self._broken |= wrong | same
            return good
        if same:
            raise ValueError(
                f"scale={scale}, but LQ has the size of HQ already in {len(same)} of {len(found)} pairs: "
                f"{first_five(same.values())}; such sets hold LQ up-sampled beforehand: give the LQ folder at its own "
                "size"
            )
        if wrong:
            raise ValueError(
                f"scale={scale} does not fit the sizes of {len(wrong)} of {len(found)} pairs: "
                f"{first_five(wrong.values())}; set scale to the set's factor"
                + (f", which is {factors.pop():g}" if len(factors) == 1 else ", or crop HQ to scale times LQ")
            )
        return good

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ImageSample:
        pair = self.pairs[index]
        return {
            "lq": to_tensor(read_image(pair.lq)),
            "hq": to_tensor(read_image(pair.hq)),
            "prompt": self.texts[index],
            "name": pair.name,
            "index": index,
        }
