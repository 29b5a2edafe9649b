"""Measure the error that 16 bits cause in each frozen network's output, relative to float32.

Run `python benchmarks/precision.py`; docs/precision.md holds its table. Errors are root mean squares over that of the
float32 output. The embedded foundation is trained. `random:` weights have the published sizes and are not trained:
their errors show only how rounding adds up over that many layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from common.conditioning.features import DinoFeatures
from common.denoisers.flux import FluxDenoiser, FluxText
from common.loading import load_diffusers_model, load_text_encoder, load_unet, load_vae
from common.precision import computing, hold

CPU = torch.device("cpu")
COLUMNS = (("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float16"))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def denoiser(unet: Any, side: int) -> Callable[[nn.Module], Tensor]:
    z, c = draw(1, unet.config.in_channels, side, side), draw(1, 77, unet.config.cross_attention_dim)
    return lambda net: net(z, 400, c).sample


def networks(full: bool) -> dict[str, tuple[nn.Module, Callable[[Any], Tensor]]]:
    """Each network with what is asked of it."""
    unet, vae, where = (load_unet("random:sd21"), load_vae("random:sd21"), "sd21") if full else (
        load_unet("tiny"), load_vae("tiny"), "tiny")  # fmt: skip
    side = 256 if full else 64
    image = torch.nn.functional.interpolate(draw(1, 3, side // 8, side // 8), scale_factor=8, mode="bicubic").tanh()
    with torch.no_grad():
        z = vae.encode(image).latent_dist.mode()
    _, text = load_text_encoder(f"random:{where}" if full else where)
    ids = torch.arange(text.config.max_position_embeddings)[None] % text.config.vocab_size
    dino = DinoFeatures("random:dinov2_large" if full else "tiny")
    dino.follows_autocast = True
    found: dict[str, tuple[nn.Module, Callable[[Any], Tensor]]] = {
        "U-Net": (unet, denoiser(unet, 32 if full else 16)),
        "VAE, encoder": (vae, lambda net: net.encode(image).latent_dist.mode()),
        "VAE, decoder": (vae, lambda net: net.decode(z).sample),
        "text encoder": (text, lambda net: net(ids).last_hidden_state),
        "DINOv2": (dino, lambda net: net(image * 0.5 + 0.5)),
    }
    if not full:
        flux = load_diffusers_model(FluxTransformer2DModel, "tiny", "transformer")
        config = flux.config
        embedded = FluxText(draw(1, 8, config.joint_attention_dim), draw(1, config.pooled_projection_dim))
        latents = draw(1, config.in_channels // 4, 16, 16)
        found["FLUX transformer"] = (FluxDenoiser(flux), lambda net: net(latents, 0.5, embedded))
    return found


@torch.no_grad()
def errors(network: nn.Module, ask: Callable[[Any], Tensor]) -> list[float]:
    """The error in each column; a copy of the network is held."""
    held = copy.deepcopy(network)
    hold(held, "bfloat16")
    expected, found = ask(network), []
    for weights, precision in COLUMNS:
        with computing(precision, CPU):  # type: ignore[arg-type]  # a text of the table
            out = ask(held if weights == "bfloat16" else network).float()
        found.append(float((out - expected).norm() / expected.norm()))
    return found


def main() -> None:
    torch.set_num_threads(1)
    heads = [f"held in {weights}, computed in {precision}" for weights, precision in COLUMNS]
    print("| network | parameters | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 2))
    for full in (False, True):
        for name, (network, ask) in networks(full).items():
            size = sum(p.numel() for p in network.parameters()) / 1e6
            cells = " | ".join(f"{error:.1e}" for error in errors(network, ask))
            print(f"| {name}, {'random' if full else 'tiny'} | {size:,.1f} M | {cells} |", flush=True)


if __name__ == "__main__":
    main()
