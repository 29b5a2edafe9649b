"""Where a command writes its results, and which files there it may replace."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import inside
from common.made import begin, refuse_alike, refuse_foreign

if TYPE_CHECKING:
    from common.training import TrainingModule

log = logging.getLogger(__name__)


@dataclass
class Output:
    """The output of a run.

    Args:
        folder: Folder of a test or prediction; null for one in the run's folder.
        file: File of the only predicted image, in place of a folder.
        skip_existing: Leave predicted files that are there as they are.
        can_skip: True if the method's prediction follows `skip_existing`.
        run_name: Name of the run in tables; null for the logger's.
        images: Folder for images that no logger takes.
        skipped: Number of images that this prediction has left as they are.
    """

    folder: Path | None = None
    file: Path | None = None
    skip_existing: bool = False
    can_skip: bool = False
    run_name: str | None = None
    images: Path = Path("images")
    skipped: int = 0

    def of(self, stage: str, module: TrainingModule) -> Path:
        """The folder that a command writes into; reading the run's is a broadcast, so all processes must do so.

        Args:
            stage: "fit", "validate", "test" or "predict".
            module: The module, whose trainer knows the run's folder.
        """
        if self.file is not None:
            return self.file.parent
        if self.folder is not None:
            return self.folder / "test" if stage == "test" else self.folder
        run = Path(module.trainer.log_dir or ".")
        return run / stage if stage in ("test", "predict") else run

    def target(self, folder: Path, name: str, file_type: str) -> Path:
        """The file that an image is predicted to.

        Args:
            folder: Folder of the prediction.
            name: The image's name.
            file_type: Ending of the file, where the user names none.

        Raises:
            ValueError: It would lie outside the folder.
        """
        return self.file or inside(folder, f"{name}.{file_type}")

    def skips(self, targets: Sequence[Path]) -> bool:
        """True, and counted, if the files of a batch are to be left as they are.

        Raises:
            FileExistsError: They are not, and one was not made by isr.
        """
        if self.skip_existing and all(target.is_file() for target in targets):
            self.skipped += len(targets)
            return True
        refuse_foreign(targets)
        return False

    def log_skipped(self) -> None:
        """Log the number of images that were left as they are, and start to count anew."""
        if self.skipped:
            log.warning("%d images were there already and are left as they are", self.skipped)
        self.skipped = 0

    def check(self, stage: str, module: TrainingModule) -> None:
        """Check the output before anything is loaded, and begin the record of what a test or prediction makes.

        Args:
            stage: "fit", "validate", "test" or "predict".
            module: The module, with its trainer, its data and the files that it predicts.

        Raises:
            FileExistsError: A file that would be written is there, no prediction has made it, and it is not to be kept.
            ValueError: The output is, holds or lies in an input, or one file would hold several images.
        """
        folder, data, trainer = self.of(stage, module), module.data_info, module.trainer
        if self.file is not None and stage == "predict":
            count = len(data.names_to_predict())
            if count != 1:
                raise ValueError(f"output={self.file} is one file, and predict has {count} images; give a folder")
            data.check_apart(stage, self.file, within=True)
        elif self.folder is not None or trainer.loggers:
            data.check_apart(stage, folder, within=stage in ("fit", "validate"))
            if stage in ("test", "predict"):
                # older runs have no record
                begin(folder, adopt=self.folder is None and trainer.log_dir is not None)
        if stage != "predict":
            return
        files = module.predicted_files(folder)
        refuse_alike(folder, files)
        if self.can_skip and not self.skip_existing:
            refuse_foreign(files, "give another output, or --skip_existing true to leave them as they are")
        elif not self.can_skip:
            refuse_foreign(files)


def name_of_run(trainer: Any) -> str | None:
    """Name of a run: its folder's, as the logger knows it; None without a logger."""
    name = getattr(trainer.logger, "name", None)
    return str(name).rpartition("/")[2] if name else None
