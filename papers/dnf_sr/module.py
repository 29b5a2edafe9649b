"""DNF-SR's one step: the noised low-quality latent takes the place of the image that an image-editing flow model makes.

Both stages restore in this way. `sft.py` is stage 1, `nf2t.py` stage 2, `README.md` the card.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from common.adapters import adapter_names, count_lora
from common.autoencoder import ImageCodec
from common.conditioning.captions import Captioner
from common.conditioning.flux_text import (
    cache_flux_prompts,
    encode_flux_prompts,
    flux_text_encoders,
    lacking_flux_prompts,
)
from common.denoisers.flux import FluxDenoiser, FluxText
from common.diffusion import flow_clean, flow_noise
from common.draws import Draws
from common.images import bicubic_upsample, to_01, to_pm1
from common.loading import DTYPES, architecture_only, load_diffusers_model, load_vae
from common.losses import ImageLoss, build_image_loss
from common.metrics import to_uint8
from common.parameters import Row, count
from common.precision import hold
from common.restoration import RestorationModule

SUFFIX = "Make this image more realistic and detailed."
"""Text after every caption (the paper's Figure 4)."""


class Slots(NamedTuple):
    """Latents (B,C,h,w): the inputs of the step, and the one that it starts from."""

    target: Tensor
    """Input in the place of the image to make."""
    reference: Tensor | None
    """Input in the place of the image to edit."""
    start: Tensor
    """Latent from which t v is subtracted."""


class Conditions(NamedTuple):
    """Conditions of a whole image."""

    text: FluxText
    noise: int = 0
    """Number of the noise among those that an image can be restored with."""


class FlowRestorer(RestorationModule):
    """Base class of both stages: the frozen flow model and its one step.

    Args:
        pretrained: VAE, transformer and text encoders: hub id, diffusers folder, `tiny` or `random:<architecture>`.
        input: Latents in the step. `dual`: the noised low-quality latent is the image to make, the clean one the image
            to edit. `mix`: only the noised latent. `lr`: the clean latent is the image to make, without noise.
        t_mid: Time of the step, in (0, 1]; at 1 the noised latent is noise alone.
        clean_estimate: Latent from which t v is subtracted: the target `slot`, or the clean low-quality latent
            (`z_lq`), as in the supplement.
        guidance: Guidance input of a guidance-distilled transformer.
        prompt: Text for every image in the place of its own; null takes the data's captions.
        prompt_suffix: Text after every caption or prompt.
        captioner: Image-to-text model (hub id or folder) that writes each low-quality image's text at test time in the
            place of the data's; bfloat16 on an accelerator, float32 on a CPU.
        max_tokens: Number of text tokens.
        keep_text_encoders: Keep T5 and CLIP loaded, for texts that change from batch to batch. Otherwise they are
            loaded for every new text, and freed.
        text_cache: Folder that keeps the texts' embeddings from run to run; null for none. Without
            `keep_text_encoders` a fit first fills it with the texts of the training and validation sets, each process
            with its share; all nodes must share the folder.
        lora_rank: Rank of all adapters.
        lora_alpha: Alpha of all adapters; their scale is alpha / rank.
        dists: Loss in feature space.
        dists_weights: Weights of the loss's VGG16: `pretrained`, `random` or a file.
        dists_width: Factor on the VGG16's channels, for `random` only.
        optimizer: Optimiser of the adapters.
        lr_scheduler: Learning-rate scheduler of the adapters, stepped once an update.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        **kwargs: As for every method: `scale`, `inference`, `seed`, `ema_decay`, `clip`, `accumulate`,
            `losses`, `losses_weights`, `frozen_dtype`.
    """

    without_prompts = ", or set model.prompt to one text for all"

    def __init__(
        self,
        pretrained: str = "black-forest-labs/FLUX.1-Kontext-dev",
        input: Literal["dual", "mix", "lr"] = "dual",
        t_mid: float = 0.5,
        clean_estimate: Literal["slot", "z_lq"] = "slot",
        guidance: float = 1.0,
        prompt: str | None = None,
        prompt_suffix: str = SUFFIX,
        captioner: str | None = None,
        max_tokens: int = 512,
        keep_text_encoders: bool = False,
        text_cache: str | None = None,
        lora_rank: int = 64,
        lora_alpha: float = 64,
        dists: Literal["dists", "ea_dists"] = "dists",
        dists_weights: str = "pretrained",
        dists_width: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < t_mid <= 1:
            raise ValueError(f"t_mid={t_mid} is out of range; set a time above 0, 1 at most")
        self.pretrained, self.input, self.t_mid = pretrained, input, t_mid
        self.clean_estimate, self.guidance = clean_estimate, guidance
        self.prompt, self.prompt_suffix, self.max_tokens = prompt, prompt_suffix, max_tokens
        self.keep_text_encoders, self.text_cache = keep_text_encoders, text_cache
        self.captioner = Captioner(captioner) if captioner is not None else None
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.dists_kind, self.dists_weights, self.dists_width = dists, dists_weights, dists_width
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.flow: FluxDenoiser | None = None
        self.dists: ImageLoss | None = None

    # Networks

    def configure_networks(self) -> None:
        """Build VAE and transformer, both frozen."""
        self.codec = ImageCodec(load_vae(self.pretrained), self.gradient_checkpointing)
        dtype = DTYPES[self.frozen_dtype]  # 12 billion weights, which were published in bfloat16
        transformer = load_diffusers_model(FluxTransformer2DModel, self.pretrained, "transformer", dtype)
        hold(transformer, self.frozen_dtype)
        if transformer.config.in_channels != 4 * self.codec.latent_channels:
            raise ValueError(
                f"pretrained={self.pretrained}: the transformer takes tokens of {transformer.config.in_channels}, but "
                f"2x2 pixels of the VAE's latents are {4 * self.codec.latent_channels}. Set a FLUX with its own VAE."
            )
        self.size_multiple = math.lcm(2 * self.codec.downscale, self.scale) // self.scale
        self.flow = FluxDenoiser(transformer, self.gradient_checkpointing)

    def configure_training(self) -> None:
        """Build the loss in feature space."""
        self.dists = build_image_loss(self.dists_kind, self.dists_weights, self.dists_width)

    def networks(self) -> dict[str, nn.Module]:
        """The networks by the paper's names."""
        assert self.flow is not None
        networks: dict[str, nn.Module] = {"transformer": self.flow.transformer, "VAE": self.codec}
        return networks | ({"loss network (VGG16)": self.dists} if isinstance(self.dists, nn.Module) else {})

    def parameter_rows(self) -> list[Row]:
        """Rows of the networks, of the adapters with their number of layers, and of the text encoders."""
        networks, rows = self.networks(), []
        for row in super().parameter_rows():
            adapted = networks.get(row.name.removesuffix(" LoRA"))
            if row.kind == "adapter" and adapted is not None:
                layers = max(count_lora(adapted, name).layers for name in adapter_names(adapted))
                row = replace(row, name=f"{row.name} ({layers} layers)")
            rows.append(row)
        for name, encoder in flux_text_encoders(self.pretrained).items():
            size = next(encoder.parameters()).element_size()
            rows.append(Row(f"{name} of {self.pretrained}", "text", count(encoder).total, 0, size))
        return rows

    def memory_plan(self) -> dict[str, int]:
        """Bytes of weights, gradients and optimiser states in training, by part; activations are not counted."""
        assert self.flow is not None
        with architecture_only():
            text = encode_flux_prompts(self.pretrained, [""], max_tokens=self.max_tokens)
        plan = {
            f"transformer, {self.frozen_dtype}, once": _base_bytes(self.flow.transformer),
            "VAE": _base_bytes(self.codec),
            "text of one caption (the encoders need not stay)": sum(part.nbytes for part in text),
        }
        if self.keep_text_encoders:
            encoders = flux_text_encoders(self.pretrained).values()
            plan["text encoders, kept"] = sum(p.nbytes for encoder in encoders for p in encoder.parameters())
        for name in self.trainable_patterns():
            weights = sum(parameter.nbytes for parameter in self.trainable_parameters(name))
            plan |= {f"{name}: weights and gradients": 2 * weights, f"{name}: two moments of Adam": 2 * weights}
        return plan

    def wants_prompts(self) -> str | None:
        """Name the option if there is no one text for all images."""
        return "prompt=null" if self.prompt is None else None

    def configure_optimizers(self) -> Any:
        """One optimiser for each of `trainable_patterns`; only the first has a scheduler."""
        optimizers = [self._make_optimizer(name) for name in self.trainable_patterns()]
        return optimizers, [self.lr_scheduler(optimizers[0])] if self.lr_scheduler is not None else []

    def _make_optimizer(self, name: str) -> torch.optim.Optimizer:
        return self.optimizer(self.trainable_parameters(name))

    # The step, section 3.3

    def encode(self, x_lq: Tensor) -> Tensor:
        """z_L = E(x_L) of low-quality images (B,3,h,w) in [0,1], enlarged: (B,C,h',w'), the posterior's mode."""
        return self.codec.encode(to_pm1(bicubic_upsample(x_lq, self.scale)))

    def fill(self, z_lq: Tensor, eps: Tensor) -> Slots:
        """Z_mix = (1 - t) z_L + t eps as the image to make, z_L as the image to edit; see `input`."""
        target = z_lq if self.input == "lr" else flow_noise(z_lq, eps, self.t_mid)
        return Slots(target, z_lq if self.input == "dual" else None, target if self.clean_estimate == "slot" else z_lq)

    def velocity(self, slots: Slots, text: FluxText) -> Tensor:
        """The flow's v = F(z_mix, z_L, t, c), (B,C,h',w')."""
        assert self.flow is not None
        return self.flow(slots.target, self.t_mid, text, slots.reference, self.guidance)

    def clean(self, slots: Slots, v: Tensor) -> Tensor:
        """z_H = z_mix - t v."""
        return flow_clean(slots.start, v, self.t_mid)

    def feature_loss(self, x: Tensor, target: Tensor) -> Tensor:
        """DISTS (or EA-DISTS) of images (B,3,H,W) in [-1,1], taken in [0,1]: (B,)."""
        assert self.dists is not None
        return self.dists(to_01(x), to_01(target))

    def texts(self, prompts: list[str]) -> list[str]:
        """The transformer's texts: each caption (or `prompt`) with the suffix."""
        texts = [prompt if self.prompt is None else self.prompt for prompt in prompts]
        return [f"{text.strip()} {self.prompt_suffix}".strip() for text in texts]

    def text(self, prompts: list[str]) -> FluxText:
        """The embeddings of `texts`."""
        return encode_flux_prompts(
            self.pretrained,
            self.texts(prompts),
            self.device,
            self.max_tokens,
            self.keep_text_encoders,
            self.text_cache,
        )

    def on_fit_start(self) -> None:
        """Encode one text, or fill `text_cache`, so that a run without text encoders fails before it starts."""
        super().on_fit_start()
        given = self.data_info.texts() or [""]
        if self.text_cache is None or self.keep_text_encoders:
            self.text(given[:1])
            return
        self._fill_text_cache(self.text_cache, list(dict.fromkeys(self.texts(given))))

    def _fill_text_cache(self, folder: str, texts: list[str]) -> None:
        """Encode the texts that a folder lacks, each process its share.

        Raises:
            ValueError: The processes do not share the folder.
        """
        mine = texts[self.global_rank :: self.trainer.world_size]
        fresh = cache_flux_prompts(self.pretrained, mine, folder, self.device, self.max_tokens)
        rank_zero_info(
            f"text_cache={folder}: encoded {fresh} of {len(mine)} texts, the rest was there (process 0's share of "
            f"{len(texts)})"
        )
        self.trainer.strategy.barrier("text_cache")
        lacking = lacking_flux_prompts(self.pretrained, texts, folder, self.max_tokens)
        if lacking:
            raise ValueError(
                f"text_cache={folder} lacks {len(lacking)} texts that other processes encoded; set a folder that all "
                "nodes share"
            )

    # Inference

    def prepare(self, x_lq: Tensor, prompts: list[str]) -> Conditions:
        """Embedding of the whole image's text."""
        return Conditions(self.text(prompts if self.captioner is None else self.captioner.to(self.device)(x_lq)))

    def restore(self, x_lq: Tensor, conditions: Conditions) -> Tensor:
        """One encoding, one transformer call and one decoding, with the noise of `test_noise`."""
        z_lq = self.encode(x_lq)
        slots = self.fill(z_lq, self.test_noise(x_lq, z_lq.shape[1:], conditions.noise))
        return to_01(self.codec.decode(self.clean(slots, self.velocity(slots, conditions.text))).clamp(-1, 1))

    def test_noise(self, x_lq: Tensor, shape: torch.Size, number: int = 0) -> Tensor:
        """Noise (B,*shape) that follows from the seed, its number and each image's (or tile's) pixels.

        A repeated or resumed prediction gives the same file, for any batches, processes and order.
        """
        pixels = to_uint8(x_lq).cpu().numpy()
        keys = [int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=7).digest(), "big") for image in pixels]
        return Draws(self.seed, torch.tensor(keys), self.device).normal(f"test/noise{number}", shape)


def _base_bytes(module: nn.Module) -> int:
    named = dict(module.named_parameters())
    return sum(p.nbytes for name, p in named.items() if "lora_" not in name)
