"""LPIPS (Zhang et al., arXiv:1801.03924) on VGG16 or AlexNet, and its edge-aware form, DFOSD's ablation."""

from typing import Literal

import torch
from torch import Tensor, nn

from common.loading import weights_to_read
from common.losses.checks import check_pair
from common.losses.dists import EdgePadding, Grey, edges_rgb
from common.losses.vgg import VGGTrunk, read_torchmetrics_weights


class LPIPS(nn.Module):
    """Learned perceptual distance of two images, 0 for equal ones; nothing in it is trainable.

    The official net maps [-1, 1] images by a shift and a scale of its own; on [0, 1] images these are ImageNet's mean
    and standard deviation to the digit, which the trunk applies. Features are divided by sqrt(sum f^2 + 1e-8), the
    form whose gradient is finite where all features are zero.

    Args:
        weights: `pretrained`, `random` or a path, as for `VGGTrunk`. `random` weighs all C channels of a map by 1/C;
            otherwise the linear weights are the official ones (v0.1).
        width: Factor on the number of channels; other than 1 only with `random` weights.
        seed: Seed of the `random` weights.
        net: Trunk: `vgg16`, usual in losses, or `alexnet`, usual in tables.
    """

    linear: Tensor

    def __init__(
        self, weights: str = "random", width: float = 1.0, seed: int = 0, net: Literal["vgg16", "alexnet"] = "vgg16"
    ) -> None:
        super().__init__()
        weights = weights_to_read(weights)
        layers = (3, 8, 15, 22, 29) if net == "vgg16" else (1, 4, 7, 9, 11)  # the ReLUs before each pooling, or all
        self.trunk = VGGTrunk(layers, net, weights, width, "max", seed)
        if weights == "random":
            linear = [torch.full((num,), 1 / num) for num in self.trunk.channels]
        else:
            official = read_torchmetrics_weights(f"lpips_models/{net.removesuffix('16').removesuffix('net')}.pth")
            linear = [official[f"lin{index}.model.1.weight"].flatten() for index in range(5)]
        self.register_buffer("linear", torch.cat(linear), persistent=False)

    def forward(self, x_01: Tensor, y_01: Tensor) -> Tensor:
        """Compare images with targets; only `x_01` gets a gradient.

        Args:
            x_01: Images, (B, 3, H, W), RGB in [0, 1], sides of at least 16 (AlexNet: 35); nothing is clamped.
            y_01: Targets, same shape and range.

        Returns:
            Distance per image, (B,), fp32.

        Raises:
            ValueError: The shapes differ or are not (B, 3, H, W), or in debug mode the range is wrong.
        """
        check_pair(x_01, y_01)
        return self.distance(x_01, y_01)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """`forward` without its checks, for maps that may leave [0, 1], such as edges."""
        with torch.autocast(x.device.type, enabled=False):
            maps_x = self.trunk(x)
            with torch.no_grad():
                maps_y = self.trunk(y)
            diffs = [mean_square(_unit(a) - _unit(b)) for a, b in zip(maps_x, maps_y, strict=True)]  # (B, C_i) each
            return (torch.cat(diffs, 1) * self.linear).sum(1)


class EALPIPS(nn.Module):
    """Edge-aware LPIPS: LPIPS(x, y) + LPIPS(S(x), S(y)), S the Sobel magnitude in three equal channels.

    Args:
        weights: `pretrained`, `random` or a path, as for `LPIPS`.
        width: Factor on the number of channels; other than 1 only with `random` weights.
        grey: Image that the edges are computed on, as for `EADISTS`.
        edge_padding: `replicate` or `zeros`, as for `EADISTS`.
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
        self.lpips = LPIPS(weights, width, seed)
        self.grey: Grey = grey
        self.edge_padding: EdgePadding = edge_padding

    def forward(self, x_01: Tensor, y_01: Tensor) -> Tensor:
        """Compare images with targets as `LPIPS.forward` does; (B,)."""
        check_pair(x_01, y_01)
        edges_x, edges_y = (edges_rgb(image, self.grey, self.edge_padding) for image in (x_01, y_01))
        return self.lpips.distance(x_01, y_01) + self.lpips.distance(edges_x, edges_y)


def mean_square(diff: Tensor) -> Tensor:
    """Mean over the pixels of the squares; (B, C, H, W) in, (B, C) out."""
    return (diff * diff).sum((2, 3)) / (diff.shape[2] * diff.shape[3])  # faster backward than square and mean on a CPU


def _unit(features: Tensor) -> Tensor:
    """Give every pixel's feature vector length 1; (B, C, H, W)."""
    return features * ((features * features).sum(1, keepdim=True) + 1e-8).rsqrt()
