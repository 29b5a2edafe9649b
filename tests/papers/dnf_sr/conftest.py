"""A small random FLUX in the hub's layout, a batch, and both stages on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from common.draws import Draws
from common.restoration import Inference
from papers.dnf_sr import DNFSR, NF2T
from papers.dnf_sr.module import SUFFIX

STILL = partial(torch.optim.SGD, lr=0.0)
SMALL: dict[str, Any] = {
    "lora_rank": 4, "lora_alpha": 4, "dists_weights": "random", "dists_width": 0.05, "optimizer": STILL, "clip": None,
    "max_tokens": 6, "inference": Inference(color_fix="none", tile=None),
}  # fmt: skip
Batch = dict[str, Any]


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> str:
    root: Path = tmp_path_factory.mktemp("flux")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 12, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=2,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.7,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        vae.decoder.conv_out.weight.data *= 0.2  # images stay within [-1, 1], where clamping changes nothing
        vae.save_pretrained(root / "vae")
        transformer = FluxTransformer2DModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 2, 2),
        )
        for name, parameter in transformer.named_parameters():
            if "norm" in name and "linear" in name:  # gates, which else nearly close the blocks
                parameter.data.normal_(0, 0.3)
        transformer.save_pretrained(root / "transformer")
        text = CLIPTextConfig(
            vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        CLIPTextModel(text).save_pretrained(root / "text_encoder")
        t5 = T5Config(vocab_size=384, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        T5EncoderModel(t5).save_pretrained(root / "text_encoder_2")
    ByT5Tokenizer(model_max_length=77).save_pretrained(root / "tokenizer")
    ByT5Tokenizer(model_max_length=512).save_pretrained(root / "tokenizer_2")
    return str(root)


@pytest.fixture(scope="session")
def batch() -> Batch:
    g = torch.Generator().manual_seed(3)
    hq = F.interpolate(torch.rand(2, 3, 10, 10, generator=g), scale_factor=4, mode="bilinear")
    hq = (hq + 0.2 * torch.rand(2, 3, 40, 40, generator=g)).clamp(0, 1)
    return {
        "lq": (F.avg_pool2d(hq, 4) * 255).round().to(torch.uint8),
        "hq": (hq * 255).round().to(torch.uint8),
        "prompt": ["a house", "two dogs"],
        "name": ["a", "b"],
        "index": torch.tensor([0, 1]),
    }


def low(batch: Batch) -> Tensor:
    return batch["lq"].float() / 255


def high(batch: Batch) -> Tensor:
    return batch["hq"].float() / 255


def disturb(network: nn.Module, size: float = 0.05, mark: str = "lora_B") -> None:
    """Adapters as if they had been trained."""
    g = torch.Generator().manual_seed(11)
    for name, parameter in network.named_parameters():
        if mark in name:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=g))


def make_sft(flux: str, **options: Any) -> DNFSR:
    small = {**SMALL, "disc": "random:dinov3_tiny", "disc_hidden": 8, "disc_optimizer": STILL}
    model = DNFSR(pretrained=flux, **{**small, **options})
    model.configure_model()
    return model


@pytest.fixture(scope="session")
def sft_run(flux: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of stage 1, whose adapters do something."""
    model = make_sft(flux)
    assert model.flow is not None
    disturb(model.flow)
    disturb(model.codec, 0.02)
    path = tmp_path_factory.mktemp("sft") / "last.ckpt"
    keys, state = model.checkpoint_keys(), model.state_dict()
    settings = {
        "_class_path": "papers.dnf_sr.DNFSR", "pretrained": flux, "prompt_suffix": SUFFIX, "max_tokens": 6,
        "t_mid": 0.5, "lora_rank": 4, "lora_alpha": 4,
    }  # fmt: skip
    torch.save({"state_dict": {key: state[key] for key in keys}, "hyper_parameters": settings}, path)
    return str(path)


@pytest.fixture
def make(flux: str, sft_run: str) -> Callable[..., NF2T]:
    """Makes stage 2, configured."""

    def configured(awaits_checkpoint: bool | None = None, **options: Any) -> NF2T:
        small = {**SMALL, "sft": sft_run, "pretrained": flux, "group_size": 3, "rewards": ("colourfulness", "neg_mse")}
        small["updates_per_rollout"] = 1
        model = NF2T(**{**small, **options})
        model.awaits_checkpoint = awaits_checkpoint
        model.configure_model()
        return model

    return configured


class FakeCaptioner:
    """Says which image it sees, and remembers it."""

    def __init__(self, model: str) -> None:
        self.model, self.seen = model, list[Tensor]()

    def to(self, device: torch.device) -> "FakeCaptioner":
        return self

    def __call__(self, x_01: Tensor) -> list[str]:
        self.seen.append(x_01)
        return [f"image {len(self.seen)}.{i}" for i in range(len(x_01))]


class Spy(Draws):
    """The draws, remembered."""

    def __init__(self, index: Tensor) -> None:
        super().__init__(0, index)
        self.drawn: dict[str, Tensor] = {}

    def normal(self, stream: str, shape: Any) -> Tensor:
        self.drawn[stream] = super().normal(stream, shape)
        return self.drawn[stream]


@dataclass
class Tape(Callback):
    """How often the networks were called, with and without a graph; the gradients of each optimiser's step."""

    calls: dict[str, list[bool]] = field(default_factory=dict)
    grads: list[dict[str, Tensor]] = field(default_factory=list)

    def attach(self, model: Any) -> None:
        networks = {"transformer": model.flow.transformer, "encode": model.codec.vae.encoder}
        for name, network in (networks | {"decode": model.codec.vae.decoder}).items():
            self.calls[name] = []
            network.register_forward_hook(partial(self._write, name))

    def _write(self, name: str, network: nn.Module, args: Any, out: Any) -> None:
        self.calls[name].append(getattr(out, "sample", out).requires_grad)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Of each network: calls without a graph, and with one."""
        return {name: (calls.count(False), calls.count(True)) for name, calls in self.calls.items()}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.grads.append({name: p.grad.clone() for name, p in named if p.grad is not None})


@dataclass
class Run:
    model: Any
    tape: Tape
    spy: Spy
    trainer: Trainer
    metrics: dict[str, float]


def train(model: Any, batch: Batch, steps: int = 1, precision: Any = "32-true", spy: Spy | None = None) -> Run:
    tape, spy = Tape(), spy or Spy(batch["index"])
    tape.attach(model)
    model.draws = lambda batch: spy  # the same in each step
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[tape], log_every_n_steps=1, precision=precision,
    )  # fmt: skip
    batches: Any = [dict(batch) for _ in range(steps)]
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    return Run(model, tape, spy, trainer, {name: float(value) for name, value in trainer.callback_metrics.items()})
