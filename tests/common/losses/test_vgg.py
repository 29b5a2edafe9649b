"""The VGG trunk: torchvision's layout and values, frozen for good, and the same random weights wherever it is built."""

import logging
from itertools import pairwise
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from common.loading import architecture_only
from common.losses.vgg import L2Pool, VGGTrunk, build_features, random_state, stage_channels

_CONV_INDICES = {
    "vgg16": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    "vgg19": (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34),
}
_CONV_CHANNELS = {
    "vgg16": (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
    "vgg19": (64, 64, 128, 128, *[256] * 4, *[512] * 8),
}


def _torchvision_features(arch: str) -> nn.Sequential:
    from torchvision.models.vgg import cfgs, make_layers

    with torch.device("meta"):
        return make_layers(cfgs["D" if arch == "vgg16" else "E"])


class TestLayout:
    @pytest.mark.parametrize("arch", ["vgg16", "vgg19"])
    def test_keys_and_shapes_are_torchvisions(self, arch: str) -> None:
        shapes = {key: tuple(value.shape) for key, value in VGGTrunk([0], arch).state_dict().items()}
        written_out = {}
        for index, out, into in zip(
            _CONV_INDICES[arch], _CONV_CHANNELS[arch], (3, *_CONV_CHANNELS[arch][:-1]), strict=True
        ):
            written_out[f"features.{index}.weight"] = (out, into, 3, 3)
            written_out[f"features.{index}.bias"] = (out,)
        torchvision = {f"features.{k}": tuple(v.shape) for k, v in _torchvision_features(arch).state_dict().items()}
        assert shapes == written_out == torchvision

    def test_vgg16_holds_14_714_688_values(self) -> None:
        assert sum(p.numel() for p in VGGTrunk([0]).parameters()) == 14_714_688

    def test_every_layers_output_is_torchvisions(self) -> None:
        # A name per index is not enough: outputs before the ReLU must stay as they were, so ReLUs are not in-place.
        trunk = VGGTrunk(range(37), "vgg19", width=0.125)
        x_01 = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(1))
        h = (x_01 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
            :, None, None
        ]
        outputs = trunk(x_01)
        state = trunk.state_dict()
        for index, layer in enumerate(_torchvision_features("vgg19")):
            if isinstance(layer, nn.Conv2d):
                h = F.conv2d(h, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
                assert outputs[index].min() < 0
            else:
                h = h.relu() if isinstance(layer, nn.ReLU) else F.max_pool2d(h, 2)
            assert_close(outputs[index], h, rtol=1e-4, atol=1e-5)

    def test_width_scales_the_channels(self) -> None:
        trunk = VGGTrunk((3, 8, 15, 22, 29), width=0.25)
        assert [f.shape[1] for f in trunk(torch.rand(1, 3, 32, 32))] == [16, 32, 64, 128, 128]

    def test_stops_at_the_last_asked_layer(self) -> None:
        trunk = VGGTrunk((1, 3), width=0.125)
        trunk.features[4].register_forward_hook(lambda *_: pytest.fail("the pool behind the last layer ran"))
        assert len(trunk(torch.rand(1, 3, 8, 8))) == 2


class TestL2Pool:
    def test_equals_the_formula_written_out_in_float64(self) -> None:
        h = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        padded = F.pad(h.square(), (1, 1, 1, 1))
        taps = {-1: 1, 0: 2, 1: 1}
        expected = torch.zeros(2, 3, 4, 3, dtype=torch.float64)
        for i in range(4):
            for j in range(3):
                for dy, wy in taps.items():
                    for dx, wx in taps.items():
                        expected[..., i, j] += wy * wx / 16 * padded[..., 2 * i + 1 + dy, 2 * j + 1 + dx]
        assert_close(L2Pool(3).double()(h), (expected + 1e-12).sqrt())

    def test_gradient_is_finite_where_all_is_zero(self) -> None:
        h = torch.zeros(1, 2, 4, 4, requires_grad=True)
        L2Pool(2)(h).sum().backward()
        assert h.grad is not None
        assert torch.isfinite(h.grad).all()


class TestFrozen:
    def test_nothing_is_trainable_and_train_mode_does_not_reach_it(self) -> None:
        owner = nn.Sequential(VGGTrunk([3], width=0.125)).train()
        assert not any(p.requires_grad for p in owner.parameters())
        assert not owner[0].training
        assert not any(m.training for m in owner[0].modules())

    def test_runs_in_fp32_inside_autocast(self) -> None:
        trunk = VGGTrunk((3, 29), width=0.125)
        x_01 = torch.rand(1, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16):
            inside = trunk(x_01)
        for a, b in zip(inside, trunk(x_01), strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)

    def test_refuses_to_run_after_a_cast_to_16_bits(self) -> None:
        with pytest.raises(ValueError, match="bf16-mixed"):
            VGGTrunk([3], width=0.125).to(torch.bfloat16)(torch.rand(1, 3, 8, 8))


class TestRandomWeights:
    def test_are_the_same_every_time_and_leave_the_global_generator_alone(self) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = VGGTrunk([3], width=0.25).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        torch.manual_seed(2)
        second, other = VGGTrunk([3], width=0.25).state_dict(), VGGTrunk([3], width=0.25, seed=1).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not torch.equal(first["features.0.weight"], other["features.0.weight"])

    def test_the_default_device_does_not_decide_them(self, calls: list[tuple[str, str]]) -> None:
        trunk, layout = VGGTrunk([3], width=0.25), nn.Module()
        layout.features = build_features("vgg16", stage_channels(0.25), "max")
        with torch.device("meta"):
            drawn = random_state(layout, 0)
            elsewhere = VGGTrunk([3], width=0.25, pooling="l2")
        assert all(torch.equal(value, drawn[key]) for key, value in trunk.state_dict().items())
        assert {device for name, device in calls if name == "randn"} == {"cpu"}
        assert {value.device.type for value in [*elsewhere.parameters(), *elsewhere.buffers()]} == {"meta"}

    def test_of_an_architecture_take_no_memory(self, calls: list[tuple[str, str]]) -> None:
        with architecture_only():
            trunk = VGGTrunk([3], width=0.25, pooling="l2")
        assert {device for name, device in calls if name == "randn"} == {"meta"}
        assert {value.device.type for value in [*trunk.parameters(), *trunk.buffers()]} == {"meta"}

    def test_keep_the_power_of_the_signal_through_the_depth(self) -> None:
        trunk = VGGTrunk(_CONV_INDICES["vgg16"], pooling="l2")
        powers = [f.square().mean().item() for f in trunk(torch.rand(1, 3, 64, 64))]
        assert all(0.25 < later / earlier < 4 for earlier, later in pairwise(powers))

    def test_are_announced_once_with_network_and_width(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            VGGTrunk([3], "vgg19", width=0.25)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "vgg19" in record.getMessage()
        assert "width 0.25" in record.getMessage()


class TestWeightFiles:
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_load_with_the_classifier_ignored(
        self, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = {key: value.contiguous() for key, value in VGGTrunk([3], seed=7).state_dict().items()}
        state["classifier.0.weight"] = torch.zeros(2, 2)
        path = tmp_path / f"vgg{suffix}"
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        caplog.clear()
        loaded = VGGTrunk([3], weights=str(path))
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
        assert not any(p.requires_grad for p in loaded.parameters())
        assert not caplog.records

    def test_of_another_network_are_refused_in_one_line(self, tmp_path: Path) -> None:
        path = tmp_path / "other.pth"
        torch.save(VGGTrunk([3], width=0.125).state_dict(), path)
        with pytest.raises(ValueError, match=r"other\.pth.*vgg16") as caught:
            VGGTrunk([3], weights=str(path))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("weights", ["missing.pth", "pretrain", "vgg.ckpt"])
    def test_that_do_not_exist_are_named(self, weights: str) -> None:
        with pytest.raises(FileNotFoundError, match=f"weights='{weights}'.*'pretrained', or 'random'"):
            VGGTrunk([3], weights=weights)

    def test_without_a_network_the_error_names_argument_url_and_fix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.models import VGG19_Weights

        def offline(*_: object, **__: object) -> None:
            raise URLError("no network")

        monkeypatch.setattr(VGG19_Weights, "get_state_dict", offline)
        with pytest.raises(FileNotFoundError, match=r"weights='pretrained'.*vgg19-dcbb9e9d\.pth.*put that file") as err:
            VGGTrunk([3], "vgg19", weights="pretrained")
        assert "\n" not in str(err.value)

    @pytest.mark.parametrize(("weights", "width"), [("pretrained", 0.5), ("vgg.pth", 0.5), ("random", 0.0)])
    def test_a_width_that_does_not_fit_is_refused_before_they_are_read(self, weights: str, width: float) -> None:
        with pytest.raises(ValueError, match=f"width={width}.*weights='random'"):
            VGGTrunk([3], weights=weights, width=width)

    @pytest.mark.parametrize("layers", [(), (8, 3), (3, 3), (31,), (-1,)])
    def test_layers_out_of_order_or_range_are_refused(self, layers: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"0\.\.30"):
            VGGTrunk(layers)
