"""Loaders of networks: from weights where the source has them, else built with random values."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from common.errors import one_line
from common.loading.drawing import drawing_weights, is_architecture_only, network_device
from common.loading.sources import HUB_ID, SD21_BASE, TINY, WeightsFolder, WeightsNotFoundError, locate, not_found
from common.parameters import count

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_RANDOM_SEED = 0
_T5_TOKENS = 512  # T5's training length, which FLUX's tokenizer has, too
_LARGE = 10**9  # parameters


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
    source = locate(pretrained, subfolder, weights=True)
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

    source = locate(pretrained, subfolder, weights=True)
    model = _load_transformers_model(source, pretrained, subfolder, dtype)
    if source.has_weights:
        folder = locate(pretrained, tokenizer_subfolder, weights=False).root / tokenizer_subfolder
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
    source = locate(pretrained, "", weights=True)
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
    source = locate(pretrained, "scheduler", weights=False)
    return _read_config(source.root, "scheduler", pretrained, "scheduler_config.json")


def _load_transformers_model(
    source: WeightsFolder, pretrained: str, subfolder: str, dtype: torch.dtype | None, seed: int = _RANDOM_SEED
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
        unet = _read_config(locate(pretrained, unet_subfolder, weights=False).root, unet_subfolder, pretrained)
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
            raise not_found(pretrained, subfolder, reason) from error
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
