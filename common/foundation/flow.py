"""The tiny foundation's flow transformer: FLUX.1 Kontext in miniature, trained on the embedded training photos only.

A rectified flow in the latent space of the tiny VAE. In part of the steps a reference follows the tokens of the noisy
latent, as Kontext has it: the same photo after a mild edit, which the network takes back. Recipe: README.md beside this
file. Reached by `make foundation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from common.autoencoder import ImageCodec
from common.conditioning.flux_text import CLIP, clip_pooled, t5_tokens
from common.denoisers.flux import FluxDenoiser, FluxText
from common.diffusion import flow_noise
from common.draws import Draws
from common.foundation.guarded import GuardedModule
from common.foundation.muon import muon_or_adamw
from common.foundation.schedule import anneal
from common.images import to_pm1
from common.loading import load_text_encoder, load_vae

HEAD_WIDTH = 32
POSITION_WIDTHS = (4, 14, 14)  # of a head, turned by image, row and column; FLUX: 16, 56, 56 of 128


class TinyFlow(GuardedModule):
    """Train a small `FluxTransformer2DModel` with its T5 encoder; VAE and CLIP text encoder are there and frozen.

    Most steps see the crops' quarters, which is cheaper and mixes more times and noises into a batch; the others teach
    the positions that larger images have.

    Args:
        pretrained: Diffusers folder with `vae`, `text_encoder` and `tokenizer`, or `tiny`.
        heads: Attention heads, each 32 wide.
        double_blocks: Blocks in which text and image have weights of their own.
        single_blocks: Blocks in which they share them.
        text_width: Width of the T5 encoder.
        text_tokens: Length of a prompt in bytes.
        condition_dropout: Share of samples that see the empty prompt.
        with_reference: Share of steps with a reference.
        quartered: Share of steps on the quarters of the crops.
        lr: Peak learning rate.
        ema_decay: Decay of the averaged weights, which are the ones validated and saved.
        clip: Gradient norm limit.
        tail: Share of the steps, the last ones, over which the learning rate is annealed.
        optimizer: `muon` or `adamw`.
        seed: Random seed of times, noise, dropout and edits; null takes `--seed_everything`, 0 in Python.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        heads: int = 3,
        double_blocks: int = 2,
        single_blocks: int = 5,
        text_width: int = 32,
        text_tokens: int = 32,
        condition_dropout: float = 0.1,
        with_reference: float = 0.6,
        quartered: float = 0.75,
        lr: float = 4e-3,
        ema_decay: float = 0.998,
        clip: float = 1.0,
        tail: float = 0.3,
        optimizer: Literal["adamw", "muon"] = "muon",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.condition_dropout, self.with_reference, self.quartered = condition_dropout, with_reference, quartered
        self.lr, self.clip, self.tail, self.optimizer, self.seed = lr, clip, tail, optimizer, seed or 0
        self.codec = ImageCodec(load_vae(pretrained))
        self.clip_tokenizer, self.clip_encoder = load_text_encoder(pretrained, *CLIP)
        self.tokenizer = ByT5Tokenizer(model_max_length=text_tokens, extra_ids=0)
        transformer = FluxTransformer2DModel(
            in_channels=4 * self.codec.latent_channels,
            num_layers=double_blocks,
            num_single_layers=single_blocks,
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=heads,
            joint_attention_dim=text_width,
            pooled_projection_dim=self.clip_encoder.config.hidden_size,
            guidance_embeds=True,  # Kontext's has it; here it only ever sees 1
            axes_dims_rope=POSITION_WIDTHS,
        )
        for name, layer in transformer.named_modules():
            if isinstance(layer, nn.Linear) and (name == "proj_out" or ".norm" in f".{name}"):
                nn.init.zeros_(layer.weight)  # each block starts as the identity (adaLN-Zero), the whole as zero
                nn.init.zeros_(layer.bias)
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizer),
                d_model=text_width,
                d_kv=text_width // 2,
                d_ff=2 * text_width,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        )
        self.networks = nn.ModuleDict({"transformer": FluxDenoiser(transformer), "text_encoder_2": text_encoder})
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
        self.ema: Any = torch.optim.swa_utils.AveragedModel(self.networks, multi_avg_fn=average)

    def loss(
        self, networks: Any, x_01: Tensor, prompts: list[str], t: Tensor, noise: Tensor, x_ref_01: Tensor | None
    ) -> Tensor:
        """|v - (eps - z)|^2 per sample, (B,)."""
        with torch.no_grad():
            z = self.codec.encode(to_pm1(x_01))
            z_ref = None if x_ref_01 is None else self.codec.encode(to_pm1(x_ref_01))
            pooled = clip_pooled(self.clip_tokenizer, self.clip_encoder, prompts)
        tokens = t5_tokens(self.tokenizer, networks["text_encoder_2"], prompts, self.tokenizer.model_max_length)
        v = networks["transformer"](flow_noise(z, noise, t), t, FluxText(tokens, pooled), z_ref)
        return (v - (noise - z)).square().mean((1, 2, 3))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Predict the velocity at a uniform time, with or without a reference."""
        x, prompts, index = batch["hq"], batch["prompt"], batch["index"]
        step = Draws(self.seed, index[:1])
        if step.uniform("quartered").item() < self.quartered:
            x = torch.cat([half for rows in x.chunk(2, -2) for half in rows.chunk(2, -1)])
            prompts, index = prompts * 4, torch.cat([4 * index + part for part in range(4)])
        draws = Draws(self.seed, index, self.device)
        dropped = draws.uniform("condition") < self.condition_dropout
        prompts = ["" if drop else text for drop, text in zip(dropped, prompts, strict=True)]
        x_ref = mild_edit(x, draws) if step.uniform("reference").item() < self.with_reference else None
        loss = self.loss(self.networks, x, prompts, draws.uniform("t"), self._noise(draws, "noise", x), x_ref).mean()
        self.log("train/loss" if x_ref is None else "train/edit", loss, prog_bar=True, batch_size=len(x))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average the weights."""
        self.ema.update_parameters(self.networks)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Velocity error of the averaged weights at four times, with fixed noise, without and with the photo itself."""
        x = batch["hq"]
        noise = self._noise(Draws(self.seed, batch["index"], self.device), "val", x)
        for time in (0.25, 0.5, 0.75, 1.0):
            t = torch.full((len(x),), time, device=self.device)
            for name, x_ref in (("loss", None), ("edit", x)):
                value = self.loss(self.ema.module, x, batch["prompt"], t, noise, x_ref).mean()
                self.log(f"val/{name}_t{time:.2f}", value, prog_bar=True, batch_size=len(x))

    def configure_optimizers(self) -> Any:
        """Constant, then annealed."""
        optimizer = muon_or_adamw(self.optimizer, self.networks.parameters(), self.lr)
        return anneal(optimizer, int(self.trainer.estimated_stepping_batches), tail=self.tail)

    def save_foundation(self, folder: str | Path) -> None:
        """Write transformer, T5 encoder and its tokenizer in FLUX's layout, in fp16."""
        folder = Path(folder)
        networks = self.ema.module
        for name, network in (
            ("transformer", networks["transformer"].transformer),
            ("text_encoder_2", networks["text_encoder_2"]),
        ):
            network.half().save_pretrained(folder / name)
            network.float()
        self.tokenizer.save_pretrained(folder / "tokenizer_2")

    def _noise(self, draws: Draws, stream: str, x: Tensor) -> Tensor:
        return draws.normal(stream, (self.codec.latent_channels, *(s // self.codec.downscale for s in x.shape[-2:])))


def mild_edit(x_01: Tensor, draws: Draws) -> Tensor:
    """Make references of photos: each sample is left as it is, slightly blurred, or changed in brightness and colours.

    The edits contain no degradations of super-resolution: no resizing, no noise, no JPEG.

    Args:
        x_01: Photos, (B, 3, H, W), in [0, 1].
        draws: Random draws of the batch.

    Returns:
        References, like x_01.
    """
    from torchvision.transforms.v2.functional import gaussian_blur  # takes seconds

    kinds, sigmas = draws.uniform("edit"), 0.4 + 0.6 * draws.uniform("sigma")
    gains = 1 + 0.12 * draws.normal("gain", (3, 1, 1)).clamp(-2, 2)
    edited = []
    for x, kind, sigma, gain in zip(x_01, kinds, sigmas, gains, strict=True):
        if kind < 0.3:
            x = gaussian_blur(x, [7, 7], [float(sigma)])
        elif kind < 0.6:
            x = (x * gain).clamp(0, 1)
        edited.append(x)
    return torch.stack(edited)
