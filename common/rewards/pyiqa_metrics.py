"""pyiqa's no-reference metrics as rewards: CLIP-IQA with its gradient, the others as scores; weights on demand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.draws import own_random_state
from common.pyiqa import load_pyiqa
from common.rewards.base import Reward

logger = logging.getLogger(__name__)


class PyiqaReward(Reward):
    """A no-reference metric of pyiqa, negated where lower is better.

    pyiqa is imported, and its network read or downloaded, at the first call or by `load`. It is not a submodule, so
    `train()`, `to()`, `state_dict()` and DDP do not reach it (MANIQA in train mode takes random crops). It follows the
    images' device. Calls draw from a random state of their own. The prompts are not read.

    CLIP-IQA is pyiqa's: RN50 without positional embedding, the mean over five pairs of antonyms, within (0, 1).

    Args:
        metric: pyiqa's name, e.g. `clipiqa`, `musiq`, `maniqa-pipal`, `laion_aes`.
        differentiable: Let the gradient through to the images; pyiqa promises none for metrics but `clipiqa`.
    """

    def __init__(self, metric: str, differentiable: bool = False) -> None:
        super().__init__()
        self.metric = metric
        self.name = f"pyiqa:{metric}"
        self.differentiable = differentiable
        if metric.startswith("qalign"):
            logger.warning("%s is a reward now: among DNF-SR's metrics it ceases to be the independent one.", self.name)
        self._loaded: tuple[Any, torch.device] | None = None  # a tuple, which nn.Module does not look into

    def load(self, device: torch.device | str = "cpu") -> None:
        """Import pyiqa and read the metric's weights, downloaded where absent.

        Args:
            device: Where the network runs.

        Raises:
            ValueError: pyiqa has no such metric, or it scores folders or compares with a reference.
            MetricUnavailableError: pyiqa is not installed, or the weights are not available.
        """
        device = torch.empty(0, device=device).device  # "cuda" with its index, as images have it
        if self._loaded is not None and self._loaded[1] == device:
            return
        with torch.inference_mode(False):  # a test may load it before a fit uses it
            model, _ = load_pyiqa(self.metric, device)
        if model.metric_mode == "FR":
            raise ValueError(
                f"pyiqa's {self.metric} compares with a reference; use neg_mse, neg_lpips or neg_dists for that."
            )
        model.as_loss, model.loss_reduction = self.differentiable, "none"  # else pyiqa returns no gradient, or a mean
        for network in (model, *getattr(model.net, "clip_model", [])):  # CLIP hides in a list
            network.requires_grad_(False).eval()
        self._loaded = model, device

    def _score(self, x: Tensor, prompts: Sequence[str], hq: Tensor | None) -> Tensor:
        self.load(x.device)
        assert self._loaded is not None
        model = self._loaded[0]
        with own_random_state(x.device):
            score = model(x.float()).reshape(len(x)).float()
        return -score if model.lower_better else score
