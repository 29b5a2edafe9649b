"""A diffusers U-Net and its noise schedule behind one call."""

from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from common.diffusion import NoiseSchedule
from common.precision import input_dtype


class Prediction(NamedTuple):
    """A denoiser's prediction for z_t, in both forms; each is (B, C, h, w) in float32 at least."""

    eps: Tensor
    x0: Tensor


class UNetDenoiser(nn.Module):
    """Predict noise and clean latent with a `UNet2DConditionModel` of either prediction type.

    Args:
        unet: The network.
        schedule: Its noise schedule; `prediction_type` must be `epsilon` or `v_prediction`.
        gradient_checkpointing: Recompute the activations in the backward pass: less memory, more time.

    Raises:
        ValueError: The prediction type is unknown.
    """

    def __init__(
        self, unet: UNet2DConditionModel, schedule: NoiseSchedule, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        if schedule.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type='{schedule.prediction_type}' must be 'epsilon' or 'v_prediction'.")
        self.unet = unet
        self.schedule = schedule
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def forward(
        self, z_t: Tensor, t: int | Tensor, prompt_embeds: Tensor, added: dict[str, Tensor] | None = None
    ) -> Prediction:
        """Run the U-Net once.

        Args:
            z_t: Noisy latents, (B, C, h, w).
            t: Timesteps, one number or int64 (B,).
            prompt_embeds: Condition, (B, N, D), or (1, N, D) for the whole batch.
            added: SDXL's further conditions, see `sdxl_conditions`.

        Returns:
            The prediction as eps and as x0, consistent with z_t: z_t = sqrt(abar) x0 + sqrt(1 - abar) eps.

        Raises:
            ValueError: The U-Net needs further conditions and `added` is None.
        """
        if self.unet.config.addition_embed_type == "text_time" and added is None:
            raise ValueError("this U-Net is SDXL's and needs `added`; make it with sdxl_conditions(batch_size, ...).")
        dtype = input_dtype(self.unet.conv_in)
        out = self.unet(
            z_t.to(dtype), t, prompt_embeds.to(dtype).expand(len(z_t), -1, -1), added_cond_kwargs=added
        ).sample.to(torch.promote_types(z_t.dtype, torch.float32))
        if self.schedule.prediction_type == "epsilon":
            return Prediction(out, self.schedule.x0_from_eps(z_t, out, t))
        return Prediction(self.schedule.eps_from_v(z_t, out, t), self.schedule.x0_from_v(z_t, out, t))


def sdxl_conditions(
    batch_size: int, size: int = 512, pooled_width: int = 1280, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """SDXL's added conditions for "no text, whole image": zeros as pooled text, sizes without a crop.

    Args:
        batch_size: B.
        size: Side of the (square) image in pixels.
        pooled_width: Width of the pooled text embedding.
        device: Where to make them.

    Returns:
        `text_embeds` (B, pooled_width) and `time_ids` (B, 6): original size, crop corner, target size.
    """
    return {
        "text_embeds": torch.zeros(batch_size, pooled_width, device=device),
        "time_ids": torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32, device=device).repeat(
            batch_size, 1
        ),
    }
