"""Rewards that compare with the high-quality image: their distances negated, frozen, and what is said without one."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from common.losses import DISTS, LPIPS
from common.rewards import NegatedDISTS, NegatedLPIPS, NegatedMSE, Reward, build_reward, group_rewards

SMALL = {"weights": "random", "width": 1 / 16}
MAKERS = {
    "neg_mse": lambda: build_reward("neg_mse"),
    "neg_lpips": lambda: build_reward("neg_lpips", **SMALL),
    "neg_lpips_vgg16": lambda: build_reward("neg_lpips", net="vgg16", **SMALL),
    "neg_dists": lambda: build_reward("neg_dists", **SMALL),
}


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=MAKERS)
def reward(request: pytest.FixtureRequest) -> Reward:
    return MAKERS[request.param]()


class TestEach:
    def test_is_0_for_a_perfect_restoration_and_falls_with_the_error(self, reward: Reward) -> None:
        hq = images(2, 3, 40, 48)
        noise = images(2, 3, 40, 48, seed=1) - 0.5
        scores = [reward((hq + amount * noise).clamp(0, 1), ["", ""], hq) for amount in (0.0, 0.1, 0.3, 1.0)]
        assert_close(scores[0], torch.zeros(2), rtol=0, atol=1e-6)
        assert all((better > worse).all() for better, worse in itertools.pairwise(scores))

    def test_gives_one_number_an_image_that_depends_on_that_pair_alone(self, reward: Reward) -> None:
        x, hq = images(3, 3, 40, 48), images(3, 3, 40, 48, seed=1)
        scores = reward(x, [""] * 3, hq)
        assert scores.shape == (3,)
        assert scores.dtype == torch.float32
        for i in range(3):
            assert_close(reward(x[i : i + 1], ["other words"], hq[i : i + 1]), scores[i : i + 1])
        assert (scores - reward(x, [""] * 3, hq.flip(0)))[0].abs() > 1e-6

    def test_gradient_reaches_the_image_and_neither_reference_nor_weights(self, reward: Reward) -> None:
        x, hq = images(2, 3, 40, 48).requires_grad_(), images(2, 3, 40, 48, seed=1).requires_grad_()
        reward(x, ["", ""], hq).sum().backward()
        assert x.grad is not None
        assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
        assert hq.grad is None
        assert not any(parameter.requires_grad for parameter in reward.parameters())

    def test_stays_in_eval_mode(self, reward: Reward) -> None:
        assert not any(child.training for child in reward.children())
        assert reward.training == (reward.name == "neg_mse")  # has no weights, and no other mode
        nn.ModuleList([reward]).train()
        assert not any(module.training for module in reward.modules())

    def test_clamps_both_and_computes_in_fp32_whatever_autocast_says(self, reward: Reward) -> None:
        x, hq = images(2, 3, 40, 48) * 1.4 - 0.2, images(2, 3, 40, 48, seed=1) * 1.4 - 0.2
        plain = reward(x.clamp(0, 1), ["", ""], hq.clamp(0, 1))
        assert torch.equal(reward(x, ["", ""], hq), plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(reward(x, ["", ""], hq), plain)
            low = reward(x.bfloat16(), ["", ""], hq)
        assert torch.equal(low, reward(x.bfloat16().float(), ["", ""], hq))

    def test_says_what_it_needs(self, reward: Reward) -> None:
        x = images(2, 3, 40, 48)
        assert reward.referenced
        assert reward.differentiable
        assert not reward.prompted
        with pytest.raises(
            ValueError, match=rf"hq_01 is missing where reward '{reward.name}' compares \(2, 3, 40, 48\)"
        ):
            reward(x, ["", ""])
        with pytest.raises(ValueError, match=r"hq_01 is of shape \(1, 3, 40, 48\) where reward"):
            reward(x, ["", ""], x[:1])
        with pytest.raises(ValueError, match=r"hq_01 is torch\.uint8 of shape .*; pass floating \(B, 3, H, W\)"):
            reward(x, ["", ""], x.mul(255).byte())

    def test_names_the_reference_whose_range_is_wrong_in_debug_mode(
        self, reward: Reward, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("ISR_DEBUG", "1")
        x = images(1, 3, 40, 48)
        with pytest.raises(ValueError, match=r"hq_01 spans .* where \[0, 1\] is expected"):
            reward(x, [""], x * 255)


class TestValues:
    def test_mse_by_hand(self) -> None:
        x, hq = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
        x[0], hq[1, 0] = 0.5, 1.0  # all values off by 1/2; a third of them off by 1
        assert_close(NegatedMSE()(x, ["", ""], hq), torch.tensor([-0.25, -1 / 3]))
        wide = NegatedMSE()(x.double(), ["", ""], hq)
        assert wide.dtype == torch.float64
        assert NegatedMSE()(x, ["", ""], hq.double()).dtype == torch.float32

    def test_lpips_and_dists_are_those_of_the_losses_with_their_sign_changed(self) -> None:
        x, hq = images(2, 3, 40, 48), images(2, 3, 40, 48, seed=1)
        for found, loss in (
            (NegatedLPIPS("random", 1 / 16, 3), LPIPS("random", 1 / 16, 3, "alexnet")),
            (NegatedLPIPS("random", 1 / 16, 3, "vgg16"), LPIPS("random", 1 / 16, 3)),
            (NegatedDISTS("random", 1 / 16, 3), DISTS("random", 1 / 16, 3)),
        ):
            assert torch.equal(found(x, ["", ""], hq), -loss(x, hq))

    def test_weights_come_from_where_they_are_said_to(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("neg_lpips", "neg_dists"):
            with pytest.raises(FileNotFoundError, match=r"weights='nowhere\.pth' is not an existing"):
                build_reward(name, weights="nowhere.pth")
            asked: list[str] = []

            def refuse(arch: str, asked: list[str] = asked) -> dict[str, Tensor]:
                asked.append(arch)
                raise FileNotFoundError("not here")

            monkeypatch.setattr("common.losses.vgg._pretrained_state", refuse)
            with pytest.raises(FileNotFoundError, match="not here"):
                build_reward(name)
            assert asked == ["alexnet" if name == "neg_lpips" else "vgg16"]

    def test_alpha_and_beta_of_dists_are_no_parameters(self) -> None:
        reward = NegatedDISTS("random")
        names = [name for name, _ in reward.named_parameters()]
        assert not any("alpha" in name or "beta" in name for name in names)
        assert reward.dists.alpha.numel() + reward.dists.beta.numel() == 2950
        assert not reward.dists.alpha.requires_grad


class TestInAGroup:
    def test_the_best_restoration_wins_with_lower_better_false(self) -> None:
        hq = images(1, 3, 40, 48).expand(4, -1, -1, -1)
        noise = images(4, 3, 40, 48, seed=1) - 0.5
        x = (hq + torch.tensor([0.2, 0.05, 0.4, 0.1]).view(4, 1, 1, 1) * noise).clamp(0, 1)
        raw = torch.stack([make()(x, [""] * 4, hq) for make in MAKERS.values()], 1)
        rewards = group_rewards(raw, [False] * len(MAKERS))
        assert rewards.argsort(descending=True).tolist() == [1, 3, 0, 2]
        assert_close(group_rewards(-raw, [True] * len(MAKERS)), rewards)
        assert_close(group_rewards(-raw, [False] * len(MAKERS)), 1 - rewards)

    def test_equal_restorations_give_no_preference(self) -> None:
        x, hq = images(1, 3, 40, 48).repeat(3, 1, 1, 1), images(1, 3, 40, 48, seed=1).repeat(3, 1, 1, 1)
        raw = torch.stack([make()(x, [""] * 3, hq) for make in MAKERS.values()], 1)
        assert not math.isnan(raw.sum())
        assert_close(group_rewards(raw, [False] * len(MAKERS)), torch.full((3,), 0.5))


@pytest.mark.weights
class TestPretrained:
    """With the official weights."""

    def test_equal_torchmetrics_and_pyiqa(self) -> None:
        pyiqa = pytest.importorskip("pyiqa")
        x, hq = images(2, 3, 64, 64), images(2, 3, 64, 64, seed=1)
        for name in ("lpips", "dists"):
            expected = pyiqa.create_metric(name, device="cpu")(x, hq).flatten()
            assert_close(build_reward(f"neg_{name}")(x, ["", ""], hq), -expected, rtol=1e-3, atol=1e-4)
