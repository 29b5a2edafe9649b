"""A checkpoint holds what is trained, says what does not fit, and is found or named."""

from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoints import check_keys, kept_keys, load_trained_weights, matching, read_checkpoint, trained_state


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("constant", torch.zeros(2), persistent=False)


def trained() -> list[str]:
    return list(matching(Model(), ["head.*"]))


def test_patterns_are_those_of_file_names() -> None:
    assert trained() == ["head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"]
    assert list(matching(Model(), ["*.0.bias", "head.0.*"])) == ["base.0.bias", "head.0.weight", "head.0.bias"]


def test_a_pattern_that_fits_nothing_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"'tail\.\*' fits no parameter of Model"):
        matching(Model(), ["head.*", "tail.*"])


def test_kept_are_the_trained_their_modules_buffers_and_the_roots_counters() -> None:
    kept = kept_keys(Model(), trained())
    buffers = {"head.1.running_mean", "head.1.running_var", "head.1.num_batches_tracked", "count"}
    assert kept == {*trained(), *buffers}


@pytest.mark.parametrize(
    ("found", "says"), [({"a"}, "1 trained keys missing .'b'"), ({"a", "b", "c"}, "1 unknown .'c'")]
)
def test_keys_that_do_not_fit_are_counted_and_named(found: set[str], says: str) -> None:
    with pytest.raises(ValueError, match=rf"X does not fit this model.*{says}.*config\.yaml"):
        check_keys({"a", "b"}, found, "X")
    check_keys({"a", "b"}, {"b", "a"}, "X")


def test_a_checkpoint_that_is_nowhere_names_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=.*gone/x\.ckpt: no such file.*run/last\.ckpt"):
        read_checkpoint(tmp_path / "gone" / "x.ckpt")


def test_a_file_that_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_text("weights")
    with pytest.raises(ValueError, match=rf"ckpt_path={path} cannot be read as a checkpoint"):
        read_checkpoint(path)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"ckpt_path={path}.*state_dict"):
        read_checkpoint(path)


def test_a_half_written_checkpoint_is_an_error_and_not_half_a_model(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": Model().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)


def save(path: Path, model: nn.Module, **more: object) -> set[str]:
    keys = kept_keys(model, trained())
    state = {key: value for key, value in model.state_dict().items() if key in keys}
    torch.save({"state_dict": state, **more}, path)
    return keys


def test_trained_weights_are_loaded_and_the_rest_left_alone(tmp_path: Path) -> None:
    source, target = Model(), Model()
    source.count += 7
    keys = save(tmp_path / "a.ckpt", source)
    base = target.base[0].weight.clone()
    load_trained_weights(target, tmp_path / "a.ckpt", keys)
    assert torch.equal(target.head[0].weight, source.head[0].weight)
    assert torch.equal(target.base[0].weight, base)
    assert int(target.count) == 0, "a new run counts from zero"


def test_averages_are_what_a_new_run_starts_from(tmp_path: Path) -> None:
    source, target = Model(), Model()
    average = {name: torch.full_like(value, 0.25) for name, value in matching(source, ["head.*"]).items()}
    keys = save(tmp_path / "a.ckpt", source, ema={"updates": 3, "average": average})
    load_trained_weights(target, tmp_path / "a.ckpt", keys)
    assert all(float(value.detach().flatten()[0]) == 0.25 for value in target.head.parameters())


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    source, target = Model(), Model()
    source.head[0] = nn.Linear(2, 5)
    keys = save(tmp_path / "a.ckpt", source)
    with pytest.raises(ValueError, match=r"init_from=.*head\.0\.\w+ is \(5.*\) there and \(2.*\) here") as caught:
        load_trained_weights(target, tmp_path / "a.ckpt", keys)
    assert "\n" not in str(caught.value)


def test_averages_stand_in_the_place_of_their_parameters() -> None:
    state, average = {"a.w": torch.zeros(1), "a.count": torch.ones(1)}, {"a.w": torch.full((1,), 5.0)}
    assert trained_state({"state_dict": state}) == state
    with_averages = trained_state({"state_dict": state, "ema": {"updates": 1, "average": average}})
    assert {name: float(value) for name, value in with_averages.items()} == {"a.w": 5.0, "a.count": 1.0}
    assert float(state["a.w"]) == 0.0


def test_the_vectors_of_spectral_normalisation_are_kept_so_that_a_reload_computes_the_same() -> None:
    def normed(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.ModuleDict({"head": nn.utils.parametrizations.spectral_norm(nn.Linear(5, 7))})

    saved, loaded = normed(0), normed(1)
    for _ in range(20):
        saved["head"](torch.ones(1, 5))  # each forward pass in training moves the vectors
    kept = kept_keys(saved, list(matching(saved, ["head.*"])))
    loaded.load_state_dict({key: value for key, value in saved.state_dict().items() if key in kept}, strict=False)
    x = torch.randn(3, 5)
    assert torch.equal(loaded.eval()["head"](x), saved.eval()["head"](x))
