"""Latent LPIPS against a float64 version written out, and against the layout of InvSR's released file."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from common.losses.latent_lpips import LatentLPIPS

# (convolution, its slice); the released file's names hold torchvision's indices.
_CONVS = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
_LAST_OF_SLICE = (2, 7, 14, 21, 28)
_UNUSED = ("scaling_layer.", "lins.")
_LIN3 = "lin3.model.1.weight"


def _latents(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x, x + 0.3 * torch.randn(shape, generator=generator)


def _released_shapes() -> dict[str, tuple[int, ...]]:
    lines = (Path(__file__).parents[2] / "data/keys/latent_lpips.txt").read_text().split("\n")
    return {
        key: tuple(int(n) for n in shape.split("x")) for key, shape in (line.split() for line in lines if line.strip())
    }


def _released(seed: int = 5) -> dict[str, Tensor]:
    """Random values in the released names and shapes; `lins.k` repeats `lin k`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in _released_shapes().items():
        repeated = key.replace("lins.", "lin")
        std = (2 / (shape[1] * 9)) ** 0.5 if len(shape) == 4 else 0.1
        state[key] = state[repeated].clone() if repeated in state else std * torch.randn(shape, generator=generator)
    return state


def _maps_float64(state: dict[str, Tensor], z: Tensor, pools_before: tuple[int, ...] = (24,)) -> list[Tensor]:
    h, found = z.double(), []
    for conv, k in _CONVS.items():
        h = F.max_pool2d(h, 2) if conv in pools_before else h
        weight, bias = (state[f"net.slice{k}.{conv}.{name}"].double() for name in ("weight", "bias"))
        h = F.conv2d(h, weight, bias, padding=1).relu()
        if conv in _LAST_OF_SLICE:
            found.append(h)
    return found


def _distance_float64(state: dict[str, Tensor], x: Tensor, y: Tensor, pools_before: tuple[int, ...] = (24,)) -> Tensor:
    """The definition: unit vectors, squared difference, 1x1 convolution, mean over the pixels, sum of five."""
    total = torch.zeros(len(x), dtype=torch.float64)
    both = (_maps_float64(state, z, pools_before) for z in (x, y))
    for k, pair in enumerate(zip(*both, strict=True)):
        a, b = (f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10) for f in pair)
        total += F.conv2d((a - b) ** 2, state[f"lin{k}.model.1.weight"].double()).mean((1, 2, 3))
    return total


def _with_uneven_linear(loss: LatentLPIPS) -> LatentLPIPS:
    """Linear weights that tell the channels apart, as the released ones do, and biases that are not 0."""
    generator = torch.Generator().manual_seed(9)
    for name, value in loss.named_parameters():
        if name.startswith("lin") or name.endswith("bias"):
            value.copy_(torch.rand(value.shape, generator=generator) / 10)
    return loss


