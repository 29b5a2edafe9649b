"""pyiqa's metrics as rewards: on a stand-in package, and where installed on pyiqa itself with a small random CLIP."""

import importlib.metadata
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from common.pyiqa import MetricUnavailableError
from common.rewards import PyiqaReward, build_reward

CONFIGS: dict[str, dict[str, Any]] = {
    "clipiqa": {"metric_mode": "NR"},
    "laion_aes": {"metric_mode": "NR"},
    "niqe": {"metric_mode": "NR", "lower_better": True},
    "lpips": {"metric_mode": "FR", "lower_better": True},
    "broken": {"metric_mode": "NR"},
}


class Net(nn.Module):
    """The mean of the red channel, (B, 1); its 'CLIP' hides in a list, in train mode and with gradients on."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_model = [nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 1, 1)).train()]
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        assert not self.clip_model[0].training
        random.random(), np.random.rand(), torch.rand(1)
        return x[:, :1].mean((2, 3)) * self.scale


class Model(nn.Module):
    """Stands where pyiqa's InferenceModel does, with its switches."""

    made: list["Model"]

    def __init__(self, name: str, device: torch.device) -> None:
        super().__init__()
        if name == "broken":
            raise OSError("<urlopen error: no route to host>\nmore")
        self.net, self.device, self.as_loss, self.loss_reduction = Net(), device, False, "mean"
        self.metric_mode = CONFIGS[name]["metric_mode"]
        self.lower_better = CONFIGS[name].get("lower_better", False)
        self.seen: list[Tensor] = []
        Model.made.append(self)

    def forward(self, x: Tensor) -> Tensor:
        assert x.min() >= 0
        assert x.max() <= 1
        self.seen.append(x)
        with torch.set_grad_enabled(self.as_loss):
            score = self.net(x)
        return score.mean() if self.as_loss and self.loss_reduction == "mean" else score


@pytest.fixture
def fake_pyiqa(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    package, configs = ModuleType("pyiqa"), ModuleType("pyiqa.default_model_configs")
    package.create_metric = Model  # type: ignore[attr-defined] -- a module made here
    configs.DEFAULT_CONFIGS = {name: {"metric_opts": {"type": "X"}} for name in CONFIGS}  # type: ignore[attr-defined] -- likewise
    monkeypatch.setitem(sys.modules, "pyiqa", package)
    monkeypatch.setitem(sys.modules, "pyiqa.default_model_configs", configs)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"pyiqa": "9.9"}[name])
    monkeypatch.setattr(Model, "made", [], raising=False)
    return Model.made


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5))


