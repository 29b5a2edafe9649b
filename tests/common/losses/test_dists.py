"""DISTS and EA-DISTS against torchmetrics and a float64 version written out, and Sobel edges by hand."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from common.losses.dists import ALPHA_SHARES, BETA_SHARES, DISTS, EADISTS, edges_rgb, sobel_magnitude
from common.losses.vgg import read_torchmetrics_weights

_CHANNELS = (3, 64, 128, 256, 512, 512)


def _images(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A smooth image in [0, 1] with some noise, and another, noisier one of the same content."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, shape[-2:], mode="bicubic").clamp(0, 1)
    x, y = (smooth + scale * torch.randn(shape, generator=generator) for scale in (0.02, 0.1))
    return x.clamp(0, 1), y.clamp(0, 1)


@pytest.fixture(scope="module")
def random_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full-width VGG16 of random weights in torchvision's layout."""
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(DISTS(seed=3).trunk.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def official(random_file: Path) -> DISTS:
    """DISTS with the official alpha and beta on a random trunk."""
    return DISTS(str(random_file))


@pytest.fixture(scope="module")
def torchmetrics_dists(random_file: Path) -> nn.Module:
    """The network of torchmetrics with its own alpha and beta, on the same trunk."""
    import torchmetrics.functional.image.dists as module
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["D"])
    state = torch.load(random_file, weights_only=True)
    features.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "vgg16", lambda weights: SimpleNamespace(features=features))
        return module.DISTSNetwork(load_weights=True)


def _dists_float64(loss: DISTS, x: Tensor, y: Tensor) -> Tensor:
    """Steps 1 to 4 of the paper, nothing shared with the code under test but the weights."""
    state = {key: value.double() for key, value in loss.trunk.state_dict().items()}
    window = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64)[None, None] / 16

    def maps(image: Tensor) -> list[Tensor]:
        h = torch.stack(
            [(image[:, c] - m) / s for c, (m, s) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)])], 1
        )
        found = [image]
        for stage in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            if stage[0] > 0:
                flat = F.conv2d((h**2).flatten(0, 1)[:, None], window, stride=2, padding=1)
                h = (flat.view(len(image), -1, *flat.shape[-2:]) + 1e-12).sqrt()
            for index in stage:
                h = F.conv2d(h, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1).relu()
            found.append(h)
        return found

    alpha, beta = loss.alpha.double(), loss.beta.double()
    total, start = torch.ones(len(x), dtype=torch.float64), 0
    for map_x, map_y in zip(maps(x.double()), maps(y.double()), strict=True):
        a, b = map_x.flatten(2), map_y.flatten(2)
        cov = (a * b).mean(2) - a.mean(2) * b.mean(2)
        s1 = (2 * a.mean(2) * b.mean(2) + 1e-6) / (a.mean(2) ** 2 + b.mean(2) ** 2 + 1e-6)
        s2 = (2 * cov + 1e-6) / (a.var(2, correction=0) + b.var(2, correction=0) + 1e-6)
        part = slice(start, start + a.shape[1])
        total -= (alpha[part] * s1 + beta[part] * s2).sum(1)
        start += a.shape[1]
    assert start == len(alpha)
    return total


