"""Training of every method: optimisers by turns, reproducible draws, averages, small checkpoints.

A training stage derives from `TrainingModule` and writes `configure_networks`, `training_step` and
`configure_optimizers`; it names what it trains in `trainable`. Discriminators, teachers and the networks of losses it
makes in `configure_training`, so that a prediction neither loads nor holds them. One that restores images derives from
`common.restoration.RestorationModule`.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from common.checkpoints import (
    check_keys,
    check_shapes,
    is_plain,
    kept_keys,
    load_trained_weights,
    matching,
    read_checkpoint,
    without,
)
from common.conditioning.text import encode_prompts
from common.datainfo import DataInfo
from common.draws import Draws
from common.ema import EMA
from common.guard import Guard, save_batch
from common.images import write_png
from common.loading import is_architecture_only
from common.loggers import file_name, show
from common.made import begin, refuse_alike, refuse_foreign
from common.metrics import to_uint8
from common.parameters import Row, rows_of
from common.precision import FrozenDtype, TestPrecision
from common.schedules import check_schedules
from common.stages import Stage, recorded

log = logging.getLogger(__name__)

T = TypeVar("T")
Batch = dict[str, Any]
"""`lq` (B,3,h,w) and `hq` (B,3,s*h,s*w), uint8 or float in [0,1]; `prompt`, `name`: list[str]; `index`: (B,) int64."""


class NonFiniteLossError(RuntimeError):
    """A loss or its gradient became NaN or infinite; its batch was saved and changed no weight and no average."""


class TrainingModule(LightningModule):
    """Base of all training stages; see the file's head.

    Args:
        seed: Random seed of new weights and of all draws made in training; null takes `--seed_everything`, 0 in Python.
        ema_decay: Decay of the average of the trained weights, which then is what gets validated and tested.
        clip: Limit of each optimiser's gradient norm; null for none.
        accumulate: Batches whose gradients make one update.
        frozen_dtype: Dtype of frozen denoisers and of DINOv2; VAE, text encoders and networks of losses are float32.
    """

    trainable: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Optimiser -> name patterns of the parameters it trains, in the optimisers' order; the first one sets the pace."""
    training_only: ClassVar[tuple[str, ...]] = ()
    """Those children with trained weights that `configure_training` makes."""
    without_prompts: ClassVar[str] = ""
    """How to train without prompts, for the message of `check_prompts`."""
    test_precision: TestPrecision = "float32"
    """Precision of validation, test and prediction."""
    inference_only = False
    """Set before `configure_model`: leave out what only training needs. Lightning's test and predict do so anyway."""

    def __init__(
        self,
        seed: int | None = None,
        ema_decay: float | None = None,
        clip: float | None = 1.0,
        accumulate: int = 1,
        frozen_dtype: FrozenDtype = "float32",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # the frozen base is not in checkpoints; on_load_checkpoint checks the rest
        self.seed, self.clip, self.accumulate = seed or 0, clip, accumulate
        self.frozen_dtype = frozen_dtype
        self.ema = EMA(ema_decay) if ema_decay is not None else None
        if accumulate < 1:
            raise ValueError(f"accumulate={accumulate} is out of range; set 1 or more batches an update")
        self.register_buffer("train_step", torch.zeros((), dtype=torch.long))
        self.train_step: Tensor  # calls of training_step begun, micro-batches included
        self.results_dir: Path | None = None  # where test and predict write; default: in the run's folder
        self.given_name: str | None = None  # of the run, in tables; default: the logger's
        self._has_networks = self._has_training = False  # what `configure_model` has built
        self._run_dir = Path(".")
        self._grad_norm = torch.zeros(())
        self.stages: dict[str, Stage] = {}  # earlier stages, by the argument that names each
        self.awaits_checkpoint: bool | None = None  # None: unknown before it comes
        self._missing_stages: dict[str, FileNotFoundError] = {}
        self._texts: dict[str, tuple[str, str]] = {}  # buffers of fixed texts: the encoder's base and the prompt
        self._steps = 0  # train_step on the host: to read the device's would make it wait
        self._batches: deque[tuple[int, Batch]] = deque(maxlen=2)  # the last ones, with their train steps
        self._guard: Guard | None = None
        self._skips: bool | Tensor = False  # whether the optimiser in turn does without its step

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

    # Earlier stages

    def miss_stage(self, argument: str, error: FileNotFoundError) -> None:
        """Go on without the file of an earlier stage, as the checkpoint to come may hold what is needed of it.

        Args:
            argument: The setting that names the stage.
            error: Raised now where no checkpoint comes, else before anything is run.

        Raises:
            FileNotFoundError: No checkpoint comes.
        """
        if not self._may_await_checkpoint:
            raise error
        self._missing_stages[argument] = error

    @property
    def _may_await_checkpoint(self) -> bool:
        """False where it is known that no checkpoint comes."""
        return self.awaits_checkpoint if self.awaits_checkpoint is not None else self._trainer is not None

    def check_stages(self) -> None:
        """Refuse to run without an earlier stage.

        Raises:
            FileNotFoundError: Neither its file nor the checkpoint has it.
        """
        for error in self._missing_stages.values():
            raise error

    def take_stages(self, checkpoint: Mapping[str, Any]) -> None:
        """Use the earlier stages that a checkpoint was trained with, also if their files have changed.

        Args:
            checkpoint: A checkpoint of this method.

        Raises:
            ValueError: A file holds other weights now, and the checkpoint has only their digest.
        """
        kept = recorded(checkpoint.get("stages", {}))
        for argument in (*self.stages, *self._missing_stages):
            here, stage = self.stages.get(argument), kept.get(argument)
            if stage is None and here is not None:
                log.warning(
                    "the checkpoint does not hold its earlier stage: %s=%s is used as it is", argument, here.path
                )
            elif stage is not None and (here is None or here.digest != stage.digest):
                if here is not None:
                    log.warning("%s=%s holds other weights than this checkpoint's run had", argument, here.path)
                self.restore_stage(argument, stage)
                self.stages[argument] = stage
                self._missing_stages.pop(argument, None)

    def restore_stage(self, argument: str, stage: Stage) -> None:
        """Put what a checkpoint holds of an earlier stage in the place of what its file gave; default: refuse.

        Raises:
            ValueError: The checkpoint holds only a digest.
        """
        raise ValueError(
            f"{argument}={self.stages[argument].path} holds other weights than the stage that this checkpoint was "
            f"trained on ({stage.path}); restore those, or train this stage again"
        )

    # Fixed texts

    def fix_text(self, name: str, pretrained: str, prompt: str) -> None:
        """Hold a prompt's embedding, (1,N,D), in a buffer; checkpoints hold it too, so that they need no text encoder.

        Where a checkpoint may come, the buffer stays empty until `take_texts` or `encode_texts`.

        Args:
            name: Name of the buffer.
            pretrained: Where tokenizer and text encoder come from, see `common.loading`.
            prompt: The prompt.
        """
        self._texts[name] = (pretrained, prompt)
        waits = self._may_await_checkpoint and not is_architecture_only()
        embedding = torch.empty(0) if waits else encode_prompts(pretrained, [prompt])
        self.register_buffer(name, embedding, persistent=False)

    def take_texts(self, checkpoint: Mapping[str, Any]) -> None:
        """Use the embeddings that a checkpoint holds of the same prompts and text encoders."""
        kept = checkpoint.get("texts", {})
        for name, (pretrained, prompt) in self._texts.items():
            text = kept.get(name)
            if text is not None and (text["pretrained"], text["prompt"]) == (pretrained, prompt):
                self._set_text(name, text["embedding"])

    def encode_texts(self) -> None:
        """Encode the fixed texts that no checkpoint brought.

        Raises:
            WeightsNotFoundError: The text encoder is not there and cannot be fetched.
        """
        for name, (pretrained, prompt) in self._texts.items():
            if not self.get_buffer(name).numel():
                self._set_text(name, encode_prompts(pretrained, [prompt]))

    def _set_text(self, name: str, embedding: Tensor) -> None:
        setattr(self, name, embedding.clone().to(self.get_buffer(name)))  # clone: the checkpoint's file may be replaced

    def _texts_record(self) -> dict[str, Any]:
        """Fixed texts as a checkpoint holds them."""
        return {
            name: {"pretrained": pretrained, "prompt": prompt, "embedding": self.get_buffer(name)}
            for name, (pretrained, prompt) in self._texts.items()
        }

    # Training

    def trainable_parameters(self, optimizer: str) -> list[nn.Parameter]:
        """The parameters of one of the optimisers that `trainable` names."""
        return list(matching(self, self.trainable_patterns()[optimizer]).values())

    def trainable_patterns(self) -> Mapping[str, tuple[str, ...]]:
        """`trainable`, less what this configuration switches off; override where it does."""
        return self.trainable

    def all_trainable(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its dotted name, less those that are `left_out`."""
        patterns = [pattern for patterns in self.trainable_patterns().values() for pattern in patterns]
        return matching(self, [pattern for pattern in patterns if not self.left_out(pattern)])

    def wants_prompts(self) -> str | None:
        """The setting (`argument=value`) that makes the data's prompts the condition; default: None, no prompts."""
        return None

    def setup(self, stage: str) -> None:
        """Check the output; refuse a fit, and warn of other commands, whose texts the data does not have."""
        self.check_output(TrainerFn(stage).value)
        if str(self.trainer.precision).endswith("-mixed"):
            rank_zero_info(
                f"trainer.precision={self.trainer.precision} holds for training steps; validation, test and prediction "
                f"compute in {self.test_precision}"
            )
        wanted = self.wants_prompts()
        if wanted is None:
            return
        if stage == "fit":
            self.check_prompts(wanted)
        split = {"fit": "val", "validate": "val"}.get(stage, stage)
        if getattr(self, "captioner", None) is None and not self.data_info.has_prompts(split):
            log.warning(
                "%s: the %s images have no prompts, so each gets the empty text; give data.prompts", wanted, split
            )

    def check_prompts(self, wanted: str) -> None:
        """Refuse training data without prompts.

        Args:
            wanted: Setting that reads them, `argument=value`.

        Raises:
            ValueError: No training image has a prompt.
        """
        if not self.data_info.has_prompts("train"):
            raise ValueError(
                f"{wanted} reads the prompts of the training images, and none has one; give data.prompts (isr caption "
                f"writes them){self.without_prompts}"
            )

    @property
    def data_info(self) -> DataInfo:
        """Facts that the run's data module knows."""
        return DataInfo(getattr(self.trainer, "datamodule", None))

    @property
    def update_step(self) -> int:
        """Number of the update that the present batch is part of, from 1; `accumulate` batches make one update."""
        return -(-self._steps // self.accumulate)

    def draws(self, batch: Batch) -> Draws:
        """Random numbers for this batch that resume and several processes reproduce."""
        index = batch.get("index")
        if index is None:  # a foreign data module: count what this run has seen
            size = len(batch["lq"])
            first = ((self._steps - 1) * self.trainer.world_size + self.global_rank) * size
            index = torch.arange(first, first + size)
        return Draws(self.seed, index, self.device)

    @contextmanager
    def turn(self, name: str) -> Iterator[Callable[[Tensor], None]]:
        """One optimiser's turn: only its parameters require grad, and the yielded function updates them by a loss.

        The update runs backward and, at the end of an accumulation window, clips (after unscaling), steps, advances the
        scheduler and zeroes. Only the first optimiser's steps count as Lightning's `global_step`, so that `max_steps`,
        checkpoints and schedules count train steps, not optimiser calls.
        """
        order = list(self.trainable_patterns())
        which = order.index(name)
        optimizers = self.optimizers(use_pl_optimizer=True)
        optimizer: Any = optimizers[which] if isinstance(optimizers, list) else optimizers

        def update(loss: Tensor) -> None:
            self.check_loss(name, loss)
            self.manual_backward(loss / self.accumulate)
            if self._steps % self.accumulate:
                self._check_gradient(optimizer.optimizer)
                return
            if which:
                optimizer._on_before_step = optimizer._on_after_step = lambda: None
            optimizer.step()
            # not in the hook: Lightning drops an epoch's first numbers when two hooks log by turns
            self.log(f"grad_norm/{name}", self._grad_norm)
            optimizer.zero_grad()
            schedulers: Any = self.lr_schedulers()
            schedulers = schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []
            for scheduler in schedulers:
                if getattr(scheduler, "optimizer", None) is optimizer.optimizer:
                    scheduler.step()
            if which == 0 and self.ema is not None and self._skips is not True:
                self.ema.update(self.all_trainable(), self._skips if isinstance(self._skips, Tensor) else None)

        with self.toggled_optimizer(optimizer):
            yield update

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, after mixed precision has unscaled the gradients, and keep the optimiser from a bad step.

        Optimisers made with `fused=true` read that on the device. For all others, and under 16-mixed, whose gradient
        scaler waits for the device too, the host waits once an update: their gradients become None, since zeroed ones
        would still decay weights and move them by what they remember.
        """
        scaler = self._scaler
        if scaler is not None and _is_fused(optimizer):
            scaler.unscale_(optimizer)  # Lightning leaves it to the optimiser, and scaled gradients would be clipped
        parameters = _with_gradient(optimizer)
        self._grad_norm = nn.utils.clip_grad_norm_(parameters, self.clip if self.clip is not None else float("inf"))
        guard = self._check_gradient(optimizer, self._grad_norm)
        guard.reduce()
        skips = guard.found | ~torch.isfinite(self._grad_norm)
        if scaler is None and _is_fused(optimizer):
            self._skips = skips
            optimizer.grad_scale, optimizer.found_inf = None, skips.float()  # type: ignore[attr-defined]
            return
        self._skips = bool(skips)
        if self._skips:
            for parameter in parameters:
                parameter.grad = None

    @property
    def _scaler(self) -> Any:
        """The gradient scaler of 16-mixed, else None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _guarding(self, device: torch.device) -> Guard:
        if self._guard is None:
            self._guard = Guard(device)
        return self._guard

    def check_loss(self, name: str, loss: Tensor) -> None:
        """Note on the device whether a loss, of the optimiser of that name, is finite; `turn` does so for its own."""
        order = list(self.trainable_patterns())
        self._guarding(loss.device).note(loss, self._code(order.index(name), 0))

    def _check_gradient(self, optimizer: torch.optim.Optimizer, norm: Tensor | None = None) -> Guard:
        """Note whether an optimiser's gradients are finite; a scaler that can still go down may overflow them."""
        if norm is None:
            gradients = [p.grad for p in _with_gradient(optimizer) if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        scale = None if self._scaler is None else self._scaler._get_scale_async()  # get_scale() waits for the device
        every: Any = self.optimizers(use_pl_optimizer=False)
        which = every.index(optimizer) if isinstance(every, list) else 0
        guard = self._guarding(norm.device)
        guard.note(norm, self._code(which, 1), unless=None if scale is None else scale > 1)
        return guard

    def _code(self, which: int, kind: int) -> int:
        """Number of a finding: train step, place of the optimiser, 0 for its loss and 1 for its gradient."""
        return 2 * (self._steps * len(self.trainable_patterns()) + which) + kind

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Lightning's, but training's numbers are means over all processes: what one process with all samples logs."""
        kwargs["sync_dist"] = kwargs.get("sync_dist", False) or name.startswith("train/")
        super().log(name, value, *args, **kwargs)

    def on_train_start(self) -> None:
        """Read where the run stands, once, and compare the schedules with the run's length."""
        self._steps = int(self.train_step)
        check_schedules(self.trainer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Count the step before it runs, so that a checkpoint made after it agrees."""
        self.train_step += 1
        self._steps += 1
        self._batches.append((self._steps, batch))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stop if the step before this one was not finite: the device has done that one and may still do this one."""
        if self._guard is None:
            return
        if self._steps % self.accumulate:
            self._guard.reduce()
        self._stop_if(self._guard.exchange())

    def on_train_end(self) -> None:
        """Stop if the last step was not finite."""
        self._stop_if_not_finite()

    def _stop_if_not_finite(self) -> None:
        if self._guard is not None:
            self._stop_if(self._guard.now())

    def _stop_if(self, code: int | None) -> None:
        """Save the batch of a finding and raise, in every process alike.

        Raises:
            NonFiniteLossError: There is one.
        """
        if code is None:
            return
        assert self._guard is not None
        place, kind = divmod(code, 2)
        step, which = divmod(place, len(self.trainable_patterns()))
        path = self.save_batch("nonfinite", step)
        name = list(self.trainable_patterns())[which]
        value = float(self._guard.value)
        found = "not finite in another process" if math.isfinite(value) else str(value)
        raise NonFiniteLossError(
            f"the {name} {('loss', 'gradient norm')[kind]} is {found} at train step {step}; the batch is in {path}, no "
            "weight and no average was changed by it, and the last checkpoint is of a step before it: lower the "
            "learning rate, or look at that batch"
        )

    def save_batch(self, what: str, step: int) -> Path:
        """Write this process's batch of a train step, one of the last two, into the run's folder.

        Args:
            what: Begin of the file's name.
            step: The train step.

        Returns:
            The file, which holds plain tensors, texts and numbers.
        """
        path = self._run_dir / f"{what}_step{step}_rank{self.global_rank}.pt"
        save_batch(dict(self._batches)[step], path)
        return path

    # Images come as uint8 and become float on the device

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """uint8 to float in [0,1]."""
        for key in ("lq", "hq"):
            if key in batch and batch[key].dtype == torch.uint8:
                batch[key] = batch[key].float() / 255
        return batch

    def on_fit_start(self) -> None:
        """Note the run's folder, once earlier stages and texts are there, and forget what an earlier fit found."""
        self.check_stages()
        self.encode_texts()
        self._guard = None
        self._run_dir = Path(self.trainer.log_dir or ".")  # reading it is a broadcast: all processes must

    @property
    def run_name(self) -> str:
        """Name of this run in tables: its folder's."""
        name = self.given_name or getattr(self.trainer.logger, "name", None)
        return str(name).rpartition("/")[2] if name else type(self).__name__

    def _results(self) -> Path:
        return self.results_dir or Path(self.trainer.log_dir or ".")

    def output_folder(self, stage: str) -> Path:
        """The folder that a command writes into; reading it is a broadcast, so all processes must do so.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        folder = self._results()
        if stage == "predict":
            return self.results_dir or folder / stage
        return folder / stage if stage == "test" else folder

    def check_output(self, stage: str) -> None:
        """Refuse to write among the images that are read, and begin the record of what a test or prediction makes.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            FileExistsError: See `check_predicted`.
            ValueError: The output folder is, holds or lies in an input.
        """
        folder, in_run = self.output_folder(stage), self.results_dir is None
        if not in_run or self.trainer.loggers:
            self.data_info.check_apart(stage, folder, within=stage in ("fit", "validate"))
            if stage in ("test", "predict"):
                begin(folder, adopt=in_run and self.trainer.log_dir is not None)  # older runs have no record
        if stage == "predict":
            self.check_predicted(folder)

    def check_predicted(self, folder: Path) -> None:
        """Refuse to overwrite files that no prediction has made, before anything is loaded.

        Args:
            folder: Where the prediction writes.

        Raises:
            FileExistsError: A file that would be written is there and was not made by a prediction.
            ValueError: Two files would be one.
        """
        targets = self.predicted_files(folder)
        refuse_alike(folder, targets)
        refuse_foreign(targets)

    def predicted_files(self, folder: Path) -> list[Path]:
        """The files that a prediction will write into a folder, as far as the data knows them; default: none."""
        return []

    def _dataset_name(self, stage: str, dataloader_idx: int) -> str:
        names = self.data_info.dataset_names(stage)
        return str(names[dataloader_idx]) if dataloader_idx < len(names) else f"{stage}{dataloader_idx}"

    def gathered(self, mine: list[T]) -> list[T]:
        """The lists of all processes, one after the other."""
        if self.trainer.world_size == 1:
            return mine
        parts: list[list[T]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(parts, mine)
        return [item for part in parts for item in part]

    def show_image(self, name: str, image: Tensor) -> None:
        """Give an image (3,H,W) in [0,1] to every logger that takes images; not in the sanity check.

        Where no logger does, it is written to `images` in the run's folder.
        """
        if self.trainer.sanity_checking or not self.trainer.is_global_zero:
            return
        step = self.trainer.global_step
        shown = [show(logger, name, image, step) for logger in self.trainer.loggers]
        if shown and not any(shown):
            pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
            write_png(self._run_dir / "images" / f"{file_name(name)}_step{step}.png", pixels)

    # Validation, test and prediction use the averaged weights

    def _swap_ema(self) -> None:
        if self.ema is not None:
            self.ema.swap(self.all_trainable())

    def on_validation_start(self) -> None:
        """Put the averages in; the end of the epoch takes them out."""
        self.check_stages()
        self.encode_texts()
        if self._trainer is not None:
            self._run_dir = self._results()  # reading it is a broadcast: all processes must
        self._swap_ema()

    def on_validation_epoch_end(self) -> None:
        """Take the averages out: before `on_validation_end`, in which ModelCheckpoint saves the weights."""
        self._swap_ema()

    on_test_start = on_predict_start = on_validation_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

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
        kept = recorded(read_checkpoint(path).get("stages", {}))
        for argument, stage in self.stages.items():
            if argument in kept and kept[argument].digest != stage.digest:
                log.warning("init_from=%s was trained with another %s than %s", path, argument, stage.path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the frozen base, and settings that are objects: a Python program gives networks and functions.

        Raises:
            NonFiniteLossError: The last step was not finite; the checkpoint before it stays.
        """
        self._stop_if_not_finite()
        settings = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        plain = {key: value for key, value in settings.items() if is_plain(value)}
        if len(plain) < len(settings):
            dropped = ", ".join(sorted(settings.keys() - plain.keys()))
            log.warning("settings that are Python objects are not in the checkpoint: %s", dropped)
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = plain
        keys = self.checkpoint_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keys}
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()
        if self.stages:
            checkpoint["stages"] = {argument: stage.record() for argument, stage in self.stages.items()}
        if self._texts:
            checkpoint["texts"] = self._texts_record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that it fits before anything is loaded, and take what it holds of earlier stages and of texts."""
        checkpoint.update(without(checkpoint, self.left_out))
        check_keys(self.checkpoint_keys(), set(checkpoint["state_dict"]), "the checkpoint")
        check_shapes(self, checkpoint["state_dict"], "the checkpoint")
        if self.ema is not None:
            if "ema" not in checkpoint:
                raise ValueError("ema_decay is set and the checkpoint holds no average; set model.ema_decay=null")
            self.ema.load_state_dict(checkpoint["ema"], self.all_trainable())
        self.take_stages(checkpoint)
        self.take_texts(checkpoint)
        self._steps = int(checkpoint["state_dict"].get("train_step", 0))


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """True if an optimiser reads on the device that it must skip its step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _with_gradient(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
