"""Counts of section 4 of the spec: adapters of generator and regulariser, on the meta device."""

import pytest
from diffusers import AutoencoderKL
from torch import nn

from common.adapters import OSEDIFF_TARGETS, LoraCount, add_lora, count_lora, targets_in
from common.loading import architecture_only, load_unet, load_vae

RANK, ALPHA = 4, 8
NAMES = ("f2idiff", "t2idiff", "f2idiff_eff", "f2idiff_eff_half")


def adapted_unet(name: str) -> nn.Module:
    with architecture_only():
        return add_lora(load_unet(f"random:{name}"), RANK, ALPHA, OSEDIFF_TARGETS)


def encoder_targets(vae: AutoencoderKL) -> tuple[str, ...]:
    """OSEDiff's layers of the encoder, and `quant_conv`; by full names, as endings would mean the decoder's too."""
    inside = [f"encoder.{name}" for name, _ in vae.encoder.named_modules()]
    return (*(n for n in inside if n.endswith(tuple(f".{target}" for target in OSEDIFF_TARGETS))), "quant_conv")


def adapted_vae() -> nn.Module:
    with architecture_only():
        vae = load_vae("random:sd21")
        return add_lora(vae, RANK, ALPHA, encoder_targets(vae))


def touched(module: nn.Module) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in module.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize(
    ("name", "count", "conv_in", "generator", "both"),
    [
        ("f2idiff", 4_055_712, 11_840, 4_436_908, 8_492_620),
        ("t2idiff", 4_022_944, 11_840, 4_404_140, 8_427_084),
        ("f2idiff_eff", 2_878_368, 8_288, 3_256_012, 6_134_380),
        ("f2idiff_eff_half", 2_093_472, 5_920, 2_468_748, 4_562_220),
    ],
)
def test_generator_and_regulariser_have_the_specs_counts(
    name: str, count: int, conv_in: int, generator: int, both: int
) -> None:
    unet = adapted_unet(name)
    assert count_lora(unet) == LoraCount(258, count)
    base = sum(p.numel() for key, p in unet.conv_in.named_parameters() if "lora_" not in key)
    assert base == conv_in  # trained in full beside its adapter
    assert count_lora(adapted_vae()).parameters + count + base == generator
    assert generator + count == both


@pytest.mark.parametrize("name", NAMES)
def test_the_mid_block_alone_has_the_count_of_its_layers(name: str) -> None:
    with architecture_only():
        unet = load_unet(f"random:{name}")
        shapes = {
            key: value.shape
            for key, value in unet.mid_block.named_parameters()
            if value.ndim > 1 and "time_emb" not in key
        }
        expected = sum(RANK * (shape[0] + shape[1:].numel()) for shape in shapes.values())
        found = count_lora(add_lora(unet, RANK, ALPHA, targets_in(unet, "mid_block")))
    assert found == LoraCount(len(shapes), expected)


@pytest.mark.parametrize("name", NAMES)
def test_no_time_embedding_and_no_norm_is_adapted(name: str) -> None:
    layers = touched(adapted_unet(name))
    assert len(layers) == 258
    assert not [layer for layer in layers if "time_" in layer or "norm" in layer]


def test_the_vaes_encoder_and_quant_conv_are_adapted_and_nothing_behind_them() -> None:
    vae = adapted_vae()
    assert count_lora(vae) == LoraCount(32, 369_356)
    layers = touched(vae)
    assert "quant_conv" in layers
    assert all(layer.startswith("encoder.") for layer in layers - {"quant_conv"})


def test_the_efficient_u_net_is_half_as_large() -> None:
    with architecture_only():
        sizes = [sum(p.numel() for p in load_unet(f"random:{name}").parameters()) for name in NAMES]
    assert round(sizes[0] / sizes[2], 2) == 2.01
    assert round(sizes[0] / sizes[3], 2) == 3.88
