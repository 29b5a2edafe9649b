"""Muon: torch's own on matrices, the same on flattened convolutions, Adam on the rest."""

import pytest
import torch
from torch import nn

from common.foundation.muon import Muon, muon_or_adamw, orthogonal


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def descend(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.numel(), generator=generator).view(parameter.shape)
        optimizer.step()


@pytest.mark.parametrize("shape", [(8, 24), (40, 16), (64, 576)])
def test_the_singular_values_of_an_orthogonalised_matrix_are_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(2))))
    assert values.min() > 0.4
    assert values.max() < 1.3


def test_orthogonalising_keeps_the_singular_vectors() -> None:
    matrix = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonal(matrix) @ vh.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-10


@pytest.mark.parametrize("shape", [(8, 24), (40, 16)])
def test_on_matrices_it_is_torchs_own(shape: tuple[int, int]) -> None:
    """To the precision of bfloat16, in which torch's iterates."""
    ours, theirs = parameters(shape), parameters(shape)
    start = ours[0].detach().clone()
    descend(Muon(ours, lr=0.02), ours, 5)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    descend(reference, theirs, 5)
    assert (ours[0] - start).abs().mean() > 5e-3
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2e-3)


def test_a_convolution_is_the_matrix_of_its_flattened_kernels_whatever_its_memory_format() -> None:
    (matrix,), (kernel,) = parameters((8, 36)), parameters((8, 4, 3, 3))
    last = nn.Parameter(kernel.detach().clone().contiguous(memory_format=torch.channels_last))
    for parameter in (matrix, kernel, last):
        descend(Muon([parameter], lr=0.1), [parameter], 3)
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last.detach().contiguous(), kernel.detach(), rtol=1e-5, atol=1e-6)


def test_vectors_and_thin_matrices_are_left_to_adam() -> None:
    ours, theirs = parameters((16,), (3, 50)), parameters((16,), (3, 50))
    descend(Muon(ours, lr=0.1), ours, 4)
    descend(torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.99)), theirs, 4)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_it_goes_on_from_its_saved_state() -> None:
    whole, parted = parameters((8, 24), (5,)), parameters((8, 24), (5,))
    descend(Muon(whole), whole, 2)
    first = Muon(parted)
    descend(first, parted, 2)
    optimizer = Muon(whole)
    reference = Muon(parted)
    reference.load_state_dict(first.state_dict())
    descend(reference, parted, 1)
    descend(optimizer, whole, 1)  # without its momentum
    assert not torch.equal(whole[0], parted[0])
    assert reference.state_dict()["state"][1]["step"] == 3


def test_either_optimiser_comes_by_its_name_with_the_same_learning_rate_and_betas() -> None:
    muon, adamw = (muon_or_adamw(name, parameters((8, 8)), 0.03) for name in ("muon", "adamw"))
    assert (type(muon), type(adamw)) == (Muon, torch.optim.AdamW)
    for optimizer in (muon, adamw):
        assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.03, (0.9, 0.99))
    assert adamw.defaults["weight_decay"] == 0
