"""DINOv2 features: what transformers' own model says of an image prepared by hand, and how many tokens that is."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from common.conditioning.features import DinoFeatures
from common.loading import WeightsNotFoundError, architecture_only, hub_table, sources

LARGE = "facebook/dinov2-large"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 as transformers saves it: a 5 x 5 grid, layer scale and dropout that would be seen."""
    root = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=70,
        layerscale_value=0.5,
        hidden_dropout_prob=0.5,
        initializer_range=0.2,
    )
    Dinov2Model(config).save_pretrained(root)
    return root


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(folder: Path, x_01: Tensor, height: int, width: int) -> Tensor:
    """PIL's bicubic resize of float channels, ImageNet's numbers, transformers' model."""
    resized = [
        [np.asarray(Image.fromarray(c.numpy()).resize((width, height), Image.Resampling.BICUBIC)) for c in image]
        for image in x_01
    ]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (np.array(resized) - mean[:, None, None]) / std[:, None, None]
    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(pixels).float()).last_hidden_state


class TestLarge:
    """`facebook/dinov2-large` without its weights."""

    @pytest.mark.parametrize("pretrained", [LARGE, "random:dinov2_large"])
    def test_has_its_published_count(self, pretrained: str) -> None:
        with architecture_only():
            features = DinoFeatures(pretrained)
        assert sum(p.numel() for p in features.parameters()) == 304_368_640
        assert {p.device.type for p in features.parameters()} == {"meta"}
        assert features.width == 1024

    @pytest.mark.parametrize(("side", "inner", "count"), [(512, 518, 1370), (256, 252, 325), (224, 224, 257)])
    def test_makes_1370_tokens_of_512_pixels_and_325_of_256(self, side: int, inner: int, count: int) -> None:
        with architecture_only():
            features = DinoFeatures(LARGE)
        assert features.num_tokens(side, side) == count
        hidden = features.model(torch.empty(2, 3, inner, inner, device="meta")).last_hidden_state
        assert hidden.shape == (2, count, 1024)

    def test_is_no_pipeline_and_says_its_licence_when_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert LARGE not in hub_table()
        with pytest.raises(WeightsNotFoundError) as caught:
            DinoFeatures(LARGE)
        message = str(caught.value)
        assert message.startswith(f"pretrained='{LARGE}': no 'model' in")
        for part in ("Apache-2.0", f"hf download {LARGE}", "transformers layout", "'random:dinov2_large'"):
            assert part in message
        assert "\n" not in message


