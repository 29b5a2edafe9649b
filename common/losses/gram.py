"""Gram-KL, RFSR's penalty on a change of style (arXiv:2412.03268, Eq. 6): distances of VGG19's Gram matrices."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses.checks import check_pair
from common.losses.vgg import VGGTrunk

GramFeatures = Literal["layernorm", "plain"]
GramDistance = Literal["sq_frobenius", "l1_mean"]

GRAM_LAYERS = (2, 7, 16, 25, 34)  # conv1_2, conv2_2, conv3_4, conv4_4, conv5_4 of VGG19, before their ReLUs


class GramKL(nn.Module):
    """Weighted sum of `gram_distances` over five layers of VGG19; despite its name no Kullback-Leibler divergence.

    Value and gradient are zero where the images equal their references. Nothing in it is trainable. The paper gives
    neither layers nor normalisation; both are taken from the authors' code, whose distance is `l1_mean`.

    Args:
        weights: `pretrained`, `random` or a path, as for `VGGTrunk`.
        width: Factor on the number of channels; other than 1 only with `random` weights.
        features: Features of the Gram matrices, as for `gram_matrix`.
        distance: Distance of two Gram matrices: `sq_frobenius` (Eq. 6) or `l1_mean`, as for `gram_distances`.
        layer_weights: Weights of conv1_2, conv2_2, conv3_4, conv4_4 and conv5_4.
        seed: Seed of the `random` weights.

    Raises:
        ValueError: There are not five `layer_weights`.
    """

    layer_weights: Tensor

    def __init__(
        self,
        weights: str = "random",
        width: float = 1.0,
        features: GramFeatures = "layernorm",
        distance: GramDistance = "sq_frobenius",
        layer_weights: Sequence[float] = (0.1, 0.1, 1.0, 1.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(layer_weights) != len(GRAM_LAYERS):
            raise ValueError(f"layer_weights={list(layer_weights)} must be five, one for each of conv1_2 to conv5_4.")
        self.trunk = VGGTrunk(GRAM_LAYERS, "vgg19", weights, width, "max", seed)
        self.features: GramFeatures = features
        self.distance: GramDistance = distance
        self.register_buffer("layer_weights", torch.tensor(layer_weights, dtype=torch.float32), persistent=False)

    def forward(self, x_01: Tensor, x_ref_01: Tensor) -> Tensor:
        """Compare images with those of the pretrained model; only `x_01` gets a gradient.

        Args:
            x_01: Images, (B, 3, H, W), RGB in [0, 1], sides of at least 16; nothing is clamped.
            x_ref_01: The pretrained model's images of the same inputs, same shape and range.

        Returns:
            sum_l w_l d(G_l, G_l') per image, (B,), fp32.

        Raises:
            ValueError: As for `gram_distances`.
        """
        return (gram_distances(self.trunk, x_01, x_ref_01, self.features, self.distance) * self.layer_weights).sum(1)


def gram_distances(
    trunk: VGGTrunk,
    x_01: Tensor,
    x_ref_01: Tensor,
    features: GramFeatures = "layernorm",
    distance: GramDistance = "sq_frobenius",
) -> Tensor:
    """Distances of the Gram matrices of two batches in every layer of a trunk; to report the drift of a style.

    Args:
        trunk: The network, such as `GramKL.trunk`; L layers.
        x_01: Images, (B, 3, H, W), RGB in [0, 1].
        x_ref_01: References, same shape and range; they get no gradient.
        features: Features of the Gram matrices, as for `gram_matrix`.
        distance: `sq_frobenius`, sum (G - G')^2, or `l1_mean`, mean |G - G'|, over the C^2 entries.

    Returns:
        One distance per image and layer, unweighted, (B, L), fp32.

    Raises:
        ValueError: The shapes differ or are not (B, 3, H, W), an option is unknown, or in debug mode the range is
            wrong.
    """
    check_pair(x_01, x_ref_01)
    if distance not in ("sq_frobenius", "l1_mean"):
        raise ValueError(f"distance={distance!r} is unknown; use 'sq_frobenius' or 'l1_mean'.")
    grams = [gram_matrix(f, features) for f in trunk(x_01)]
    with torch.no_grad():
        grams_ref = [gram_matrix(f, features) for f in trunk(x_ref_01)]
    diffs = [gram - gram_ref for gram, gram_ref in zip(grams, grams_ref, strict=True)]
    if distance == "sq_frobenius":
        return torch.stack([diff.square().sum((1, 2)) for diff in diffs], 1)
    return torch.stack([diff.abs().mean((1, 2)) for diff in diffs], 1)


def gram_matrix(f: Tensor, features: GramFeatures = "layernorm") -> Tensor:
    """Products of a layer's channels, F F^T / (C H W) with F of shape (C, H W).

    Args:
        f: Features, (B, C, H, W).
        features: `layernorm` subtracts the mean of each image's C H W values and divides by sqrt(their variance +
            1e-5), so that the trace is 1; `plain` takes them as they are.

    Returns:
        (B, C, C), fp32, also under autocast (fp64 for fp64 features).

    Raises:
        ValueError: `features` is unknown.
    """
    if features not in ("layernorm", "plain"):
        raise ValueError(f"features={features!r} is unknown; use 'layernorm' or 'plain'.")
    with torch.autocast(f.device.type, enabled=False):
        rows = f.flatten(2).to(torch.promote_types(f.dtype, torch.float32))  # (B, C, H W)
        if features == "layernorm":
            rows = F.layer_norm(rows, rows.shape[1:])
        return rows @ rows.mT / (rows.shape[1] * rows.shape[2])
