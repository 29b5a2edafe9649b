"""Layouts of pairs in a folder, as published sets have them; folders that only look like pairs are refused.

A folder with an LQ and an HQ sub-folder (`test_LR` and `test_HR`, `lq` and `gt`, `LRbicx4` and `GTmod12`,
`DIV2K_valid_LR_bicubic/X4` and `DIV2K_valid_HR`) or with both in one folder (`Canon_001_LR4.png`, `Canon_001_HR.png`)
holds pairs. Names of folders make a layout only if their files match; any other tree of photos has no layout.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.files import first_five
from data.decoding import ImageError, image_size, read_image
from data.packed import Packed, Paths, digests, numbered
from data.pairing import HQ_STEM, LQ_STEM, explicit, match_pairs
from data.sources import whole_entries

Names = tuple[object, ...]

_LQ_WORD = re.compile(r"(lr|lq)(bicubic|bic|bi|bd|dn|wild|unknown|mild|difficult)?(x?\d{1,2})?")
_HQ_WORD = re.compile(r"(hr|hq|gt)(mod\d+|x?\d{1,3})?")
_QUALIFIER = re.compile(
    r"bicubic|unknown|wild|mild|difficult|sub|x\d{1,2}|\d{1,2}x|srf\d"
)  # in names of LQ or HQ folders
_SCALE = re.compile(r"(?:^|[^a-z0-9]|lr|lq|bic|hr)x(\d{1,2})(?![0-9])|(?:^|[^a-z0-9])srf_?(\d)", re.IGNORECASE)
_TURN = re.compile(r"(?P<base>.+)[_-](?P<turn>[A-Za-z]\w*|x?\d{1,2}x?)$")
_SPLITS = {"train": ("train", "training"), "val": ("valid", "val", "validation"), "test": ("test", "testing")}
_DIFFERENT = "?"  # rest of the name, for LQ and HQ folders whose names differ otherwise, too
_FACTORS = (2, 3, 4, 6, 8, 16)
_ALIKE = 0.9  # correlation of 16 x 16 thumbnails


@dataclass(frozen=True)
class PairFolders:
    """Pairs by name of two folders, without a layout.

    Args:
        lq: Folder of the low-quality images.
        hq: Folder of their references; may be the same.
        csv: Table with the columns lq and hq, paths below the two folders, and optionally prompt; null pairs by name.
    """

    lq: str
    hq: str
    csv: str | None = None

    @property
    def place(self) -> Path:
        """Folder that gives the set its name: the one above both, or the LQ folder."""
        lq, hq = Path(self.lq).expanduser().resolve(), Path(self.hq).expanduser().resolve()
        return lq.parent if lq.parent == hq.parent and lq != hq else lq


@dataclass(frozen=True)
class Layout:
    """The two folders of a folder's pairs (one folder twice where names of files mark LQ and HQ)."""

    lq: Path
    hq: Path
    name: str


@dataclass
class _Site:
    """LQ and HQ folders of one set, below one folder: path -> factor in its name."""

    lq: dict[Path, int | None] = field(default_factory=dict)
    hq: dict[Path, int | None] = field(default_factory=dict)


def find_layout(folder: Path, scale: int, argument: str) -> Layout | None:
    """Find the layout of a folder's pairs.

    Args:
        folder: The folder.
        scale: Super-resolution factor, which chooses among LQ folders of several factors.
        argument: The user's argument; `train`, `val` and `test` choose among folders of several splits.

    Returns:
        The layout, or None for a folder of images without one.

    Raises:
        ValueError: The folder holds no images, several sets of pairs, none of this scale, or looks paired but has an
            unknown layout.
    """
    top = os.path.join(folder, "")
    files = Paths(Packed(path.removeprefix(top) for path in whole_entries(folder, argument).files.texts))
    found = _two_folders(folder, files, scale, argument) or _one_folder(folder, files, scale, argument)
    if found is None and argument != "predict":  # a prediction restores every image there
        _refuse_lookalikes(folder, files, argument)
    return found


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def _role(name: str) -> tuple[str, str] | None:
    """(`lq` or `hq`, rest of the name) of a folder's name that contains a word for either."""
    words = _words(name)
    roles = {role for role, word in (("lq", _LQ_WORD), ("hq", _HQ_WORD)) if any(map(word.fullmatch, words))}
    if words == ["sr", "bicubic"]:  # SeeSR's LQ images, at the size of HQ
        return "lq", ""
    if len(roles) != 1:
        return None
    other = [word for word in words if not any(map(re.fullmatch, (_LQ_WORD, _HQ_WORD, _QUALIFIER), [word] * 3))]
    return roles.pop(), " ".join(other)


