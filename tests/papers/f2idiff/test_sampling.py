"""Drawing from a foundation model: DDIM written out in numpy, guidance, and how often the network is asked."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.testing import assert_close

from common.denoisers.unet import Prediction
from common.diffusion import NoiseSchedule
from papers.f2idiff.sampling import sample

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
TIMES = {
    1: [999],
    4: [999, 749, 499, 249],
    7: [999, 856, 713, 570, 428, 285, 142],  # 1000 (1, 6/7, ..., 1/7), rounded, less 1
    20: list(range(999, 0, -50)),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Toy:
    """eps is linear in z, and depends on time and condition; remembers how it was called."""

    def __init__(self) -> None:
        self.schedule = NoiseSchedule(SD)
        self.calls: list[tuple[int, int]] = []

    def eps(self, z: Tensor, t: int, c: Tensor) -> Tensor:
        return 0.8 * z.flip(1) + 0.1 * z * t / 1000 + c.mean((1, 2)).view(-1, 1, 1, 1)

    def __call__(self, z: Tensor, t: int | Tensor, c: Tensor) -> Prediction:
        assert len(z) == len(c)
        assert not torch.is_grad_enabled()
        self.calls.append((int(t), len(z)))
        eps = self.eps(z, int(t), c)
        return Prediction(eps, self.schedule.x0_from_eps(z, eps, int(t)))


class Knowing(Toy):
    """The denoiser of data that is one image."""

    def __init__(self, x0: Tensor) -> None:
        super().__init__()
        self.x0 = x0

    def eps(self, z: Tensor, t: int, c: Tensor) -> Tensor:
        x0 = self.x0.repeat(len(z) // len(self.x0), 1, 1, 1)
        eps: Tensor = (z - ABAR[t] ** 0.5 * x0) / (1 - ABAR[t]) ** 0.5
        return eps


def by_hand(noise: Tensor, c: Tensor, null: Tensor, times: list[int], w: float) -> NDArray[np.float64]:
    """DDIM, arXiv:2010.02502, Eq. 12 with sigma 0; from the last of the timesteps to the clean image."""
    toy, z = Toy(), noise.numpy()
    for t, following in zip(times, [*times[1:], None], strict=True):
        e_c, e_null = (toy.eps(torch.from_numpy(z), t, told).numpy() for told in (c, null))
        e = (1 - w) * e_null + w * e_c
        x0 = (z - np.sqrt(1 - ABAR[t]) * e) / np.sqrt(ABAR[t])
        abar = 1.0 if following is None else ABAR[following]
        z = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * e
    return z


C, NULL, NOISE = randn(3, 5, 6, seed=1), torch.zeros(3, 5, 6, dtype=torch.float64), randn(3, 4, 2, 2)


@pytest.mark.parametrize("steps", TIMES)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 0.5, 7.5])
def test_is_ddim_written_out(steps: int, guidance: float) -> None:
    found = sample(Toy(), C, NULL, NOISE, steps, guidance)  # type: ignore[arg-type]  # a toy for a U-Net
    assert_close(found, torch.from_numpy(by_hand(NOISE, C, NULL, TIMES[steps], guidance)), rtol=1e-9, atol=1e-9)
    assert found.dtype == torch.float64


@pytest.mark.parametrize(("guidance", "size"), [(0.0, 3), (1.0, 3), (7.5, 6)])
@pytest.mark.parametrize("steps", TIMES)
def test_asks_once_a_step_with_the_batch_twice_where_it_guides(guidance: float, size: int, steps: int) -> None:
    toy = Toy()
    sample(toy, C, NULL, NOISE, steps, guidance)  # type: ignore[arg-type]
    assert toy.calls == [(t, size) for t in TIMES[steps]]


@pytest.mark.parametrize("steps", TIMES)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_a_denoiser_that_knows_the_image_gives_it_without_rest(steps: int, guidance: float) -> None:
    x0 = randn(3, 4, 2, 2, seed=5)
    found = sample(Knowing(x0), C, NULL, NOISE, steps, guidance)  # type: ignore[arg-type]
    assert_close(found, x0, rtol=0, atol=1e-9)


def test_without_guidance_one_of_the_conditions_counts_for_nothing() -> None:
    other = randn(3, 5, 6, seed=9)
    for guidance, same in ((0.0, (other, NULL)), (1.0, (C, other))):
        found = sample(Toy(), C, NULL, NOISE, 4, guidance)  # type: ignore[arg-type]
        assert torch.equal(found, sample(Toy(), *same, NOISE, 4, guidance))  # type: ignore[arg-type]
        assert not torch.equal(found, sample(Toy(), C, other, NOISE, 4, 2.0))  # type: ignore[arg-type]


def test_keeps_its_noise_and_adds_none() -> None:
    noise, state = NOISE.clone(), torch.get_rng_state()
    first = sample(Toy(), C, NULL, noise, 4, 2.0)  # type: ignore[arg-type]
    assert torch.equal(noise, NOISE)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sample(Toy(), C, NULL, noise, 4, 2.0), first)  # type: ignore[arg-type]
