"""Time the degradation against a plain torch version of the published pipeline, both on one thread.

    python benchmarks/degradation.py --images 40

Times are CPU seconds of the process, so that other load on the machine counts less. Both sides draw from the same
probabilities, not the same draws: with few images the means differ by chance; the table gives their standard error.
"""

import argparse
import importlib.util
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # before numpy and torch are imported

import cv2  # noqa: E402 (the thread counts above come first)
import numpy as np  # noqa: E402 (likewise)
import torch  # noqa: E402 (likewise)

from data.degradations import operations  # noqa: E402 (likewise)
from data.degradations.config import PRESETS, preset  # noqa: E402 (likewise)
from data.degradations.realesrgan import Degradation, sample_rng  # noqa: E402 (likewise)

STAGES = ("blur", "resize", "gaussian_noise", "poisson_noise", "jpeg")
Degrade = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def reference_module() -> ModuleType:
    path = Path(__file__).parents[1] / "tests" / "data" / "reference_degradation.py"
    spec = importlib.util.spec_from_file_location("reference_degradation", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is missing; run from a checkout of the repository")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def photos(size: int) -> list[np.ndarray]:
    """Crops of scikit-image's photos, uint8 RGB (size, size, 3), the rest mirrored where a photo is smaller."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("scikit-image is not installed; pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    crops = []
    for name in ("astronaut.png", "coffee.png", "chelsea.png"):
        image = cv2.cvtColor(cv2.imread(str(folder / name)), cv2.COLOR_BGR2RGB)
        bottom, right = max(0, size - image.shape[0]), max(0, size - image.shape[1])
        image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REFLECT_101)
        crops.append(np.ascontiguousarray(image[:size, :size]))
    return crops


def measure(degrade: Degrade, images: list[np.ndarray], count: int, warm_up: int = 3) -> np.ndarray:
    """CPU milliseconds of each of `count` calls."""
    for index in range(warm_up):
        degrade(images[index % len(images)], sample_rng(1, 0, index))
    times = []
    for index in range(count):
        rng = sample_rng(0, 0, index)
        start = time.process_time()
        degrade(images[index % len(images)], rng)
        times.append(1e3 * (time.process_time() - start))
    return np.array(times)


@contextmanager
def stage_clock() -> Iterator[dict[str, float]]:
    """Add up the CPU milliseconds of each operation while the context is open."""
    spent: dict[str, float] = defaultdict(float)
    originals = {name: getattr(operations, name) for name in STAGES}

    def timed(name: str) -> Callable[..., np.ndarray]:
        def call(*args: object) -> np.ndarray:
            start = time.process_time()
            result = originals[name](*args)
            spent[name] += 1e3 * (time.process_time() - start)
            return result

        return call

    for name in STAGES:
        setattr(operations, name, timed(name))
    try:
        yield spent
    finally:
        for name, original in originals.items():
            setattr(operations, name, original)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40, help="images for the torch references; ours gets ten times")
    parser.add_argument("--size", type=int, default=512, help="height and width of the input, px")
    parser.add_argument("--preset", default="osediff", help=f"one of {', '.join(PRESETS)}")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    config = preset(args.preset)
    reference = reference_module().ReferenceDegradation
    images = photos(args.size)
    ours = Degradation(config)
    rows = {
        "ours": measure(ours, images, 10 * args.images),
        "torch, as published": measure(reference(config), images, args.images),
        "torch, depthwise blur": measure(reference(config, depthwise=True), images, args.images),
    }
    print(f"{args.preset}, {args.size} px, one thread, CPU time")
    print(f"{'':24}{'ms/image':>10}{'+-':>8}{'median':>9}{'images/s':>10}{'ours is':>10}")
    for name, times in rows.items():
        ratio = times.mean() / rows["ours"].mean()
        error = times.std() / np.sqrt(len(times))
        print(
            f"{name:24}{times.mean():10.1f}{error:8.1f}{np.median(times):9.1f}{1e3 / times.mean():10.1f}{ratio:9.1f}x"
        )
    with stage_clock() as spent:
        total = measure(ours, images, 10 * args.images, warm_up=0).sum()
    print("ours, by stage: " + ", ".join(f"{name} {100 * spent[name] / total:.0f} %" for name in STAGES))


if __name__ == "__main__":
    main()
