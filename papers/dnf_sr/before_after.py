"""The comparison in a test of stage 2: the same images with the same noise, before and after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.metrics import to_uint8
from common.training import Batch
from papers.dnf_sr.figures import Comparison, write_comparison
from papers.dnf_sr.module import Conditions

if TYPE_CHECKING:
    from papers.dnf_sr.nf2t import NF2T


class BeforeAfter:
    """Rewards of test images by stage 1's policy and by theta."""

    def __init__(self) -> None:
        self._rows: list[Comparison] = []

    def add(self, model: NF2T, batch: Batch, conditions: Conditions, batch_idx: int, loader: int) -> None:
        """Restore a batch with several noises by both policies, and note the rewards.

        Args:
            model: Stage 2, in a test.
            batch: The batch.
            conditions: Conditions of its images.
            batch_idx: Number of the batch in its loader.
            loader: Number of the loader.
        """
        dataset, size = model.data_info.dataset_name("test", loader), len(batch["name"])
        numbers = batch.get("index", torch.arange(batch_idx * size, (batch_idx + 1) * size))  # a foreign data module
        drawn = [loader == 0 and int(number) == model.pictured for number in numbers]
        for noise in range(max(model.compared, model.group_size if any(drawn) else 0)):
            same_noise = conditions._replace(noise=noise)
            after = model.upscale(batch["lq"], batch["prompt"], same_noise).sr
            with model.policies.stage_one():
                before = model.upscale(batch["lq"], batch["prompt"], same_noise).sr
            scores = [_scores(model, x, batch) for x in (before, after)]
            for i, name in enumerate(batch["name"]):
                one, other = ({metric: float(values[i]) for metric, values in score.items()} for score in scores)
                images = (before[i].cpu(), after[i].cpu()) if drawn[i] and noise < model.group_size else None
                self._rows.append(Comparison(dataset, name, noise, one, other, images))

    def write(self, model: NF2T) -> dict[str, float]:
        """Write the rewards of all processes' images, draw the samples, and empty the comparison.

        Returns:
            Numbers to log, in the first process.
        """
        gathered, self._rows = model.gathered(self._rows), []
        # an image that two processes saw only once
        rows = list({(row.dataset, row.image, row.noise): row for row in gathered}.values())
        folder = model.output_folder("test")
        if not rows or not model.trainer.is_global_zero:
            return {}
        numbers: dict[str, float] = {}
        for gain in write_comparison(folder, rows, model.compared):
            values = {"before": gain.before, "after": gain.after, "low": gain.low, "high": gain.high}
            numbers |= {f"test/{gain.metric}/{key}": value for key, value in values.items()}
        return numbers


def _scores(model: NF2T, x_01: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Raw rewards and PSNR-Y, each (B,)."""
    scores = model.score(x_01, batch)
    psnr = model.scores.metric("psnr_y", model.device)
    if "hq" in batch and not isinstance(psnr, str):
        pairs = zip(to_uint8(x_01), to_uint8(batch["hq"]), strict=True)
        values = [psnr(*(image.permute(1, 2, 0).cpu().numpy() for image in pair)) for pair in pairs]
        scores["psnr_y"] = torch.tensor(values)
    return scores
