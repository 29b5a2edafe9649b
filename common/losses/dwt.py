"""Low band of a discrete wavelet transform and the L1 distance in it (RFSR, arXiv:2412.03268, Eq. 2)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses.checks import check_pair

Wavelet = Literal["haar", "dtcwt3"]

# Kingsbury's low-pass filters for the dual-tree transform as in rjw57/dtcwt 0.14, equal in pytorch_wavelets 1.3: h0o of
# near_sym_b (times 5120) and h0a of qshift_b; h0b is h0a reversed.
_NEAR_SYM_B = tuple(tap / 5120 for tap in (-9, 0, 114, -240, -247, 1520, 2844, 1520, -247, -240, 114, 0, -9))
_QSHIFT_B = (
    0.003253142763653182,
    -0.00388321199915849,
    0.03466034684485349,
    -0.03887280126882779,
    -0.11720388769911527,
    0.27529538466888204,
    0.7561456438925225,
    0.5688104207121227,
    0.011866092033797,
    -0.1067118046866654,
    0.023825384794920298,
    0.01702522388155399,
    -0.005439475937274115,
    -0.004556895628475491,
)


def dwt_low(x_01: Tensor, wavelet: Wavelet = "haar") -> Tensor:
    """Low band (LL) of an image.

    Args:
        x_01: Images, (B, C, H, W), [0, 1], sides of at least 2. 16-bit floats are computed in fp32.
        wavelet: `haar`, one orthonormal level: (a + b + c + d) / 2 of each 2x2 block, odd sides reflected. `dtcwt3`,
            three levels of the dual-tree complex wavelet transform with near_sym_b and qshift_b (the authors' code).

    Returns:
        (B, C, ceil(H / 2), ceil(W / 2)), 2 c for a constant c. For `dtcwt3` 4 c and, where H and W are multiples of 8,
        (B, C, H / 4, W / 4).

    Raises:
        ValueError: `wavelet` is unknown.
    """
    x = x_01.to(torch.promote_types(x_01.dtype, torch.float32))
    if wavelet == "haar":
        return 2 * F.avg_pool2d(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="reflect"), 2)
    if wavelet == "dtcwt3":
        return _dtcwt3_low(x)
    raise ValueError(f"wavelet={wavelet!r} is unknown; use 'haar' or 'dtcwt3'.")


def dwt_low_loss(x_01: Tensor, y_01: Tensor, wavelet: Wavelet = "haar") -> Tensor:
    """Mean |LL(x) - LL(y)| per image; only `x_01` gets a gradient.

    Args:
        x_01: Images, (B, 3, H, W), [0, 1], sides of at least 2; nothing is clamped.
        y_01: Targets, same shape and range.
        wavelet: As for `dwt_low`.

    Returns:
        Mean over channels and places of the low band, (B,), fp32.

    Raises:
        ValueError: The shapes differ or are not (B, 3, H, W), `wavelet` is unknown, or in debug mode a range is wrong.
    """
    check_pair(x_01, y_01)
    dtype = torch.promote_types(x_01.dtype, torch.float32)
    return dwt_low(x_01.to(dtype) - y_01.detach().to(dtype), wavelet).abs().mean((1, 2, 3))  # LL is linear


def _dtcwt3_low(x: Tensor) -> Tensor:
    """Low band of the third level, both trees interleaved; sizes that do not fit repeat their border pixels."""
    h0o = x.new_tensor(_NEAR_SYM_B).view(1, 1, -1)
    h0a = x.new_tensor(_QSHIFT_B)
    trees = x.new_zeros(2, 1, 28)  # one tree on the even samples, the other on the odd ones
    trees[0, 0, ::2], trees[1, 0, 1::2] = h0a, h0a.flip(0)
    height, width = x.shape[2:]
    low = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
    with torch.autocast(x.device.type, enabled=False):
        low = _filter_rows(_filter_rows(low, h0o, 1).mT, h0o, 1).mT
        for _ in range(2):
            row, column = (int(side % 4 > 0) for side in low.shape[2:])
            low = F.pad(low, (column, column, row, row), mode="replicate")
            low = _filter_rows(_filter_rows(low, trees, 4).mT, trees, 4).mT
    return low


def _filter_rows(x: Tensor, kernels: Tensor, stride: int) -> Tensor:
    """Correlate mirrored rows with K kernels, (K, 1, taps), interleaved; (B, C, H, W) to (B, C, H, K W / stride)."""
    num, taps = x.shape[3], kernels.shape[2]
    margin = (taps - stride) // 2
    index = torch.arange(-margin, num + margin, device=x.device) % (2 * num)
    rows = x[..., torch.minimum(index, 2 * num - 1 - index)].flatten(0, 2).unsqueeze(1)
    return F.conv1d(rows, kernels, stride=stride).mT.reshape(*x.shape[:3], -1)
