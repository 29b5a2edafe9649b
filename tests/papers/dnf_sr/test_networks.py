"""DNF-SR's discriminator: counts, transformers' own hidden states, blur and DiffAugment by hand, where gradients go."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTConfig, DINOv3ViTModel

from common.draws import Draws
from common.loading import WeightsNotFoundError, architecture_only, load_vision_model
from common.losses import discriminator_loss, generator_loss
from common.parameters import count
from papers.dnf_sr.networks import (
    BlurPool,
    DinoTrunk,
    Discriminator,
    colour,
    conv_head,
    cutout,
    diff_augment,
    token_head,
    translate,
)

VIT = "facebook/dinov3-vitb16-pretrain-lvd1689m"
CONVNEXT = "facebook/dinov3-convnext-large-pretrain-lvd1689m"
TINY = "random:dinov3_tiny"


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform over [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 - 1


def draws(*index: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.tensor(index))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small DINOv3 as transformers saves it: registers, layer scale and dropped paths that would be seen."""
    root = tmp_path_factory.mktemp("vit")
    config = DINOv3ViTConfig(
        patch_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_register_tokens=3,
        layerscale_value=0.5,
        drop_path_rate=0.5,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DINOv3ViTModel(config)
        nn.init.uniform_(model.norm.weight, 0.5, 2.0)
        nn.init.uniform_(model.norm.bias)
        model.save_pretrained(root)
    return str(root)


@pytest.fixture(scope="module")
def convnext(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("convnext")
    config = DINOv3ConvNextConfig(
        hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 2, 1], layer_scale_init_value=0.5, initializer_range=0.3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DINOv3ConvNextModel(config).save_pretrained(root)
    return str(root)


def pixels(x_pm1: Tensor) -> Tensor:
    """ImageNet's normalisation written out."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x_pm1 + 1) / 2 - mean[:, None, None]) / std[:, None, None]


class TestCounts:
    @pytest.mark.parametrize("trunk", [VIT, "random:dinov3_vitb16"])
    def test_vit_b_has_its_own_and_without_mask_token_and_qv_biases_timms(self, trunk: str) -> None:
        with architecture_only():
            disc = Discriminator(trunk, augment=False)
        assert count(disc.trunk) == (85_660_416, 0)
        extra = {
            n: p for n, p in disc.trunk.named_parameters() if n.endswith(("q_proj.bias", "v_proj.bias", "mask_token"))
        }
        assert len(extra) == 12 + 12 + 1
        assert 85_660_416 - sum(p.numel() for p in extra.values()) == 85_641_216
        assert disc.trunk.levels == (5, 9, 12)

    def test_its_heads_have_the_count_by_hand(self) -> None:
        with architecture_only():
            disc = Discriminator(VIT, augment=False)
        conv, token = 9 * 768 * 128 + 128 + 128 + 1, 768 * 128 + 128 + 128 + 1
        assert [count(head).total for head in disc.heads] == [conv, conv, token]
        assert count(disc.heads) == (1_868_547, 1_868_547)
        logits = disc(torch.empty(2, 3, 512, 512, device="meta"))
        assert [logit.shape for logit in logits] == [(2, 1, 8, 8), (2, 1, 8, 8), (2, 1, 32, 32)]

    @pytest.mark.parametrize("trunk", [CONVNEXT, "random:dinov3_convnext_l"])
    def test_convnext_l_has_three_convolutional_heads(self, trunk: str) -> None:
        with architecture_only():
            disc = Discriminator(trunk, augment=False)
        assert count(disc.trunk) == (196_230_336, 0)
        assert [count(head).total for head in disc.heads] == [9 * c * 128 + 128 + 128 + 1 for c in (192, 384, 768)]
        logits = disc(torch.empty(2, 3, 512, 512, device="meta"))
        assert [logit.shape for logit in logits] == [(2, 1, 32, 32), (2, 1, 16, 16), (2, 1, 8, 8)]

    def test_the_demos_has_its_own_and_judges_64_pixels(self) -> None:
        disc = Discriminator(TINY, augment=False)
        assert count(disc.trunk) == (122_784, 0)
        assert disc.trunk.levels == (2, 3, 4)
        with torch.no_grad():
            logits = disc(images(2, 3, 64, 64))
        assert [logit.shape for logit in logits] == [(2, 1, 2, 2), (2, 1, 2, 2), (2, 1, 8, 8)]
        assert all(logit.std() > 0.01 for logit in logits)

    def test_heads_are_drawn_on_the_cpu_and_go_to_the_trunks_device(self, calls: list[tuple[str, str]]) -> None:
        with torch.device("meta"):
            disc = Discriminator(TINY)
        draws = [call for call in calls if call[0] in ("uniform_", "normal_", "normal")]
        assert {device for _, device in draws} == {"cpu"}
        held = [*disc.heads.parameters(), *disc.heads.buffers(), *disc.trunk.parameters()]
        assert {tensor.device.type for tensor in held} == {"meta"}

    @pytest.mark.parametrize(("trunk", "architecture"), [(VIT, "dinov3_vitb16"), (CONVNEXT, "dinov3_convnext_l")])
    def test_missing_weights_are_said_to_be_gated_with_their_licence(
        self, trunk: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(WeightsNotFoundError) as caught:
            Discriminator(trunk)
        message = str(caught.value)
        for part in ("DINOv3 License, to be accepted at", f"hf download {trunk}", f"'random:{architecture}'"):
            assert part in message
        assert "\n" not in message


class TestTrunk:
    def test_gives_transformers_hidden_states_after_the_final_norm_as_maps(self, vit: str) -> None:
        x = images(2, 3, 24, 32)
        trunk = DinoTrunk(vit)
        assert trunk.levels == (2, 4, 6)  # round(6 / 12 times 5, 9, 12), halves to even
        model = DINOv3ViTModel.from_pretrained(vit).eval()
        with torch.no_grad():
            maps = trunk(x)
            hidden = model(pixels(x), output_hidden_states=True)
            for level, found in zip(trunk.levels, maps, strict=True):
                state = hidden.hidden_states[level]
                assert state.shape == (2, 1 + 3 + 6 * 8, 16)
                expected = F.layer_norm(state, (16,), model.norm.weight, model.norm.bias, 1e-5)[:, 4:]
                assert_close(found, expected.reshape(2, 6, 8, 16).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
            assert_close(maps[-1].flatten(2).transpose(1, 2), hidden.last_hidden_state[:, 4:], rtol=1e-4, atol=1e-5)

    def test_gives_convnexts_stages_as_they_are(self, convnext: str) -> None:
        x = images(2, 3, 64, 80)
        model = DINOv3ConvNextModel.from_pretrained(convnext).eval()
        with torch.no_grad():
            maps = DinoTrunk(convnext)(x)
            expected, h = [], pixels(x)
            for stage in load_vision_model(convnext).model.stages[:3]:
                h = stage(h)
                expected.append(h)
            hidden = model(pixels(x), output_hidden_states=True).hidden_states
        assert [m.shape for m in maps] == [(2, 4, 16, 20), (2, 6, 8, 10), (2, 8, 4, 5)]
        for found, by_hand in zip(maps, expected, strict=True):
            assert_close(found, by_hand)
            assert any(state.shape == found.shape and torch.allclose(state, found, atol=1e-6) for state in hidden)

    def test_levels_can_be_chosen(self, vit: str, convnext: str) -> None:
        x = images(1, 3, 64, 64)
        with torch.no_grad():
            both, one = DinoTrunk(vit, (1, 4))(x), DinoTrunk(vit)(x)
            stages = DinoTrunk(convnext, (2, 4))
            assert [m.shape[1:] for m in stages(x)] == [(6, 8, 8), (10, 2, 2)]
        assert len(both) == 2
        assert torch.equal(both[1], one[1])
        assert stages.strides == (8, 32)

    def test_stays_in_eval_mode_where_positions_do_not_jitter(self, vit: str) -> None:
        x, trunk = images(1, 3, 24, 24), DinoTrunk(vit)
        with torch.no_grad():
            before = trunk(x)
            nn.ModuleList([trunk]).train()
            assert not any(module.training for module in trunk.modules())
            assert all(map(torch.equal, before, trunk(x)))

    def test_works_in_the_dtype_of_its_weights_whatever_autocast_says(self, vit: str) -> None:
        x, trunk = images(1, 3, 24, 24), DinoTrunk(vit)
        with torch.no_grad():
            plain = trunk(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert all(map(torch.equal, plain, trunk(x)))
            half = trunk.bfloat16()(x)
        assert {m.dtype for m in half} == {torch.bfloat16}
        assert_close(half[0].float(), plain[0], rtol=0.1, atol=0.2)

    @pytest.mark.parametrize("kind", ["vit", "convnext"])
    def test_gradient_reaches_the_images_alike_with_less_kept_under_checkpointing(
        self, kind: str, request: pytest.FixtureRequest
    ) -> None:
        folder, kept, gradients = request.getfixturevalue(kind), [], []
        for checkpointing in (False, True):
            trunk, x = DinoTrunk(folder, gradient_checkpointing=checkpointing), images(1, 3, 64, 64).requires_grad_()
            sizes: list[int] = []

            def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
                sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = sum(m.square().sum() for m in trunk(x))
            (gradient,) = torch.autograd.grad(loss, x)
            kept.append(sum(sizes))
            gradients.append(gradient)
        assert gradients[0].abs().min() > 0
        assert_close(gradients[1], gradients[0])
        assert kept[1] < 0.7 * kept[0]

    def test_what_does_not_fit_is_refused(self, vit: str, convnext: str) -> None:
        with pytest.raises(ValueError, match=r"'random:dinov2_tiny' is a 'dinov2' model, not a DINOv3; use"):
            DinoTrunk("random:dinov2_tiny")
        for levels in ((), (0, 3), (3, 7), (4, 2), (2, 2)):
            with pytest.raises(ValueError, match=r"levels=\[.*\] must increase within 1\.\.6, the depth of"):
                DinoTrunk(vit, levels)
        with pytest.raises(ValueError, match=r"x_pm1 is \(24, 30\), not a multiple of 4, DINOv3's stride; crop or pad"):
            DinoTrunk(vit)(images(1, 3, 24, 30))
        with pytest.raises(ValueError, match=r"x_pm1 is \(40, 32\), not a multiple of 16"):
            DinoTrunk(convnext)(images(1, 3, 40, 32))


class TestBlurPool:
    @pytest.mark.parametrize("grow", [0, 1])
    def test_keeps_constants_to_the_border(self, grow: int) -> None:
        x = torch.tensor([2.0, -3.0])[None, :, None, None].expand(1, 2, 6, 7)
        expected = x[..., :1, :1].expand(1, 2, 6 + 2 * grow, 7 + 2 * grow)
        assert_close(BlurPool(2, grow)(x), expected)

    def test_spreads_an_impulse_by_the_binomial_window_and_each_channel_alone(self) -> None:
        x = torch.zeros(1, 2, 9, 9)
        x[0, 1, 4, 4] = 64
        window = torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1]))
        for grow in (0, 1):
            blurred = BlurPool(2, grow)(x)
            assert not blurred[0, 0].any()
            assert_close(blurred[0, 1, 2 + grow : 6 + grow, 2 + grow : 6 + grow], window)
            assert_close(blurred.sum(), window.sum())

    def test_reflects_the_border(self) -> None:
        row = torch.tensor([1.0, 2, 4, 8, 16])
        x = row.expand(1, 1, 5, 5)
        reflected = [2.0, 1, 2, 4, 8, 16, 8, 4]  # 1 before and 2 behind
        expected = [sum(w * v for w, v in zip((1, 3, 3, 1), reflected[i : i + 4], strict=True)) / 8 for i in range(5)]
        assert_close(BlurPool(1)(x), torch.tensor(expected).expand(1, 1, 5, 5))


class TestHeads:
    def test_convolutional_one_has_a_logit_at_every_fourth_place_from_5_tokens_on(self) -> None:
        head = conv_head(4, 8)
        for rows, columns in itertools.product(range(5, 18), (5, 16)):
            shape = (2, 1, math.ceil(rows / 4), math.ceil(columns / 4))
            assert head(torch.zeros(2, 4, rows, columns)).shape == shape

    def test_convolutional_one_follows_a_shift_by_four_tokens(self) -> None:
        torch.manual_seed(0)
        head, x = conv_head(4, 8).eval(), images(1, 4, 32, 32)
        with torch.no_grad():
            logits, moved = head(x), head(x.roll((4, 8), (2, 3)))
        assert_close(moved[..., 2:-1, 3:-1], logits[..., 1:-2, 1:-3])
        assert logits.std() > 0.01

    def test_token_one_looks_at_each_token_alone(self) -> None:
        torch.manual_seed(0)
        head, x = token_head(4, 8).eval(), images(1, 4, 5, 6)
        with torch.no_grad():
            logits = head(x)
            assert logits.shape == (1, 1, 5, 6)
            assert_close(head(x.flip(2)), logits.flip(2))
            assert_close(head(x[..., 2:3, 3:4]), logits[..., 2:3, 3:4])
        assert logits.std() > 0.01

    @pytest.mark.parametrize("make", [conv_head, token_head])
    def test_every_weight_has_spectral_norm_one(self, make: Callable[[int, int], nn.Sequential]) -> None:
        torch.manual_seed(0)
        head = make(6, 8)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(7)
            for _ in range(100):
                head(images(1, 6, 8, 8))
        layers = [layer for layer in head if isinstance(layer, nn.Conv2d)]
        assert len(layers) == 2
        for layer in layers:
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)

    def test_come_from_the_seed_and_leave_the_global_generator(self) -> None:
        before = torch.get_rng_state()
        one, same, other = (Discriminator(TINY, augment=False, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), before)
        pairs = list(zip(one.state_dict().values(), same.state_dict().values(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not torch.equal(one.heads[0][1].weight, other.heads[0][1].weight)


class TestColour:
    def test_brightness_moves_all_values_alike(self) -> None:
        x, one = images(2, 3, 4, 5), torch.ones(2)
        changed = colour(x, torch.tensor([0.25, -0.5]), one, one)
        assert_close(changed - x, torch.tensor([0.25, -0.5]).view(2, 1, 1, 1).expand_as(x))

    def test_saturation_keeps_each_pixels_grey_and_0_leaves_nothing_else(self) -> None:
        x, one = images(2, 3, 4, 5), torch.ones(2)
        changed = colour(x, 0 * one, torch.tensor([0.0, 2.0]), one)
        assert_close(changed.mean(1), x.mean(1))
        assert_close(changed[0], x[0].mean(0).expand(3, 4, 5))
        assert_close(changed[1, 0] - changed[1, 1], 2 * (x[1, 0] - x[1, 1]))

    def test_contrast_keeps_each_images_mean_and_scales_the_rest(self) -> None:
        x, one = images(2, 3, 4, 5), torch.ones(2)
        changed = colour(x, 0 * one, one, torch.tensor([0.5, 1.5]))
        assert_close(changed.mean((1, 2, 3)), x.mean((1, 2, 3)))
        assert_close(changed.std((1, 2, 3)), torch.tensor([0.5, 1.5]) * x.std((1, 2, 3)))

    def test_come_in_this_order(self) -> None:
        x = torch.tensor([0.0, 0.3, 0.6]).view(1, 3, 1, 1)
        changed = colour(x, torch.tensor([0.1]), torch.tensor([2.0]), torch.tensor([1.5]))
        # brightened 0.1 0.4 0.7, grey 0.4; saturated -0.2 0.4 1; mean 0.4; contrasted -0.5 0.4 1.3
        assert_close(changed.flatten(), torch.tensor([-0.5, 0.4, 1.3]))


class TestTranslate:
    def test_moves_by_hand_and_fills_with_zeros(self) -> None:
        x = torch.arange(1.0, 10).view(1, 1, 3, 3).repeat(3, 1, 1, 1)
        moved = translate(x, torch.tensor([1, 0, -2]), torch.tensor([-1, 0, 1]))
        assert moved[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
        assert torch.equal(moved[1], x[1])
        assert moved[2, 0].tolist() == [[0, 7, 8], [0, 0, 0], [0, 0, 0]]

    def test_gradient_comes_back_by_the_same_way(self) -> None:
        x = images(1, 3, 5, 6).requires_grad_()
        weight = images(1, 3, 5, 6, seed=1)
        (gradient,) = torch.autograd.grad(translate(x, torch.tensor([2]), torch.tensor([-1])), x, weight)
        assert_close(gradient, translate(weight, torch.tensor([-2]), torch.tensor([1])))


class TestCutout:
    def test_cuts_what_lies_within(self) -> None:
        x = torch.ones(3, 2, 6, 6)
        cut = cutout(x, torch.tensor([3, 0, 6]), torch.tensor([3, 2, 6]), (4, 2))
        expected = torch.ones(3, 2, 6, 6)
        expected[0, :, 1:5, 2:4] = 0
        expected[1, :, 0:2, 1:3] = 0
        expected[2, :, 4:6, 5:6] = 0
        assert torch.equal(cut, expected)

    def test_odd_sizes_lie_around_their_centre(self) -> None:
        cut = cutout(torch.ones(1, 1, 5, 5), torch.tensor([2]), torch.tensor([4]), (3, 3))
        assert cut[0, 0].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1] * 5]


def authors_augment(x: Tensor, numbers: dict[str, list[float]]) -> Tensor:
    """DiffAugment's formulas, value by value, with the numbers that its generator would have given."""
    out = torch.zeros_like(x)
    batch, _, height, width = x.shape
    for b in range(batch):
        image = x[b] + (numbers["brightness"][b] - 0.5)
        grey = image.mean(0)
        image = (image - grey) * (numbers["saturation"][b] * 2) + grey
        image = (image - image.mean()) * (numbers["contrast"][b] + 0.5) + image.mean()
        size = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
        for row, column in itertools.product(range(height), range(width)):
            source = row - int(numbers["down"][b]), column - int(numbers["right"][b])
            inside = 0 <= source[0] < height and 0 <= source[1] < width
            top, left = int(numbers["row"][b]) - size[0] // 2, int(numbers["column"][b]) - size[1] // 2
            cut = top <= row < top + size[0] and left <= column < left + size[1]
            if inside and not cut:
                out[b, :, row, column] = image[:, source[0], source[1]]
    return out


class TestDiffAugment:
    @pytest.mark.parametrize(("height", "width"), [(16, 24), (13, 18)])
    def test_equals_the_authors_formulas(self, height: int, width: int) -> None:
        x, numbers = images(4, 3, height, width, dtype=torch.float64), draws(0, 1, 2, 3)
        rows, columns = int(height / 8 + 0.5), int(width / 8 + 0.5)
        drawn = {name: numbers.uniform(f"s/{name}") for name in ("brightness", "saturation", "contrast")}
        drawn |= {"down": numbers.integers("s/down", -rows, rows)}
        drawn |= {"right": numbers.integers("s/right", -columns, columns)}
        for name, side in (("row", height), ("column", width)):
            drawn[name] = numbers.integers(f"s/{name}", 0, side - int(side / 2 + 0.5) % 2)
        expected = authors_augment(x, {name: values.tolist() for name, values in drawn.items()})
        assert_close(diff_augment(x, numbers, "s"), expected)

    def test_depends_on_the_sample_and_the_stream_alone(self) -> None:
        x = images(1, 3, 16, 16).repeat(2, 1, 1, 1)
        both = diff_augment(x, draws(3, 5), "a")
        assert torch.equal(diff_augment(x[1:], draws(5), "a"), both[1:])
        assert not torch.equal(both[0], both[1])
        assert not torch.equal(diff_augment(x, draws(3, 5), "b"), both)
        assert not torch.equal(diff_augment(x, draws(3, 5, seed=1), "a"), both)

    def test_reaches_an_eighth_of_the_side_and_cuts_at_most_a_quarter(self) -> None:
        x = torch.full((200, 3, 32, 32), 0.9)
        changed = diff_augment(x, draws(*range(200)), "s", cutout_side=0.0)[:, 0]
        assert len(changed[:, 16, 16].unique()) == 200  # brightness; constants keep saturation and contrast
        empty = changed == 0
        rows, columns = empty.all(2).sum(1), empty.all(1).sum(1)
        assert rows.max() == columns.max() == 4
        assert rows.min() == columns.min() == 0
        cut = (diff_augment(x, draws(*range(200)), "s", translation=0.0)[:, 0] == 0).sum((1, 2))
        assert 16 * 16 * 0.95 < cut.max() <= 16 * 16
        assert 8 * 8 <= cut.min() < 12 * 12

    def test_gradient_flows_but_for_what_left_the_image(self) -> None:
        x = images(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda image: diff_augment(image, draws(0, 1), "s"), x)
        (gradient,) = torch.autograd.grad(diff_augment(x, draws(0, 1), "s").square().sum(), x)
        assert (gradient.flatten(1).abs() > 0).any(1).all()

    def test_is_computed_in_fp32_for_16_bit_images(self) -> None:
        x = images(1, 3, 16, 16).bfloat16()
        assert torch.equal(diff_augment(x, draws(0), "s"), diff_augment(x.float(), draws(0), "s"))


class Generator(nn.Module):
    """One value a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(images(2, 3, 64, 64))


class TestDiscriminator:
    def test_shows_the_trunk_what_was_augmented(self) -> None:
        disc, plain = Discriminator(TINY).eval(), Discriminator(TINY, augment=False).eval()
        x = images(2, 3, 64, 64)
        with torch.no_grad():
            logits = disc(x, draws(4, 5), "step")
            for found, expected in zip(logits, plain(diff_augment(x, draws(4, 5), "step")), strict=True):
                assert_close(found, expected)
            assert not torch.allclose(logits[0], plain(x)[0])
            assert all(map(torch.equal, logits, disc(x, draws(4, 5), "step")))

    def test_only_the_heads_train(self) -> None:
        disc = Discriminator(TINY).train()
        assert {n.split(".")[0] for n, p in disc.named_parameters() if p.requires_grad} == {"heads"}
        assert not disc.trunk.training
        assert all(head.training for head in disc.heads)

    def test_generator_step_reaches_the_generator_through_the_frozen_trunk(self) -> None:
        disc, generator = Discriminator(TINY), Generator()
        generator_loss("bce_smooth", disc(generator.x, draws(0, 1), "generator")).mean().backward()
        assert generator.x.grad is not None
        assert (generator.x.grad.abs().amax((1, 2, 3)) > 0).all()
        assert all(parameter.grad is None for parameter in disc.trunk.parameters())

    def test_discriminator_step_leaves_the_generator_without_gradient(self) -> None:
        disc, generator = Discriminator(TINY), Generator()
        real = disc(images(2, 3, 64, 64, seed=1), draws(0, 1), "real")
        fake = disc(generator.x.detach(), draws(0, 1), "fake")
        discriminator_loss("bce_smooth", real, fake).mean().backward()
        assert generator.x.grad is None
        assert all(parameter.grad is not None for parameter in disc.heads.parameters())
        assert all(parameter.grad is None for parameter in disc.trunk.parameters())

    def test_generators_loss_sums_levels_and_is_least_at_ln_4(self) -> None:
        logits = [
            torch.full(shape, math.log(4), requires_grad=True) for shape in ((1, 1, 2, 2), (1, 1, 2, 2), (1, 1, 8, 8))
        ]
        loss = generator_loss("bce_smooth", logits)
        assert loss.item() == pytest.approx(3 * 0.5004, abs=1e-4)
        for gradient in torch.autograd.grad(loss.sum(), logits):
            assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)

    def test_learns_to_tell_sharp_from_blurred(self) -> None:
        disc = Discriminator(TINY, augment=False)
        optimizer = torch.optim.AdamW(disc.heads.parameters(), lr=1e-2)
        losses = []
        for step in range(16):
            sharp, other = images(8, 3, 64, 64, seed=step).chunk(2)
            real, fake = disc(sharp), disc(F.avg_pool2d(other, 3, 1, 1))
            loss = discriminator_loss("bce_smooth", real, fake).mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.6 * losses[0]
        assert all(r.mean() > f.mean() + 1 for r, f in zip(real, fake, strict=True))

    def test_is_computed_in_fp32_under_autocast_and_heads_stay_so_on_a_16_bit_trunk(self) -> None:
        disc, x = Discriminator(TINY, augment=False).eval(), images(1, 3, 64, 64)
        with torch.no_grad():
            plain = disc(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert all(map(torch.equal, plain, disc(x)))
            disc.trunk.bfloat16()
            low = disc(x)
        assert {logit.dtype for logit in low} == {torch.float32}
        assert_close(low[2], plain[2], rtol=0, atol=0.1)

    def test_what_does_not_fit_is_refused(self) -> None:
        disc = Discriminator(TINY)
        with pytest.raises(ValueError, match="draws is None for 2 images; pass the batch's, or set augment=False"):
            disc(images(2, 3, 64, 64))
        with pytest.raises(ValueError, match="draws is of 3 samples for 2 images"):
            disc(images(2, 3, 64, 64), draws(0, 1, 2))
        with pytest.raises(ValueError, match=r"x_pm1 is \(32, 64\); the heads need 40 px or more a side"):
            disc(images(2, 3, 32, 64), draws(0, 1))
