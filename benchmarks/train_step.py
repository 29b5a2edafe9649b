"""Time and memory of one training step of a configuration that restores images, by network, on random images.

    python benchmarks/train_step.py [-c CONFIG [-c OVERLAY ...]] [--steps N] [--batch B [B ...]] [--model.ARG=VALUE ...]

Default: DFOSD's demo. Crop and global batch are the configuration's unless given; precision and accelerator too.
Each batch size takes one step before the clock starts (texts are encoded and remembered, the optimisers' moments are
made), then N steps that are timed as a whole, then N steps that are timed network by network, which on a GPU waits for
each network and so takes longer. A network's time is that of its forward calls; `backward` includes what gradient
checkpointing computes again.

Where all weights are `tiny` or random, neither network nor data set are needed. On a GPU, DNF-SR's 12 B transformer:

    python benchmarks/train_step.py -c papers/dnf_sr/configs/kontext_sft.yaml --model.pretrained=random:flux_kontext \
        --model.dists_weights=random --model.disc=random:dinov3_vitb16

T5 stays loaded, as the configuration says; its 9.5 GB leave with --model.keep_text_encoders=false. Stage 2 stands on a
stage 1:

    isr fit -c papers/dnf_sr/configs/demo/01_sft.yaml --trainer.max_steps 2 --runs /tmp/runs
    python benchmarks/train_step.py -c papers/dnf_sr/configs/demo/02_nf2t.yaml --model.sft=/tmp/runs/dnf_sr/demo-sft
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.autoencoder import ImageCodec
from common.loading import random_on_device
from common.metrics import to_uint8
from common.restoration import RestorationModule
from common.training import Batch
from launch.parameters import parse

DEFAULT = Path(__file__).parents[1] / "papers/dfosd/configs/demo/01_dfosd.yaml"
BACKWARD, OPTIMISERS, REST = "backward", "optimisers", "rest: losses, rewards, draws, logging"


@dataclass
class Steps:
    """Figures of the training steps of one batch size."""

    seconds: list[float] = field(default_factory=list)  # of each step that is timed as a whole
    parts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of each step timed by part
    calls: dict[str, int] = field(default_factory=dict)  # of the last step
    flops: int = 0  # of the first step, forward and backward
    waits: dict[str, int] | None = None  # by file and line, of the last step; None where no GPU is
    peak: int = 0  # bytes: allocated on the GPU in the timed steps, or resident since the process began

    def by_part(self) -> list[float]:
        """Seconds of each step that is timed by part."""
        return [sum(parts) for parts in zip(*self.parts.values(), strict=True)]


class Parts:
    """Shares time out among networks and other parts, some within others; it waits for the GPU at each change."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.timed = False
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[str] = []  # parts that have begun, one within the other
        self._since = 0.0

    def watch(self, networks: Mapping[str, Any]) -> None:
        """Make a part of each network's forward calls, and of a VAE's encoder and decoder."""
        for name, network in networks.items():
            parts = {name: network}
            if isinstance(network, ImageCodec):  # its two methods are no calls of the module
                parts = {f"{name}, encoder": network.vae.encoder, f"{name}, decoder": network.vae.decoder}
            for part, module in parts.items():
                module.register_forward_pre_hook(partial(self._begin_network, part))
                module.register_forward_hook(self._end_network, always_call=True)

    def restart(self, timed: bool) -> None:
        """Forget all seconds and calls."""
        self.timed, self.seconds, self.calls = timed, defaultdict(float), defaultdict(int)
        self.wait()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that lasts as long as this context."""
        self.begin(name)
        yield
        self.end()

    def begin(self, name: str) -> None:
        """Open a part within the one that is open."""
        self._charge()
        self._open.append(name)
        self.calls[name] += 1

    def end(self) -> None:
        """Close the innermost part."""
        self._charge()
        self._open.pop()

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _begin_network(self, name: str, *_: Any) -> None:
        if BACKWARD not in self._open:  # where checkpointing calls networks again
            self.begin(name)

    def _end_network(self, *_: Any) -> None:
        if BACKWARD not in self._open:
            self.end()

    def _charge(self) -> None:
        """Charge the time since the last change to the innermost part."""
        if not self.timed:
            return
        self.wait()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class Waits:
    """Counts where Python waits for the GPU because it reads or copies a tensor's values."""

    def __init__(self) -> None:
        self._recorder: warnings.catch_warnings[Any] | None = None  # from `begin` to `end`
        self._caught: list[warnings.WarningMessage] = []

    def begin(self) -> None:
        """Have torch warn at each wait."""
        self._recorder = warnings.catch_warnings(record=True)
        caught = self._recorder.__enter__()
        assert caught is not None  # it records
        self._caught = caught
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def end(self) -> dict[str, int] | None:
        """Stop, and return the number of waits by file and line; None if none were counted, as on other devices."""
        if self._recorder is None:
            return None
        torch.cuda.set_sync_debug_mode("default")
        self._recorder.__exit__(None, None, None)
        self._recorder = None
        waits = [caught for caught in self._caught if "synchronizing CUDA" in str(caught.message)]
        return dict(Counter(f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}" for each in waits))


class _WholeStep:
    """Takes the place of a FLOP counter's tracker of modules, whose hooks keep what checkpointing computes again."""

    parents: ClassVar = {"Global"}

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Clock(Callback):
    """Times whole steps, then shares steps out among networks, backward passes and optimisers.

    Args:
        steps: Number of steps of each batch size that are timed as a whole; the rest are timed by part.
        count_flops: Count the operations of each batch size's first step.
    """

    def __init__(self, steps: int, count_flops: bool = False) -> None:
        self.found: dict[int, Steps] = defaultdict(Steps)  # by batch size
        self.device = torch.device("cpu")  # the model's while it is trained
        self._steps, self._count_flops = steps, count_flops
        self._taken = 0  # steps of this batch size
        self._parts, self._waits = Parts(), Waits()
        self._flops: FlopCounterMode | None = None  # while a step's operations are counted

    @property
    def _by_part(self) -> bool:
        return self._taken > self._steps

    def on_fit_start(self, trainer: Trainer, model: Any) -> None:
        """Watch the networks, the backward passes and the optimisers."""
        self.device = self._parts.device = model.device
        self._parts.watch(model.networks())
        backward = model.manual_backward

        @wraps(backward)
        def timed(loss: Tensor) -> None:
            with self._parts.part(BACKWARD):
                backward(loss)

        model.manual_backward = timed
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self._parts.begin(OPTIMISERS))
            optimizer.register_step_post_hook(lambda *_: self._parts.end())

    def on_train_batch_start(self, trainer: Trainer, model: Any, batch: Batch, batch_idx: int) -> None:
        """Start, and with the first timed step of a batch size the peak of the memory, too."""
        size = len(batch["hq"])
        if size not in self.found:
            self._taken = 0
        self._now = self.found[size]
        if self._taken == 0 and self._count_flops:
            self._flops = FlopCounterMode(display=False)
            self._flops.mod_tracker = _WholeStep()
            self._flops.__enter__()
        if self._taken == 1 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if self._by_part and self.device.type == "cuda":
            self._waits.begin()
        self._parts.restart(timed=self._by_part)
        self._parts.begin(REST)
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, model: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Keep the step's times, except the first one's."""
        self._parts.end()
        self._parts.wait()
        if self._flops is not None:
            self._now.flops = self._stop_counting()
        elif 0 < self._taken <= self._steps:
            self._now.seconds.append(time.perf_counter() - self._start)
        elif self._by_part:
            for part, seconds in self._parts.seconds.items():
                self._now.parts[part].append(seconds)
            self._now.waits = self._waits.end()
        self._now.calls = self._parts.calls
        if self.device.type == "cuda":
            self._now.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._now.peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._taken += 1

    def on_exception(self, trainer: Trainer, model: Any, exception: BaseException) -> None:
        """Leave no mode of torch behind, which would slow down and fill what runs next."""
        self._stop_counting()
        self._waits.end()

    def _stop_counting(self) -> int:
        """Operations of the step, 0 where they are not counted."""
        if self._flops is None:
            return 0
        flops, self._flops = self._flops, None
        flops.__exit__(None, None, None)
        return flops.get_total_flops()


def section(configs: Sequence[str | Path], name: str) -> dict[str, Any]:
    """The trainer's settings of config files, or the data's, later files over earlier ones."""
    settings: dict[str, Any] = {}
    for config in configs:
        found = yaml.safe_load(Path(config).read_text()).get(name) or {}
        settings |= found.get("init_args", {}) if name == "data" else found
    return settings


def random_parts(settings: Mapping[str, Any]) -> list[str]:
    """The settings that ask for random weights."""
    return [f"{key}={value}" for key, value in settings.items() if str(value) == "random" or "random:" in str(value)]


def batches(count: int, size: int, crop: int, scale: int) -> list[Batch]:
    """Noise as photos, with one text for all."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(count):
        hq = torch.rand(size, 3, crop, crop, generator=generator)
        found.append(
            {
                "hq": to_uint8(hq),
                "lq": to_uint8(F.avg_pool2d(hq, scale)),
                "prompt": ["a house by a lake"] * size,
                "name": [str(i) for i in range(size)],
                "index": torch.arange(step * size, (step + 1) * size),
            }
        )
    return found


