"""Checks shared by the image losses."""

import os

from torch import Tensor


def check_pair(x_01: Tensor, y_01: Tensor) -> None:
    """Refuse inputs whose shapes differ or are not (B, 3, H, W); in debug mode also check their range.

    Args:
        x_01: Images, (B, 3, H, W), about [0, 1].
        y_01: Target images, same shape.

    Raises:
        ValueError: A shape is wrong, or ISR_DEBUG=1 and a range is (see `check_range_01`).
    """
    if x_01.shape != y_01.shape or x_01.ndim != 4 or x_01.shape[1] != 3:
        raise ValueError(
            f"x_01 has shape {tuple(x_01.shape)} and y_01 {tuple(y_01.shape)}; pass two batches of one (B, 3, H, W)."
        )
    if os.environ.get("ISR_DEBUG") == "1":
        check_range_01(x_01, "x_01")
        check_range_01(y_01, "y_01")


def check_range_01(x: Tensor, name: str) -> None:
    """Refuse images whose range is clearly not [0, 1].

    Nothing is clamped before a loss, so a restored image may overshoot [0, 1] a little while it trains. The bounds
    therefore lie half a range outside: [-1, 1] and [0, 255] images are caught, overshoot is not. Reading the range
    waits for the device, hence the losses call this only where the environment has ISR_DEBUG=1.

    Args:
        x: Images, any shape.
        name: Name of the images in the message.

    Raises:
        ValueError: The range exceeds [-0.5, 1.5]; the message holds the range found.
    """
    low, high = (bound.item() for bound in x.detach().aminmax())
    if low < -0.5 or high > 1.5:
        raise ValueError(
            f"{name} spans [{low:.3g}, {high:.3g}] where [0, 1] is expected; map [-1, 1] images with x * 0.5 + 0.5."
        )
