"""FLUX's transformer (also FLUX.1 Kontext's, arXiv:2506.15742) as a velocity field over latents.

An image enters as tokens of 2x2 latent pixels. A token's position is three numbers, (image, row, column), which rotate
queries and keys (RoPE). Kontext edits a reference: its tokens follow those of the image to make, as image 1 instead
of 0 at the same rows and columns. They are no part of the output.

B batch, C latent channels, h w latent sides, N text tokens of width D, P width of the pooled text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from common.precision import input_dtype

FLUX_TARGETS: tuple[str, ...] = (
    "x_embedder",
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
"""Layers that OMGSR (arXiv:2508.08227) adapts in FLUX: the image's input layer, all attention, the double blocks' MLPs.

In a single block these are q, k and v; `proj_mlp` and `proj_out` are not adapted.
"""


class FluxText(NamedTuple):
    """FLUX's condition from a prompt; the batch of either tensor may be 1 for all samples."""

    tokens: Tensor
    """(B, N, D), by T5."""
    pooled: Tensor
    """(B, P), by CLIP."""


class FluxDenoiser(nn.Module):
    """Predict the velocity of z_t = (1 - t) z + t eps, which is eps - z on average, with a `FluxTransformer2DModel`.

    Args:
        transformer: The network; adapters may be float32 on a base in bfloat16.
        gradient_checkpointing: Recompute the activations in the backward pass: less memory, more time. The adapter that
            is active during the backward pass must be the one of the forward pass.
    """

    def __init__(self, transformer: FluxTransformer2DModel, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.transformer = transformer
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def forward(
        self, z_slot: Tensor, t: float | Tensor, text: FluxText, z_ref: Tensor | None = None, guidance: float = 1.0
    ) -> Tensor:
        """Run the transformer once.

        Args:
            z_slot: Input in the place of the image to make, (B, C, h, w), scaled latents, h and w even.
            t: Time in [0, 1], 1 for noise; one number or (B,).
            text: Condition.
            z_ref: Reference to edit, like z_slot.
            guidance: Guidance scale of a guidance-distilled network; other networks ignore it.

        Returns:
            v, (B, C, h, w), in float32 at least.

        Raises:
            ValueError: A side is odd, or the reference has another shape.
        """
        if z_ref is not None and z_ref.shape != z_slot.shape:
            raise ValueError(
                f"z_ref has shape {tuple(z_ref.shape)}, z_slot {tuple(z_slot.shape)}; resize the reference first."
            )
        batch, _, height, width = z_slot.shape
        dtype, device = input_dtype(self.transformer.x_embedder), z_slot.device
        images = [z_slot] if z_ref is None else [z_slot, z_ref]
        times = t.to(device, dtype) if isinstance(t, Tensor) else torch.tensor([t], dtype=dtype, device=device)
        guided = self.transformer.config.guidance_embeds
        tokens = self.transformer(
            hidden_states=torch.cat([pack(z) for z in images], 1).to(dtype),  # (B, N_slot + N_ref, 4C)
            encoder_hidden_states=text.tokens.to(device, dtype).expand(batch, -1, -1),
            pooled_projections=text.pooled.to(device, dtype).expand(batch, -1),
            timestep=times.expand(batch),
            img_ids=torch.cat([_positions(i, height, width, device) for i in range(len(images))]),
            txt_ids=torch.zeros(text.tokens.shape[1], 3, device=device),
            guidance=torch.full((batch,), guidance, dtype=dtype, device=device) if guided else None,
        ).sample
        of_slot = tokens[:, : height * width // 4].to(torch.promote_types(z_slot.dtype, torch.float32))
        return unpack(of_slot, height, width)


def pack(z: Tensor) -> Tensor:
    """Make 2x2 latent pixels one token.

    Args:
        z: (B, C, h, w), h and w even.

    Returns:
        (B, h/2 * w/2, 4C), row by row; within a token by channel, row, column.

    Raises:
        ValueError: A side is odd.
    """
    batch, channels, height, width = z.shape
    if height % 2 or width % 2:
        raise ValueError(f"z is {height}x{width}, and its sides must be even; pad the image by one more latent pixel.")
    patches = z.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        tokens: (B, h/2 * w/2, 4C).
        height: h.
        width: w.

    Returns:
        (B, C, h, w).

    Raises:
        ValueError: A side is odd, or there are not as many tokens as that.
    """
    batch, count, channels = tokens.shape
    if height % 2 or width % 2 or count != height * width // 4:
        raise ValueError(f"tokens has {count} tokens for {height}x{width}; give even sides with height * width / 4.")
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def _positions(image: int, height: int, width: int, device: torch.device) -> Tensor:
    """(image, row, column) of each token, (h/2 * w/2, 3)."""
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    return torch.cartesian_prod(torch.tensor([image], device=device), rows, columns).float()
