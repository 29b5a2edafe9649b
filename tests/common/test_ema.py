"""The average is the textbook's, comes and goes without a trace, and survives a checkpoint."""

import io

import pytest
import torch
from torch import nn

from common.ema import EMA


def parameters(*values: float) -> dict[str, nn.Parameter]:
    return {str(i): nn.Parameter(torch.full((3,), value)) for i, value in enumerate(values)}


def set_to(params: dict[str, nn.Parameter], value: float) -> None:
    with torch.no_grad():
        for parameter in params.values():
            parameter.fill_(value)


def test_first_update_copies_and_later_ones_follow_the_recursion() -> None:
    params, ema = parameters(1.0), EMA(0.9, warmup=False)
    expected = 1.0
    ema.update(params)
    for value in (2.0, -3.0, 0.5):
        set_to(params, value)
        ema.update(params)
        expected = 0.9 * expected + 0.1 * value
        assert float(ema.average["0"][0]) == pytest.approx(expected, rel=1e-6)


def test_warm_up_uses_one_plus_n_over_ten_plus_n_until_the_decay_is_reached() -> None:
    params, ema = parameters(0.0), EMA(0.3)
    ema.update(params)
    set_to(params, 1.0)
    expected = 0.0
    for n in range(1, 8):
        ema.update(params)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
        assert float(ema.average["0"][0]) == pytest.approx(expected, rel=1e-6)
    assert (1 + 7) / (10 + 7) > 0.3 > (1 + 1) / (10 + 1), "the test crosses the border"


def test_the_average_is_kept_in_single_precision_whatever_the_parameter() -> None:
    params = {"a": nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    ema = EMA(0.999, warmup=False)
    ema.update(params)
    set_to(params, 1.0078125)
    ema.update(params)
    assert ema.average["a"].dtype == torch.float32
    assert float(ema.average["a"][0]) == pytest.approx(1 + 0.001 * 0.0078125, abs=1e-7)


def test_swapping_twice_is_exact_and_swapping_before_an_update_does_nothing() -> None:
    params, ema = parameters(1.0), EMA(0.9)
    ema.swap(params)
    assert float(params["0"].detach()[0]) == 1.0
    ema.update(params)
    set_to(params, 1 / 3)
    ema.update(params)
    held, average = params["0"].detach().clone(), ema.average["0"].clone()
    assert not torch.equal(held, average)
    with ema.swapped(params):
        assert torch.equal(params["0"], average)
    assert torch.equal(params["0"], held)
    assert torch.equal(ema.average["0"], average)


def test_the_context_swaps_back_after_an_error() -> None:
    params, ema = parameters(1.0), EMA(0.5)
    ema.update(params)
    set_to(params, 2.0)
    with pytest.raises(RuntimeError), ema.swapped(params):
        raise RuntimeError
    assert float(params["0"].detach()[0]) == 2.0


def test_the_swap_keeps_the_parameters_identity_so_that_optimisers_still_hold_them() -> None:
    params, ema = parameters(1.0), EMA(0.5)
    ema.update(params)
    before = params["0"]
    with ema.swapped(params):
        assert params["0"] is before
        assert params["0"].requires_grad


def test_a_saved_average_goes_on_as_if_nothing_had_happened() -> None:
    def train(ema: EMA, params: dict[str, nn.Parameter], values: list[float]) -> None:
        for value in values:
            set_to(params, value)
            ema.update(params)

    params, ema = parameters(0.1, 0.2), EMA(0.95)
    train(ema, params, [0.5, 0.7])
    buffer = io.BytesIO()
    torch.save(ema.state_dict(), buffer)
    buffer.seek(0)
    other = EMA(0.95)
    other.load_state_dict(torch.load(buffer, weights_only=True), params)
    train(ema, params, [0.9, 0.3])
    train(other, params, [0.9, 0.3])
    assert other.updates == ema.updates == 4
    assert all(torch.equal(other.average[name], ema.average[name]) for name in params)


def test_loading_copies_so_that_the_checkpoint_stays_as_it_was() -> None:
    params, ema = parameters(1.0), EMA(0.5)
    state = {"updates": 1, "average": {"0": torch.zeros(3)}}
    ema.load_state_dict(state, params)
    ema.update(params)
    assert float(ema.average["0"][0]) > 0
    assert float(state["average"]["0"][0]) == 0


def test_an_average_of_other_parameters_is_refused_by_name() -> None:
    ema = EMA(0.5)
    with pytest.raises(ValueError, match="other"):
        ema.load_state_dict({"updates": 1, "average": {"other": torch.zeros(3)}}, parameters(1.0))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 2.0])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"ema_decay={decay}.*between 0 and 1"):
        EMA(decay)
