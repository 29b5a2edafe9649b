"""Settings of stage 2 that contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from papers.dnf_sr.nf2t import NF2T


def check_settings(model: NF2T) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ValueError: They do.
    """
    if model.group_size < 2:
        raise ValueError(f"group_size={model.group_size} is out of range; a group to compare in has 2 or more")
    if model.input == "lr":
        raise ValueError("input=lr takes no noise, so all restorations of a group are equal; use dual or mix")
    if model.updates_per_rollout == "K" and model.accumulate != 1:
        raise ValueError(
            f"accumulate={model.accumulate} with updates_per_rollout=K: each update is of one batch; set "
            "accumulate=1 and the photos of an update by data.global_batch_size or data.batch_size, or set "
            "updates_per_rollout=1"
        )
    off_policy = model.updates_per_rollout != 1 or model.eta_schedule != "hard_copy" or model.accumulate != 1
    if model.fast_on_policy and (off_policy or model.variant != "nf2t"):
        raise ValueError(
            "fast_on_policy=true holds where v = v_old: set variant=nf2t, updates_per_rollout=1, "
            "eta_schedule=hard_copy and accumulate=1, or fast_on_policy=false"
        )
    if model.nft_kl and model.variant != "nft":
        raise ValueError(f"nft_kl={model.nft_kl} with variant={model.variant}: set variant=nft, or nft_kl=0")
