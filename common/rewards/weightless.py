"""Rewards without weights: formulas that stand in for learned rewards in the demo and do not replace them elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common.rewards.base import Reward

_LUMA = (0.299, 0.587, 0.114)  # BT.601
_SCHARR_SMOOTH = (3 / 16, 10 / 16, 3 / 16)
_SCHARR_SLOPE = (-0.5, 0.0, 0.5)
_TINY = 1e-20  # under roots; in units of (grey value)^4


class Sharpness(Reward):
    """Edge sharpness: how much coherent gradient an image has for its local contrast; 0 for flat images, below 1.

    With Y the luma, g its Scharr gradient, G a Gaussian window, and means over all windows within the image:

        J = G * (g g^T),   A = mean(lambda_1(J) - lambda_2(J)),   V = mean(G * Y^2 - (G * Y)^2)
        score = A / (A + V + floor)

    A step of height h that is blurred over sigma px adds about h^2 / sigma to A and about h^2 to V, so blur lowers the
    score. So does noise: its gradients have no direction, hence lambda_1 = lambda_2 up to chance, and it adds to V. A
    ramp scores 1 / (1 + var G) for any slope; gain and offset of the image do not matter until V nears `floor`.

    It is not a quality measure: it reacts to edges, not content, and a cartoon scores above the photo it is drawn from.

    Args:
        sigma: Standard deviation of the window, px; it reaches 3 sigma, rounded up.
        floor: Variance that counts as flat, for grey values in [0, 1]; the default is that of faint noise, 4 of 255
            levels.
    """

    name = "sharpness"
    differentiable = True

    def __init__(self, sigma: float = 2.0, floor: float = (4 / 255) ** 2) -> None:
        super().__init__()
        if sigma <= 0 or floor <= 0:
            raise ValueError(f"sigma={sigma} and floor={floor} must be positive; the defaults are 2 and (4/255)^2.")
        self.sigma, self.floor = sigma, floor

    def _score(self, x: Tensor, prompts: Sequence[str], hq: Tensor | None) -> Tensor:
        radius = math.ceil(3 * self.sigma)
        window = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype) / self.sigma) ** 2)
        window = window / window.sum()
        side = len(window) + 2  # Scharr's operator takes a pixel at each end
        if min(x.shape[2:]) < side:
            raise ValueError(f"x_01 is {x.shape[3]} x {x.shape[2]} px; the sharpness needs {side} x {side} or more.")
        y = (x * x.new_tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        y = y - y.mean((2, 3), keepdim=True)  # keeps digits in the variance
        smooth, slope = x.new_tensor(_SCHARR_SMOOTH), x.new_tensor(_SCHARR_SLOPE)
        g_x, g_y = _separable(y, smooth, slope), _separable(y, slope, smooth)
        y = y[..., 1:-1, 1:-1]
        planes = torch.stack([g_x * g_x, g_y * g_y, g_x * g_y, y, y * y])  # (5, B, 1, H, W)
        xx, yy, xy, mean, square = _separable(planes.flatten(0, 1), window, window).unflatten(0, (5, -1))
        coherent = ((xx - yy) ** 2 + 4 * xy**2).clamp_min(_TINY).sqrt().mean((1, 2, 3))
        contrast = (square - mean**2).clamp_min(0).mean((1, 2, 3))
        return coherent / (coherent + contrast + self.floor)


class Neutrality(Reward):
    """Closeness of an image's mean colour to grey, by the grey-world assumption (Buchsbaum 1980); 1 if it is grey.

    With the means of R, G and B over the pixels and their standard deviation (of the three, over 3):

        score = 1 - std(mean R, mean G, mean B)

    The assumption fails for photos of one colour: a higher score means a weaker colour cast, or lost colour.
    """

    name = "neutrality"
    differentiable = True

    def _score(self, x: Tensor, prompts: Sequence[str], hq: Tensor | None) -> Tensor:
        return 1 - _root(x.mean((2, 3)).var(1, correction=0))


class Colourfulness(Reward):
    """Colourfulness of Hasler and Suesstrunk (2003): spread and strength of the two opponent colours; 0 for grey.

    With rg = R - G and yb = (R + G) / 2 - B, standard deviations and means over the pixels:

        score = sqrt(std_rg^2 + std_yb^2) + 0.3 sqrt(mean_rg^2 + mean_yb^2)

    The published scale is 255 times this, for pixels in 0..255. More colour is not better: restorations of one image
    differ in it, and that is what a second reward in a group needs.
    """

    name = "colourfulness"
    differentiable = True

    def _score(self, x: Tensor, prompts: Sequence[str], hq: Tensor | None) -> Tensor:
        red, green, blue = x.unbind(1)
        opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)  # (B, 2, pixels)
        variance, mean = torch.var_mean(opponents, 2, correction=0)
        return _root(variance.sum(1)) + 0.3 * _root((mean**2).sum(1))


def _root(power: Tensor) -> Tensor:
    """Square root whose slope is 0 at 0, and which is exactly 0 there."""
    return power.clamp_min(_TINY).sqrt() - math.sqrt(_TINY)


def _separable(y: Tensor, column: Tensor, row: Tensor) -> Tensor:
    """Correlate (B, 1, H, W) with the outer product of two odd windows, where these fit."""
    return F.conv2d(F.conv2d(y, column.view(1, 1, -1, 1)), row.view(1, 1, 1, -1))
