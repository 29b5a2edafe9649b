"""Training steps, restorations and data loading at paper scale, for one GPU: it fills docs/performance.md.

    python benchmarks/paper_scale.py [--budget SECONDS] [--only NAME ...] [--again]
    python benchmarks/paper_scale.py --device cpu --tiny    # every item with the demo's configurations, here and now

The items run in the order of their worth until the budget is spent. Each result goes to benchmarks/results/DEVICE.json
the moment it is there; a second call measures what is missing. No weights, data set or network are needed: networks
have their full size and random weights, photos are noise, and what stands in for what is in each item's `overrides`.
`make gpu` runs the tests marked `gpu` first: one step, resume, prediction and comparison on CUDA against the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import re
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from train_step import Measured, Parts, Steps, measure

from common.loading import random_on_device
from common.precision import TestPrecision
from common.restoration import RestorationModule
from launch.parameters import parse

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SD = "--model.pretrained=random:sd21"
SEESR = [
    "--model.base.init_args.pretrained=random:sd21",
    "--model.base.init_args.networks=random:seesr",
    "--model.base.init_args.tagger=papers.rfsr.Untagged",
    "--model.gram_weights=random",
    '--model.rewards={"sharpness": 1.0e-3}',  # CLIP-IQA and ImageReward need their weights
]
FLUX = ["--model.pretrained=random:flux_kontext", "--model.keep_text_encoders=false", "--model.dists_weights=random"]
WEIGHTLESS = "--model.rewards=[sharpness, neutrality, neg_mse]"  # the paper's need their weights


@dataclass(frozen=True)
class Step:
    """A training step of a configuration, at one batch size after the other until the memory is full."""

    name: str
    configs: Sequence[str]
    overrides: Sequence[str] = ()
    demo: str = ""  # the configuration that takes its place under --tiny
    tiny: Sequence[str] = ()  # overrides under --tiny
    sizes: Sequence[int] = (1, 2, 4)
    crop: int = 512
    saves: str = ""  # name by which later items' overrides refer to the checkpoint, {saves}
    prepare: Callable[[Any], None] | None = None
    tf32: Literal["convolutions", "everywhere", "nowhere"] = "convolutions"  # torch's default, and so isr fit's
    steps: int = 3


@dataclass(frozen=True)
class Restore:
    """Restorations by a configuration's networks, on low-quality images of these sides, px."""

    name: str
    configs: Sequence[str]
    overrides: Sequence[str] = ()
    demo: str = ""
    tiny: Sequence[str] = ()
    sides: Sequence[int] = (128, 512)
    precisions: Sequence[TestPrecision] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Feed:
    """Training pairs a second from the embedded photos, by processes of the data loader."""

    name: str
    crop: int = 512
    sizes: Sequence[int] = field(default=(1, 8, 16))


def channels_last(model: Any) -> None:
    """Put the convolutions of all networks into the layout that tensor cores prefer."""
    for network in model.networks().values():
        if isinstance(network, nn.Module):
            network.to(memory_format=torch.channels_last)


def compile_unet(model: Any) -> None:
    """Compile the generator's U-Net; on the CPU without code generation, which takes minutes."""
    unet = model.generator.unet
    unet.compile(backend="inductor" if unet.device.type == "cuda" else "eager")


def _papers(path: str) -> str:
    return f"papers/{path}.yaml"


