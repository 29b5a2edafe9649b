"""Pixel losses, the factory by name, and the range guard."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.losses import build_image_loss, check_range_01, l1, mse

_NAMES = ("mse", "l1", "dists", "ea_dists", "lpips", "ea_lpips")


class TestPixel:
    def test_hand_values_per_image(self) -> None:
        x = torch.stack([torch.full((3, 4, 4), 0.5), torch.zeros(3, 4, 4)])
        y = torch.zeros(2, 3, 4, 4)
        y[1, 0] = 0.9
        assert_close(mse(x, y), torch.tensor([0.25, 0.27]))
        assert_close(l1(x, y), torch.tensor([0.5, 0.3]))

    def test_gradient_is_mses_and_alive_outside_the_range(self) -> None:
        x, y = torch.full((1, 3, 2, 2), 1.3, requires_grad=True), torch.zeros(1, 3, 2, 2, requires_grad=True)
        mse(x, y).sum().backward()
        assert_close(x.grad, torch.full((1, 3, 2, 2), 2 * 1.3 / 12))
        assert y.grad is None

    def test_16_bit_images_are_compared_in_fp32(self) -> None:
        x, y = torch.rand(1, 3, 8, 8).bfloat16(), torch.rand(1, 3, 8, 8).bfloat16()
        assert_close(l1(x, y), l1(x.float(), y.float()), rtol=0, atol=0)


class TestBuildImageLoss:
    @pytest.mark.parametrize("name", _NAMES)
    def test_every_name_gives_one_value_per_image_zero_at_equality(self, name: str) -> None:
        loss = build_image_loss(name, "random", 0.125)
        x, y = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3, 32, 32)
        assert loss(x, y).shape == (2,)
        assert (loss(x, y) > 1e-3).all()
        assert loss(x, x).abs().max() < 1e-6

    def test_weights_and_width_reach_the_trunk(self) -> None:
        loss = build_image_loss("ea_dists", width=0.125)
        assert isinstance(loss, nn.Module)
        assert loss.state_dict()["dists.trunk.features.0.weight"].shape == (8, 3, 3, 3)
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
            build_image_loss("lpips", "nowhere.pth")

    def test_an_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(
            ValueError, match=r"'ssim'.*mse, l1, dwt, dists, ea_dists, lpips, lpips_alex, ea_lpips, gram"
        ):
            build_image_loss("ssim")


class TestRangeGuard:
    @pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 255.0)])
    def test_names_argument_and_range_found(self, low: float, high: float) -> None:
        with pytest.raises(ValueError, match=rf"x_01 spans \[{low:.3g}, {high:.3g}\]"):
            check_range_01(torch.tensor([low, high]), "x_01")

    def test_lets_overshoot_pass(self) -> None:
        check_range_01(torch.tensor([-0.3, 1.4]), "x_01")

    @pytest.mark.parametrize("name", _NAMES)
    def test_is_on_in_debug_mode_only_and_not_for_edges(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        loss = build_image_loss(name, "random", 0.125)
        x_01 = (torch.arange(32) // 4 % 2).float().expand(1, 3, 32, 32)  # stripes; their edges reach 4
        y_01, x_pm1 = torch.full_like(x_01, 0.5), 2 * x_01 - 1
        monkeypatch.setenv("ISR_DEBUG", "1")
        loss(x_01, y_01)
        with pytest.raises(ValueError, match=r"x_01 spans \[-1, 1\]"):
            loss(x_pm1, y_01)
        with pytest.raises(ValueError, match=r"y_01 spans \[-1, 1\]"):
            loss(y_01, x_pm1)
        monkeypatch.delenv("ISR_DEBUG")
        loss(x_pm1, y_01)
