"""Groups that a reward could not score: its value is not finite, so the group has no preference."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from common.guard import Later, StepGuard
from common.processes import reduce

log = logging.getLogger(__name__)

MOST_UNSCORED = 5
"""Train steps in a row with a reward that is not finite, after which a fit stops."""
MOST_SAVED = 10
"""Batches with such a reward that one process saves; the others are only counted."""


class UnscoredError(RuntimeError):
    """A reward gave numbers that are not finite, step after step."""


class UnscoredGroups:
    """Counts such groups in a fit, on the device, and reports each train step one step later without a wait."""

    def __init__(self) -> None:
        self._later, self._saved = Later(), 0
        self._counts = torch.zeros(3, dtype=torch.long)  # steps in a row with any, groups in this step, in all steps

    def count(self, found: Tensor) -> None:
        """Count the groups of a train step."""
        row, _, in_all = self._counts.to(found.device)
        self._counts = torch.stack([torch.where(found > 0, row + 1, 0), found, in_all + found])

    def report(self, step: int, guard: StepGuard) -> None:
        """Log the groups of the train step before, and save its batch; a collective operation.

        Args:
            step: The train step before.
            guard: Guard that keeps its batch.

        Raises:
            UnscoredError: A process had such a group in each of the last steps; all processes raise it.
        """
        longest = self._counts[0].clone()
        reduce(longest, "MAX")
        counts = self._later.exchange(torch.cat([self._counts, longest[None]]))
        if counts is None:
            return
        _, found, in_all, row = counts.tolist()
        if found:
            saved = f"; only the first {MOST_SAVED} such batches are saved"
            if self._saved < MOST_SAVED:
                self._saved += 1
                saved = f"; the batch is in {guard.save_batch('unscored', step)}"
            log.warning(
                "a reward is not finite for %d groups at train step %d: they have no preference (%d so far)%s",
                *(found, step, in_all, saved),
            )
        if row >= MOST_UNSCORED:
            raise UnscoredError(
                f"a reward is not finite in {row} train steps in a row, up to step {step}: the last checkpoint is "
                f"unharmed. Inspect {guard.folder}/unscored_*.pt, or leave that reward out of model.rewards."
            )
