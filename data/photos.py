"""Real photos that ship inside the scikit-image and matplotlib wheels: no download, fixed roles.

No training here uses the validation or test photos. Every choice (learning rates, timesteps, step counts) is
made on the validation photos; the test photos are scored once, in the report.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Photo:
    """One embedded photo.

    Args:
        package: The wheel that carries it.
        file: Its path inside that package.
        caption: Description, used as prompt by the tiny foundation.
        rescales: Training sizes, as factors of its own side; several sizes give more crops.
        weight: Frequency in training, relative to the others.
    """

    package: str
    file: str
    caption: str
    rescales: tuple[float, ...] = (1.0,)
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The file's stem."""
        return Path(self.file).stem

    @property
    def path(self) -> Path:
        """Path of the file in the installed wheel.

        Raises:
            FileNotFoundError: The wheel is missing or no longer carries the file.
        """
        spec = importlib.util.find_spec(self.package)
        path = (
            Path(spec.submodule_search_locations[0]) / self.file if spec and spec.submodule_search_locations else None
        )
        if path is None or not path.is_file():
            raise FileNotFoundError(
                f"photo {self.name}: {self.package} does not carry {self.file}; run pip install -c constraints.txt ."
            )
        return path


def _skimage(file: str, caption: str, rescales: tuple[float, ...] = (1.0,), weight: float = 1.0) -> Photo:
    return Photo("skimage", f"data/{file}", caption, rescales, weight)


PHOTOS: dict[str, tuple[Photo, ...]] = {
    "train": (
        # Colour photos carry most of the weight: a few of them hold nearly all that the autoencoder learns of colour.
        Photo("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "portrait of a navy officer", (1.0, 0.6), 3.0),
        _skimage("motorcycle_left.png", "a motorcycle in a garage", (1.0, 0.7, 0.5), 3.0),
        _skimage("motorcycle_right.png", "a motorcycle in a garage", (1.0, 0.7, 0.5), 1.0),
        _skimage("hubble_deep_field.jpg", "galaxies in a dark sky", (1.0, 0.5), 1.0),
        _skimage("retina.jpg", "the retina of an eye", (0.35, 0.2), 0.7),
        _skimage("ihc.png", "stained tissue under a microscope", (1.0, 0.6), 1.2),
        _skimage("color.png", "a colour chart", (1.0,), 0.3),
        _skimage("camera.png", "a photographer with a camera", (1.0, 0.6), 1.2),
        _skimage("brick.png", "a brick wall", (1.0, 0.6), 0.7),
        _skimage("grass.png", "grass", (1.0, 0.6), 0.7),
        _skimage("gravel.png", "gravel", (1.0, 0.6), 0.7),
        _skimage("coins.png", "old coins", (1.0,), 0.7),
        _skimage("moon.png", "the surface of the moon", (1.0,), 0.3),
        _skimage("cell.png", "a cell under a microscope", (0.6,), 0.2),
        _skimage("clock_motion.png", "a clock in motion", (1.0,), 0.3),
        _skimage("page.png", "a printed page", (1.0,), 0.4),
        _skimage("text.png", "handwritten text", (1.0,), 0.4),
    ),
    "val": (_skimage("astronaut.png", "portrait of an astronaut"), _skimage("coffee.png", "a cup of coffee")),
    "test": (_skimage("chelsea.png", "a tabby cat"), _skimage("rocket.jpg", "a rocket on its launch pad")),
}
CAPTIONS: dict[str, str] = {photo.name: photo.caption for photos in PHOTOS.values() for photo in photos}


def photo_paths(split: Split) -> dict[str, Path]:
    """Name -> file of a split's photos, in a fixed order.

    Raises:
        FileNotFoundError: An installed wheel lacks one of them.
    """
    return {photo.name: photo.path for photo in PHOTOS[split]}
