"""Training of every method: optimisers by turns, reproducible draws, averages, small checkpoints.

A training stage derives from `TrainingModule` and writes `configure_networks`, `training_step` and
`configure_optimizers`; it names what it trains in `trainable`. Discriminators, teachers and the networks of losses it
makes in `configure_training`, so that a prediction neither loads nor holds them. One that restores images derives from
`common.restoration.RestorationModule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from common.checkpoints import (
    check_fit,
    drop_objects,
    keep_only,
    kept_keys,
    load_trained_weights,
    matching,
    read_checkpoint,
    without,
)
from common.conditioning.fixed_texts import FixedTexts
from common.datainfo import DataInfo
from common.draws import Draws, counted_index, places
from common.ema import EMA
from common.guard import StepGuard
from common.images import as_float
from common.loggers import BarNumbers, show_image
from common.output import Output, name_of_run
from common.parameters import Row, rows_of
from common.precision import FrozenDtype, TestPrecision, log_precision
from common.processes import gathered
from common.schedules import check_schedules
from common.stages import EarlierStages, Stage
from common.updates import Update, Updates

T = TypeVar("T")
Batch = dict[str, Any]
"""`lq` (B,3,h,w) and `hq` (B,3,s*h,s*w), uint8 or float in [0,1]; `prompt`, `name`: list[str]; `index`: (B,) int64."""


class TrainingModule(LightningModule):
    """Base of all training stages; see the file's head.

    Args:
        seed: Random seed of new weights and of all draws made in training; null takes `--seed_everything`, 0 in Python.
        ema_decay: Decay of the average of the trained weights, which then is what gets validated and tested.
        clip: Limit of each optimiser's gradient norm; null for none.
        accumulate: Batches whose gradients make one update.
        frozen_dtype: Dtype of frozen denoisers and of DINOv2; VAE, text encoders and networks of losses are float32.

    Attributes:
        trainable: Optimiser -> name patterns of the parameters it trains, in the optimisers' order; the first one sets
            the pace.
        training_only: Those children with trained weights that `configure_training` makes.
        without_prompts: How to train without prompts, for the message that refuses data without them.
        test_precision: Precision of validation, test and prediction.
        inference_only: Set before `configure_model`: leave out what only training needs. Lightning's test and predict
            do so anyway.
        awaits_checkpoint: True if a checkpoint will be loaded; null where that is not known yet.
        train_step: Calls of `training_step` begun, micro-batches included.
        stages: Earlier stages that this one builds on.
        fixed_texts: Prompts that never change.
        guard: Stops a fit at a loss or gradient that is not finite.
        updates: Updates of the optimisers.
        output: Where a command writes.
        bar: Training's numbers in the progress bar.
    """

    trainable: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    training_only: ClassVar[tuple[str, ...]] = ()
    without_prompts: ClassVar[str] = ""
    test_precision: TestPrecision = "float32"
    inference_only: bool = False
    awaits_checkpoint: bool | None = None
    train_step: Tensor

    def __init__(
        self,
        seed: int | None = None,
        ema_decay: float | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        frozen_dtype: FrozenDtype = "float32",
    ) -> None:
        super().__init__()
        # checkpoints hold no frozen base; on_load_checkpoint checks the rest
        self.automatic_optimization = self.strict_loading = False
        self.seed, self.clip, self.accumulate, self.frozen_dtype = seed or 0, clip, accumulate, frozen_dtype
        self.ema = EMA(ema_decay) if ema_decay is not None else None
        self.register_buffer("train_step", torch.zeros((), dtype=torch.long))
        self._steps = 0  # train_step on the host: to read the device's would make it wait
        self._has_networks = self._has_training = False  # what `configure_model` has built
        self.stages, self.fixed_texts = EarlierStages(), FixedTexts()
        self.guard, self.updates, self.output, self.bar = StepGuard(), Updates(accumulate), Output(), BarNumbers()

    # Networks

    def configure_model(self) -> None:
        """Build the networks and load the frozen weights, each part once; Lightning may call this more than once.

        It switches cuDNN's attention off: on an H100 with torch 2.11 its backward pass gave DNF-SR's transformer NaN
        gradients in bf16 (pytorch/pytorch#196678); the other kernels gave none.
        """
        torch.backends.cuda.enable_cudnn_sdp(False)
        if not self._has_networks:
            self.configure_networks()
            self._has_networks = True
        if not self._has_training and self.builds_training():
            self.configure_training()
            self._has_training = True

    def builds_training(self) -> bool:
        """True if parts that only training needs are built; false where Lightning validates, tests or predicts."""
        looking = (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING)
        return not self.inference_only and (self._trainer is None or self.trainer.state.fn not in looking)

    def configure_networks(self) -> None:
        """Build what inference needs, and load its frozen weights; default: nothing."""

    def configure_training(self) -> None:
        """Build what only training needs; default: nothing."""

    def left_out(self, name: str) -> bool:
        """True if a dotted name belongs to a child that only training needs and that has not been built."""
        return not self._has_training and name.partition(".")[0] in self.training_only

    def networks(self) -> dict[str, nn.Module]:
        """The method's networks by the name that `isr parameters` prints; default: its direct children."""
        return dict(self.named_children())

    def parameter_rows(self) -> list[Row]:
        """Rows of `isr parameters`: for each of `networks` its own weights and its adapters, each parameter once.

        Override to add networks that are not part of the method, such as text encoders (kind `text`).
        """
        return rows_of(self.networks(), self.all_trainable().values(), self.ema is not None)

    def parameter_sums(self) -> dict[str, int]:
        """Sums of rows that the paper publishes, by name; default: none."""
        return {}

    # Earlier stages, prompts and data

    @property
    def may_await_checkpoint(self) -> bool:
        """False where it is known that no checkpoint comes."""
        return self.awaits_checkpoint if self.awaits_checkpoint is not None else self._trainer is not None

    def restore_stage(self, argument: str, stage: Stage) -> None:
        """Put what a checkpoint holds of an earlier stage in the place of what its file gave; default: refuse.

        Raises:
            ValueError: The checkpoint holds only a digest.
        """
        self.stages.refuse(argument, stage)

    def wants_prompts(self) -> str | None:
        """The setting (`argument=value`) that makes the data's prompts the condition; default: None, no prompts."""
        return None

    @property
    def data_info(self) -> DataInfo:
        """Facts that the run's data module knows."""
        return DataInfo(getattr(self.trainer, "datamodule", None))

    def setup(self, stage: str) -> None:
        """Check the output; refuse a fit, and warn of other commands, whose texts the data does not have."""
        self.output.check(TrainerFn(stage).value, self)
        log_precision(str(self.trainer.precision), self.test_precision)
        self.data_info.check_texts(TrainerFn(stage).value, self)

    # Training

    def trainable_parameters(self, optimizer: str) -> list[nn.Parameter]:
        """The parameters of one of the optimisers that `trainable` names."""
        return list(matching(self, self.trainable_patterns()[optimizer]).values())

    def trainable_patterns(self) -> Mapping[str, tuple[str, ...]]:
        """`trainable`, less what this configuration switches off; override where it does."""
        return self.trainable

    def all_trainable(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its dotted name, less those that are `left_out`."""
        return matching(self, [p for ps in self.trainable_patterns().values() for p in ps if not self.left_out(p)])

    def optimizer_turn(self, name: str) -> AbstractContextManager[Update]:
        """One optimiser's turn: only its parameters require grad, and the yielded function updates them by a loss.

        The update runs backward and, at the end of an accumulation window, clips (after unscaling), steps, advances the
        scheduler and zeroes. Only the first optimiser's steps count as Lightning's `global_step`, so that `max_steps`,
        checkpoints and schedules count train steps, not optimiser calls. `common.updates.Update` has its options.
        """
        return self.updates.turn(self, name)

    @property
    def update_step(self) -> int:
        """Number of the update that the present batch is part of, from 1; `accumulate` batches make one update."""
        return -(-self._steps // self.accumulate)

    @property
    def is_accumulating(self) -> bool:
        """True if the present batch only adds its gradient; the last one of an update makes the optimisers step."""
        return self._steps % self.accumulate != 0

    def draws(self, batch: Batch) -> Draws:
        """Random numbers for this batch that resume and several processes reproduce."""
        if "index" in batch:
            return Draws(self.seed, batch["index"], self.device)
        index = counted_index(len(batch["lq"]), self._steps - 1, self.trainer.world_size, self.global_rank)
        return Draws(self.seed, index, self.device)

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's, but training's numbers are means over all processes: what one process with all samples logs."""
        super().log(name, value, *args, **self.bar.taken(name, kwargs))

    def show_image(self, name: str, image: Tensor) -> None:
        """Give an image (3,H,W) in [0,1] to every logger that takes images, else to the run's folder."""
        show_image(self.trainer, name, image, self.output.images)

    # Lightning's hooks, in their order in a fit

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Bring a batch to the device, but for `index`, which only the host reads."""
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), **places(batch)}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Convert images, which come as uint8, to float in [0,1]."""
        return as_float(batch)

    def on_fit_start(self) -> None:
        """Check that earlier stages and texts are there, and start the guard."""
        self.stages.check()
        self.fixed_texts.encode(self)
        folder = Path(self.trainer.log_dir or ".")  # reading it is a broadcast: all processes must
        self.output.images = folder / "images"
        self.guard.start(list(self.trainable_patterns()), folder, self.global_rank)

    def on_train_start(self) -> None:
        """Read where the run stands, once, and compare the schedules with the run's length."""
        self._steps = int(self.train_step)
        check_schedules(self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count the step before it runs, so that a checkpoint made after it agrees."""
        self.train_step += 1
        self._steps += 1
        self.guard.begin(self._steps, batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, and leave out a step that is not finite."""
        self.updates.before_step(self, optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Show the step's numbers in the bar, and stop if the step before this one was not finite."""
        self.bar.update(self.trainer)
        self.guard.end(agreed=not self.is_accumulating)

    def on_train_end(self) -> None:
        """Stop if the last step was not finite."""
        self.guard.stop_if_found()

    # Validation, test and prediction use the averaged weights

    def swap_ema(self) -> None:
        """Exchange the trained weights and their averages; a second call undoes it."""
        if self.ema is not None:
            self.ema.swap(self.all_trainable())

    def on_validation_start(self) -> None:
        """Put the averages in; the end of the epoch takes them out."""
        self.stages.check()
        self.fixed_texts.encode(self)
        if self._trainer is not None:
            self.output.images = self.output_folder("validate") / "images"
        self.swap_ema()

    def on_validation_epoch_end(self) -> None:
        """Take the averages out: before `on_validation_end`, in which ModelCheckpoint saves the weights."""
        self.swap_ema()

    on_test_start = on_predict_start = on_validation_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    @property
    def run_name(self) -> str:
        """Name of this run in tables: its folder's."""
        return self.output.run_name or name_of_run(self.trainer) or type(self).__name__

    def output_folder(self, stage: str) -> Path:
        """The folder that a command writes into: "fit", "validate", "test" or "predict"; a broadcast."""
        return self.output.of(stage, self)

    def predicted_files(self, folder: Path) -> list[Path]:
        """The files that a prediction will write into a folder, as far as the data knows them; default: none."""
        return []

    def gathered(self, mine: list[T]) -> list[T]:
        """The lists of all processes, one after the other."""
        return gathered(mine, self.trainer.world_size)

    # Checkpoints hold what is trained

    def checkpoint_keys(self) -> set[str]:
        """State-dict keys that a checkpoint of this method holds."""
        return kept_keys(self, self.all_trainable())

    def start_from(self, path: str | Path) -> None:
        """Take the trained weights of a checkpoint, for a new fit with a new optimiser.

        Args:
            path: The checkpoint.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It does not fit.
        """
        load_trained_weights(self, path, self.checkpoint_keys())
        self.stages.compare(read_checkpoint(path), path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the frozen base and settings that are objects; add averages, earlier stages and fixed texts.

        Raises:
            NonFiniteLossError: The last step was not finite; the checkpoint before it stays.
        """
        self.guard.stop_if_found()
        drop_objects(checkpoint)
        keep_only(checkpoint, self.checkpoint_keys())
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()
        checkpoint |= self.stages.record() | self.fixed_texts.record(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that it fits before anything is loaded, and take what it holds of earlier stages and of texts."""
        checkpoint.update(without(checkpoint, self.left_out))
        check_fit(self, checkpoint, self.checkpoint_keys(), "the checkpoint")
        if self.ema is not None:
            self.ema.load_checkpoint(checkpoint, self.all_trainable())
        self.stages.take(checkpoint, self.restore_stage)
        self.fixed_texts.take(self, checkpoint)
        self._steps = int(checkpoint["state_dict"].get("train_step", 0))
