"""The foundation's trainers stop before a number that is not finite changes a weight."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from common.foundation.autoencoder import TinyAutoencoder
from common.foundation.denoiser import TinyDenoiser
from common.foundation.flow import TinyFlow
from common.guard import NonFiniteLossError

TRAINERS: dict[str, Callable[[], LightningModule]] = {
    "vae": lambda: TinyAutoencoder(channels=(8, 8, 8)),
    "unet": lambda: TinyDenoiser(channels=(8, 8), text_width=8),
    "flow": lambda: TinyFlow(heads=3, double_blocks=1, single_blocks=1, text_width=8),
}


def fit(model: LightningModule, folder: Path, steps: int, bad: int | None = None) -> dict[str, torch.Tensor]:
    """Train on random images, of which batch `bad` has one that is not finite; gives the weights."""
    g = torch.Generator().manual_seed(0)
    batches: list[dict[str, Any]] = [
        {"hq": torch.rand(2, 3, 32, 32, generator=g), "prompt": ["a", "b"], "index": torch.arange(2) + 2 * step}
        for step in range(steps)
    ]
    if bad is not None:
        batches[bad]["hq"][1, 0, 5, 5] = float("nan")
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_loss_that_is_not_finite_stops_training_and_changes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    states = []
    for steps, bad in ((2, None), (4, 2)):
        torch.manual_seed(0)
        model = TRAINERS[name]()
        # the learning rate follows from the number of steps
        monkeypatch.setattr(type(model), "configure_optimizers", lambda m: torch.optim.SGD(m.parameters(), lr=1e-2))
        if bad is None:
            states.append(fit(model, tmp_path, steps))
            continue
        with pytest.raises(NonFiniteLossError, match="the loss is not finite at train step 3; the batch is in "):
            fit(model, tmp_path, steps, bad)
        states.append(model.state_dict())
    one, other = states
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    (saved,) = tmp_path.rglob("nonfinite_step3_rank0.pt")
    batch = torch.load(saved, weights_only=True)
    assert batch["index"].tolist() == [4, 5]
    assert batch["prompt"] == ["a", "b"]
    assert int(batch["hq"].isnan().sum()) == 1


def test_a_gradient_that_is_not_finite_stops_training_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = TinyAutoencoder(channels=(8, 8, 8))
    model.vae.encoder.conv_in.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="the gradient norm is not finite at train step 1"):
        fit(model, tmp_path, 2)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