class TestDISTS:
    @pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 49, 70)])
    def test_equals_torchmetrics_with_the_official_alpha_and_beta(
        self, official: DISTS, torchmetrics_dists: nn.Module, shape: tuple[int, ...]
    ) -> None:
        x, y = _images(*shape)
        expected = torchmetrics_dists(x, y, require_grad=True).detach().reshape(-1)
        assert expected.min() > 1e-3
        assert_close(official(x, y), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("width", [1.0, 0.25])
    def test_equals_the_formulas_written_out_in_float64(self, width: float) -> None:
        loss = DISTS(width=width)
        x, y = _images(2, 3, 40, 33)
        expected = _dists_float64(loss, x, y)
        assert_close(loss(x, y).double(), expected, rtol=0, atol=1e-6)
        assert_close(
            loss.double()(x.double(), y.double()), expected, rtol=0, atol=1e-8
        )  # ImageNet's mean is stored as fp32

    def test_gradient_equals_torchmetrics(self, official: DISTS, torchmetrics_dists: nn.Module) -> None:
        # Our variances do not differentiate through the mean, whose share of the gradient is zero.
        x, y = _images(1, 3, 48, 48)
        gradients = []
        for function in (official, lambda a, b: torchmetrics_dists(a, b, require_grad=True)):
            leaf = x.clone().requires_grad_()
            function(leaf, y).sum().backward()
            gradients.append(leaf.grad)
        assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item())

    def test_is_zero_at_equality_and_symmetric(self, official: DISTS) -> None:
        x, y = _images(2, 3, 48, 48)
        assert official(x, x).abs().max() < 1e-6
        assert_close(official(x, y), official(y, x), rtol=0, atol=1e-6)
        assert (official(x, y) > 1e-3).all()

    def test_gradient_reaches_the_image_and_not_the_target(self) -> None:
        loss = DISTS(width=0.25)
        x, y = (image.requires_grad_() for image in _images(1, 3, 32, 32))
        loss(x, y).mean().backward()
        assert x.grad is not None
        assert x.grad.abs().max() > 0
        assert y.grad is None
        assert [*loss.parameters()]
        assert not any(p.requires_grad for p in loss.parameters())
        assert not loss.alpha.requires_grad
        assert not loss.beta.requires_grad

    def test_each_image_has_its_own_value(self) -> None:
        loss = DISTS(width=0.25)
        x, y = _images(3, 3, 32, 32)
        together = loss(x, y)
        assert together.shape == (3,)
        assert_close(together, torch.cat([loss(x[i : i + 1], y[i : i + 1]) for i in range(3)]), rtol=0, atol=1e-6)

    def test_gradient_is_finite_at_constant_images(self) -> None:
        x = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
        DISTS(width=0.25)(x, torch.zeros(1, 3, 32, 32)).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()

    def test_does_not_clamp(self) -> None:
        x = torch.full((1, 3, 32, 32), 1.2)
        x[..., 0] = -0.2
        x.requires_grad_()
        DISTS(width=0.25)(x, _images(1, 3, 32, 32)[1]).sum().backward()
        assert x.grad is not None
        assert (x.grad != 0).all()

    def test_random_weights_share_alpha_and_beta_between_maps_as_the_official_ones_do(self) -> None:
        ours, file = DISTS(width=0.25), read_torchmetrics_weights("dists_models/weights.pt")
        assert ours.channels == (3, 16, 32, 64, 128, 128)
        total = file["alpha"].sum() + file["beta"].sum()
        for name, shares in (("alpha", ALPHA_SHARES), ("beta", BETA_SHARES)):
            expected = torch.stack([part.sum() for part in (file[name].flatten() / total).split(_CHANNELS)])
            parts = getattr(ours, name).split(ours.channels)
            assert_close(torch.tensor(shares), expected, rtol=0, atol=6e-5)
            assert_close(torch.stack([part.sum() for part in parts]), expected, rtol=0, atol=1e-4)
            assert all(part.min() == part.max() for part in parts)
        assert_close(ours.alpha.sum() + ours.beta.sum(), torch.tensor(1.0))

    def test_state_dict_holds_the_trunk_alone(self) -> None:
        assert all(key.startswith("trunk.features.") for key in DISTS(width=0.125).state_dict())

    def test_random_mode_is_deterministic_and_leaves_the_global_generator_alone(self) -> None:
        before = torch.get_rng_state()
        x, y = _images(1, 3, 32, 32)
        assert torch.equal(DISTS(width=0.25)(x, y), DISTS(width=0.25)(x, y))
        assert torch.equal(before, torch.get_rng_state())

    def test_names_both_shapes_when_they_differ(self) -> None:
        with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\).*\(1, 3, 8, 9\)"):
            DISTS(width=0.125)(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9))

    @pytest.mark.weights
    def test_pretrained_gives_torchmetrics_documented_values(self) -> None:
        # Example of torchmetrics 1.9.0 functional/image/dists.py, whose doctests run after torch.manual_seed(42).
        generator = torch.Generator().manual_seed(42)
        x, y = (torch.rand(5, 3, 256, 256, generator=generator) for _ in range(2))
        expected = torch.tensor([0.1285, 0.1344, 0.1356, 0.1277, 0.1276])
        assert_close(DISTS("pretrained")(x, y), expected, rtol=0, atol=1e-4)


class TestEADISTS:
    def test_is_dists_of_the_images_plus_dists_of_the_edges(
        self, official: DISTS, torchmetrics_dists: nn.Module
    ) -> None:
        loss = EADISTS(width=1.0)
        loss.dists = official
        x, y = _images(2, 3, 48, 48)
        edges = [_sobel_float64(image.double().mean(1, keepdim=True), "replicate").float() for image in (x, y)]
        expected = torchmetrics_dists(x, y) + torchmetrics_dists(*(e.repeat(1, 3, 1, 1) for e in edges))
        assert_close(loss(x, y), expected, rtol=0, atol=2e-6)

    def test_is_zero_at_equality_and_symmetric(self) -> None:
        loss = EADISTS(width=0.25)
        x, y = _images(2, 3, 48, 48)
        assert loss(x, x).abs().max() < 1e-6
        assert_close(loss(x, y), loss(y, x), rtol=0, atol=1e-6)

    def test_gradient_reaches_the_image_and_not_the_target(self) -> None:
        loss = EADISTS(width=0.25)
        x, y = (image.requires_grad_() for image in _images(1, 3, 32, 32))
        loss(x, y).mean().backward()
        assert x.grad is not None
        assert x.grad.abs().max() > 0
        assert y.grad is None
        assert not any(p.requires_grad for p in loss.parameters())

    def test_runs_one_trunk_four_times_and_only_the_images_half_with_a_graph(self) -> None:
        loss = EADISTS(width=0.125)
        with_graph = []
        loss.dists.trunk.register_forward_hook(lambda _, __, maps: with_graph.append(maps[0].requires_grad))
        x, y = (image.requires_grad_() for image in _images(1, 3, 32, 32))
        loss(x, y)
        assert sorted(with_graph) == [False, False, True, True]

    @pytest.mark.parametrize("grey", ["mean", "luma", "per_channel"])
    @pytest.mark.parametrize("edge_padding", ["replicate", "zeros"])
    def test_switches_reach_the_edges(self, grey: str, edge_padding: str) -> None:
        loss = EADISTS(width=0.125, grey=grey, edge_padding=edge_padding)
        x, y = _images(1, 3, 32, 32)
        x = 1.4 * x - 0.2  # overshoots: nothing may be clamped on the way
        edges = (edges_rgb(image, grey, edge_padding) for image in (x, y))
        assert_close(loss(x, y), loss.dists(x, y) + loss.dists(*edges))

    def test_under_bf16_autocast_stays_fp32(self) -> None:
        loss = EADISTS(width=0.25)
        x, y = (image.bfloat16() for image in _images(2, 3, 48, 48))
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(x, y)
        assert inside.dtype == torch.float32
        assert_close(inside, loss(x.float(), y.float()), rtol=1e-3, atol=0)