def _factor(name: str) -> int | None:
    found = _SCALE.search(name)
    return int(found[1] or found[2]) if found else None


def _two_folders(folder: Path, files: Sequence[Path], scale: int, argument: str) -> Layout | None:
    sites = _sites(files)
    if not sites:
        return None
    chosen = _of_split_and_scale(sites, scale, argument)
    if len(chosen) > 1:
        sets = [f"{_named(site.lq)} with {_named(site.hq)}" for site in chosen.values()]
        first = next(iter(chosen.values()))
        raise ValueError(
            f"{argument}={folder} holds {len(sets)} sets of pairs: {first_five(sets)}; name the folders one by one, or "
            f"{explicit(folder / next(iter(first.lq)), folder / next(iter(first.hq)), argument)}"
        )
    ((parent, rest), site) = next(iter(chosen.items()))
    lq, hq = (_of_scale(getattr(site, side), scale, folder, argument) for side in ("lq", "hq"))
    pairs, complaints = match_pairs(folder / lq, folder / hq, scale)
    if rest == _DIFFERENT and not (pairs and _ratio(*pairs[0])):  # Ford GT, LR exports
        return None
    if not pairs and not any(complaint.startswith("ambiguous ") for complaint in complaints):
        raise ValueError(
            f"{argument}={folder} holds {lq} and {hq}, but no name of a file there fits one of the other; give pairs "
            f"one name, or {explicit(folder / lq, folder / hq, argument)}, csv: a table with the columns lq and hq"
        )
    _refuse_splits(folder, [file for file in files if file.is_relative_to(lq) or file.is_relative_to(hq)], argument, hq)
    roots = [root for one in sites.values() for root in (*one.lq, *one.hq)]
    others = [file for file in files if not any(file.is_relative_to(root) for root in roots)]
    if others and (argument in {"train", "predict"} or not all(file.is_relative_to(parent) for file in others)):
        raise ValueError(
            f"{argument}={folder} holds pairs ({lq} with {hq}) and {len(others)} other images: {first_five(others)}; "
            f"name the folder of those that are meant, or {explicit(folder / lq, folder / hq, argument)}"
        )
    return Layout(folder / lq, folder / hq, f"pairs in {lq} and {hq}")


def _sites(files: Iterable[Path]) -> dict[tuple[Path, str], _Site]:
    """Sets of pairs by names of folders: (folder above, rest of the names) -> LQ and HQ folders."""
    found: dict[tuple[Path, str], _Site] = {}
    for directory in sorted({file.parent for file in files}):
        parts = directory.parts
        for depth, part in enumerate(parts):
            role = _role(part)
            if role is None:
                continue
            end = depth + 1
            if depth + 1 < len(parts) and re.fullmatch(r"x\d{1,2}(_sub)?", parts[depth + 1], re.IGNORECASE):
                end += 1
            root = Path(*parts[:end])
            site = found.setdefault((Path(*parts[:depth]), role[1]), _Site())
            getattr(site, role[0])[root] = _factor("/".join(parts[depth:end]))
            break
    whole = {key: site for key, site in found.items() if site.lq and site.hq}
    halves = {key: site for key, site in found.items() if key not in whole}
    for parent in {parent for parent, _ in halves} - {parent for parent, _ in whole}:
        lqs, hqs = ([s for (p, _), s in halves.items() if p == parent and getattr(s, side)] for side in ("lq", "hq"))
        if len(lqs) == len(hqs) == 1:  # my_lr and gt
            whole[parent, _DIFFERENT] = _Site(lqs[0].lq, hqs[0].hq)
    return whole


