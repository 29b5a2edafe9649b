"""Time and memory of one training step of a configuration that restores images, by network, on random images.

    python benchmarks/train_step.py [-c CONFIG [-c OVERLAY ...]] [--steps N] [--model.ARG=VALUE ...]

Default: DFOSD's demo. Crop and batch are the configuration's unless given; precision and accelerator are its own. A
network's time is that of its forward calls; `backward` includes what gradient checkpointing computes again. One step
comes before the clock starts: in it texts are encoded, to be remembered, and the optimisers' moments are made.

Where all weights are `tiny` or random, neither network nor data set are needed. On a GPU, DNF-SR's 12 B transformer:

    python benchmarks/train_step.py -c papers/dnf_sr/configs/kontext_sft.yaml --model.pretrained=random:flux_kontext \
        --model.dists_weights=random --model.disc=random:dinov3_vitb16

Its weights are drawn on the CPU, which takes minutes and 24 GB there. T5 stays loaded, as the configuration says; its
9.5 GB leave with --model.keep_text_encoders=false. Stage 2 stands on a stage 1:

    isr fit -c papers/dnf_sr/configs/demo/01_sft.yaml --trainer.max_steps 2 --runs /tmp/runs
    python benchmarks/train_step.py -c papers/dnf_sr/configs/demo/02_nf2t.yaml --model.sft=/tmp/runs/dnf_sr/demo-sft
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from common.autoencoder import ImageCodec
from common.metrics import to_uint8
from common.restoration import RestorationModule
from common.training import Batch
from launch.parameters import parse

DEFAULT = Path(__file__).parents[1] / "papers/dfosd/configs/demo/01_dfosd.yaml"
BACKWARD, OPTIMISERS, REST = "backward", "optimisers", "rest: losses, rewards, draws, logging"


class Clock(Callback):
    """Shares the time of each step out among networks, backward passes and optimisers: each moment is one part's."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)  # of each step
        self.calls: dict[str, int] = defaultdict(int)  # of the last step
        self.peak = 0  # bytes
        self.device = torch.device("cpu")  # the model's while it is trained
        self._spent: dict[str, float] = {}
        self._parts: list[str] = []  # those that have begun, one within the other
        self._since = 0.0

    def on_fit_start(self, trainer: Trainer, model: Any) -> None:
        """Watch the networks, the backward passes and the optimisers."""
        self.device = model.device
        for name, network in model.networks().items():
            parts = {name: network}
            if isinstance(network, ImageCodec):  # its two methods are no calls of the module
                parts = {f"{name}, encoder": network.vae.encoder, f"{name}, decoder": network.vae.decoder}
            for part, module in parts.items():
                module.register_forward_pre_hook(partial(self._begin_network, part))
                module.register_forward_hook(self._end_network)
        backward = model.manual_backward

        @wraps(backward)
        def timed(loss: Tensor) -> None:
            with self._part(BACKWARD):
                backward(loss)

        model.manual_backward = timed
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(lambda *_: self._begin(OPTIMISERS))
            optimizer.register_step_post_hook(lambda *_: self._end())

    def on_train_batch_start(self, trainer: Trainer, model: Any, batch: Batch, batch_idx: int) -> None:
        """Start, and with the first timed step the peak of the memory, too."""
        if batch_idx == 1 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._spent, self.calls = defaultdict(float), defaultdict(int)
        self._begin(REST)

    def on_train_batch_end(self, trainer: Trainer, model: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Keep the step's times, but the first one's."""
        self._end()
        for part, seconds in self._spent.items() if batch_idx else ():
            self.seconds[part].append(seconds)

    def on_train_end(self, trainer: Trainer, model: Any) -> None:
        """Read the peak: what CUDA has handed out, or what was resident since the process began."""
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def steps(self) -> list[float]:
        """Seconds of each step."""
        return [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]

    @contextmanager
    def _part(self, part: str) -> Iterator[None]:
        self._begin(part)
        yield
        self._end()

    def _begin_network(self, part: str, *_: Any) -> None:
        if BACKWARD not in self._parts:  # where checkpointing calls networks again
            self._begin(part)

    def _end_network(self, *_: Any) -> None:
        if BACKWARD not in self._parts:
            self._end()

    def _begin(self, part: str) -> None:
        self._charge()
        self._parts.append(part)
        self.calls[part] += 1

    def _end(self) -> None:
        self._charge()
        self._parts.pop()

    def _charge(self) -> None:
        """What has passed since the last change is the innermost part's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._parts:
            self._spent[self._parts[-1]] += now - self._since
        self._since = now


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", action="append", help="later ones over earlier ones")
    parser.add_argument("--steps", type=int, default=5, help="that are timed, after one that is not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--crop", type=int, help="HQ px")
    parser.add_argument("--batch", type=int, help="images")
    options, overrides = parser.parse_known_args(argv)
    configs = options.config or [DEFAULT]
    torch.set_num_threads(options.threads)
    data, trained = section(configs, "data"), section(configs, "trainer")
    crop, size = options.crop or data["crop_size"], options.batch or data["batch_size"]
    precision = trained.get("precision", "32-true")

    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model_parser, parsed = parse(configs, overrides)
    start = time.perf_counter()
    model: RestorationModule = model_parser.instantiate_classes(parsed).model
    model.configure_model()
    built = time.perf_counter() - start

    clock = Clock()
    trainer = Trainer(
        max_epochs=1, accelerator=trained.get("accelerator", "auto"), devices=1, precision=precision, callbacks=[clock],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    photos: Any = batches(1 + options.steps, size, crop, model.scale)
    trainer.fit(model, torch.utils.data.DataLoader(photos, batch_size=None))

    steps = clock.steps()
    on_gpu = clock.device.type == "cuda"
    where = torch.cuda.get_device_name(clock.device) if on_gpu else f"CPU, {options.threads} thread(s)"
    print(f"{', '.join(map(str, configs))}: {size} x {crop} px, {precision}, {where}, median of {len(steps)} steps")
    settings = parsed.model.init_args.as_dict()
    print(f"random weights: {', '.join(random_parts(settings)) or 'none'}; random images; built in {built:.1f} s")
    for part, times in sorted(clock.seconds.items(), key=lambda item: -median(item[1])):
        calls = "" if part == REST else f"{clock.calls[part]} x"
        print(f"  {part:<40}{calls:>6}{1e3 * median(times):11.1f} ms {median(times) / median(steps):6.0%}")
    print(f"  {'one step':<46}{1e3 * median(steps):11.1f} ms   ({1e3 * min(steps):.1f} to {1e3 * max(steps):.1f})")
    memory = "allocated at most in these steps" if on_gpu else "resident at most, the building included"
    print(f"  {'memory':<46}{clock.peak / 1e9:11.2f} GB   ({memory})")


if __name__ == "__main__":
    main()