_DFOSD = {"configs": [_papers("dfosd/configs/sd21")], "demo": _papers("dfosd/configs/demo/01_dfosd")}
_DFOSD_RANDOM = [SD, "--model.perceptual_weights=random"]
_DM_SR = {"configs": [_papers("dm_sr/configs/sd_turbo")], "demo": _papers("dm_sr/configs/demo/02_dm_sr")}
_DM_SR_RANDOM = [SD, "--model.perceptual_weights=random", "--model.estimator={estimator}"]
_F2IDIFF = {"configs": [_papers("f2idiff/configs/sr_f2i")], "demo": _papers("f2idiff/configs/demo/01_f2idiff_sr")}
_F2IDIFF_RANDOM = [
    SD,
    "--model.foundation=null",  # SD 2.1's U-Net, of the same widths as the paper's
    "--model.features=random:dinov2_large",
    "--model.perceptual_weights=random",
]
_RFSR = {"configs": [_papers("rfsr/configs/seesr")], "demo": _papers("rfsr/configs/demo/02_rfsr")}
_NF2T = {"configs": [_papers("dnf_sr/configs/kontext_nf2t")], "demo": _papers("dnf_sr/configs/demo/02_nf2t")}
_SFT = {"configs": [_papers("dnf_sr/configs/kontext_sft")], "demo": _papers("dnf_sr/configs/demo/01_sft")}
_SFT_RANDOM = [*FLUX, "--model.disc=random:dinov3_vitb16"]
_CALIBRATED = ["--model.lo=0.0", "--model.hi=1.0"]  # else the data calibrate them at the start
_TINY_NF2T = ["--model.sft={sft}"]
_EARLY, _LATE = "--model.t_late_max=-1", "--model.t_early_min=1001"


def _variant(name: str, *overrides: str, **settings: Any) -> Step:
    """DFOSD's step with one setting changed."""
    return Step(f"dfosd/sd21, {name}", **_DFOSD, overrides=[*_DFOSD_RANDOM, *overrides], sizes=(1, 4), **settings)


ITEMS: list[Step | Restore | Feed] = [
    Step("dfosd/sd21", **_DFOSD, overrides=_DFOSD_RANDOM),
    Step(
        "dm_sr/estimator",
        [_papers("dm_sr/configs/estimator")],
        ["--model.weights=random", "--model.lpips_weights=random", *_CALIBRATED],
        _papers("dm_sr/configs/demo/01_estimator"),
        _CALIBRATED,
        saves="estimator",
    ),
    Step("dm_sr/sd_turbo", **_DM_SR, overrides=_DM_SR_RANDOM, tiny=["--model.estimator={estimator}"]),
    Step("dnf_sr/kontext_sft", **_SFT, overrides=_SFT_RANDOM, saves="sft", sizes=(1, 2)),
    Step(
        "dnf_sr/kontext_nf2t",
        **_NF2T,
        overrides=[*FLUX, WEIGHTLESS, "--model.sft={sft}"],
        tiny=_TINY_NF2T,
        sizes=(1,),
        steps=1,
    ),
    Step("f2idiff/sr_f2i", **_F2IDIFF, overrides=_F2IDIFF_RANDOM, crop=256, sizes=(1, 2, 4, 6)),
    Step("rfsr/seesr, early", **_RFSR, overrides=[*SEESR, _EARLY], tiny=[_EARLY], sizes=(1,)),
    Step("rfsr/seesr, late", **_RFSR, overrides=[*SEESR, _LATE], tiny=[_LATE], sizes=(1,)),
    Step(
        "f2idiff/foundation_f2i",
        [_papers("f2idiff/configs/foundation_f2i")],
        [SD, "--model.features=random:dinov2_large"],
        _papers("f2idiff/configs/foundation_tiny"),
        sizes=(1, 4, 15),
    ),
    Restore("restore dfosd/sd21", **_DFOSD, overrides=_DFOSD_RANDOM),
    _variant("no TF32", tf32="nowhere"),
    _variant("TF32 everywhere", tf32="everywhere"),
    _variant("frozen_dtype float32", "--model.frozen_dtype=float32"),
    _variant("no checkpointing", "--model.gradient_checkpointing=false"),
    _variant("plain AdamW", "--model.optimizer.init_args.fused=false"),
    _variant("channels_last", prepare=channels_last),
    Restore("restore dm_sr/sd_turbo", **_DM_SR, overrides=_DM_SR_RANDOM, tiny=["--model.estimator={estimator}"]),
    Restore("restore f2idiff/sr_f2i", **_F2IDIFF, overrides=_F2IDIFF_RANDOM),
    Restore("restore dnf_sr/kontext_sft", **_SFT, overrides=_SFT_RANDOM, sides=(128,), precisions=("bfloat16",)),
    Restore("restore rfsr/seesr", **_RFSR, overrides=SEESR, sides=(128,)),
    Feed("feeding"),
    Step(
        "dfosd/sd21 + d3sr",
        [*_DFOSD["configs"], _papers("dfosd/configs/d3sr")],
        [*_DFOSD_RANDOM, "--model.disc_pretrained=random:sdxl"],
        _DFOSD["demo"],
    ),
    Step(
        "f2idiff/osediff_sd21",
        [_papers("f2idiff/configs/osediff_sd21")],
        [SD, "--model.perceptual_weights=random"],
        _papers("f2idiff/configs/demo/02_t2idiff_sr"),
        crop=256,
        sizes=(1, 2, 6),
    ),
    Step("dfosd/sd21, compiled U-Net", **_DFOSD, overrides=_DFOSD_RANDOM, prepare=compile_unet, sizes=(1,)),
]