def _of_split_and_scale(
    sites: dict[tuple[Path, str], _Site], scale: int, argument: str
) -> dict[tuple[Path, str], _Site]:
    """The sets whose names contain the split and the factor if there are some; else all."""
    wanted = {*_SPLITS["test"], *_SPLITS["val"]} if argument in {"test", "pairs"} else {*_SPLITS.get(argument, ())}
    every = {word for words in _SPLITS.values() for word in words}

    def words(key: tuple[Path, str]) -> set[str]:
        return set(_words("/".join([key[0].as_posix(), key[1]])))

    if len(sites) > 1 and wanted:
        of_split = {key: site for key, site in sites.items() if words(key) & wanted or not words(key) & every}
        sites = of_split or sites
    if len(sites) > 1:
        of_scale = {key: site for key, site in sites.items() if _factor(key[0].as_posix()) in (None, scale)}
        sites = of_scale or sites
    return sites


def _named(roots: Iterable[Path]) -> str:
    return "/".join(root.as_posix() for root in roots)


def _of_scale(roots: dict[Path, int | None], scale: int, folder: Path, argument: str) -> Path:
    """The one LQ or HQ folder of this factor; a folder with the factor in its name comes before one without."""
    exact = [root for root, factor in roots.items() if factor == scale]
    found = exact or [root for root, factor in roots.items() if factor is None and root.name != "sr_bicubic"]
    found = found or [root for root, factor in roots.items() if factor is None]
    if len(found) == 1:
        return found[0]
    listed = first_five(root.as_posix() for root in roots)
    if found:
        raise ValueError(
            f"{argument}={folder} holds several folders of one side of its pairs: {listed}; choose: "
            f"{explicit('...', '...', argument)}"
        )
    raise ValueError(f"{argument}={folder} holds {listed}, none of scale={scale}; set scale to a factor that is there")


def _one_folder(folder: Path, files: Sequence[Path], scale: int, argument: str) -> Layout | None:
    """Pairs of files in one folder, by the ends of their names."""
    lqs: dict[Path, dict[int | None, Path]] = {}
    hqs: dict[Path, Path] = {}
    for file in files:
        if lq := LQ_STEM.match(file.stem):
            factor = lq["a"] or lq["b"]
            lqs.setdefault(file.with_name(lq["base"]), {})[int(factor) if factor else None] = file
        elif hq := HQ_STEM.match(file.stem):
            hqs[file.with_name(hq["base"])] = file
    if not lqs:
        return None
    bare = {base: file for file in files if (base := file.with_suffix("")) in lqs and base not in hqs}
    for base, file in list(bare.items()):
        factor, small = next(iter(lqs[base].items()))
        if _ratio(folder / small, folder / file) != (factor or scale):  # an enlarged image may be called _x4 as well
            del bare[base]
    paired = lqs.keys() & (hqs.keys() | bare.keys())
    if 2 * sum(1 + len(lqs[base]) for base in paired) < len(files) or not paired:
        return None
    if not any({scale, None} & lqs[base].keys() for base in paired):
        factors = sorted({factor for base in paired for factor in lqs[base] if factor})
        raise ValueError(f"{argument}={folder} holds pairs of scale {factors}, none of scale={scale}; set scale to one")
    _refuse_splits(folder, files, argument)
    return Layout(folder, folder, "pairs side by side, as names with _LR4 and _HR")


def _refuse_splits(folder: Path, files: Iterable[Path], argument: str, root: Path = Path()) -> None:
    """Refuse pairs of several splits, such as Canon/Train/4 and Canon/Test/4.

    Raises:
        ValueError: Folders below the root of the HQ images, or those above all files, have names of several splits.
    """
    found: dict[str, Path] = {}
    for directory in sorted({file.parent for file in files if file.is_relative_to(root)}):
        words = set(_words(directory.relative_to(root).as_posix()))
        found |= {split: directory for split, names in _SPLITS.items() if words & set(names)}
    if len(found) > 1:
        raise ValueError(
            f"{argument}={folder} holds pairs of several splits: {first_five(found.values())}; name the folder of one, "
            f"or {explicit('...', '...', argument)}"
        )


