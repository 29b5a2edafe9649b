"""Methods that can be compared: trained runs, baselines without a network, GANs from weights files, result folders."""

from __future__ import annotations

import functools
import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from common.checkpoints import newest_checkpoint, read_checkpoint, read_tensors, trained_state
from common.draws import own_random_state
from common.errors import one_line
from common.files import first_five, plain_name
from common.images import bicubic_upsample
from common.metrics import to_uint8
from common.restoration import RestorationModule
from data.decoding import ImageError, Pixels, read_image
from data.sources import list_images
from launch.baselines import blurred, rounded
from launch.comparison.inputs import Item
from launch.errors import UsageError
from launch.moved import current
from launch.runs import differing_versions, leaves, paper_of, stored_model


class Method(ABC):
    """Something that makes, or has made, a result of each image.

    Args:
        name: Name in the tables.
    """

    kind: str
    """`run`, `baseline`, `weights` or `results`."""
    measurable = True
    """True where its speed can be measured here."""
    scale: int | None = None
    """The only factor it restores by; None takes any. That of weights is known once `network` is."""

    paper: str | None = None
    """Folder of the paper that the method is of; None where it is of none."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._model: Any = None

    @abstractmethod
    def key(self, item: Item) -> str:
        """Key of everything that its result depends on, except the low-quality pixels and the prompt.

        Raises:
            ImageError: It has no result of this image.
        """

    @abstractmethod
    def restore(self, item: Item) -> Pixels:
        """Its result, (H, W, 3) uint8.

        Raises:
            ValueError: It does not restore by this factor, or the result cannot be read.
        """

    def make(self, item: Item) -> Pixels:
        """Its result, computed even where it is there already: what the efficiency is measured of."""
        return self.restore(item)

    def network(self) -> nn.Module | None:
        """The network that restores, loaded; None where there is none."""
        return None

    def trained(self) -> set[int]:
        """Ids of the network's parameters that were trained."""
        return set()

    def close(self) -> None:
        """Give the network's memory back."""
        self._model = None

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Notes for the reader of the report, made once all results have been searched."""
        return []

    def _check_scale(self, item: Item) -> None:
        if self.scale != item.scale:
            raise ValueError(f"{self.name} enlarges {self.scale} times, {item.dataset} asks for {item.scale} times")


class Baseline(Method):
    """Bicubic enlargement, blurred afterwards where a width is given.

    Args:
        name: Name in the tables.
        sigma: Width of the blur in px; None for no blur.
    """

    kind = "baseline"

    def __init__(self, name: str, sigma: float | None = None) -> None:
        super().__init__(name)
        self.sigma = sigma

    def key(self, item: Item) -> str:
        """The blur."""
        return f"bicubic, sigma {self.sigma}"

    def restore(self, item: Item) -> Pixels:
        """Enlarge, blur, round."""
        enlarged = bicubic_upsample(_tensor(item), item.scale)[0].permute(1, 2, 0).numpy()
        return rounded(enlarged if self.sigma is None else blurred(enlarged, self.sigma))


class Run(Method):
    """A method that `isr fit` trained: averaged weights (EMA), its own inference settings and colour fix.

    Args:
        name: Name in the tables.
        path: Its folder, a version's, or a checkpoint. A version without a checkpoint is taken as configured.
        device: Where it runs.
        images: Folder of the results that `isr test` wrote, taken instead of making them again:
            `<images>/<test set>/<image>.png`.

    Raises:
        UsageError: There is neither a checkpoint nor a configuration, or its model restores no images.
    """

    kind = "run"

    def __init__(self, name: str, path: Path, device: torch.device, images: Path | None = None) -> None:
        super().__init__(name)
        self.device, self.images = device, images
        self.checkpoint = _checkpoint(path)
        self.settings = _settings(path, self.checkpoint)
        self.scale = self.settings.get("init_args", {}).get("scale")
        self.paper = paper_of(str(self.settings["class_path"]))
        self._key = ""
        self._others = [] if images is not None else differing_versions(path)

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Versions of its name that are another model, or were trained on other data."""
        newest = self.checkpoint.parents[1].name if self.checkpoint is not None else ""
        return [f"{self.name}: its newest version, {newest}, is taken; {other}." for other in self._others]

    def key(self, item: Item) -> str:
        """Its file's bytes; without one settings, trained weights, and the files that settings name (a stage's)."""
        if self.images is not None:
            return _digest_of(self._image(item))
        if not self._key:
            settings = dict(leaves(self.settings))
            lines = sorted(f"{key}={value}" for key, value in settings.items() if ".metrics" not in f".{key}")
            made = hashlib.blake2b("\n".join(lines).encode(), digest_size=16)
            for value in settings.values():
                if isinstance(value, str) and Path(value).is_file():
                    made.update(Path(value).read_bytes())
            if self.checkpoint is not None:
                checkpoint = read_checkpoint(self.checkpoint)
                for _, stage in sorted(checkpoint.get("stages", {}).items()):
                    made.update(stage["digest"].encode())
                for name, weight in sorted(trained_state(checkpoint).items()):
                    if "." in name:  # the counters at the root decide no pixel
                        made.update(name.encode() + weight.float().contiguous().numpy().tobytes())
            self._key = made.hexdigest()
        return self._key

    def network(self) -> RestorationModule:
        """The model, loaded."""
        if self._model is None:
            from launch.export import configured, load

            model = configured(self.settings) if self.checkpoint is None else load(self.checkpoint)
            if not isinstance(model, RestorationModule):
                raise UsageError(f"runs: {self.name} is of {type(model).__name__}, which restores no images; leave it")
            self._model, self.scale = model.to(self.device).eval().requires_grad_(False), model.scale
        network: RestorationModule = self._model
        return network

    def trained(self) -> set[int]:
        """Ids of what was trained."""
        return {id(parameter) for parameter in self.network().all_trainable().values()}

    def restore(self, item: Item) -> Pixels:
        """As `isr predict` does, each image from random seed 0."""
        return self.make(item) if self.images is None else read_image(self._image(item))

    def _image(self, item: Item) -> Path:
        assert self.images is not None
        return self.images / item.dataset / f"{item.name}.png"

    def make(self, item: Item) -> Pixels:
        """Restore by the network, whether the image is there or not."""
        model = self.network()
        self._check_scale(item)
        with own_random_state(self.device):
            sr = model.upscale(_tensor(item).to(self.device), [item.prompt]).sr
        return _pixels(sr)


