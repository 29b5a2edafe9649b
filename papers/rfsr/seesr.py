"""SeeSR's U-Net and ControlNet (arXiv:2311.16518): Stable Diffusion's, with cross-attention to an image's tokens.

After each text transformer (`attentions`) stands a second one of the same shape (`image_attentions`), which reads
DAPE's tokens of the low-quality image: ResNet -> text -> image -> skip connection. It is a whole transformer with its
own self-attention, feed-forward layer and residual connection. It has no gate and, in SeeSR, no zero initialisation.
This follows the authors' code (cswry/SeeSR, `models/`); names and shapes are those of their checkpoint.

B batch, N text tokens of width D, M image tokens of width E, C latent channels, h w latent sides.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Self

import torch
from diffusers import ControlNetModel, ModelMixin, Transformer2DModel, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, UNetMidBlock2DCrossAttn
from torch import Tensor, nn

from common.loading import drawing_weights
from common.precision import input_dtype

IMAGE_ATTENTIONS = "*.image_attentions.*"
"""Pattern of the names of the layers that SeeSR adds to the U-Net and trains."""

SEESR_TRAINED = ("controlnet.*", f"unet.{IMAGE_ATTENTIONS}")
"""Parameters that SeeSR trains, in a module with the two networks as `controlnet` and `unet`: 749,881,040 values."""

_TOKENS = "image_tokens"  # under this name the tokens travel through diffusers' forward to the blocks


class Residuals(NamedTuple):
    """A ControlNet's residuals for its U-Net: one per skip connection (SD: 12), shallow first, and the mid block's."""

    down: tuple[Tensor, ...]
    mid: Tensor


def _arguments(model: ModelMixin, kind: type) -> dict[str, Any]:
    """The values in a model's config for another class's arguments.

    `from_config` is not used, as diffusers takes arguments given by position for defaults and drops them.
    """
    names = inspect.signature(kind.__init__).parameters  # type: ignore[misc]  # it is diffusers' alone
    return {name: value for name, value in model.config.items() if name in names}


class _ImageAttentionBlock(nn.Module):
    """A cross-attention block of diffusers with its layers, and one image transformer for each text transformer.

    Args:
        block: The block.
        image_dim: E.
    """

    has_cross_attention = True  # diffusers' U-Net and ControlNet ask for it

    def __init__(self, block: Any, image_dim: int) -> None:
        super().__init__()
        self.attentions: nn.ModuleList = block.attentions
        self.resnets: nn.ModuleList = block.resnets
        self.image_attentions = nn.ModuleList(
            Transformer2DModel(**_arguments(text, Transformer2DModel) | {"cross_attention_dim": image_dim})
            for text in block.attentions
        )
        self.gradient_checkpointing = False  # set by diffusers, which also puts _gradient_checkpointing_func here

    def _convolve(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        """ResNet i; the transformers handle their own checkpointing."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self.resnets[i], x, temb)  # type: ignore[operator]  # a function
        return self.resnets[i](x, temb)

    def _attend(self, i: int, x: Tensor, e_txt: Tensor, e_img: Tensor) -> Tensor:
        """Text, then image, each with its residual connection."""
        x = self.attentions[i](x, e_txt, return_dict=False)[0]
        return self.image_attentions[i](x, e_img, return_dict=False)[0]


class _DownBlock(_ImageAttentionBlock):
    def __init__(self, block: CrossAttnDownBlock2D, image_dim: int) -> None:
        super().__init__(block, image_dim)
        self.downsamplers = block.downsamplers

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: Mapping[str, Tensor],
        **masks: None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The block with diffusers' signature, without masks: the output, and the inputs of the skip connections."""
        x, skips = hidden_states, []
        for i in range(len(self.resnets)):
            x = self._convolve(i, x, temb)
            x = self._attend(i, x, encoder_hidden_states, cross_attention_kwargs[_TOKENS])
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, tuple(skips)


class _MidBlock(_ImageAttentionBlock):
    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: Mapping[str, Tensor],
        **masks: None,
    ) -> Tensor:
        """The block with diffusers' signature, without masks."""
        x = self._convolve(0, hidden_states, temb)
        for i in range(len(self.attentions)):
            x = self._attend(i, x, encoder_hidden_states, cross_attention_kwargs[_TOKENS])
            x = self._convolve(i + 1, x, temb)
        return x


class _UpBlock(_ImageAttentionBlock):
    def __init__(self, block: CrossAttnUpBlock2D, image_dim: int) -> None:
        super().__init__(block, image_dim)
        self.upsamplers = block.upsamplers

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: Mapping[str, Tensor],
        upsample_size: tuple[int, int] | None = None,
        **masks: None,
    ) -> Tensor:
        """The block with diffusers' signature, without masks; the skip connections are used last first."""
        x = hidden_states
        for i, skip in enumerate(reversed(res_hidden_states_tuple)):
            x = self._convolve(i, torch.cat([x, skip], 1), temb)
            x = self._attend(i, x, encoder_hidden_states, cross_attention_kwargs[_TOKENS])
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, upsample_size)
        return x


