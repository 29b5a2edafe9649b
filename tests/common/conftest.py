"""What several tests here need: an empty Hugging Face cache, and a hub."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from common.loading import sources


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """Makes the hub give a folder for any repository; the list returned fills with the patterns asked for."""

    def served(folder: Path) -> list[str]:
        asked: list[str] = []

        def snapshot(repo: str, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
            if local_files_only:
                raise FileNotFoundError(repo)
            asked.extend(allow_patterns or [])
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        monkeypatch.setattr(sources, "_raise_without_network", lambda repo, subfolder: None)
        return asked

    return served