class TestStandIn:
    def test_score_is_one_number_an_image_negated_where_lower_is_better(self, fake_pyiqa: list[Model]) -> None:
        x = images(3, 3, 8, 9)
        for name in ("clipiqa", "laion", "pyiqa:clipiqa"):
            assert_close(build_reward(name)(x, [""] * 3), x[:, 0].mean((1, 2)))
        assert_close(build_reward("pyiqa:niqe")(x, [""] * 3), -x[:, 0].mean((1, 2)))

    def test_clipiqa_alone_has_a_gradient_and_gives_none_to_its_weights(self, fake_pyiqa: list[Model]) -> None:
        x = images(2, 3, 8, 8).requires_grad_()
        build_reward("clipiqa")(x, ["", ""]).sum().backward()
        assert x.grad is not None
        assert_close(x.grad[:, 0], torch.full((2, 8, 8), 1 / 64))
        assert not build_reward("pyiqa:clipiqa")(x, ["", ""]).requires_grad
        assert not build_reward("laion")(x, ["", ""]).requires_grad
        for model in fake_pyiqa:
            weights = [*model.parameters(), *model.net.clip_model[0].parameters()]
            assert not any(weight.requires_grad for weight in weights)

    def test_under_no_grad_there_is_none(self, fake_pyiqa: list[Model]) -> None:
        x = images(1, 3, 8, 8).requires_grad_()
        with torch.no_grad():
            assert not build_reward("clipiqa")(x, [""]).requires_grad

    def test_network_is_made_once_at_the_first_call_and_again_on_another_device(self, fake_pyiqa: list[Model]) -> None:
        reward, x = build_reward("clipiqa"), images(1, 3, 8, 8)
        assert not fake_pyiqa
        reward.load()
        reward(x, [""])
        reward(x, [""])
        assert [model.device.type for model in fake_pyiqa] == ["cpu"]
        reward.load("meta")
        assert [model.device.type for model in fake_pyiqa] == ["cpu", "meta"]

    def test_network_stays_out_of_train_mode_state_dict_and_casts(self, fake_pyiqa: list[Model]) -> None:
        reward = build_reward("clipiqa")
        reward.load()
        nn.ModuleList([reward]).train().bfloat16()
        assert not any(module.training for module in fake_pyiqa[0].modules())
        assert not reward.state_dict()
        assert not list(reward.parameters())
        assert fake_pyiqa[0].net.scale.dtype == torch.float32

    def test_network_sees_fp32_images_clamped_to_0_1(self, fake_pyiqa: list[Model]) -> None:
        reward = build_reward("clipiqa")
        for dtype in (torch.bfloat16, torch.float64):
            reward((images(1, 3, 8, 8) * 3 - 1).to(dtype), [""])
        assert all(x.dtype == torch.float32 for x in fake_pyiqa[0].seen)

    def test_random_states_stay_where_they_were(self, fake_pyiqa: list[Model]) -> None:
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        build_reward("clipiqa")(images(1, 3, 8, 8), [""])
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tolist() == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])

    def test_what_cannot_be_a_reward_is_refused(self, fake_pyiqa: list[Model]) -> None:
        with pytest.raises(ValueError, match="pyiqa's lpips compares with a reference; use neg_mse, neg_lpips or"):
            build_reward("pyiqa:lpips").load()
        with pytest.raises(ValueError, match="pyiqa has no metric 'clipiqq'; it has clipiqa"):
            build_reward("pyiqa:clipiqq").load()

    def test_q_align_comes_with_a_warning_that_it_is_no_independent_metric_then(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        build_reward("pyiqa:musiq")
        assert not caplog.messages
        build_reward("pyiqa:qalign")
        assert caplog.messages == [
            "pyiqa:qalign is a reward now: among DNF-SR's metrics it ceases to be the independent one."
        ]

    def test_weights_that_cannot_be_had_give_a_reason_of_one_line(self, fake_pyiqa: list[Model]) -> None:
        with pytest.raises(MetricUnavailableError) as caught:
            PyiqaReward("broken")(images(1, 3, 8, 8), [""])
        assert str(caught.value) == "pyiqa:broken: OSError: <urlopen error: no route to host>"

    def test_without_pyiqa_the_reason_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyiqa", None)
        with pytest.raises(MetricUnavailableError, match=r"pyiqa:clipiqa: pyiqa cannot be imported .*\[metrics\]"):
            build_reward("clipiqa").load()


@pytest.fixture
def small_clip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """pyiqa with a CLIP of random weights in place of the one that it would download."""
    pytest.importorskip("pyiqa")
    from pyiqa.archs.clip_model import CLIP

    def make(*_: object) -> nn.Module:
        torch.manual_seed(0)
        return CLIP(16, 64, (1, 1, 1, 1), 8, None, 77, 49408, 16, 2, 1).train()

    monkeypatch.setattr("pyiqa.archs.clipiqa_arch.load", make)
    return make


class TestInstalledPyiqa:
    def test_clipiqa_is_the_mean_over_five_pairs_of_prompts(self, small_clip: Callable[..., nn.Module]) -> None:
        import clip

        x = images(3, 3, 64, 96)
        network = small_clip().eval().requires_grad_(False)
        pairs = ["Good image", "bad image", "Sharp image", "blurry image", "sharp edges", "blurry edges"]
        pairs += ["High resolution image", "low resolution image", "Noise-free image", "noisy image"]
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        pixels = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        seen = nn.functional.normalize(network.encode_image(pixels, False), dim=1)
        words = nn.functional.normalize(network.encode_text(clip.tokenize(pairs)), dim=1)
        logits = network.logit_scale.exp() * seen @ words.T
        expected = torch.sigmoid(logits[:, ::2] - logits[:, 1::2]).mean(1)
        assert_close(build_reward("clipiqa")(x, [""] * 3), expected, rtol=1e-4, atol=1e-5)

    def test_clipiqa_reads_each_image_alone_and_is_differentiable(self, small_clip: Callable[..., nn.Module]) -> None:
        x = images(2, 3, 64, 64).requires_grad_()
        reward = build_reward("clipiqa")
        score = reward(x, ["", ""])
        assert score.shape == (2,)
        assert ((score > 0) & (score < 1)).all()
        (gradient,) = torch.autograd.grad(score[0], x)
        assert gradient[0].abs().max() > 0
        assert not gradient[1].any()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(reward(x, ["", ""]), score)
        with torch.no_grad():
            assert not reward(x, ["", ""]).requires_grad


@pytest.mark.weights
class TestPretrained:
    """With pyiqa's weights and CLIP's; no golden values: none could be made here."""

    @pytest.mark.parametrize("name", ["clipiqa", "laion", "pyiqa:musiq", "pyiqa:maniqa-pipal"])
    def test_a_blurred_photo_scores_below_the_sharp_one_and_batches_do_not_mix(self, name: str) -> None:
        cv2 = pytest.importorskip("cv2")
        from data.photos import photo_paths

        image = cv2.cvtColor(cv2.imread(str(photo_paths("test")["chelsea"])), cv2.COLOR_BGR2RGB)[:288, :288]
        both = np.stack([image, cv2.GaussianBlur(image, (0, 0), 4)])
        x = torch.from_numpy(both).permute(0, 3, 1, 2).float() / 255
        reward = build_reward(name)
        score = reward(x, ["", ""])
        assert score[0] > score[1]
        assert_close(torch.cat([reward(x[:1], [""]), reward(x[1:], [""])]), score, rtol=1e-3, atol=1e-4)