@dataclass(frozen=True)
class Place:
    """Where the items run, and how."""

    device: str  # cuda or cpu
    tiny: bool
    saved: Path  # folder of checkpoints that later items build on

    def arguments(self, item: Step | Restore) -> tuple[list[Path], list[str]]:
        """Config files and overrides of an item."""
        configs = [item.demo] if self.tiny else item.configs
        overrides = item.tiny if self.tiny else item.overrides
        stages = {path.stem: str(path) for path in self.saved.glob("*.ckpt")}
        missing = [name for text in overrides for name in re.findall(r"^[^=]+=\{(\w+)\}$", text) if name not in stages]
        if missing:
            raise LookupError(f"needs the checkpoint of {missing[0]}, which this call has not made")
        filled = [re.sub(r"=\{(\w+)\}$", lambda found: f"={stages[found[1]]}", text) for text in overrides]
        return [ROOT / config for config in configs], filled

    @contextmanager
    def network_maker(self) -> Iterator[None]:
        """Within this context networks are made on the device."""
        with torch.device("cuda") if self.device == "cuda" else nullcontext():
            yield


def _step(item: Step, place: Place) -> dict[str, Any]:
    configs, overrides = place.arguments(item)
    crop = 64 if place.tiny else item.crop
    found: dict[int, Steps] = {}
    torch.backends.cuda.matmul.allow_tf32 = item.tf32 == "everywhere"
    torch.backends.cudnn.allow_tf32 = item.tf32 != "nowhere"
    result: dict[str, Any] = {"overrides": _named(overrides), "crop": crop, "batches": {}}
    measured: Measured | None = None
    try:
        measured = measure(
            configs,
            overrides,
            crop=crop,
            sizes=(1, 2) if place.tiny else item.sizes,
            steps=1 if place.tiny else item.steps,
            by_part=1,
            accelerator="gpu" if place.device == "cuda" else "cpu",
            count_flops=item.prepare is not compile_unet,  # a dispatch mode would break the graph
            prepare=item.prepare,
            found=_Growing(found),
        )
        result |= {"built_s": round(measured.built, 1), "precision": measured.precision}
        if item.saves:
            save_stage(measured, place.saved / f"{item.saves}.ckpt")
    except torch.OutOfMemoryError as error:
        result["stopped"] = "out of memory"
        print(f"{item.name}: {error}", flush=True)
    for size, steps in found.items():
        if steps.seconds:
            result["batches"][str(size)] = _figures(size, steps)
    return result


def save_stage(measured: Measured, path: Path) -> None:
    """Write a trained model's checkpoint, for stages that build on it."""
    kept = measured.model.checkpoint_keys()
    state = {key: value for key, value in measured.model.state_dict().items() if key in kept}
    torch.save({"state_dict": state, "hyper_parameters": measured.stored}, path)