class Weights(Method):
    """A GAN or another network from a weights file that spandrel knows (Real-ESRGAN, BSRGAN, SwinIR, LDL ...).

    Args:
        name: Name in the tables.
        path: The file.
        device: Where it runs.

    Raises:
        FileNotFoundError: There is no such file.
        UsageError: spandrel is not installed.
    """

    kind = "weights"

    def __init__(self, name: str, path: Path, device: torch.device) -> None:
        super().__init__(name)
        if not path.is_file():
            raise FileNotFoundError(f"weights: {name}={path} is not there; give a file of weights")
        try:
            import spandrel  # an extra
        except ImportError as error:
            raise UsageError(f"weights: {name}={path} needs spandrel; pip install 'isr-papers[compare]'") from error
        self.path, self.device, self._spandrel = path, device, spandrel

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.blake2b(self.path.read_bytes(), digest_size=16).hexdigest()

    def key(self, item: Item) -> str:
        """The file's bytes."""
        return self._digest

    def network(self) -> nn.Module:
        """The network, loaded.

        Raises:
            ValueError: spandrel does not know the file, or it is no super-resolution of RGB images.
        """
        if self._model is None:
            try:
                state = self._spandrel.canonicalize_state_dict(read_tensors(self.path))
                model: Any = self._spandrel.ModelLoader(device=self.device).load_from_state_dict(state)
            except Exception as error:  # each of its architectures raises what it likes
                why = one_line(error)
                raise ValueError(f"weights: {self.path} is no file that spandrel can load ({why})") from error
            if (model.input_channels, model.output_channels) != (3, 3):
                raise ValueError(f"weights: {self.path} does not turn RGB into RGB images; take another file")
            self._model, self.scale = model.eval(), int(model.scale)
        network: nn.Module = self._model.model
        return network

    def trained(self) -> set[int]:
        """All of it."""
        return {id(parameter) for parameter in self.network().parameters()}

    def restore(self, item: Item) -> Pixels:
        """The whole image at once."""
        self.network()
        self._check_scale(item)
        with torch.no_grad():
            return _pixels(self._model(_tensor(item).to(self.device)))