def _ratio(lq: Path, hq: Path) -> int | None:
    """Ratio of the two sizes, if it is a usual factor."""
    try:
        return _ratio_of(image_size(lq), image_size(hq))
    except ImageError:
        return None


def _ratio_of(small: tuple[int, int], large: tuple[int, int]) -> int | None:
    """The usual factor between two sizes, the larger of which may be over by a rest."""
    return next((factor for factor in _FACTORS if (large[0] // factor, large[1] // factor) == small), None)


def _refuse_lookalikes(folder: Path, files: Sequence[Path], argument: str) -> None:
    """Refuse a folder with small and large versions of the same images that no layout explains.

    Raises:
        ValueError: Files of one name in two folders, or of names that end in two ways, show the same at a usual factor.
    """
    _, number = numbered(digests(repr(version[:2]) for version in _versions(files)))
    several = np.bincount(number)[number] > 1 if len(number) else []
    places: dict[Names, dict[Names, dict[str, Path]]] = {}
    alone: Counter[tuple[Names, str]] = Counter()  # versions of images of which there is one
    for (place, name, version, file), more in zip(_versions(files), several, strict=True):
        names = places.setdefault(place, {})
        if more:
            names.setdefault(name, {})[version] = file
        else:
            alone[place, version] += 1
    for place, names in places.items():
        groups = [group for _, group in sorted(names.items(), key=str) if len(group) > 1]
        if not groups:
            continue
        probes = [groups[0], groups[len(groups) // 2], groups[-1]]
        alike = _same_at_a_factor(folder, probes[0])
        for probe in probes[1:]:
            alike = alike and alike & _same_at_a_factor(folder, probe)
        for small, large, factor in sorted(alike):
            both = sum(small in group and large in group for group in groups)
            if 2 * both < sum(small in group for group in names.values()) + alone[place, small]:
                continue
            lq, hq = probes[0][small], probes[0][large]
            raise ValueError(
                f"{argument}={folder} looks like {both} pairs of an unknown layout: {lq} shows the same as {hq} at "
                f"1/{factor} of its size; {explicit(folder / lq.parent, folder / hq.parent, argument)}"
                + (", csv: a table with the columns lq and hq" if lq.parent == hq.parent else "")
            )


def _versions(files: Iterable[Path]) -> Iterator[tuple[Names, Names, str, Path]]:
    """(place, image there, name of this version, file) for each way in which names may mark versions."""
    roles = {file.parts[:i] for file in files for i, part in enumerate(file.parts[:-1]) if _role(part)}
    for file in files:
        parts, stem = file.parent.parts, file.stem
        if parts in roles:  # a.png and LR/a.png
            yield (parts,), ((), stem), ".", file
        for i, part in enumerate(parts):
            yield (parts[:i],), (parts[i + 1 :], stem), part, file
        if turn := _TURN.match(stem):
            yield (parts, "names"), (turn["base"],), turn["turn"], file


def _same_at_a_factor(folder: Path, group: dict[str, Path]) -> set[tuple[str, str, int]]:
    """(small, large, factor) of the files of one name, 16 at most, that show the same at a usual factor."""
    some = sorted(group.items())[:16]
    try:
        sizes = {name: image_size(folder / file) for name, file in some}
    except ImageError:
        return set()
    factors = {
        (small, large): factor
        for small in sizes
        for large in sizes
        if (factor := _ratio_of(sizes[small], sizes[large])) is not None
    }
    thumbnails = {name: _thumbnail(folder / group[name]) for name in {name for pair in factors for name in pair}}
    return {
        (small, large, factor)
        for (small, large), factor in factors.items()
        if float(np.mean(thumbnails[small] * thumbnails[large])) > _ALIKE
    }


def _thumbnail(path: Path) -> NDArray[np.float64]:
    """16 x 16 grey pixels of mean 0 and variance 1; zeros for an image that is flat or cannot be read."""
    try:
        grey = Image.fromarray(read_image(path)).convert("L")
    except ImageError:
        return np.zeros((16, 16))
    pixels = np.asarray(grey.resize((16, 16), Image.Resampling.BOX), np.float64)
    return (pixels - pixels.mean()) / max(float(pixels.std()), 1.0)
