"""`losses:` adds any shared image loss to any method that restores an image in training.

- The gradient at the restored image changes by the weighted gradient of the added losses, computed by hand, and by
  nothing else.
- Each added loss is logged without its weight.
- A method without a restored image refuses, and an unknown name is refused before anything is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F

from common.losses import GramKL, build_image_loss, gram_distances
from common.training import TrainingModule
from data import Photos
from launch.parameters import parse
from papers.dfosd import DFOSD
from papers.dnf_sr import NF2T
from papers.rfsr import BaseSR

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "dfosd/configs/demo/01_dfosd.yaml": {"discriminator": "none"},
    "dnf_sr/configs/demo/01_sft.yaml": {"lambda_gan": 0.0},
    "f2idiff/configs/demo/01_f2idiff_sr.yaml": {},
    "rfsr/configs/demo/02_rfsr.yaml": {"t_early_min": 0, "measure_drift": False, "regulariser": "none"},
}
WEIGHTS = {"dwt": 0.5, "l1": 0.25}


class Hq(Callback):
    """Keeps the targets of the last batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.hq = batch["hq"].clone()


def step(config: str, losses: dict[str, float] | None) -> tuple[Tensor, Tensor, Tensor, Any]:
    """One step of a demo's method: decoded images, the gradient there, the targets, and the logged numbers."""
    parser, parsed = parse([str(ROOT / "papers" / config)])
    settings = parsed.model.init_args
    for name, value in {**METHODS[config], "losses": losses, "ema_decay": None}.items():
        settings[name] = value
    model: TrainingModule = parser.instantiate(parsed).model
    model.configure_model()
    codec: Any = model.base.codec if isinstance(model, BaseSR) else model.codec
    seen: list[tuple[Tensor, list[Tensor]]] = []
    decode = codec.decode

    def watched(z: Tensor) -> Tensor:
        x = decode(z)
        if x.requires_grad:
            seen.append((x.detach(), gradients := []))
            x.register_hook(gradients.append)
        return x

    codec.decode = watched
    hq = Hq()
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[hq],
    )  # fmt: skip
    trainer.fit(model, Photos(crop_size=64, batch_size=2, batches_per_epoch=1, num_workers=0, seed=0))
    (x, (gradient,)) = seen[0]
    return x, gradient, hq.hq, trainer.callback_metrics


@pytest.mark.parametrize(
    "config",
    [pytest.param(name, marks=[pytest.mark.long] * (not name.startswith(("dnf_sr", "rfsr")))) for name in METHODS],
)
def test_the_gradient_at_the_restored_image_changes_by_that_of_the_added_losses(config: str) -> None:
    x, with_losses, hq, metrics = step(config, WEIGHTS)
    _, without, _, _ = step(config, None)
    x.requires_grad_(True)
    image = (x + 1) / 2
    image = image.clamp(0, 1) if config.startswith("rfsr") else image
    l1 = (image - hq).abs().mean()
    dwt = (2 * F.avg_pool2d(image - hq, 2)).abs().mean()  # the low band of one Haar level
    (expected,) = torch.autograd.grad(WEIGHTS["dwt"] * dwt + WEIGHTS["l1"] * l1, x)
    error = (with_losses - without - expected).norm() / expected.norm()
    assert float(error) < 1e-3
    assert float(metrics["train/losses/l1"]) == pytest.approx(float(l1), rel=1e-4)
    assert float(metrics["train/losses/dwt"]) == pytest.approx(float(dwt), rel=1e-4)


def test_gram_is_of_plain_features() -> None:
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gram = build_image_loss("gram", "random", 0.125)
    assert isinstance(gram, GramKL)
    layers = gram_distances(gram.trunk, x, y, "plain") * torch.tensor([0.1, 0.1, 1.0, 1.0, 1.0])
    torch.testing.assert_close(gram(x, y), layers.sum(1))


def test_a_method_without_a_restored_image_and_an_unknown_name_are_refused() -> None:
    with pytest.raises(ValueError, match="NF2T trains without a restored image; leave losses out"):
        NF2T(losses={"l1": 1.0})
    with pytest.raises(ValueError, match="losses: dits is not an image loss; use mse, l1, dwt, "):
        DFOSD(losses={"dits": 1.0})