class _Growing(dict[int, Steps]):
    """Figures by batch size, kept in a dict of the caller's."""

    def __init__(self, kept: dict[int, Steps]) -> None:
        super().__init__()
        self._kept = kept

    def __missing__(self, size: int) -> Steps:
        self._kept[size] = self[size] = Steps()
        return self[size]


def _figures(size: int, steps: Steps) -> dict[str, Any]:
    seconds = median(steps.seconds)
    parts = {name: round(1e3 * median(times), 2) for name, times in steps.parts.items()}
    return {
        "ms_per_step": round(1e3 * seconds, 2),
        "ms_all": [round(1e3 * each, 2) for each in steps.seconds],
        "images_per_s": round(size / seconds, 3),
        "peak_gb": round(steps.peak / 1e9, 2),
        "tflop_per_step": round(steps.flops / 1e12, 3),
        "tflop_per_s": round(steps.flops / 1e12 / seconds, 1),
        "ms_by_part": parts,
        "calls": dict(steps.calls),
        "host_waits": steps.waits,
    }


def _named(overrides: Sequence[str]) -> list[str]:
    """Overrides without the folders of this call."""
    return [re.sub(r"=/.*/(\w+)\.ckpt$", r"=<\1>", text) for text in overrides]


@torch.no_grad()
def _restore(item: Restore, place: Place) -> dict[str, Any]:
    configs, overrides = place.arguments(item)
    parser, parsed = parse(configs, overrides)
    with place.network_maker():
        model: RestorationModule = parser.instantiate(parsed).model
        model.inference_only = True
        model.configure_model()
    model = model.to(place.device).eval()
    parts = Parts()
    parts.device = torch.device(place.device)
    parts.watch(model.networks())
    inference = model.inference
    result: dict[str, Any] = {"overrides": _named(overrides), "default": model.test_precision, "sides": {}}
    for side in (16, 24) if place.tiny else item.sides:
        x_lq = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(place.device)
        for how in ("whole", "tiled") if side > min(item.sides) or place.tiny else ("whole",):
            inference.tile = None if how == "whole" else 64 if place.tiny else 512
            inference.overlap = min(inference.overlap, 16) if place.tiny else inference.overlap
            for model.test_precision in item.precisions:
                name = f"{side} -> {side * model.scale} px, {how}, {model.test_precision}"
                try:
                    result["sides"][name] = _timed(model, x_lq, parts)
                except torch.OutOfMemoryError:
                    result["sides"][name] = {"stopped": "out of memory"}
                    _free()
    return result


def _timed(model: RestorationModule, x_lq: Tensor, parts: Parts) -> dict[str, Any]:
    """Median of three restorations after one that is not timed; one more is timed by part."""
    seconds = []
    for turn in range(5):
        parts.restart(timed=turn == 4)
        if x_lq.is_cuda and turn == 1:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with parts.part("rest"):
            model.upscale(x_lq, ["a house by a lake"])
        parts.wait()
        seconds.append(time.perf_counter() - start)
    by_part = {name: round(1e3 * spent, 1) for name, spent in parts.seconds.items()}
    figures: dict[str, Any] = {"ms_per_image": round(1e3 * median(seconds[1:4]), 1), "ms_by_part": by_part}
    if x_lq.is_cuda:
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return figures


def _feed(item: Feed, place: Place) -> dict[str, Any]:
    from data import SRData
    from data.photos import photo_paths

    cores = torch.multiprocessing.cpu_count()
    result: dict[str, Any] = {"photos": "the embedded ones, PNG and JPEG of 0.2 to 1.1 MP", "cores": cores}
    paths = [str(path) for path in photo_paths("train").values()]
    for workers in (1,) if place.tiny else [n for n in item.sizes if n <= cores]:
        count = 2 if place.tiny else 20 + 20 * workers
        photos = SRData(paths, crop_size=64 if place.tiny else 256, batch_size=4, num_workers=workers)
        photos.setup("fit")
        loader = iter(photos.train_dataloader())
        for _ in range(2 * workers):
            next(loader)
        start = time.perf_counter()
        for _ in range(count):
            next(loader)
        result[f"{workers} workers"] = {"pairs_per_s": round(4 * count / (time.perf_counter() - start), 1)}
        del loader
    return result


