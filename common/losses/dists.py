"""DISTS (Ding et al., arXiv:2004.07728) and the edge-aware form of it that DFOSD trains with (arXiv:2410.04224)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.loading import weights_to_read
from common.losses.checks import check_pair
from common.losses.vgg import VGGTrunk, read_torchmetrics_weights

Grey = Literal["mean", "luma", "per_channel"]
EdgePadding = Literal["replicate", "zeros"]

# Share of each map (raw image, relu1_2, relu2_2, relu3_3, relu4_3, relu5_3) in the official alpha and beta.
ALPHA_SHARES = (0.0632, 0.0386, 0.0779, 0.1531, 0.2747, 0.2686)
BETA_SHARES = (0.0616, 0.0001, 0.0007, 0.0024, 0.0020, 0.0572)
_EPS = 1e-6  # c1 and c2 of Eq. 5 and 6


class DISTS(nn.Module):
    """Deep image structure and texture similarity of two images, 0 for equal ones; nothing in it is trainable.

    Args:
        weights: `pretrained`, `random` or a path, as for `VGGTrunk`. `random` gives every map the official weights'
            share, spread evenly over its channels; otherwise alpha and beta are the official ones.
        width: Factor on the number of channels; other than 1 only with `random` weights.
        seed: Seed of the `random` weights.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(self, weights: str = "random", width: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        weights = weights_to_read(weights)
        self.trunk = VGGTrunk((3, 8, 15, 22, 29), "vgg16", weights, width, "l2", seed)
        self.channels = (3, *self.trunk.channels)
        if weights == "random":
            alpha = _spread(ALPHA_SHARES, self.channels)
            beta = _spread(BETA_SHARES, self.channels)
        else:
            official = read_torchmetrics_weights("dists_models/weights.pt")
            alpha, beta = official["alpha"].flatten(), official["beta"].flatten()
        total = alpha.sum() + beta.sum()
        self.register_buffer("alpha", alpha / total, persistent=False)
        self.register_buffer("beta", beta / total, persistent=False)

    def forward(self, x_01: Tensor, y_01: Tensor) -> Tensor:
        """Compare images with targets; only `x_01` gets a gradient.

        Args:
            x_01: Images, (B, 3, H, W), RGB in [0, 1], any size; slightly outside is fine, nothing is clamped.
            y_01: Targets, same shape and range.

        Returns:
            1 - sum_ij (alpha_ij S1_ij + beta_ij S2_ij) per image, (B,), fp32.

        Raises:
            ValueError: The shapes differ or are not (B, 3, H, W), or in debug mode the range is wrong.
        """
        check_pair(x_01, y_01)
        return self.distance(x_01, y_01)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """`forward` without its checks, for maps that may leave [0, 1], such as edges."""
        with torch.autocast(x.device.type, enabled=False):
            maps_x = self._maps(x)
            with torch.no_grad():
                maps_y = self._maps(y.detach())
            pairs = zip(maps_x, maps_y, strict=True)
            luminance, structure = zip(*(_similarities(map_x, map_y) for map_x, map_y in pairs), strict=True)
            similarity = torch.cat(luminance, 1) * self.alpha + torch.cat(structure, 1) * self.beta  # (B, sum C_i)
            return 1 - similarity.sum(1)

    def _maps(self, x: Tensor) -> list[Tensor]:
        return [x.to(self.alpha.dtype), *self.trunk(x)]


class EADISTS(nn.Module):
    """Edge-aware DISTS of DFOSD: DISTS(x, y) + DISTS(S(x), S(y)), S the Sobel magnitude, both weights 1.

    The edge maps reach 4.47 and enter DISTS neither scaled nor clamped.

    Args:
        weights: `pretrained`, `random` or a path, as for `DISTS`.
        width: Factor on the number of channels; other than 1 only with `random` weights.
        grey: Image that the edges are computed on. The paper does not specify it; the authors' public code uses `mean`.
        edge_padding: `replicate`, or `zeros` as in public code of its authors, which draws a frame.
        seed: Seed of the `random` weights.
    """

    def __init__(
        self,
        weights: str = "random",
        width: float = 1.0,
        grey: Grey = "mean",
        edge_padding: EdgePadding = "replicate",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.dists = DISTS(weights, width, seed)
        self.grey: Grey = grey
        self.edge_padding: EdgePadding = edge_padding

    def forward(self, x_01: Tensor, y_01: Tensor) -> Tensor:
        """Compare images with targets as `DISTS.forward` does; (B,)."""
        check_pair(x_01, y_01)
        edges_x, edges_y = (edges_rgb(image, self.grey, self.edge_padding) for image in (x_01, y_01))
        return self.dists.distance(x_01, y_01) + self.dists.distance(edges_x, edges_y)


def sobel_magnitude(x_01: Tensor, grey: Grey = "mean", padding: EdgePadding = "replicate") -> Tensor:
    """Edge strength sqrt(gx^2 + gy^2 + 1e-6) with the unnormalised 3x3 Sobel kernels (1 2 1).

    Args:
        x_01: Images, (B, 3, H, W), RGB in [0, 1]. 16-bit floats are computed in fp32.
        grey: `mean` of R, G and B, `luma` (BT.601), or `per_channel`.
        padding: Continuation of the border.

    Returns:
        (B, 1, H, W), or (B, 3, H, W) for `per_channel`; 1e-3 in flat areas, 4 at a step from 0 to 1.

    Raises:
        ValueError: `grey` or `padding` is unknown.
    """
    x = x_01.to(torch.promote_types(x_01.dtype, torch.float32))
    if grey == "mean":
        x = x.mean(1, keepdim=True)
    elif grey == "luma":
        x = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    elif grey != "per_channel":
        raise ValueError(f"grey={grey!r} is unknown; use 'mean', 'luma' or 'per_channel'.")
    if padding not in ("replicate", "zeros"):
        raise ValueError(f"padding={padding!r} is unknown; use 'replicate' or 'zeros'.")
    x = F.pad(x, (1, 1, 1, 1), mode="replicate" if padding == "replicate" else "constant")
    rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]  # smoothed down the columns, (B, C, H, W + 2)
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]  # smoothed along the rows, (B, C, H + 2, W)
    gx = rows[..., 2:] - rows[..., :-2]
    gy = columns[..., 2:, :] - columns[..., :-2, :]
    return (gx.square() + gy.square() + 1e-6).sqrt()


