"""Numbers of the second-order Real-ESRGAN degradation, as plain dataclasses a YAML file can set field by field.

Sources named in the comments: [RE] BasicSR `realesrgan_dataset.py` and its option files, the published code of
Real-ESRGAN (arXiv:2107.10833); [OSE] cswry/OSEDiff `dataloaders/params_realesrgan.yml`; [OMG] wuer5/OMGSR
`dataloader/params_realesrgan.yml`; [INV] zsyOAOA/InvSR `configs/sd-turbo-sr-ldis.yaml`, whose data code is that of
zsyOAOA/ResShift `basicsr/data/realesrgan_dataset.py`.
"""

from dataclasses import dataclass, replace

KERNEL_NAMES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")


def _check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value} is not a probability; set it within [0, 1]")


def _check_weights(name: str, values: tuple[float, ...], count: int) -> None:
    if len(values) != count or min(values) < 0 or abs(sum(values) - 1.0) > 1e-6:
        raise ValueError(f"{name}={values} must be {count} non-negative probabilities that sum to 1")


def _check_range(name: str, values: tuple[float, float], low: float, high: float = float("inf")) -> None:
    if not low <= values[0] <= values[1] <= high:
        raise ValueError(f"{name}={values} must be (min, max) with {low} <= min <= max <= {high}")


def _check_sizes(name: str, values: tuple[int, ...]) -> None:
    if not values or any(size < 1 or size % 2 == 0 for size in values):
        raise ValueError(f"{name}={values} must be one or more odd positive kernel sizes")


@dataclass(frozen=True)
class StageConfig:
    """One degradation: blur, resize, noise, JPEG. Defaults are OSEDiff's first stage.

    Args:
        blur_prob: Probability of blurring at all.
        kernel_sizes: Odd kernel widths drawn from with equal chance, px.
        kernel_probs: Probabilities of iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso.
        sigma: Range of the Gaussian widths, px.
        betag: Range of the exponent of generalized Gaussians (1 is the Gaussian); half the draws lie below 1.
        betap: Range of the exponent of plateau kernels; half the draws lie below 1 (at 1, if the range starts there).
        sinc_prob: Probability that the kernel is a sinc low-pass filter instead.
        resize_prob: Probabilities of resizing up, down, and keeping the size.
        resize_range: Smallest and largest resize factor; relative to the input in the first stage, to the final
            low-quality size in the second.
        gaussian_noise_prob: Probability of Gaussian noise; Poisson noise otherwise.
        noise_range: Range of the Gaussian noise's standard deviation, grey levels of 255.
        poisson_scale_range: Range of the factor on the Poisson noise.
        gray_noise_prob: Probability that the three channels share one noise field.
        jpeg_range: Range of the JPEG quality, 1 to 100.

    Raises:
        ValueError: A field is out of its range; the message names it.
    """

    blur_prob: float = 1.0  # [RE] the first blur is unconditional
    kernel_sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)  # [RE] [OSE] realesrgan.py kernel_range
    kernel_probs: tuple[float, float, float, float, float, float] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # [OSE]
    sigma: tuple[float, float] = (0.2, 3.0)  # [OSE] blur_sigma
    betag: tuple[float, float] = (0.5, 4.0)  # [OSE] betag_range
    betap: tuple[float, float] = (1.0, 2.0)  # [OSE] betap_range
    sinc_prob: float = 0.1  # [OSE] sinc_prob
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)  # [OSE] resize_prob
    resize_range: tuple[float, float] = (0.15, 1.5)  # [OSE] resize_range
    gaussian_noise_prob: float = 0.5  # [OSE] gaussian_noise_prob
    noise_range: tuple[float, float] = (1.0, 30.0)  # [OSE] noise_range
    poisson_scale_range: tuple[float, float] = (0.05, 3.0)  # [OSE] poisson_scale_range
    gray_noise_prob: float = 0.4  # [OSE] gray_noise_prob
    jpeg_range: tuple[float, float] = (30.0, 95.0)  # [OSE] jpeg_range

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("blur_prob", "sinc_prob", "gaussian_noise_prob", "gray_noise_prob"):
            _check_probability(name, getattr(self, name))
        _check_sizes("kernel_sizes", self.kernel_sizes)
        _check_weights("kernel_probs", self.kernel_probs, len(KERNEL_NAMES))
        _check_weights("resize_prob", self.resize_prob, 3)
        _check_range("sigma", self.sigma, 1e-3)
        _check_range("betag", self.betag, 1e-3)
        _check_range("betap", self.betap, 1e-3)
        _check_range("resize_range", self.resize_range, 1e-3)
        for name in ("betag", "betap", "resize_range"):
            low, high = getattr(self, name)
            if not low <= 1.0 <= high:
                raise ValueError(f"{name}=({low}, {high}) must include 1: draws are split there")
        _check_range("noise_range", self.noise_range, 0.0)
        _check_range("poisson_scale_range", self.poisson_scale_range, 0.0)
        _check_range("jpeg_range", self.jpeg_range, 1.0, 100.0)


