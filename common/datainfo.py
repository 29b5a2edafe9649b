"""Facts that a module asks of its data module. `data.SRData` knows them all; a foreign data module may know none."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