def edges_rgb(x_01: Tensor, grey: Grey, padding: EdgePadding) -> Tensor:
    """`sobel_magnitude` with one edge channel repeated to three, (B, 3, H, W)."""
    return sobel_magnitude(x_01, grey, padding).expand(-1, 3, -1, -1)


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5 and 6 per channel: S1 of the means, S2 of the biased (co)variances; (B, C, H, W) in, two (B, C) out."""
    num = x.shape[2] * x.shape[3]
    # Sums divided afterwards and products instead of squares: 2.5 times faster forward and backward on a CPU.
    mean_x, mean_y = x.sum((2, 3), keepdim=True) / num, y.sum((2, 3), keepdim=True) / num
    # The moments' derivative by the mean is zero, so the gradient need not pass through it here.
    centred_x, centred_y = x - mean_x.detach(), y - mean_y
    var_x, var_y = (centred_x * centred_x).sum((2, 3)) / num, (centred_y * centred_y).sum((2, 3)) / num
    cov = (centred_x * centred_y).sum((2, 3)) / num
    mean_x, mean_y = mean_x.flatten(1), mean_y.flatten(1)
    s1 = (2 * mean_x * mean_y + _EPS) / (mean_x.square() + mean_y.square() + _EPS)
    s2 = (2 * cov + _EPS) / (var_x + var_y + _EPS)
    return s1, s2


def _spread(shares: tuple[float, ...], channels: tuple[int, ...]) -> Tensor:
    """Give each map its share, the same to all its channels; (sum of channels,)."""
    return torch.cat([torch.full((num,), share / num) for share, num in zip(shares, channels, strict=True)])
