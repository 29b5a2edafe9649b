"""The second-order degradation of Real-ESRGAN (arXiv:2107.10833), one sample at a time, in the data worker.

Order and probabilities are those of the published code. Intended differences:

- The first resize maps the whole image onto the new one. The published code passes a scale factor to
  `interpolate`, which floors the size but keeps the factor for bilinear and bicubic, and so drops up to one new
  pixel at the right and bottom edges: the low-quality image is then stretched against its target.
- JPEG is libjpeg, so its quality is an integer, its tables are the standard's and its input is rounded; the
  published DiffJPEG holds the luma table transposed.
- Every sample draws its own parameters, so no pool of degraded pairs has to be shuffled.

OpenCV starts threads of its own. A data worker should call `cv2.setNumThreads(0)` first; this module does not,
since that setting belongs to the process.
"""

import cv2
import numpy as np
from PIL import Image

from data.degradations import operations
from data.degradations.config import DegradationConfig, StageConfig
from data.degradations.kernels import Array, draw_final_sinc, draw_index, draw_kernel


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Make the random generator of one sample, the same in any worker, rank or resumed run.

    Args:
        seed: The run's seed, at least 0.
        epoch: Epoch, at least 0.
        index: The sample's index in the data set, at least 0.

    Returns:
        Generator (SFC64, quick to make and to draw from), independent between any two triples.
    """
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, epoch, index))))


class Degradation:
    """Turn a high-quality image into a low-quality one.

    Args:
        config: Numbers of the pipeline, e.g. `preset("osediff")`.
    """

    def __init__(self, config: DegradationConfig) -> None:
        self.config = config
        operations.poisson_table(256)  # nearly every photo's; made here, before workers are forked

    def __call__(self, hq: Array, rng: np.random.Generator) -> Array:
        """Degrade one image; the result depends on the image and the generator's state only.

        Args:
            hq: RGB image, uint8, (H, W, 3), H and W multiples of the scale.
            rng: Source of all randomness, e.g. from `sample_rng`.

        Returns:
            RGB image, uint8, (H / scale, W / scale, 3).

        Raises:
            ValueError: The image has another type or shape.
        """
        config = self.config
        height, width = _check_image(hq, config.scale)
        image = cv2.cvtColor(hq, cv2.COLOR_RGB2BGR)
        image = self._stage(image, config.first, hq.shape[0], hq.shape[1], rng)
        image = operations.jpeg(image, rng.uniform(*config.first.jpeg_range))
        if rng.random() < config.second_order_prob:
            image = self._stage(image, config.second, height, width, rng)
        if rng.random() < config.final_jpeg_last_prob:
            image = self._finish(image, height, width, rng)
            image = operations.jpeg(image, rng.uniform(*config.second.jpeg_range))
        else:
            image = operations.jpeg(image, rng.uniform(*config.second.jpeg_range))
            image = self._finish(image, height, width, rng)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    @staticmethod
    def _stage(image: Array, stage: StageConfig, height: int, width: int, rng: np.random.Generator) -> Array:
        """Blur, resize to a random multiple of (height, width), add noise; uint8 in and out."""
        if rng.random() < stage.blur_prob:
            blurred = operations.blur(image, draw_kernel(stage, rng))
        else:
            blurred = image.astype(np.float32)
        factor = 1.0
        direction = draw_index(stage.resize_prob, rng)
        if direction == 0:
            factor = rng.uniform(1.0, stage.resize_range[1])
        elif direction == 1:
            factor = rng.uniform(stage.resize_range[0], 1.0)
        new_height, new_width = max(1, int(height * factor)), max(1, int(width * factor))
        resized = operations.resize(blurred, new_height, new_width, _draw_mode(rng))
        gaussian = rng.random() < stage.gaussian_noise_prob
        gray = rng.random() < stage.gray_noise_prob
        if gaussian:
            return operations.gaussian_noise(resized, rng.uniform(*stage.noise_range), gray, rng)
        return operations.poisson_noise(resized, rng.uniform(*stage.poisson_scale_range), gray, rng)

    def _finish(self, image: Array, height: int, width: int, rng: np.random.Generator) -> Array:
        """Resize to the final size and filter; uint8 in and out."""
        out = operations.resize(image.astype(np.float32), height, width, _draw_mode(rng))
        if rng.random() < self.config.final_sinc_prob:
            out = operations.blur(out, draw_final_sinc(self.config.final_sinc_sizes, rng))
        return operations.to_uint8(out)


def bicubic_downsample(hq: Array, scale: int) -> Array:
    """Shrink by an integer factor with Pillow's bicubic filter (a = -0.5, anti-aliased), close to MATLAB's imresize.

    Args:
        hq: RGB image, uint8, (H, W, 3), H and W multiples of the scale.
        scale: Factor.

    Returns:
        RGB image, uint8, (H / scale, W / scale, 3).

    Raises:
        ValueError: The image has another type or shape.
    """
    height, width = _check_image(hq, scale)
    return np.array(Image.fromarray(hq).resize((width, height), Image.Resampling.BICUBIC))


def _check_image(hq: Array, scale: int) -> tuple[int, int]:
    """Return the low-quality height and width; refuse an image that does not fit."""
    if hq.dtype != np.uint8 or hq.ndim != 3 or hq.shape[2] != 3:
        raise ValueError(f"hq is {hq.dtype} of shape {hq.shape}; give a uint8 RGB image of shape (H, W, 3)")
    height, width = hq.shape[:2]
    if height % scale or width % scale or not height or not width:
        raise ValueError(f"hq of {height}x{width} px is not a multiple of scale={scale}; crop it to one first")
    return height // scale, width // scale


def _draw_mode(rng: np.random.Generator) -> str:
    return operations.RESIZE_MODES[rng.integers(len(operations.RESIZE_MODES))]
