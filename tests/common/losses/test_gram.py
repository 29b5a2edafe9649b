"""Gram-KL against torchvision's VGG19 and numpy in float64, by hand, and what must not change it."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from common.losses.gram import GramKL, gram_distances, gram_matrix

_WEIGHTS = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}
_Features = Literal["layernorm", "plain"]
_Distance = Literal["sq_frobenius", "l1_mean"]


def _images(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    return x, (x + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1)


def _features(*shape: int, seed: int = 0) -> Tensor:
    return 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def loss() -> GramKL:
    return GramKL(width=0.125)


def _torchvision_maps(loss: GramKL, x_01: Tensor, division: int) -> dict[str, np.ndarray]:
    """Outputs of torchvision's VGG19 in float64, by hooks that copy them before the in-place ReLUs run."""
    from torchvision.models.vgg import cfgs, make_layers
    from torchvision.transforms.functional import normalize

    network = make_layers([v if isinstance(v, str) else v // division for v in cfgs["E"]])
    network.load_state_dict({k.removeprefix("features."): v for k, v in loss.trunk.state_dict().items()})
    maps: dict[str, np.ndarray] = {}

    def keep(name: str) -> None:
        block, conv = int(name[4]), int(name[6])
        starts = [0, *(i + 1 for i, layer in enumerate(network) if isinstance(layer, nn.MaxPool2d))]
        layer = [layer for layer in network[starts[block - 1] :] if isinstance(layer, nn.Conv2d)][conv - 1]
        layer.register_forward_hook(lambda _, __, out: maps.update({name: out.detach().numpy().copy()}))

    for name in _WEIGHTS:
        keep(name)
    network.double()(normalize(x_01.double(), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return maps


def _distance_float64(a: np.ndarray, b: np.ndarray, features: str, distance: str) -> float:
    """One image's distance in one layer, from (C, H, W) features."""
    grams = []
    for f in (a, b):
        if features == "layernorm":
            f = (f - f.mean()) / np.sqrt(f.var() + 1e-5)
        grams.append(np.einsum("chw,dhw->cd", f, f) / f.size)
    diff = grams[0] - grams[1]
    return float(np.linalg.norm(diff) ** 2 if distance == "sq_frobenius" else np.abs(diff).mean())


@pytest.mark.parametrize("features", ["layernorm", "plain"])
@pytest.mark.parametrize("distance", ["sq_frobenius", "l1_mean"])
class TestAgainstTorchvisionInFloat64:
    def test_value_is_the_weighted_sum_over_five_layers(self, features: _Features, distance: _Distance) -> None:
        loss = GramKL(width=0.125, features=features, distance=distance)
        x, y = _images(2, 3, 48, 32)
        maps_x, maps_y = _torchvision_maps(loss, x, 8), _torchvision_maps(loss, y, 8)
        assert [m.shape[1] for m in maps_x.values()] == [8, 16, 32, 64, 64]
        expected = torch.tensor(
            [
                [_distance_float64(maps_x[name][i], maps_y[name][i], features, distance) for name in _WEIGHTS]
                for i in range(2)
            ],
            dtype=torch.float64,
        )
        assert expected.min() > 0
        drift = gram_distances(loss.trunk, x, y, features, distance)
        assert_close(drift.double(), expected, rtol=1e-4, atol=0)
        total = expected @ torch.tensor(list(_WEIGHTS.values()), dtype=torch.float64)
        assert_close(loss(x, y).double(), total, rtol=1e-4, atol=0)
        in_float64 = loss.double()(x.double(), y.double())
        assert_close(in_float64, total, rtol=1e-6, atol=0)  # weights and ImageNet's mean are stored as fp32

    def test_gradient_is_the_slope_of_the_value(self, features: _Features, distance: _Distance) -> None:
        loss = GramKL(width=0.125, features=features, distance=distance).double()
        x, y = (image.double() for image in _images(1, 3, 16, 16))
        direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        (grad,) = torch.autograd.grad(loss(x, y).sum(), x)
        slope = (loss(x + 1e-6 * direction, y) - loss(x - 1e-6 * direction, y)).sum() / 2e-6
        assert slope.abs() > 0
        assert_close((grad * direction).sum(), slope.detach(), rtol=1e-4, atol=0)

    def test_value_and_gradient_are_exactly_zero_at_equality(self, features: _Features, distance: _Distance) -> None:
        loss = GramKL(width=0.125, features=features, distance=distance)
        x = _images(2, 3, 32, 48)[0].requires_grad_()
        value = loss(x, x.detach().clone())
        value.sum().backward()
        assert torch.equal(value, torch.zeros(2))
        assert x.grad is not None
        assert torch.equal(x.grad, torch.zeros_like(x))

    def test_gradient_reaches_the_image_and_not_the_reference(self, features: _Features, distance: _Distance) -> None:
        loss = GramKL(width=0.125, features=features, distance=distance)
        x, y = (image.requires_grad_() for image in _images(2, 3, 32, 32))
        loss(x, y).mean().backward()
        assert x.grad is not None
        assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
        assert y.grad is None
        assert [*loss.parameters()]
        assert not any(p.requires_grad for p in loss.parameters())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_under_bf16_autocast_stays_fp32(self, features: _Features, distance: _Distance, dtype: torch.dtype) -> None:
        loss = GramKL(width=0.125, features=features, distance=distance)
        x, y = (image.to(dtype) for image in _images(2, 3, 48, 48))
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(x, y)
        assert inside.dtype == torch.float32
        assert_close(inside, loss(x.float(), y.float()), rtol=1e-3, atol=0)


class TestGramKL:
    def test_takes_its_features_before_the_relus(self, loss: GramKL) -> None:
        found: list[list[Tensor]] = []
        with loss.trunk.register_forward_hook(lambda _, __, maps: found.append(maps)):
            loss(*_images(1, 3, 32, 32))
        assert len(found) == 2
        assert all(f.min() < 0 for maps in found for f in maps)
        assert [tuple(f.shape[1:]) for f in found[0]] == [(8, 32, 32), (16, 16, 16), (32, 8, 8), (64, 4, 4), (64, 2, 2)]

    def test_builds_a_graph_for_the_image_only(self, loss: GramKL) -> None:
        with_graph = []
        x, y = (image.requires_grad_() for image in _images(1, 3, 32, 32))
        with loss.trunk.register_forward_hook(lambda _, __, maps: with_graph.append(maps[0].requires_grad)):
            loss(x, y)
        assert sorted(with_graph) == [False, True]

    def test_images_of_a_batch_do_not_mix(self, loss: GramKL) -> None:
        x, y = _images(3, 3, 32, 32)
        x[1] = 0.1 * x[1]
        alone = torch.cat([loss(x[i : i + 1], y[i : i + 1]) for i in range(3)])
        assert_close(loss(x, y), alone, rtol=1e-4, atol=0)

    def test_layer_weights_multiply_their_layers_and_must_be_five(self) -> None:
        x, y = _images(1, 3, 32, 32)
        loss = GramKL(width=0.125, layer_weights=(0.0, 3.0, 0.0, 0.0, 0.0))
        assert_close(loss(x, y), 3 * gram_distances(loss.trunk, x, y)[:, 1])
        with pytest.raises(ValueError, match=r"layer_weights=\[1.0, 1.0\] must be five"):
            GramKL(width=0.125, layer_weights=(1.0, 1.0))

    def test_reads_a_file_of_torchvisions_layout(self, tmp_path: Path) -> None:
        random = GramKL(seed=3)
        path = tmp_path / "vgg19.pth"
        torch.save(random.trunk.state_dict(), path)
        x, y = _images(1, 3, 32, 32)
        assert torch.equal(GramKL(str(path))(x, y), random(x, y))
        assert not torch.equal(GramKL(seed=4)(x, y), random(x, y))

    def test_does_not_clamp(self, loss: GramKL) -> None:
        x = torch.full((1, 3, 32, 32), 1.2, requires_grad=True)
        loss(x, _images(1, 3, 32, 32)[1]).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert (x.grad != 0).any()

    def test_checks_shapes_always_and_ranges_in_debug_mode(self, loss: GramKL, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = _images(1, 3, 32, 32)
        with pytest.raises(ValueError, match="shape"):
            loss(x, y[..., :16])
        x_pm1 = 2 * x - 1
        loss(x_pm1, y)
        monkeypatch.setenv("ISR_DEBUG", "1")
        loss(x, y)
        for pair in ((x_pm1, y), (x, x_pm1)):
            with pytest.raises(ValueError, match=r"spans \[-1, 1\]"):
                loss(*pair)

    def test_an_unknown_distance_names_the_known_ones(self, loss: GramKL) -> None:
        with pytest.raises(ValueError, match=r"distance='l2'.*'sq_frobenius' or 'l1_mean'"):
            gram_distances(loss.trunk, *_images(1, 3, 16, 16), distance="l2")  # type: ignore[arg-type]


class TestGramMatrix:
    def test_hand_values(self) -> None:
        f = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 2, 1, 2)
        assert_close(gram_matrix(f, "plain"), torch.tensor([[[1.25, 2.75], [2.75, 6.25]]]))
        # (-1.5, -0.5, 0.5, 1.5) / sqrt(1.25) after the mean 2.5 and the variance 1.25
        assert_close(gram_matrix(f), torch.tensor([[[0.5, -0.3], [-0.3, 0.5]]]), rtol=1e-5, atol=0)

    def test_hand_values_of_the_distances(self) -> None:
        x, y = (torch.eye(3)[i].view(1, 3, 1, 1) for i in (0, 1))  # Gram matrices diag(1, 0, 0) / 3, diag(0, 1, 0) / 3
        images_are_features = lambda x_01: [x_01]  # noqa: E731 - a trunk without layers
        for distance, expected in (("sq_frobenius", 2 / 9), ("l1_mean", 2 / 27)):
            found = gram_distances(images_are_features, x, y, "plain", distance)  # type: ignore[arg-type]
            assert_close(found, torch.tensor([[expected]]))

    def test_after_layernorm_the_trace_is_1_for_every_image(self) -> None:
        f = _features(2, 6, 9, 7) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1)
        assert_close(gram_matrix(f).diagonal(dim1=1, dim2=2).sum(1), torch.ones(2), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("features", ["layernorm", "plain"])
    def test_does_not_see_where_the_pixels_are(self, features: _Features) -> None:
        f = _features(2, 6, 9, 7)
        order = torch.randperm(63, generator=torch.Generator().manual_seed(1))
        shuffled = f.flatten(2)[..., order].view_as(f)
        assert_close(gram_matrix(shuffled, features), gram_matrix(f, features), rtol=1e-5, atol=1e-6)
        channels_shuffled = f[:, torch.tensor([1, 0, 2, 3, 4, 5])]
        assert (gram_matrix(channels_shuffled, features) - gram_matrix(f, features)).abs().max() > 1e-3

    def test_layernorm_takes_out_gain_and_offset_which_plain_keeps(self) -> None:
        f = _features(1, 6, 9, 7)
        assert_close(gram_matrix(5 * f - 2), gram_matrix(f), rtol=1e-4, atol=1e-6)
        assert_close(gram_matrix(5 * f, "plain"), 25 * gram_matrix(f, "plain"))

    def test_is_finite_with_a_finite_gradient_where_features_are_constant(self) -> None:
        f = torch.full((1, 4, 3, 3), 2.0, requires_grad=True)
        gram_matrix(f).sum().backward()
        assert f.grad is not None
        assert torch.isfinite(f.grad).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_multiplies_in_fp32_inside_autocast(self, dtype: torch.dtype) -> None:
        f = _features(1, 6, 32, 32).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            inside = gram_matrix(f)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, gram_matrix(f.float()))

    def test_unknown_features_name_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=r"features='relu'.*'layernorm' or 'plain'"):
            gram_matrix(_features(1, 2, 2, 2), "relu")  # type: ignore[arg-type]