class TestForward:
    @pytest.mark.parametrize(
        ("shape", "size"),
        [
            ((70, 70), (70, 70)),  # the model's own grid, no resize
            ((64, 64), (70, 70)),  # 64 / 14 = 4.6
            ((45, 73), (42, 70)),  # 3.2 and 5.2; antialiased, and interpolated positions
            ((150, 40), (154, 42)),
            ((5, 30), (14, 28)),  # a patch at least
        ],
    )
    def test_is_the_last_hidden_state_of_transformers_own_model(
        self, folder: Path, shape: tuple[int, int], size: tuple[int, int]
    ) -> None:
        x_01 = images(2, 3, *shape)
        features = DinoFeatures(str(folder))
        found = features(x_01)
        assert_close(found, by_hand(folder, x_01, *size), rtol=1e-3, atol=1e-4)
        assert found.shape == (2, features.num_tokens(*shape), 16)

    @pytest.mark.parametrize(("shape", "size"), [((64, 64), (28, 28)), ((40, 80), (28, 56)), ((90, 30), (84, 28))])
    def test_a_size_is_that_of_the_shorter_side(
        self, folder: Path, shape: tuple[int, int], size: tuple[int, int]
    ) -> None:
        x_01 = images(1, 3, *shape)
        features = DinoFeatures(str(folder), size=28)
        assert_close(features(x_01), by_hand(folder, x_01, *size), rtol=1e-3, atol=1e-4)
        assert features.num_tokens(*shape) == 1 + size[0] * size[1] // 196

    def test_shrinks_with_antialiasing(self, folder: Path) -> None:
        x_01 = images(1, 3, 280, 280)
        assert_close(DinoFeatures(str(folder), size=70)(x_01), by_hand(folder, x_01, 70, 70), rtol=1e-3, atol=1e-4)

    def test_tokens_choose_among_the_same_sequence(self, folder: Path) -> None:
        x_01 = images(2, 3, 42, 56)
        whole, patch, cls = (DinoFeatures(str(folder), tokens=tokens) for tokens in ("all", "patch", "cls"))
        assert torch.equal(torch.cat([cls(x_01), patch(x_01)], 1), whole(x_01))
        assert [f.num_tokens(42, 56) for f in (whole, patch, cls)] == [13, 12, 1]
        assert cls(x_01).shape == (2, 1, 16)

    def test_of_another_image_is_another(self, folder: Path) -> None:
        features = DinoFeatures(str(folder))
        assert (features(images(1, 3, 42, 42)) - features(images(1, 3, 42, 42, seed=1))).abs().mean() > 0.1

    def test_is_frozen_and_without_a_graph(self, folder: Path) -> None:
        features = DinoFeatures(str(folder))
        assert not any(p.requires_grad for p in features.parameters())
        assert not features(images(1, 3, 42, 42).requires_grad_()).requires_grad

    def test_stays_in_eval_mode_so_dropout_never_acts(self, folder: Path) -> None:
        features, x_01 = DinoFeatures(str(folder)), images(1, 3, 42, 42)
        before = features(x_01)
        torch.nn.Sequential(features).train()
        assert not any(m.training for m in features.modules())
        assert torch.equal(features(x_01), before)

    def test_is_fp32_under_autocast_and_of_16_bit_images(self, folder: Path) -> None:
        features, x_01 = DinoFeatures(str(folder)), images(1, 3, 45, 45).bfloat16()
        expected = features(x_01.float())
        with torch.autocast("cpu", torch.bfloat16):
            found = features(x_01)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)

    def test_held_in_bfloat16_it_computes_as_autocast_says(self, folder: Path) -> None:
        held, plain, x_01 = (
            DinoFeatures(str(folder), frozen_dtype="bfloat16"),
            DinoFeatures(str(folder)),
            images(1, 3, 42, 42),
        )
        types = {name.rpartition(".")[0].rpartition(".")[2]: p.dtype for name, p in held.named_parameters()}
        assert {types[name] for name in ("q_proj", "fc1", "fc2")} == {torch.bfloat16}
        assert {types[name] for name in ("norm1", "layernorm", "projection")} == {torch.float32}
        expected, exact = plain(x_01), held(x_01)
        plain.follows_autocast = True
        with torch.autocast("cpu", torch.bfloat16):
            rough = held(x_01)
            assert torch.equal(rough, plain(x_01))
        assert exact.dtype == rough.dtype == torch.float32
        errors = [float((found - expected).norm() / expected.norm()) for found in (exact, rough)]
        assert 0 < errors[0] < errors[1] < 0.01

    def test_cast_to_16_bits_as_a_whole_it_still_gives_fp32(self, folder: Path) -> None:
        x_01 = images(1, 3, 42, 42)
        expected, found = DinoFeatures(str(folder))(x_01), DinoFeatures(str(folder)).bfloat16()(x_01)
        assert found.dtype == torch.float32
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.02

    def test_other_shapes_than_batches_of_images_are_refused(self, folder: Path) -> None:
        features = DinoFeatures(str(folder))
        for shape in ((3, 42, 42), (1, 1, 42, 42)):
            with pytest.raises(ValueError, match=r"pass \(B, 3, H, W\)"):
                features(images(*shape))