_TAKEN_OVER_BY = {
    CrossAttnDownBlock2D: _DownBlock,
    UNetMidBlock2DCrossAttn: _MidBlock,
    CrossAttnUpBlock2D: _UpBlock,
}


def _with_arguments_of(parent: type) -> Callable[[Any], Any]:
    """Let diffusers register and read a config with all the parent's arguments beside the ones of an `__init__`.

    diffusers reads the signature, in which `**config` would hide the arguments.
    """

    def decorate(init: Any) -> Any:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
        theirs = inspect.signature(parent.__init__)  # type: ignore[misc]  # it is diffusers' alone
        init.__signature__ = theirs.replace(parameters=[*theirs.parameters.values(), *own])
        return register_to_config(init)

    return decorate


class _SeeSRNetwork(ModelMixin):
    """Base of SeeSR's U-Net and ControlNet."""

    def _add_image_attentions(self: Any, image_dim: int, wanted: bool) -> None:
        """Exchange the cross-attention blocks for ours."""
        if not wanted:
            raise ValueError(
                "use_image_cross_attention=False: this is not a network of SeeSR; use diffusers' own class."
            )
        self.mid_block = self._take_over(self.mid_block, image_dim)
        for blocks in (self.down_blocks, getattr(self, "up_blocks", nn.ModuleList())):
            for i, block in enumerate(blocks):
                blocks[i] = self._take_over(block, image_dim)

    @staticmethod
    def _take_over(block: nn.Module, image_dim: int) -> nn.Module:
        ours = _TAKEN_OVER_BY.get(type(block))
        if ours is not None:
            return ours(block, image_dim)
        if getattr(block, "has_cross_attention", False):
            raise ValueError(
                f"blocks of the kind {type(block).__name__} cannot have image attentions; use a network with "
                f"{', '.join(kind.__name__ for kind in _TAKEN_OVER_BY)}."
            )
        return block

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """Load as diffusers does, from `.safetensors` or `.bin`, but refuse missing and unknown keys.

        Raises:
            ValueError: The weights are not those of this network, such as Stable Diffusion's own.
        """
        net, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if kind.endswith("_keys") and keys}
        if wrong:
            found = ", ".join(f"{len(keys)} {kind.removesuffix('_keys')} ({keys[0]})" for kind, keys in wrong.items())
            raise ValueError(
                f"{cls.__name__}: the weights do not fit, {found}; give SeeSR's own, or start from a plain Stable "
                f"Diffusion U-Net with {cls.__name__}.from_base"
            )
        return net

    @classmethod
    def _grow(cls, base: UNet2DConditionModel, new: Sequence[str], seed: int, **config: Any) -> Self:
        """Build a network from another one's config and weights; parameters that match `new` are random."""
        with drawing_weights(seed), torch.device("meta" if base.device.type == "meta" else "cpu"):
            net = cls(**_arguments(base, cls) | config)
        weights = base.state_dict()
        missing = [
            name for name in net.state_dict() if name not in weights and not any(fnmatchcase(name, n) for n in new)
        ]
        if missing:
            raise ValueError(f"{type(base).__name__} lacks {missing[0]}; give it without adapters.")
        net.load_state_dict(weights, strict=False)
        return net.to(base.device, base.dtype)

    def _tokens(self, tokens: Tensor, z: Tensor) -> Tensor:
        """Tokens of a condition, (B,n,d) or (1,n,d), for every sample of z and in the dtype of the weights."""
        return tokens.to(self._weight_dtype).expand(len(z), -1, -1)

    @property
    def _weight_dtype(self) -> torch.dtype:
        return input_dtype(self.conv_in)


