"""LPIPS and EA-LPIPS against torchmetrics and a float64 version written out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from common.losses.dists import sobel_magnitude
from common.losses.lpips import EALPIPS, LPIPS
from common.losses.vgg import IMAGENET_MEAN, IMAGENET_STD


def _images(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    return x, (x + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1)


@pytest.fixture(scope="module")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-width VGG16 of random weights in torchvision's layout."""
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(LPIPS(seed=3).trunk.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def official(random_file: Path) -> LPIPS:
    """LPIPS with the official linear weights on a random trunk."""
    return LPIPS(str(random_file))


@pytest.fixture(scope="module")
def torchmetrics_lpips(random_file: Path) -> nn.Module:
    """The network of torchmetrics with its own linear weights, on the same trunk; it takes [-1, 1]."""
    import torchmetrics.functional.image.lpips as module
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["D"])
    state = torch.load(random_file, weights_only=True)
    features.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_get_tv_model_features", lambda *_: features)
        return module._NoTrainLpips(pretrained=True, net="vgg")


def _lpips_float64(loss: LPIPS, x: Tensor, y: Tensor) -> Tensor:
    """The paper's Eq. 1 on [-1, 1] images with the official shift and scale."""
    state = {key: value.double() for key, value in loss.trunk.state_dict().items()}
    shift, scale = (
        torch.tensor(t, dtype=torch.float64)[:, None, None] for t in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    )

    def maps(image: Tensor) -> list[Tensor]:
        h, found = (2 * image - 1 - shift) / scale, []
        for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            h = F.max_pool2d(h, 2) if stage[0] > 0 else h
            for index in stage:
                h = F.conv2d(h, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1).relu()
            found.append(h)
        return found

    total, start = torch.zeros(len(x), dtype=torch.float64), 0
    for a, b in zip(maps(x.double()), maps(y.double()), strict=True):
        a, b = (f / ((f**2).sum(1, keepdim=True) + 1e-8).sqrt() for f in (a, b))
        linear = loss.linear[start : start + a.shape[1]].double()
        total += torch.einsum("bchw,c->b", (a - b) ** 2, linear) / (a.shape[2] * a.shape[3])
        start += a.shape[1]
    assert start == len(loss.linear)
    return total


class TestLPIPS:
    @pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 49, 70)])
    def test_equals_torchmetrics_with_the_official_linear_weights(
        self, official: LPIPS, torchmetrics_lpips: nn.Module, shape: tuple[int, ...]
    ) -> None:
        x, y = _images(*shape)
        expected = torchmetrics_lpips(2 * x - 1, 2 * y - 1).flatten()
        assert expected.min() > 1e-3
        assert_close(official(x, y), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 49, 70)])
    def test_on_alexnet_equals_torchmetrics_too(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        import torchmetrics.functional.image.lpips as module
        from torchvision.models import alexnet

        with torch.random.fork_rng():
            torch.manual_seed(5)
            network = alexnet(weights=None)
        torch.save(network.state_dict(), tmp_path / "alexnet.pth")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_get_tv_model_features", lambda *_: network.features)
            expected_loss = module._NoTrainLpips(pretrained=True, net="alex")
        x, y = _images(*shape)
        expected = expected_loss(2 * x - 1, 2 * y - 1).flatten()
        assert expected.min() > 1e-4
        assert_close(LPIPS(str(tmp_path / "alexnet.pth"), net="alexnet")(x, y), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("width", [1.0, 0.25])
    def test_equals_the_formula_written_out_in_float64(self, width: float) -> None:
        loss = LPIPS(width=width)
        x, y = _images(2, 3, 40, 33)
        expected = _lpips_float64(loss, x, y)
        assert_close(loss(x, y).double(), expected, rtol=0, atol=1e-6)
        assert_close(
            loss.double()(x.double(), y.double()), expected, rtol=0, atol=1e-8
        )  # ImageNet's mean is stored as fp32

    def test_the_official_shift_and_scale_are_imagenets_statistics(self, torchmetrics_lpips: nn.Module) -> None:
        scaling = torchmetrics_lpips.scaling_layer
        assert_close((1 + scaling.shift.flatten()) / 2, torch.tensor(IMAGENET_MEAN))
        assert_close(scaling.scale.flatten() / 2, torch.tensor(IMAGENET_STD))

    def test_random_weights_are_one_over_the_channels(self) -> None:
        loss = LPIPS(width=0.25)
        assert_close(loss.linear, torch.cat([torch.full((c,), 1 / c) for c in (16, 32, 64, 128, 128)]))

    def test_is_zero_at_equality_and_symmetric(self, official: LPIPS) -> None:
        x, y = _images(2, 3, 48, 48)
        assert torch.equal(official(x, x), torch.zeros(2))
        assert_close(official(x, y), official(y, x), rtol=0, atol=1e-6)

    def test_gradient_reaches_the_image_and_not_the_target(self) -> None:
        loss = LPIPS(width=0.25)
        x, y = (image.requires_grad_() for image in _images(1, 3, 32, 32))
        loss(x, y).mean().backward()
        assert x.grad is not None
        assert x.grad.abs().max() > 0
        assert y.grad is None
        assert [*loss.parameters()]
        assert not any(p.requires_grad for p in loss.parameters())
        assert not loss.linear.requires_grad

    def test_gradient_is_finite_where_features_vanish(self) -> None:
        loss = LPIPS(width=0.25)
        for value in loss.trunk.parameters():
            value.zero_()
        x, y = _images(1, 3, 32, 32)
        x.requires_grad_()
        loss(x, y).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()

    def test_does_not_clamp(self) -> None:
        x = torch.full((1, 3, 32, 32), 1.2, requires_grad=True)
        LPIPS(width=0.25)(x, _images(1, 3, 32, 32)[1]).sum().backward()
        assert x.grad is not None
        assert (x.grad != 0).any()


class TestEALPIPS:
    def test_is_lpips_of_the_images_plus_lpips_of_the_edges(
        self, official: LPIPS, torchmetrics_lpips: nn.Module
    ) -> None:
        loss = EALPIPS()
        loss.lpips = official
        x, y = _images(2, 3, 48, 48)
        x = 1.4 * x - 0.2  # overshoots: nothing may be clamped on the way
        edges = [2 * sobel_magnitude(image).repeat(1, 3, 1, 1) - 1 for image in (x, y)]
        expected = torchmetrics_lpips(2 * x - 1, 2 * y - 1) + torchmetrics_lpips(*edges)
        assert_close(loss(x, y), expected.flatten(), rtol=0, atol=2e-6)

    def test_runs_one_trunk_four_times_and_only_the_images_half_with_a_graph(self) -> None:
        loss = EALPIPS(width=0.125)
        with_graph = []
        loss.lpips.trunk.register_forward_hook(lambda _, __, maps: with_graph.append(maps[0].requires_grad))
        x, y = (image.requires_grad_() for image in _images(1, 3, 32, 32))
        loss(x, y)
        assert sorted(with_graph) == [False, False, True, True]

    def test_under_bf16_autocast_stays_fp32(self) -> None:
        loss = EALPIPS(width=0.25)
        x, y = (image.bfloat16() for image in _images(2, 3, 48, 48))
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(x, y)
        assert inside.dtype == torch.float32
        assert_close(inside, loss(x.float(), y.float()), rtol=1e-3, atol=0)