class TestValue:
    @pytest.mark.parametrize(("width", "in_channels", "side"), [(0.125, 4, (12, 10)), (0.25, 16, (8, 8))])
    def test_equals_the_definition_written_out_in_float64(
        self, width: float, in_channels: int, side: tuple[int, int]
    ) -> None:
        loss = _with_uneven_linear(LatentLPIPS(width=width, in_channels=in_channels))
        x, y = _latents(3, in_channels, *side)
        expected = _distance_float64(loss.state_dict(), x, y)
        assert expected.abs().min() > 1e-3
        assert_close(loss(x, y).double(), expected, rtol=1e-4, atol=1e-6)
        assert_close(loss.double()(x.double(), y.double()), expected, rtol=1e-10, atol=1e-12)

    def test_divides_by_the_length_plus_1e_10(self) -> None:
        loss = LatentLPIPS(width=0.125)
        loss.get_parameter("net.slice1.2.weight").mul_(1e-10)  # without biases all features behind it are as small
        x, y = _latents(2, 4, 8, 8)
        assert 1e-11 < loss.maps(x)[4].max() < 1e-9
        expected = _distance_float64(loss.state_dict(), x, y)
        assert expected.min() > 1e-3
        assert_close(loss(x, y).double(), expected, rtol=1e-4, atol=0)

    def test_differs_from_the_net_with_all_pools_or_none(self) -> None:
        loss = LatentLPIPS(width=0.125)
        x, y = _latents(2, 4, 16, 16)
        value, state = loss(x, y).double(), loss.state_dict()
        for pools_before in ((5, 10, 17, 24), ()):
            other = _distance_float64(state, x, y, pools_before)
            assert ((value - other).abs() > 0.01 * other).all()

    @pytest.mark.parametrize(("height", "width"), [(8, 6), (7, 5), (2, 2), (2, 3)])
    def test_four_maps_have_the_latents_size_and_the_fifth_half(self, height: int, width: int) -> None:
        maps = LatentLPIPS(width=0.125).maps(torch.zeros(1, 4, height, width))
        sizes = [(height, width)] * 4 + [(height // 2, width // 2)]
        assert [tuple(f.shape) for f in maps] == [
            (1, c, *size) for c, size in zip((8, 16, 32, 64, 64), sizes, strict=True)
        ]

    def test_is_zero_at_equality_symmetric_and_per_latent(self) -> None:
        loss = LatentLPIPS(width=0.125)
        x, y = _latents(3, 4, 8, 8)
        assert torch.equal(loss(x, x.clone()), torch.zeros(3))
        assert_close(loss(x, y), loss(y, x), rtol=1e-6, atol=0)
        assert_close(loss(x, y), torch.cat([loss(a[None], b[None]) for a, b in zip(x, y, strict=True)]))

    def test_grows_with_the_distance(self) -> None:
        loss = LatentLPIPS(width=0.125)
        x, y = _latents(1, 4, 8, 8)
        values = torch.cat([loss(x + step * (y - x), x) for step in (0.1, 0.3, 1.0)])
        assert (values.diff() > 0).all()

    def test_under_bf16_autocast_is_the_fp32_value_bit_by_bit(self) -> None:
        loss = LatentLPIPS(width=0.125)
        x, y = _latents(2, 4, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(x, y)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, loss(x, y))
        assert loss(x.bfloat16(), y.bfloat16()).dtype == torch.float32

    @pytest.mark.parametrize(
        ("of_x", "of_y"),
        [
            ((1, 4, 8, 8), (1, 4, 8, 6)),
            ((2, 4, 8, 8), (1, 4, 8, 8)),
            ((1, 3, 8, 8), (1, 3, 8, 8)),
            ((4, 8, 8), (4, 8, 8)),
            ((1, 4, 1, 8), (1, 4, 1, 8)),
        ],
    )
    def test_other_shapes_are_refused(self, of_x: tuple[int, ...], of_y: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"x has shape .* pass two batches of latents of one \(B, 4, h, w\)"):
            LatentLPIPS(width=0.125)(torch.zeros(of_x), torch.zeros(of_y))

    def test_refuses_to_run_after_a_cast_to_16_bits(self) -> None:
        with pytest.raises(ValueError, match="bf16-mixed"):
            LatentLPIPS(width=0.125).to(torch.bfloat16)(*_latents(1, 4, 4, 4))


class TestGradient:
    def test_is_that_of_the_definition_and_the_target_gets_none(self) -> None:
        loss = _with_uneven_linear(LatentLPIPS(width=0.125)).double()
        x, y = (z.double().requires_grad_() for z in _latents(2, 4, 6, 6))
        loss(x, y).mean().backward()
        (expected,) = torch.autograd.grad(_distance_float64(loss.state_dict(), x, y.detach()).mean(), x)
        assert x.grad is not None
        assert expected.abs().max() > 1e-6
        assert_close(x.grad, expected, rtol=1e-8, atol=1e-12)
        assert y.grad is None

    def test_only_the_first_latents_run_with_a_graph(self) -> None:
        loss = LatentLPIPS(width=0.125)
        with_graph = []
        loss.get_submodule("net.slice1").register_forward_hook(lambda _, __, f: with_graph.append(f.requires_grad))
        loss(*(z.requires_grad_() for z in _latents(1, 4, 4, 4)))
        assert with_graph == [True, False]

    @pytest.mark.parametrize("value", [0.0, 1.5])
    def test_is_finite_at_constant_latents_also_where_all_features_are_zero(self, value: float) -> None:
        loss = LatentLPIPS(width=0.125)
        for name, parameter in loss.named_parameters():
            if name.startswith("net.slice3"):
                parameter.sub_(1.0)  # nothing passes the ReLUs of relu3_3 and, without biases, none after it
        x = torch.full((1, 4, 6, 6), value, requires_grad=True)
        assert loss.maps(x)[3].abs().max() == 0
        distance = loss(x, _latents(1, 4, 6, 6)[1]).sum()
        with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either, which a ReLU would hide
            distance.backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()

    def test_is_finite_where_the_square_of_the_features_underflows(self) -> None:
        loss = LatentLPIPS(width=0.125)
        loss.get_parameter("net.slice1.2.weight").mul_(1e-25)
        x, y = _latents(1, 4, 6, 6)
        x.requires_grad_()
        assert 0 < loss.maps(x)[0].max() < 1e-23
        loss(x, y).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()

    def test_at_equality_is_zero(self) -> None:
        x = torch.zeros(1, 4, 6, 6, requires_grad=True)  # without biases every feature is 0
        LatentLPIPS(width=0.125)(x, x.detach()).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, torch.zeros_like(x))


class TestFrozen:
    def test_nothing_is_trainable_and_train_mode_does_not_reach_it(self) -> None:
        loss = LatentLPIPS(width=0.125)
        assert not any(m.training for m in loss.modules())
        owner = nn.Sequential(loss).train()
        assert [*owner.parameters()]
        assert not any(p.requires_grad for p in owner.parameters())
        assert not any(m.training for m in owner[0].modules())

    def test_a_step_of_the_latents_leaves_no_gradient_in_it(self) -> None:
        loss = LatentLPIPS(width=0.125)
        loss(_latents(1, 4, 4, 4)[0].requires_grad_(), _latents(1, 4, 4, 4)[1]).sum().backward()
        assert all(p.grad is None for p in loss.parameters())


class TestRandomWeights:
    def test_at_full_size_hold_14_715_264_and_1_472_values(self) -> None:
        sizes = {name: p.numel() for name, p in LatentLPIPS().named_parameters()}
        assert sum(size for name, size in sizes.items() if name.startswith("net.")) == 14_715_264
        assert sum(size for name, size in sizes.items() if name.startswith("lin")) == 1_472
        assert sum(sizes.values()) == 14_715_264 + 1_472

    def test_are_the_same_every_time_and_leave_the_global_generator_alone(self) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = LatentLPIPS(width=0.125)
        first(*_latents(1, 4, 4, 4))
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(2)
        second, other = LatentLPIPS(width=0.125).state_dict(), LatentLPIPS(width=0.125, seed=1).state_dict()
        assert all(torch.equal(value, second[key]) for key, value in first.state_dict().items())
        assert not torch.equal(second["net.slice1.0.weight"], other["net.slice1.0.weight"])

    def test_are_drawn_on_the_cpu_and_go_to_the_default_device(self, calls: list[tuple[str, str]]) -> None:
        with torch.device("meta"):
            loss = LatentLPIPS(width=0.125)
        assert {device for name, device in calls if name == "randn"} == {"cpu"}
        assert {parameter.device.type for parameter in loss.parameters()} == {"meta"}

    def test_weigh_every_channel_by_one_over_their_number(self) -> None:
        state = LatentLPIPS(width=0.25).state_dict()
        for k, num in enumerate((16, 32, 64, 128, 128)):
            assert torch.equal(state[f"lin{k}.model.1.weight"], torch.full((1, num, 1, 1), 1 / num))

    def test_are_announced_once_with_the_width(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            LatentLPIPS(width=0.25)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "latent LPIPS has random weights (width 0.25)" in record.getMessage()


class TestWeightFiles:
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_in_the_released_layout_load_every_value(
        self, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        state, path = _released(), tmp_path / f"vgg16_sdturbo_lpips{suffix}"
        assert len(state) == 38
        assert sum(value.numel() for value in state.values()) == 14_718_214
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        loss = LatentLPIPS(str(path))
        assert not caplog.records
        assert not any(p.requires_grad for p in loss.parameters())
        loaded = loss.state_dict()
        assert set(loaded) == {key for key in state if not key.startswith(_UNUSED)}
        assert all(torch.equal(value, state[key]) for key, value in loaded.items())
        x, y = _latents(1, 4, 6, 6)
        assert_close(loss(x, y).double(), _distance_float64(state, x, y), rtol=1e-4, atol=1e-7)

    def test_saved_by_this_class_load_again(self, tmp_path: Path) -> None:
        loss, path = LatentLPIPS(in_channels=16, seed=2), tmp_path / "flux.pth"
        torch.save(loss.state_dict(), path)
        again = LatentLPIPS(str(path), in_channels=16)
        assert_close(again(*_latents(1, 16, 4, 4)), loss(*_latents(1, 16, 4, 4)), rtol=0, atol=0)

    def test_in_half_precision_run_in_fp32(self, tmp_path: Path) -> None:
        path = tmp_path / "half.pth"
        torch.save({key: value.half() for key, value in _released().items()}, path)
        assert all(p.dtype == torch.float32 for p in LatentLPIPS(str(path)).parameters())

    @pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
    def test_wrapped_as_invsrs_trainer_saves_them_load_too(self, prefix: str, tmp_path: Path) -> None:
        state, path = _released(), tmp_path / "wrapped.pth"
        torch.save({"iters": 7, "state_dict": {prefix + key: value for key, value in state.items()}}, path)
        loaded = LatentLPIPS(str(path)).state_dict()
        assert torch.equal(loaded["net.slice5.28.weight"], state["net.slice5.28.weight"])

    @pytest.mark.parametrize(
        ("spoil", "found"),
        [
            (lambda s: s.pop("net.slice3.12.bias"), "Missing key.*net.slice3.12.bias"),
            (lambda s: [s.pop(key) for key in (_LIN3, "lins.3.model.1.weight")], f"Missing key.*{_LIN3}"),
            (lambda s: s.pop(_LIN3), f"Missing key.*{_LIN3}"),
            (lambda s: s.update({"net.slice5.30.weight": torch.zeros(1)}), "Unexpected key.*net.slice5.30.weight"),
            (lambda s: s.update({"lins.5.model.1.weight": torch.zeros(1)}), "Unexpected key.*lins.5"),
            (lambda s: s.update({"scaling_layer.mean": torch.zeros(1)}), "Unexpected key.*scaling_layer.mean"),
            (lambda s: s.update({"net.slice1.2.weight": torch.zeros(64, 32, 3, 3)}), "size mismatch.*slice1.2.weight"),
            (lambda s: s["lins.2.model.1.weight"].add_(1e-3), "a lins.2 that is not its lin2"),
            (lambda s: s.clear(), "Missing key"),
        ],
        ids=["bias", "linear", "only_repeat", "extra", "sixth_repeat", "third_scaling", "shape", "repeat", "empty"],
    )
    def test_with_a_missing_extra_or_wrong_tensor_are_refused_in_one_line(
        self, spoil: Callable[[dict[str, Tensor]], object], found: str, tmp_path: Path
    ) -> None:
        state, path = _released(), tmp_path / "spoilt.pth"
        spoil(state)
        torch.save(state, path)
        with pytest.raises(ValueError, match=found) as caught:
            LatentLPIPS(str(path))
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"weights={str(path)!r}")
        assert "pass InvSR's vgg16_sdturbo_lpips.pth" in message

    def test_for_other_latents_are_refused_with_their_number_of_channels(self, tmp_path: Path) -> None:
        path = tmp_path / "sd.pth"
        torch.save(_released(), path)
        with pytest.raises(ValueError, match=r"in_channels=16, .*sd\.pth.* of 4 channels; use in_channels=4"):
            LatentLPIPS(str(path), in_channels=16)

    @pytest.mark.parametrize("weights", ["missing.pth", "pretrained", "vgg.ckpt"])
    def test_that_do_not_exist_are_named_with_where_to_get_them(self, weights: str) -> None:
        with pytest.raises(FileNotFoundError, match=rf"weights='{weights}'.*'random', or get .*huggingface\.co") as err:
            LatentLPIPS(weights)
        assert "'pretrained', or" not in str(err.value)

    @pytest.mark.parametrize(("weights", "width"), [("vgg.pth", 0.5), ("random", 0.0), ("random", -1.0)])
    def test_a_width_that_does_not_fit_is_refused_before_they_are_read(self, weights: str, width: float) -> None:
        with pytest.raises(ValueError, match=f"width={width}.*weights='random'"):
            LatentLPIPS(weights, width=width)

    def test_latents_without_channels_are_refused(self) -> None:
        with pytest.raises(ValueError, match="in_channels=0 must be at least 1"):
            LatentLPIPS(in_channels=0)