class TestArguments:
    @pytest.mark.parametrize("size", [0, -14, 7, 500])
    def test_a_size_that_is_no_whole_number_of_patches_is_refused(self, folder: Path, size: int) -> None:
        with pytest.raises(ValueError, match=f"size={size} must be a positive multiple of 14"):
            DinoFeatures(str(folder), size=size)

    def test_unknown_tokens_are_refused(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="tokens='mean' is unknown; use one of all, patch, cls"):
            DinoFeatures(str(folder), tokens="mean")

    def test_another_model_is_refused(self, tmp_path: Path) -> None:
        config = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32
        )
        CLIPVisionModel(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a 'clip_vision_model' model; give a 'dinov2'"):
            DinoFeatures(str(tmp_path))


class TestWeights:
    def test_files_with_the_published_key_names_are_read(self, folder: Path, tmp_path: Path) -> None:
        names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
        names["o_proj"] = "output.dense"
        state = {}
        for key, value in load_file(folder / "model.safetensors").items():
            for new, old in names.items():
                key = key.replace(f".attention.{new}.", f".attention.{old}.")
            state[key] = value
        assert "encoder.layer.0.attention.attention.query.weight" in state
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        x_01 = images(1, 3, 42, 42)
        assert torch.equal(DinoFeatures(str(tmp_path))(x_01), DinoFeatures(str(folder))(x_01))

    def test_a_folder_without_config_or_weights_is_an_error_in_one_line(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(WeightsNotFoundError, match=r"config\.json is missing"):
            DinoFeatures(str(tmp_path))
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(WeightsNotFoundError, match="'model' cannot be read") as caught:
            DinoFeatures(str(tmp_path))
        assert "\n" not in str(caught.value)

    def test_the_root_of_a_repository_is_fetched(self, folder: Path, serve: Callable[[Path], list[str]]) -> None:
        asked = serve(folder)
        assert DinoFeatures("someone/small").width == 16
        assert {"*.json", "model.safetensors"} <= set(asked)
        assert not [pattern for pattern in asked if pattern.startswith("/")]

    def test_a_repository_in_the_cache_is_read_from_it(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        home = tmp_path / "models--someone--small"
        (home / "snapshots").mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("0" * 40)
        (home / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)
        x_01 = images(1, 3, 42, 42)
        assert torch.equal(DinoFeatures("someone/small")(x_01), DinoFeatures(str(folder))(x_01))


class TestTiny:
    def test_is_the_same_at_each_call_and_leaves_the_random_state_alone(self) -> None:
        x_01 = images(1, 3, 64, 64)
        state = torch.get_rng_state()
        first = DinoFeatures("tiny")
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        assert torch.equal(DinoFeatures("tiny")(x_01), first(x_01))
        assert not torch.equal(DinoFeatures("tiny", seed=1)(x_01), first(x_01))

    def test_has_the_width_of_the_embedded_unets_condition(self) -> None:
        config = json.loads((sources.TINY / "unet" / "config.json").read_text())
        features = DinoFeatures("tiny")
        assert features.width == config["cross_attention_dim"] == 32
        assert sum(p.numel() for p in features.parameters()) == 47_136
        assert features(images(2, 3, 128, 128)).shape == (2, features.num_tokens(128, 128), 32) == (2, 82, 32)

    def test_says_that_it_is_random(self, caplog: pytest.LogCaptureFixture) -> None:
        DinoFeatures("tiny")
        assert "random weights: 'model' of pretrained='random:dinov2_tiny'" in caplog.text

    def test_tells_images_and_places_apart(self) -> None:
        f = DinoFeatures("tiny")(images(2, 3, 126, 126))
        assert (f[0] - f[1]).abs().mean() > 0.3
        assert f.std(dim=1).mean() > 0.3


class TestCondition:
    def test_no_image_is_all_zeros(self) -> None:
        like = images(2, 5, 16)
        assert torch.equal(DinoFeatures.null_features(like), torch.zeros(2, 5, 16))

    def test_a_cross_attention_layer_does_not_see_the_order_of_the_tokens(self, folder: Path) -> None:
        f = DinoFeatures(str(folder))(images(2, 3, 56, 70))
        torch.manual_seed(0)
        attention = Attention(query_dim=12, cross_attention_dim=16, heads=2, dim_head=8).eval()
        hidden = torch.randn(2, 9, 12)
        order = torch.randperm(f.shape[1])
        with torch.no_grad():
            out = attention(hidden, encoder_hidden_states=f)
            assert_close(attention(hidden, encoder_hidden_states=f[:, order]), out)
            assert (attention(hidden, encoder_hidden_states=f.flip(0)) - out).abs().max() > 1e-3
