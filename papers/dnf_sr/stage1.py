"""Stage 1's checkpoint, read for stage 2: its policy v_ref and its encoder E_ref."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from common.adapters import add_lora, load_adapter_state, merge, vae_encoder_targets
from common.checkpoints import read_stage, resolved, trained_state
from common.loading import HUB_ID, is_architecture_only
from common.stages import Stage, digest

if TYPE_CHECKING:
    from papers.dnf_sr.nf2t import NF2T

log = logging.getLogger(__name__)

SHARED = ("pretrained", "frozen_dtype", "input", "t_mid", "clean_estimate", "guidance", "lora_rank", "lora_alpha")
"""Settings that must be stage 1's."""
SHARED_IN_FIT = ("prompt_suffix", "max_tokens")
"""Settings that must be stage 1's in a fit of stage 2; a test may use others."""


class StageOne(NamedTuple):
    """Adapters of stage 1, as `load_adapter_state` takes them."""

    v_ref: dict[str, Tensor]
    """The transformer's."""
    stage: Stage
    """Record for stage 2's checkpoints; its weights are the encoder's adapter."""


def open_stage_one(model: NF2T) -> StageOne | None:
    """Read stage 1's checkpoint and note it in stage 2.

    Args:
        model: Stage 2, before its networks are built.

    Returns:
        Its adapters; None within `architecture_only()`, and if the file is missing but a checkpoint of stage 2 comes.

    Raises:
        FileNotFoundError: There is no such checkpoint, and no checkpoint of stage 2 comes.
        ValueError: It is another stage's, or was trained with other settings.
    """
    if is_architecture_only():
        return None
    try:
        checkpoint = read_stage(model.sft, "sft", "papers.dnf_sr.DNFSR")
    except FileNotFoundError as error:
        model.stages.miss("sft", error, awaited=model.may_await_checkpoint)
        return None
    for key in (*SHARED, *(SHARED_IN_FIT if model.builds_training() else ())):
        here = getattr(model, key)
        _check_setting(model.sft, key, checkpoint["hyper_parameters"].get(key, here), here)
    state = {key: value.clone() for key, value in trained_state(checkpoint).items() if "lora_" in key}  # mapped
    v_ref, encoder = _adapter_of(state, "flow.transformer."), _adapter_of(state, "codec.vae.")
    stage = Stage(resolved(model.sft), digest(state), encoder, {"v_ref": digest(v_ref)})
    model.stages["sft"] = stage
    return StageOne(v_ref, stage)


def _check_setting(path: str, key: str, before: Any, here: Any) -> None:
    """Refuse another setting than stage 1's; warn if a folder may hold the same weights under another name."""
    if before == here or (key == "pretrained" and _is_same_place(before, here)):
        return
    difference = f"sft={path} was trained with {key}={before}, here is {key}={here}"
    if key != "pretrained":
        raise ValueError(f"{difference}; set model.{key}={before}")
    if _is_name(before) and _is_name(here):
        raise ValueError(f"{difference}; set model.pretrained={before}, or to a folder with those weights")
    log.warning("%s. Make sure that both hold the same weights; their names do not show it.", difference)


def merge_encoder(vae: nn.Module, adapter: dict[str, Tensor], rank: int, alpha: float) -> None:
    """Make E_ref: merge stage 1's adapter into the encoder.

    Args:
        vae: The VAE.
        adapter: The adapter, see `StageOne`.
        rank: Its rank.
        alpha: Its alpha.
    """
    add_lora(vae, rank, alpha, vae_encoder_targets(vae))
    load_adapter_state(vae, adapter)
    merge(vae)


def _is_same_place(one: str, other: str) -> bool:
    """True if both paths are the same folder."""
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _is_name(pretrained: str) -> bool:
    """True if the name fixes the weights: a hub id, `tiny` or `random:<architecture>`; a folder may hold any."""
    if pretrained == "tiny" or pretrained.startswith("random:"):
        return True
    return HUB_ID.fullmatch(pretrained) is not None and not Path(pretrained).is_dir()


def _adapter_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The adapter of the network at `prefix` in a checkpoint of stage 1."""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key.replace(".default.", "."): value for key, value in inside.items()}
