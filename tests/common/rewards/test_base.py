"""What holds for every reward, tried on toys and on all that need no weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from common.rewards import (
    Colourfulness,
    ImageReward,
    ImageRewardSize,
    PyiqaReward,
    Reward,
    Sharpness,
    build_reward,
    reward_loss,
)

TINY = ImageRewardSize(16, 8, 8, 1, 2, 8, 1, 2, 300, 40, (8, 8, 8, 8))


class Toy(Reward):
    """Mean of the pixels times a weight, through a convolution that autocast would lower and a dropout."""

    name = "toy"

    def __init__(self, differentiable: bool = True) -> None:
        super().__init__()
        self.differentiable = differentiable
        self.conv = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.constant_(self.conv.weight, 1 / 3)
        self.dropout = nn.Dropout(0.5)
        self.requires_grad_(False).train(False)

    def _score(self, x: Tensor, prompts: object, hq: object) -> Tensor:
        return self.dropout(self.conv(x)).mean((1, 2, 3))


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


class Byte:
    """A tokenizer of one token a character."""

    def __call__(self, prompts: list[str], **options: object) -> "Byte":
        rows = [[1, *(ord(c) for c in prompt)][:35] for prompt in prompts]
        self.input_ids = torch.tensor([row + [0] * (35 - len(row)) for row in rows])
        self.attention_mask = (self.input_ids > 0).long()
        return self


def imagereward() -> ImageReward:
    reward = ImageReward("random", size=TINY)
    reward._tokenizer = Byte()
    return reward


MAKERS = {"toy": Toy, "sharpness": Sharpness, "colourfulness": Colourfulness, "imagereward": imagereward}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
class TestEveryReward:
    def test_gives_one_number_an_image_that_depends_on_that_image_alone(self, maker: type[Reward]) -> None:
        reward, x = maker(), images(3, 3, 24, 20)
        score = reward(x, ["a", "b", "c"])
        assert score.shape == (3,)
        assert score.dtype == torch.float32
        assert score.unique().numel() == 3
        for i, prompt in enumerate("abc"):
            assert_close(reward(x[i : i + 1], [prompt]), score[i : i + 1])

    def test_lets_the_gradient_reach_the_image_and_nothing_else(self, maker: type[Reward]) -> None:
        reward, x = maker(), images(2, 3, 24, 20).requires_grad_()
        reward(x, ["a", "b"]).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
        assert not any(parameter.requires_grad for parameter in reward.parameters())

    def test_does_not_look_at_a_reference(self, maker: type[Reward]) -> None:
        reward, x = maker(), images(2, 3, 24, 20)
        assert not reward.referenced
        assert torch.equal(reward(x, ["a", "b"], torch.zeros(1)), reward(x, ["a", "b"]))

    def test_stays_in_eval_mode(self, maker: type[Reward]) -> None:
        reward, x = maker(), images(2, 3, 24, 20)
        before = reward(x, ["a", "b"])
        nn.ModuleList([reward]).train()
        assert not any(module.training for module in reward.modules())
        assert torch.equal(reward(x, ["a", "b"]), before)

    def test_is_computed_in_fp32_whatever_autocast_says(self, maker: type[Reward]) -> None:
        reward, x = maker(), images(2, 3, 24, 20)
        plain = reward(x, ["a", "b"])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(reward(x, ["a", "b"]), plain)
            low = reward(x.bfloat16(), ["a", "b"])
        assert torch.equal(low, reward(x.bfloat16().float(), ["a", "b"]))

    def test_clamps_to_0_1_and_gives_no_gradient_outside(self, maker: type[Reward]) -> None:
        reward = maker()
        x = (images(1, 3, 24, 20) * 1.4 - 0.2).requires_grad_()
        score = reward(x, ["a"])
        assert torch.equal(score, reward(x.clamp(0, 1), ["a"]))
        (gradient,) = torch.autograd.grad(score.sum(), x)
        outside = (x < 0) | (x > 1)
        assert outside.any()
        assert not gradient[outside].any()

    def test_refuses_what_is_no_batch_of_images_with_a_prompt_each(self, maker: type[Reward]) -> None:
        reward = maker()
        for wrong in (images(3, 24, 20), images(2, 4, 24, 20), images(2, 3, 24, 20).mul(255).byte()):
            with pytest.raises(ValueError, match=r"x_01 is torch\.\w+ of shape .*; pass floating \(B, 3, H, W\)"):
                reward(wrong, ["a", "b"])
        for prompts, found in ((["a"], "1 strings"), ("ab", "one string")):
            with pytest.raises(ValueError, match=f"prompts is {found} for 2 images"):
                reward(images(2, 3, 24, 20), prompts)

    def test_refuses_a_wrong_range_in_debug_mode(self, maker: type[Reward], monkeypatch: pytest.MonkeyPatch) -> None:
        x = images(1, 3, 24, 20) * 255
        maker()(x, ["a"])
        monkeypatch.setenv("ISR_DEBUG", "1")
        with pytest.raises(ValueError, match=r"x_01 spans .* where \[0, 1\] is expected"):
            maker()(x, ["a"])


class TestPrecision:
    def test_16_bit_weights_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"reward 'toy' was cast to torch.bfloat16"):
            Toy().bfloat16()(images(1, 3, 24, 20), ["a"])

    def test_float64_images_keep_their_digits_where_there_are_no_weights(self) -> None:
        assert Sharpness()(images(1, 3, 24, 20, dtype=torch.float64), ["a"]).dtype == torch.float64


class TestGradient:
    def test_a_reward_that_is_not_differentiable_has_none(self) -> None:
        assert not Toy(differentiable=False)(images(1, 3, 24, 20).requires_grad_(), ["a"]).requires_grad

    def test_there_is_none_under_no_grad(self) -> None:
        with torch.no_grad():
            assert not Toy()(images(1, 3, 24, 20).requires_grad_(), ["a"]).requires_grad


class TestRewardLoss:
    def test_is_the_distance_to_the_hinge_and_nothing_beyond(self) -> None:
        score = torch.tensor([-1.0, 0.0, 0.7, 1.99, 2.0, 3.0], requires_grad=True)
        loss = reward_loss(score)
        assert_close(loss, torch.tensor([3.0, 2.0, 1.3, 0.01, 0.0, 0.0]))
        (slope,) = torch.autograd.grad(loss.sum(), score)
        assert slope.tolist() == [-1, -1, -1, -1, 0, 0]

    def test_hinge_can_be_moved(self) -> None:
        assert_close(reward_loss(torch.tensor([0.2, 0.6]), hinge=0.5), torch.tensor([0.3, 0.0]))


class TestBuildReward:
    def test_knows_all_by_name(self) -> None:
        expected = {
            "clipiqa": (PyiqaReward, "pyiqa:clipiqa", True, False),
            "laion": (PyiqaReward, "pyiqa:laion_aes", False, False),
            "pyiqa:musiq": (PyiqaReward, "pyiqa:musiq", False, False),
            "pyiqa:maniqa-pipal": (PyiqaReward, "pyiqa:maniqa-pipal", False, False),
            "sharpness": (Sharpness, "sharpness", True, False),
            "colourfulness": (Colourfulness, "colourfulness", True, False),
        }
        for name, (kind, label, differentiable, prompted) in expected.items():
            reward = build_reward(name)
            assert type(reward) is kind
            assert (reward.name, reward.differentiable, reward.prompted) == (label, differentiable, prompted)
        reward = build_reward("imagereward", weights="random", size=TINY)
        assert isinstance(reward, ImageReward)
        assert (reward.name, reward.differentiable, reward.prompted) == ("imagereward", True, True)

    def test_hands_arguments_on(self) -> None:
        assert build_reward("sharpness", sigma=1.0).sigma == 1.0
        assert build_reward("pyiqa:musiq", differentiable=True).differentiable

    def test_lists_the_names_when_it_knows_none(self) -> None:
        with pytest.raises(ValueError, match=r"name='clip' is not a reward; use one of clipiqa, imagereward, laion"):
            build_reward("clip")