@dataclass(frozen=True)
class DegradationConfig:
    """The whole pipeline: first stage, second stage, then resize to the final size, sinc filter and JPEG.

    Args:
        scale: Ratio of the high-quality to the low-quality size.
        first: The first stage; its resize is relative to the high-quality image.
        second: The second stage; its resize is relative to the low-quality size, and its JPEG is the last one.
        second_order_prob: Probability of the second stage's blur, resize and noise (its JPEG is always applied).
        final_sinc_prob: Probability of the final sinc filter.
        final_sinc_sizes: Odd widths of the final sinc filter drawn from with equal chance, px.
        final_jpeg_last_prob: Probability of resizing and filtering before the last JPEG rather than after it.

    Raises:
        ValueError: A field is out of its range; the message names it.
    """

    scale: int = 4  # [OSE] scale
    first: StageConfig = StageConfig()
    second: StageConfig = StageConfig(
        blur_prob=0.8,  # [OSE] second_blur_prob
        sigma=(0.2, 1.5),  # [OSE] blur_sigma2
        resize_prob=(0.3, 0.4, 0.3),  # [OSE] resize_prob2
        resize_range=(0.3, 1.2),  # [OSE] resize_range2
        noise_range=(1.0, 25.0),  # [OSE] noise_range2
        poisson_scale_range=(0.05, 2.5),  # [OSE] poisson_scale_range2
    )  # kernels, sinc_prob2, gaussian_noise_prob2, gray_noise_prob2 and jpeg_range2 equal the first stage's in [OSE]
    second_order_prob: float = 1.0  # [RE] [OSE] always
    final_sinc_prob: float = 0.8  # [OSE] final_sinc_prob
    final_sinc_sizes: tuple[int, ...] = (7, 9, 11, 13, 15, 17, 19, 21)  # [RE] [OSE] realesrgan.py kernel_range
    final_jpeg_last_prob: float = 0.5  # [RE] both orders have the same chance

    def __post_init__(self) -> None:
        """Check every field."""
        if self.scale < 1:
            raise ValueError(f"scale={self.scale} must be a positive integer")
        for name in ("second_order_prob", "final_sinc_prob", "final_jpeg_last_prob"):
            _check_probability(name, getattr(self, name))
        _check_sizes("final_sinc_sizes", self.final_sinc_sizes)


OSEDIFF = DegradationConfig()
"""OSEDiff's numbers, also SeeSR's without its sharpened targets: the default of every paper here."""

OMGSR = DegradationConfig(
    first=replace(
        OSEDIFF.first,
        resize_range=(0.3, 1.5),  # [OMG] resize_range
        noise_range=(1.0, 15.0),  # [OMG] noise_range
        poisson_scale_range=(0.05, 2.0),  # [OMG] poisson_scale_range
        jpeg_range=(60.0, 95.0),  # [OMG] jpeg_range
    ),
    second=replace(
        OSEDIFF.second,
        blur_prob=0.5,  # [OMG] second_blur_prob
        resize_range=(0.6, 1.2),  # [OMG] resize_range2
        noise_range=(1.0, 12.0),  # [OMG] noise_range2
        poisson_scale_range=(0.05, 1.0),  # [OMG] poisson_scale_range2
        jpeg_range=(60.0, 100.0),  # [OMG] jpeg_range2
    ),
)
"""OMGSR's milder numbers, shared by PASD's and SeeSR's `params_realesrgan.yml`."""

INVSR = DegradationConfig(
    first=replace(
        OSEDIFF.first,
        kernel_sizes=(3, 5, 7, 9, 11, 13, 15, 17, 19),  # [INV] blur_kernel_size 21: odd sizes from 3 to below it
    ),
    second=replace(
        OSEDIFF.second,
        kernel_sizes=(3, 5, 7, 9, 11, 13),  # [INV] blur_kernel_size2 15: odd sizes from 3 to below it
    ),
    second_order_prob=0.5,  # [INV] second_order_prob
    final_sinc_sizes=(3, 5, 7, 9, 11, 13),  # [INV] drawn from the second stage's sizes
)
"""ResShift's and InvSR's numbers: OSEDiff's, smaller kernels, the second stage for half of the samples."""

PRESETS = {"osediff": OSEDIFF, "omgsr": OMGSR, "invsr": INVSR}


def preset(name: str) -> DegradationConfig:
    """Look a published set of numbers up by name.

    Args:
        name: `osediff`, `omgsr` or `invsr`.

    Returns:
        The configuration, x4.

    Raises:
        ValueError: No preset has that name; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown degradation preset {name!r}; known are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