class SeeSRUNet(_SeeSRNetwork, UNet2DConditionModel):
    """SeeSR's U-Net; loads through `common.loading.load_diffusers_model`, also from the authors' folder.

    Args:
        image_cross_attention_dim: E.
        use_image_cross_attention: Switch in the authors' config; always true.
        **config: Arguments of diffusers' `UNet2DConditionModel`.

    Raises:
        ValueError: A block is of a kind that has no image attentions in SeeSR.
    """

    @_with_arguments_of(UNet2DConditionModel)
    def __init__(
        self, *, image_cross_attention_dim: int = 512, use_image_cross_attention: bool = True, **config: Any
    ) -> None:
        super().__init__(**config)
        self._add_image_attentions(image_cross_attention_dim, use_image_cross_attention)

    @classmethod
    def from_base(
        cls, unet: UNet2DConditionModel, image_cross_attention_dim: int = 512, zero: bool = False, seed: int = 0
    ) -> Self:
        """Start from a plain U-Net's weights; its own are copied, not shared.

        Args:
            unet: Stable Diffusion's U-Net, without adapters.
            image_cross_attention_dim: E.
            zero: Start with zeros in the `proj_out` of the image attentions, so that they change nothing at first. In
                SeeSR's own training they start at random.
            seed: Random seed of the image attentions; the global generator is not used.

        Raises:
            ValueError: The U-Net has adapters, or blocks of another kind.
        """
        net = cls._grow(unet, (IMAGE_ATTENTIONS,), seed, image_cross_attention_dim=image_cross_attention_dim)
        if zero:
            for name, parameter in net.named_parameters():
                if fnmatchcase(name, f"{IMAGE_ATTENTIONS}.proj_out.*"):
                    nn.init.zeros_(parameter)
        return net

    def forward(self, z: Tensor, t: int | Tensor, e_txt: Tensor, residuals: Residuals, e_img: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            z: Noisy latents, (B,C,h,w).
            t: Timesteps, one number or int64 (B,).
            e_txt: Text tokens, (B,N,D), or (1,N,D) for the whole batch.
            residuals: The ControlNet's output for the same z and t.
            e_img: Image tokens, (B,M,E) or (1,M,E); DAPE's are 145 x 512.

        Returns:
            eps, (B,C,h,w), in float32 at least.
        """
        dtype = self._weight_dtype
        eps = super().forward(
            z.to(dtype),
            t,
            self._tokens(e_txt, z),
            cross_attention_kwargs={_TOKENS: self._tokens(e_img, z)},
            down_block_additional_residuals=tuple(residual.to(dtype) for residual in residuals.down),
            mid_block_additional_residual=residuals.mid.to(dtype),
            return_dict=False,
        )[0]
        return eps.to(torch.promote_types(z.dtype, torch.float32))


class SeeSRControlNet(_SeeSRNetwork, ControlNetModel):
    """SeeSR's ControlNet on the up-sampled image; loads as `SeeSRUNet` does.

    Args:
        image_cross_attention_dim: E.
        use_image_cross_attention: Switch in the authors' config; always true.
        **config: Arguments of diffusers' `ControlNetModel`. Each of `conditioning_embedding_out_channels` but the first
            halves the image's sides: there must be as many as the VAE has levels.

    Raises:
        ValueError: A block is of a kind that has no image attentions in SeeSR.
    """

    @_with_arguments_of(ControlNetModel)
    def __init__(
        self, *, image_cross_attention_dim: int = 512, use_image_cross_attention: bool = True, **config: Any
    ) -> None:
        super().__init__(**config)
        self._add_image_attentions(image_cross_attention_dim, use_image_cross_attention)

    @classmethod
    def from_base(
        cls,
        unet: SeeSRUNet,
        conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256),
        seed: int = 0,
    ) -> Self:
        """Start from the U-Net's weights, image attentions among them, as SeeSR's training does; all are copied.

        Args:
            unet: The U-Net it is for, without adapters.
            conditioning_embedding_out_channels: See the class.
            seed: Random seed of the image's embedding; the global generator is not used.

        Raises:
            ValueError: The U-Net has adapters.
        """
        return cls._grow(
            unet,
            ("controlnet_*",),
            seed,
            conditioning_embedding_out_channels=tuple(conditioning_embedding_out_channels),
        )

    def forward(self, z: Tensor, t: int | Tensor, e_txt: Tensor, x_up_01: Tensor, e_img: Tensor) -> Residuals:
        """Compute what to add to the U-Net.

        Args:
            z: Noisy latents, (B,C,h,w).
            t: Timesteps, one number or int64 (B,).
            e_txt: Text tokens, (B,N,D), or (1,N,D) for the whole batch.
            x_up_01: Low-quality images, up-sampled, (B,3,H,W) in [0,1], RGB; H and W those of the decoded latents.
            e_img: Image tokens, (B,M,E) or (1,M,E).

        Returns:
            The residuals, in the dtype of the computation.

        Raises:
            ValueError: There are other than B images, or of another size.
        """
        dtype = self._weight_dtype
        factor = 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)
        expected = (len(z), 3, z.shape[-2] * factor, z.shape[-1] * factor)
        if x_up_01.shape != expected:  # one image would be broadcast over the batch
            raise ValueError(
                f"x_up_01 is {tuple(x_up_01.shape)}, and these latents need {expected}; up-sample it first."
            )
        down, mid = super().forward(
            z.to(dtype),
            t,
            self._tokens(e_txt, z),
            x_up_01.to(dtype),
            cross_attention_kwargs={_TOKENS: self._tokens(e_img, z)},
            return_dict=False,
        )
        return Residuals(tuple(down), mid)