@dataclass
class Measured:
    """Result of `measure`: the settings, the figures by batch size, and the trained model."""

    settings: dict[str, Any]
    stored: dict[str, Any]  # as a checkpoint's hyper_parameters
    precision: str
    device: torch.device
    built: float  # seconds
    found: dict[int, Steps]
    model: Any
    trainer: Trainer


def measure(
    configs: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    crop: int,
    sizes: Sequence[int],
    steps: int,
    by_part: int,
    accelerator: str = "auto",
    count_flops: bool = False,
    prepare: Callable[[Any], None] | None = None,
    found: dict[int, Steps] | None = None,
) -> Measured:
    """Run training steps of a configuration on random images, one batch size after the other.

    Args:
        configs: Config files, later ones over earlier ones.
        overrides: Further arguments, `--model.ARG=VALUE`.
        crop: Side of the HQ crops, px.
        sizes: Batch sizes.
        steps: Steps of each size that are timed as a whole.
        by_part: Steps of each size that are timed by part.
        accelerator: The Trainer's.
        count_flops: Count the operations of each size's first step.
        prepare: Called with the model once its networks are there.
        found: Where the figures go, which then are there even if a larger batch runs out of memory.
    """
    trained = section(configs, "trainer")
    precision = str(trained.get("precision", "32-true"))
    model_parser, parsed = parse(configs, overrides)
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    start = time.perf_counter()
    with torch.device("cuda") if on_gpu else nullcontext():
        model: RestorationModule = model_parser.instantiate(parsed).model
        model.configure_model()
    if prepare is not None:
        prepare(model)
    built = time.perf_counter() - start

    clock = Clock(steps, count_flops)
    if found is not None:
        clock.found = found
    trainer = Trainer(
        max_epochs=1, accelerator=accelerator, devices=1, precision=precision, callbacks=[clock],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    scale = getattr(model, "scale", 4)
    photos: Any = [batch for size in sizes for batch in batches(1 + steps + by_part, size, crop, scale)]
    trainer.fit(model, torch.utils.data.DataLoader(photos, batch_size=None))
    settings = parsed.model.init_args.as_dict()
    dumped = yaml.safe_load(model_parser.dump(parsed))["model"]
    stored = {"_class_path": dumped["class_path"], **dumped["init_args"]}
    return Measured(settings, stored, precision, clock.device, built, clock.found, model, trainer)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", action="append", help="later ones over earlier ones")
    parser.add_argument("--steps", type=int, default=5, help="number of timed steps of each kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--crop", type=int, help="HQ px")
    parser.add_argument("--batch", type=int, nargs="+", help="images; several sizes run one after the other")
    options, overrides = parser.parse_known_args(argv)
    configs = options.config or [DEFAULT]
    torch.set_num_threads(options.threads)
    data, trained = section(configs, "data"), section(configs, "trainer")
    batch = data.get("global_batch_size") or data.get("batch_size")
    crop, sizes = options.crop or data["crop_size"], options.batch or [batch]

    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    accelerator = trained.get("accelerator", "auto")
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    with random_on_device("cuda" if on_gpu else "cpu"):
        measured = measure(
            configs,
            overrides,
            crop=crop,
            sizes=sizes,
            steps=options.steps,
            by_part=options.steps,
            accelerator=accelerator,
        )

    where = torch.cuda.get_device_name(measured.device) if on_gpu else f"CPU, {options.threads} thread(s)"
    for size, found in measured.found.items():
        print(
            f"{', '.join(map(str, configs))}: {size} x {crop} px, {measured.precision}, {where}, {options.steps} steps"
        )
        names = ", ".join(random_parts(measured.settings)) or "none"
        print(f"random weights: {names}; random images; built in {measured.built:.1f} s")
        whole = median(found.by_part())
        for part, times in sorted(found.parts.items(), key=lambda item: -median(item[1])):
            calls = "" if part == REST else f"{found.calls[part]} x"
            print(f"  {part:<40}{calls:>6}{1e3 * median(times):11.1f} ms {median(times) / whole:6.0%}")
        print(f"  {'one step, by part':<46}{1e3 * whole:11.1f} ms")
        seconds = found.seconds
        spread = f"({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"
        print(f"  {'one step':<46}{1e3 * median(seconds):11.1f} ms   {spread}")
        memory = "allocated at most in these steps" if on_gpu else "resident at most, the building included"
        print(f"  {'memory':<46}{found.peak / 1e9:11.2f} GB   ({memory})")


if __name__ == "__main__":
    main()