def _sobel_float64(grey: Tensor, padding: str) -> Tensor:
    """The two kernels of the paper as plain convolutions."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=torch.float64)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate" if padding == "replicate" else "constant")
    gx, gy = (F.conv2d(padded, k[None, None]) for k in (kernel, kernel.T))
    return (gx**2 + gy**2 + 1e-6).sqrt()


class TestSobel:
    @pytest.mark.parametrize("grey", ["mean", "luma", "per_channel"])
    @pytest.mark.parametrize("padding", ["replicate", "zeros"])
    def test_equals_plain_convolutions_in_float64(self, grey: str, padding: str) -> None:
        x = 2 * torch.rand(2, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5
        channels = {
            "mean": [(x[:, :1] + x[:, 1:2] + x[:, 2:]) / 3],
            "luma": [0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]],
            "per_channel": [x[:, c : c + 1] for c in range(3)],
        }[grey]
        expected = torch.cat([_sobel_float64(channel, padding) for channel in channels], 1)
        assert_close(sobel_magnitude(x, grey, padding), expected)
        assert_close(sobel_magnitude(x.float(), grey, padding), expected.float(), rtol=1e-4, atol=1e-5)

    def test_constant_gives_one_thousandth_up_to_the_border(self) -> None:
        assert_close(sobel_magnitude(torch.full((1, 3, 5, 6), 0.7)), torch.full((1, 1, 5, 6), 1e-3))

    def test_zeros_draw_a_frame_of_two_around_a_grey_image(self) -> None:
        edges = sobel_magnitude(torch.full((1, 3, 6, 6), 0.5), padding="zeros")
        assert_close(edges[0, 0, 0, 2].item(), 2.0, rtol=1e-6, atol=0)
        assert_close(edges[0, 0, 2, 2].item(), 1e-3, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("vertical", [False, True])
    def test_ramp_of_slope_k_gives_8k_inside(self, vertical: bool) -> None:
        ramp = 0.05 * torch.arange(10.0, dtype=torch.float64).expand(1, 3, 10, 10)
        edges = sobel_magnitude(ramp.mT if vertical else ramp)[..., 1:-1, 1:-1]
        assert_close(edges, torch.full_like(edges, (0.4**2 + 1e-6) ** 0.5))

    def test_step_from_0_to_1_gives_4_on_both_sides(self) -> None:
        step = torch.zeros(1, 3, 6, 6)
        step[..., 3:] = 1
        expected = torch.tensor([1e-3, 1e-3, 4.0, 4.0, 1e-3, 1e-3]).expand(1, 1, 6, 6)
        assert_close(sobel_magnitude(step), expected, rtol=1e-6, atol=1e-8)

    def test_gradient_is_finite_at_a_constant_image(self) -> None:
        x = torch.full((1, 3, 5, 5), 0.5, requires_grad=True)
        sobel_magnitude(x).sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()

    def test_edges_are_repeated_to_three_channels_unless_they_are_three(self) -> None:
        x, _ = _images(1, 3, 8, 8)
        edges = edges_rgb(x, "mean", "replicate")
        assert torch.equal(edges[:, 0], edges[:, 2])
        assert torch.equal(edges[:, :1], sobel_magnitude(x))
        assert torch.equal(edges_rgb(x, "per_channel", "replicate"), sobel_magnitude(x, "per_channel"))

    def test_refuses_unknown_switches(self) -> None:
        with pytest.raises(ValueError, match=r"grey='red'.*per_channel"):
            sobel_magnitude(torch.rand(1, 3, 4, 4), "red")
        with pytest.raises(ValueError, match=r"padding='reflect'.*zeros"):
            sobel_magnitude(torch.rand(1, 3, 4, 4), padding="reflect")
