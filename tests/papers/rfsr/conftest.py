"""A small base with a ControlNet, a small SeeSR with tags, a reward of no worth, and a batch."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

import common.rewards
from common.restoration import Inference
from common.rewards import Reward
from papers.rfsr import RFSR, ControlNet, SeeSR, TagFiles, write_tags
from papers.rfsr.base_models import Base
from papers.rfsr.seesr import SeeSRControlNet, SeeSRUNet

TAGS = ["roof, tree", "dog, grass"]


def randomised(net: nn.Module, seed: int, size: float = 0.1) -> nn.Module:
    """All parameters, zero convolutions too, as if they had been trained."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += size * torch.randn(parameter.shape, generator=g)
    return net


@pytest.fixture(scope="session")
def sd(make_sd: Callable[..., str]) -> str:
    """The base, and a ControlNet on latents beside it."""
    root = make_sd()
    unet = UNet2DConditionModel.from_pretrained(root, subfolder="unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,), conditioning_channels=4)
    randomised(net, 2).save_pretrained(Path(root) / "controlnet")
    return root


@pytest.fixture(scope="session")
def seesr(sd: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SeeSR's two networks on that base, image tokens 10 wide."""
    root = tmp_path_factory.mktemp("seesr")
    unet = SeeSRUNet.from_base(UNet2DConditionModel.from_pretrained(sd, subfolder="unet"), 10)
    net = SeeSRControlNet.from_base(unet, (4, 6, 8))
    randomised(unet, 3).save_pretrained(root / "unet")
    randomised(net, 4).save_pretrained(root / "controlnet")
    return str(root)


def pair(seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    hq = F.interpolate(torch.rand(2, 3, 8, 8, generator=g), scale_factor=4, mode="bilinear")
    hq = (hq + 0.2 * torch.rand(2, 3, 32, 32, generator=g)).clamp(0, 1)
    return {
        "lq": (F.avg_pool2d(hq, 4) * 255).round().to(torch.uint8),
        "hq": (hq * 255).round().to(torch.uint8),
        "prompt": ["a house", "two dogs"],
        "name": ["a", "b"],
        "index": torch.tensor([0, 1]),
    }


@pytest.fixture(scope="session")
def batch() -> dict[str, Any]:
    return pair(3)


@pytest.fixture(scope="session")
def image_tokens() -> Tensor:
    return torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="session")
def tags(batch: dict[str, Any], image_tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a tagger said of the batch's images."""
    folder = tmp_path_factory.mktemp("tags")
    write_tags(folder, batch["lq"].float() / 255, TAGS, image_tokens)
    return str(folder)


@pytest.fixture(scope="session")
def make_base(sd: str, seesr: str, tags: str) -> Callable[..., Base]:
    """Makes a base by its kind, `plain` or `seesr`, of five DDIM steps: t = 801, 601, ... 1."""

    def make(kind: str = "plain", **options: Any) -> Base:
        options = {"sampler": "ddim", "steps": 5, **options}
        if kind == "plain":
            return ControlNet(sd, **options)
        return SeeSR(sd, seesr, **{"tagger": TagFiles(tags), "cfg_scale": 1.0, **options})

    return make


class Fake(Reward):
    """Brightness, so many times; above ReFL's 2 where it may be."""

    differentiable = True

    def __init__(self, name: str, gain: float) -> None:
        super().__init__()
        self.name, self.gain = name, gain
        self.told: list[list[str]] = []
        self.scale = nn.Parameter(torch.ones(()))
        self.requires_grad_(False).train(False)

    def _score(self, x: Tensor, prompts: Sequence[str], hq: Tensor | None) -> Tensor:
        self.told.append(list(prompts))
        return self.scale * self.gain * x.mean((1, 2, 3))


@pytest.fixture
def make(make_base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RFSR]:
    """Makes the method on a small base, configured; `bright` and `glaring` are rewards."""
    for name, gain in (("bright", 1.0), ("glaring", 4.0)):
        monkeypatch.setitem(common.rewards._REWARDS, name, partial(Fake, name, gain))

    def configured(
        kind: str = "plain",
        base: dict[str, Any] | None = None,
        cls: Any = RFSR,
        configure: bool = True,
        **options: Any,
    ) -> RFSR:
        if not issubclass(cls, RFSR):
            return bare(cls(make_base(kind, **(base or {})), **options), configure)
        small: dict[str, Any] = {
            "rewards": {"bright": 1.0},
            "lambda_dwt": 1.0,
            "lambda_r": 1.0,
            "gram_weights": "random",
            "gram_width": 0.1,
            "optimizer": partial(torch.optim.SGD, lr=0.0),
            "clip": None,
            "prompt_dropout": 0.0,
            "inference": Inference(color_fix="none", tile=None),
        }
        model: RFSR = cls(make_base(kind, **(base or {})), **{**small, **options})
        return bare(model, configure)

    def bare(model: Any, configure: bool) -> Any:
        if configure:
            model.configure_model()
        return model

    return configured


@pytest.fixture(scope="session")
def disturb() -> Callable[[RFSR], RFSR]:
    """Moves all that is trained away from its start."""

    def move(model: RFSR, size: float = 0.05) -> RFSR:
        g = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in model.all_trainable().values():
                parameter += size * torch.randn(parameter.shape, generator=g)
        return model

    return move