def _matmul_tflops(device: str, side: int) -> float:
    """bf16 matrix products a second on random data: what this card reaches at best."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return round(5 * 2 * side**3 / median(seconds[3:]) / 1e12, 3)


def _about(device: str, tiny: bool) -> dict[str, Any]:
    """Device, versions and commit of the figures."""
    here = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "lightning": version("lightning"),
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
        "bf16_matmul_tflop_per_s": _matmul_tflops(device, 256 if tiny else 8192 if device == "cuda" else 1024),
    }
    if device == "cuda":
        here["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        here["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return here


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _free() -> None:
    """Give memory back to the device.

    Raises:
        torch.AcceleratorError: An earlier kernel broke the device's state, so that nothing else can run.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _allocated(device: str) -> float:
    """GB that are allocated on the GPU, 0 on a CPU."""
    return round(torch.cuda.memory_allocated() / 1e9, 2) if device == "cuda" else 0.0


def write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(path)


def _line(result: Mapping[str, Any]) -> str:
    """An item's result in a line for the screen."""
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    found = [f"{b} x {f['ms_per_step']:.0f} ms, {f['peak_gb']} GB" for b, f in result.get("batches", {}).items()]
    found += [
        f"{side}: {figures.get('ms_per_image', 'stopped')} ms" for side, figures in result.get("sides", {}).items()
    ]
    found += [f"{key}: {value}" for key, value in result.items() if key.endswith("workers") or key == "stopped"]
    return "; ".join(found)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the demo's configurations, one step each")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no further item starts")
    parser.add_argument("--only", nargs="+", default=[], help="items whose names hold one of these texts")
    parser.add_argument("--again", action="store_true", help="measure also what has a result already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of DEVICE.json")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device; use --device cpu --tiny to try the program")
    begin = time.perf_counter()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    about = _about(options.device, options.tiny)
    name = re.sub(r"\W+", "_", about["device"]).strip("_").lower() + ("_tiny" if options.tiny else "")
    path = options.results / f"{name}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"items": {}}
    results["about"] = about
    print(f"{about['device']}, torch {about['torch']}: results go to {path}", flush=True)
    run: dict[type, Callable[[Any, Place], dict[str, Any]]] = {Step: _step, Restore: _restore, Feed: _feed}
    failed = False
    with tempfile.TemporaryDirectory() as folder, random_on_device(options.device):
        place = Place(options.device, options.tiny, Path(folder))
        wanted = [
            item
            for item in ITEMS
            if (not options.only or any(text in item.name for text in options.only))
            and (options.again or "failed" in results["items"].get(item.name, {"failed": ""}))
        ]
        needed = {stage for item in wanted for stage in re.findall(r"\{(\w+)\}", str(item))}
        for item in ITEMS:
            makes_stage = item not in wanted and getattr(item, "saves", "") in needed
            if makes_stage:
                item = replace(item, sizes=item.sizes[:1], steps=1)
            elif item not in wanted:
                continue
            spent = time.perf_counter() - begin
            if spent > options.budget:
                print(f"{item.name}: not measured, {spent:.0f} of {options.budget:.0f} s are spent")
                continue
            if left := _allocated(options.device):  # whole hundredths of a GB, which the item's peak would include
                print(f"{item.name}: warning: {left} GB are still allocated by what ran before", flush=True)
            try:
                result = run[type(item)](item, place)
            except Exception as error:  # the next item is worth a try whatever went wrong with this one
                result, failed = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:400]}, True
            if left:
                result["allocated_before_gb"] = left
            result["took_s"] = round(time.perf_counter() - begin - spent, 1)
            if not makes_stage:
                results["items"][item.name] = result
                write(path, results)
            _free()
            note = ", for its checkpoint" if makes_stage else ""
            print(f"{item.name}{note} ({result['took_s']:.0f} s): {_line(result)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
