"""Losses that more than one paper uses; each gives one value per image, (B,), and the caller takes the mean.

Those that a paper states as a gradient g get their (B,) from `score_surrogate`.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from common.losses.adversarial import discriminator_loss, generator_loss
from common.losses.checks import check_range_01
from common.losses.distribution_matching import distribution_matching_gradient, noise_gradient, score_surrogate
from common.losses.dists import DISTS, EADISTS, sobel_magnitude
from common.losses.dwt import dwt_low, dwt_low_loss
from common.losses.gram import GramKL, gram_distances
from common.losses.latent_lpips import LatentLPIPS
from common.losses.lpips import EALPIPS, LPIPS
from common.losses.pixel import l1, mse
from common.losses.vgg import VGGTrunk
from common.losses.vsd import vsd_gradient, vsd_loss

__all__ = [
    "DISTS",
    "EADISTS",
    "EALPIPS",
    "IMAGE_LOSSES",
    "LPIPS",
    "GramKL",
    "LatentLPIPS",
    "VGGTrunk",
    "build_image_loss",
    "check_range_01",
    "discriminator_loss",
    "distribution_matching_gradient",
    "dwt_low",
    "dwt_low_loss",
    "generator_loss",
    "gram_distances",
    "l1",
    "mse",
    "noise_gradient",
    "score_surrogate",
    "sobel_magnitude",
    "vsd_gradient",
    "vsd_loss",
]

ImageLoss = Callable[[Tensor, Tensor], Tensor]

_PIXEL = {"mse": mse, "l1": l1, "dwt": dwt_low_loss}
_FEATURE: dict[str, Callable[[str, float], ImageLoss]] = {
    "dists": DISTS,
    "ea_dists": EADISTS,
    "lpips": LPIPS,
    "lpips_alex": partial(LPIPS, net="alexnet"),
    "ea_lpips": EALPIPS,
    "gram": partial(GramKL, features="plain"),
}
IMAGE_LOSSES = (*_PIXEL, *_FEATURE)
"""Names that `build_image_loss` knows."""


def build_image_loss(name: str, weights: str = "random", width: float = 1.0) -> ImageLoss:
    """Make a loss by name, to be called as `loss(x_01, y_01)` with two (B, 3, H, W) batches in [0, 1]; gives (B,).

    Args:
        name: `mse`, `l1`, `dwt` (low-frequency band), `dists`, `ea_dists`, `lpips`, `lpips_alex`, `ea_lpips` or `gram`
            (Gram matrices of VGG19's plain features). The first three are functions, the others modules that have to
            be moved to the images' device.
        weights: `pretrained`, `random` or a path, as for `VGGTrunk`; the pixel losses have none.
        width: Factor on the number of channels of `random` weights.

    Returns:
        The loss.

    Raises:
        ValueError: `name` is unknown; the message lists the names.
    """
    if name in _PIXEL:
        return _PIXEL[name]
    if name in _FEATURE:
        return _FEATURE[name](weights, width)
    raise ValueError(f"name={name!r} is not an image loss; use one of {', '.join(IMAGE_LOSSES)}.")
