"""The second device of the tests is as strict as a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from .second_device import Far, device, second_device


@pytest.fixture(autouse=True)
def there() -> Iterator[None]:
    with second_device():
        yield


def x() -> Tensor:
    return torch.arange(12.0).view(3, 4).to(device())


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: x() + torch.ones(3, 4),
        lambda: torch.cat([x(), torch.ones(1, 4)]),
        lambda: nn.Linear(4, 2)(x()),
        lambda: x() @ torch.ones(4, 1),
        lambda: x().lerp_(torch.ones(3, 4), 0.5),
        lambda: torch.where(torch.ones(3, 4) > 0, x(), 0.0),
    ],
)
def test_devices_do_not_mix(mixed: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="second device"):
        mixed()


def test_numpy_and_generators_of_the_cpu_are_refused() -> None:
    with pytest.raises((RuntimeError, TypeError)):
        x().numpy()
    for draw in (
        lambda g: torch.randn(3, device=device(), generator=g),
        lambda g: torch.randint(0, 2, (3,), device=device(), generator=g),
        lambda g: x().normal_(generator=g),
    ):
        with pytest.raises(RuntimeError, match="generator of the CPU"):
            draw(torch.Generator())


def test_it_draws_numbers_of_its_own() -> None:
    drawn = []
    for place in ("cpu", device()):
        torch.manual_seed(0)
        drawn.append(torch.randn(4, device=place).cpu())
    assert not torch.equal(*drawn)
    torch.manual_seed(0)
    torch.rand(3, device=device())
    assert torch.randn(4).equal(drawn[0])
    assert not torch.equal(torch.rand(4, device=device()).cpu(), torch.rand(4, device=device()).cpu())


def test_what_a_gpu_takes_is_taken_and_right() -> None:
    near, far = torch.arange(12.0).view(3, 4), x()
    assert far.cpu().equal(near)
    assert type(far.cpu()) is Tensor
    assert far.mul(torch.tensor(2.0)).cpu().equal(2 * near)  # a number of the CPU
    assert far[torch.tensor([2, 0])].cpu().equal(near[[2, 0]])
    assert far.sum().item() == far[0, 3].item() * 22 == 66
    assert far.tolist() == near.tolist()
    rows = far.clone()
    rows[1:].zero_()  # through a view
    assert rows.cpu().equal(torch.cat([near[:1], torch.zeros(2, 4)]))
    rows.copy_(near)
    assert rows.cpu().equal(near)
    with device():
        assert isinstance(torch.zeros(2), Far)
        assert isinstance(torch.tensor([1.0]) + 1, Far)
    assert not isinstance(torch.zeros(2), Far)


def test_a_network_learns_there_as_on_the_cpu() -> None:
    networks = [nn.Linear(4, 2), nn.Linear(4, 2)]
    networks[1].load_state_dict(networks[0].state_dict())
    weight = networks[1].weight
    networks[1].to(device())
    assert networks[1].weight is weight
    for network, batch in zip(networks, (x().cpu(), x()), strict=True):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        network(batch).square().mean().backward()
        optimizer.step()
    assert isinstance(weight.grad, Far)
    torch.testing.assert_close(weight.cpu(), networks[0].weight)
