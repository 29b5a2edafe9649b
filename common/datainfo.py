"""Facts that a module asks of its data module. `data.SRData` knows them all; a foreign data module may know none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.training import TrainingModule

log = logging.getLogger(__name__)


class DataInfo:
    """Facts of a data module after its `setup`; each has a default where the data module has no such attribute.

    Args:
        datamodule: A data module of anyone's, or None.
    """

    def __init__(self, datamodule: Any) -> None:
        self._datamodule = datamodule

    def has_prompts(self, split: str) -> bool:
        """False if no image of `train`, `val`, `test` or `predict` has a prompt; default: True."""
        return bool(self._ask("has_prompts", True, split))

    def texts(self) -> list[str]:
        """Distinct prompts of the training and validation images; default: none."""
        found: list[str] = self._ask("texts", [])
        return found

    def dataset_names(self, split: str) -> list[str]:
        """Names of the sets of `val` or `test`, one for each loader; default: none."""
        names: dict[str, list[str]] = getattr(self._datamodule, "dataset_names", {})
        return names.get(split, [])

    def dataset_name(self, split: str, loader: int) -> str:
        """Name of the set of one loader of `val` or `test`; default: the split with the loader's number."""
        names = self.dataset_names(split)
        return str(names[loader]) if loader < len(names) else f"{split}{loader}"

    def check_prompts(self, wanted: str, alternative: str = "") -> None:
        """Refuse training data without prompts.

        Args:
            wanted: Setting that reads them, `argument=value`.
            alternative: How to train without prompts, for the message.

        Raises:
            ValueError: No training image has a prompt.
        """
        if not self.has_prompts("train"):
            raise ValueError(
                f"{wanted} reads the prompts of the training images, and none has one; give data.prompts (isr caption "
                f"writes them){alternative}"
            )

    def check_texts(self, stage: str, module: TrainingModule) -> None:
        """Refuse a fit without prompts, and warn of other images without, where prompts are the condition.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            module: The module. A captioner of its own writes the texts of other than training images.

        Raises:
            ValueError: It is a fit, and no training image has a prompt.
        """
        wanted = module.wants_prompts()
        if wanted is None:
            return
        if stage == "fit":
            self.check_prompts(wanted, module.without_prompts)
        captioned = getattr(module, "captioner", None) is not None
        split = {"fit": "val", "validate": "val"}.get(stage, stage)
        if not captioned and not self.has_prompts(split):
            log.warning(
                "%s: the %s images have no prompts, so each gets the empty text; give data.prompts", wanted, split
            )

    def names_to_predict(self) -> list[str]:
        """Names of the images to predict; default: none."""
        found: list[str] = self._ask("names_to_predict", [])
        return found

    def check_apart(self, stage: str, output: Path, within: bool = False) -> None:
        """Refuse an output folder that is, holds or lies in an input of a stage; default: accept it.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.
            output: The folder.
            within: Accept input files in the folder.

        Raises:
            ValueError: It is, holds or lies in an input.
        """
        self._ask("check_apart", None, stage, output, within)

    def _ask(self, name: str, default: Any, *args: Any) -> Any:
        method = getattr(self._datamodule, name, None)
        return default if method is None else method(*args)
