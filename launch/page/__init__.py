"""The comparison as one HTML page that opens from disk, without a server or network.

`write_page` lays `page.html`, `page.css`, `page.js` and the data together. Names and reasons that come from outside
reach the page only as JSON and become text there, never markup.
"""

from __future__ import annotations

import base64
import html
import json
import math
import mimetypes
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from common.files import replacing

_SLOT = re.compile(r"\{\{(\w+)\}\}")
_NAMES = {
    "clipiqa": "CLIP-IQA",
    "clipiqa+": "CLIP-IQA+",
    "ms_ssim": "MS-SSIM",
    "laion_aes": "LAION aesthetics",
    "qalign": "Q-Align",
    "topiq_fr": "TOPIQ-FR",
    "topiq_nr": "TOPIQ-NR",
}
_WORDS = ("sharpness", "colourfulness", "neutrality")
_SCRIPT_SAFE = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})


def write_page(folder: Path, data: Mapping[str, Any], embed: bool = False) -> Path:
    """Write `report.html` into a folder, over that of an earlier report.

    Equal data, in equal order, give equal bytes. A picture whose file is not there is named on the page.

    Args:
        folder: Folder of the page; the data's paths of pictures start from here.
        data: Contents of the page: title, notes, sources, reference, metrics, datasets, methods, values, means, gains,
            pairs, ranks, missing, efficiency, published, images, figures. Numbers that are not known are None.
        embed: Put the pictures into the page, so that it can be sent as one file, instead of naming those beside it.

    Returns:
        Path of the page.

    Raises:
        OSError: A picture cannot be read or the page not be written.
    """
    pictures = _Pictures(folder, embed)
    shown = dict(data)
    shown["images"] = {
        dataset: {name: _with_sources(image, pictures) for name, image in images.items()}
        for dataset, images in data["images"].items()
    }
    shown["metrics"] = [{**metric, "label": metric_name(metric["id"])} for metric in data["metrics"]]
    shown["figures"] = [{**figure, "path": pictures.source(figure["path"])} for figure in data["figures"]]
    shown["lost"] = pictures.lost
    parts = {
        "title": html.escape(data["title"]),
        "css": _read("page.css"),
        "js": _read("page.js"),
        "data": script_json(shown),
        "pictures": pictures.blocks(),
    }
    template = _read("page.html")
    parts["weight"] = _weight(len(template) + sum(map(len, parts.values())), pictures)
    page = folder / "report.html"
    text = _SLOT.sub(lambda slot: parts[slot[1]], template)
    with replacing(page) as temporary:
        temporary.write_text(text, encoding="ascii", errors="xmlcharrefreplace", newline="\n")
    return page


def script_json(value: object) -> str:
    """JSON that is safe inside a `<script>`: ASCII, without `<`, `>` and `&`.

    NaN becomes null, an infinity the string that JavaScript's `Number` reads as one; numbers keep eight digits.
    """
    return json.dumps(_plain(value), allow_nan=False, separators=(",", ":")).translate(_SCRIPT_SAFE)


def metric_name(metric: str) -> str:
    """The name that papers print: `psnr_y` -> PSNR, `psnr_rgb` -> PSNR (RGB), `pyiqa:musiq` -> MUSIQ."""
    plain = metric.rpartition(":")[2]
    if plain in _WORDS:
        return plain
    name, _, space = plain.partition("_") if plain.endswith(("_y", "_rgb")) else (plain, "", "")
    return _NAMES.get(name, name.upper()) + (" (RGB)" if space == "rgb" else "")


class _Pictures:
    """The pictures of a page: the source of each, the missing ones, and their size.

    Args:
        folder: Folder that their paths start from.
        embed: Put them into the page.
    """

    def __init__(self, folder: Path, embed: bool) -> None:
        self.folder = folder
        self.embed = embed
        self.lost: list[str] = []
        self._paths: dict[str, str] = {}  # path -> source

    def source(self, path: str | Path | None) -> str | None:
        """Key by which the page's script finds a picture: `#id` of its block, or its address from the page."""
        if path is None:
            return None
        name = Path(path).as_posix()
        if name in self._paths:
            return self._paths[name]
        if not (self.folder / name).is_file():
            if name not in self.lost:
                self.lost.append(name)
            return None
        self._paths[name] = f"#picture-{len(self._paths)}" if self.embed else quote(name)
        return self._paths[name]

    def blocks(self) -> str:
        """The embedded pictures, as data URIs in scripts that do not run: each is decoded when it is shown."""
        if not self.embed:
            return ""
        return "\n".join(
            f'<script type="text/plain" id="{source[1:]}">{_data_uri(self.folder / name)}</script>'
            for name, source in self._paths.items()
        )

    def weight(self) -> tuple[int, int]:
        """Number of pictures, and their bytes on disk."""
        return len(self._paths), sum((self.folder / name).stat().st_size for name in self._paths)


def _with_sources(image: Mapping[str, Any], pictures: _Pictures) -> dict[str, Any]:
    methods = {method: pictures.source(path) for method, path in image["methods"].items()}
    return {**image, "lq": pictures.source(image["lq"]), "hq": pictures.source(image["hq"]), "methods": methods}


def _data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _weight(page: int, pictures: _Pictures) -> str:
    count, size = pictures.weight()
    if not count:
        return f"This page weighs {_bytes(page)}."
    place = "in it" if pictures.embed else "beside it"
    return f"This page weighs {_bytes(page)}; {count} pictures of {_bytes(size)} lie {place}."


def _bytes(size: int) -> str:
    return f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        if math.isfinite(value):
            return float(f"{value:.8g}")
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="ascii")