class Results(Method):
    """Images that somebody else's program wrote, one for each image of a test set, of its name.

    Args:
        name: Name in the tables.
        folder: The images; those of a test set may lie in a folder of its name.

    Attributes:
        shared: Names of images that several test sets have; their results must lie in folders of the sets' names.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There is no image in it.
    """

    kind = "results"
    measurable = False

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        if not folder.is_dir():
            raise FileNotFoundError(f"results: {name}={folder} is not a folder; give the folder of its images")
        self.folder = folder
        self.files: dict[str, list[Path]] = {}
        for path, _ in list_images(folder, f"results: {name}"):
            name = plain_name(path.relative_to(folder).with_suffix("").as_posix())
            self.files.setdefault(name, []).append(path)
        self.shared: set[str] = set()
        self._read: dict[Path, str] = {}

    def _file(self, item: Item) -> Path:
        found = self.files.get(f"{item.dataset}/{item.name}") or []
        if not found and item.name in self.shared:
            raise ImageError(
                f"missing: no file {item.dataset}/{item.name}.* under {self.folder}; several test sets have an image "
                f"{item.name}, so put the results of each set into a folder of its name"
            )
        found = found or self.files.get(item.name) or []
        if not found:
            raise ImageError(f"missing: no file {item.name}.* under {self.folder}")
        if len(found) > 1:
            raise ImageError(f"ambiguous: {', '.join(path.name for path in found)}; leave one of them")
        return found[0]

    def key(self, item: Item) -> str:
        """The file's bytes."""
        path = self._file(item)
        key = _digest_of(path)
        self._read[path] = _stored_as(path)
        return key

    def restore(self, item: Item) -> Pixels:
        """Read the file as 8-bit RGB."""
        return read_image(self._file(item))

    def notes(self, items: Sequence[Item]) -> list[str]:
        """Files of no image, and files that were not 8-bit RGB."""
        wanted = {name for item in items for name in (item.name, f"{item.dataset}/{item.name}")}
        extra = [path.name for stem, paths in self.files.items() if stem not in wanted for path in paths]
        turned = [f"{path.name} ({how})" for path, how in self._read.items() if how]
        found = []
        if extra:
            named = first_five(sorted(extra))
            found.append(f"{self.name}: {len(extra)} extra files belong to no image of the test sets: {named}.")
        if turned:
            found.append(f"{self.name}: {len(turned)} files were converted to 8-bit RGB: {first_five(sorted(turned))}.")
        return found


def find_runs(folder: Path) -> dict[str, Path]:
    """Every run below a folder that has a checkpoint of a method which restores images: `<paper>/<name>` -> folder."""
    found = {}
    for run in sorted(folder.glob("*/*")):
        checkpoint = newest_checkpoint(run)
        settings = stored_model(checkpoint) if checkpoint is not None else None
        if settings is not None and restores(str(settings["class_path"])):
            found[f"{run.parent.name}/{run.name}"] = run
    return found


def restores(class_path: str) -> bool:
    """True for a class, given by its dotted name, that restores images.

    Raises:
        UsageError: There is no such class.
    """
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"class_path={class_path}: this version has no such class ({one_line(error)}); use the version that wrote "
            "the run (the commit is in its run.json)"
        ) from error
    return issubclass(found, RestorationModule)


def _checkpoint(path: Path) -> Path | None:
    if path.is_file():
        return path
    inside = path / "checkpoints" / "last.ckpt"
    return inside if inside.is_file() else newest_checkpoint(path)


def _settings(path: Path, checkpoint: Path | None) -> dict[str, Any]:
    if checkpoint is not None:
        settings = stored_model(checkpoint)
    else:
        configs = [path / "config.yaml", *sorted(path.glob("version_*/config.yaml"))]
        config = next((file for file in reversed(configs) if file.is_file()), None)
        settings = current(yaml.safe_load(config.read_text())).get("model") if config is not None else None
    if settings is None:
        raise UsageError(f"runs: {path} has no checkpoint or configuration that isr fit wrote; give such a run")
    if not restores(str(settings["class_path"])):
        raise UsageError(f"runs: {path} is of {settings['class_path']}, which restores no images; leave it out")
    return settings


def _digest_of(path: Path) -> str:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}") from error


def _tensor(item: Item) -> Tensor:
    """The low-quality image, (1, 3, h, w) in [0, 1]."""
    return torch.from_numpy(read_image(item.lq)).permute(2, 0, 1)[None].float() / 255


def _pixels(x_01: Tensor) -> Pixels:
    """(1, 3, H, W) near [0, 1] to (H, W, 3) uint8."""
    return to_uint8(x_01)[0].permute(1, 2, 0).contiguous().cpu().numpy()


def _stored_as(path: Path) -> str:
    """Format of a file's pixels; empty for 8-bit RGB and for a file that cannot be opened."""
    try:
        with Image.open(path) as image:
            mode, kind = image.mode, image.format
    except OSError:
        return ""
    if kind == "PNG" and path.read_bytes()[24:25] == b"\x10":  # IHDR's depth, which PIL's mode hides
        return f"16 bits, {mode}"
    return "" if mode == "RGB" else mode
