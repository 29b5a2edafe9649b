"""The metrics of a comparison: their weights, where these come from, their licences, and which are present.

A comparison downloads nothing: a metric whose weights are not in their caches is not computed, and
`isr metrics fetch` lists its downloads before it starts them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from common.errors import one_line
from common.files import safe_loading
from common.metrics import BT601_LUMA, Image, MetricProtocol, build_metric
from common.pyiqa import MetricUnavailableError
from launch.errors import UsageError


class MetricWeights(NamedTuple):
    """A file that a metric reads: in which cache it lies, and where it comes from."""

    cache: Literal["pyiqa", "torchvision", "clip", "openai-clip", "hub"]
    name: str
    url: str

    @property
    def path(self) -> Path:
        """Where it lies, or would; the folder of a hub's model."""
        if self.cache == "hub":
            from huggingface_hub.constants import HF_HUB_CACHE

            return Path(HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"
        if self.cache == "openai-clip":
            return Path("~/.cache/clip").expanduser() / self.name
        folder = {"pyiqa": "pyiqa", "torchvision": "checkpoints", "clip": "clip"}[self.cache]
        return Path(torch.hub.get_dir()) / folder / self.name

    @property
    def present(self) -> bool:
        """True where the file exists; for a hub's model, where a snapshot of it has a file."""
        return any(self.path.glob("snapshots/*/*")) if self.cache == "hub" else self.path.is_file()


@dataclass(frozen=True)
class Known:
    """A metric that can be asked for.

    Args:
        id: Name in the tables: one of our own, or `torchmetrics:` or `pyiqa:` and a name.
        reference: True for a metric that compares with the high-quality image.
        weights: Files that it reads.
        digits: Decimals in tables.
    """

    id: str
    reference: bool
    weights: tuple[MetricWeights, ...] = ()
    digits: int = 4

    @property
    def licence(self) -> str:
        """Licence of the code that computes it."""
        if self.id.startswith("pyiqa:"):
            return "PolyForm-Noncommercial-1.0.0 (pyiqa)"
        return "Apache-2.0 (torchmetrics)" if self.id.startswith("torchmetrics:") else "Apache-2.0"

    @property
    def absent(self) -> list[MetricWeights]:
        """Files that are missing."""
        return [file for file in self.weights if not file.present]


def _pyiqa(*names: str) -> tuple[MetricWeights, ...]:
    hub = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
    return tuple(MetricWeights("pyiqa", name, f"{hub}/{name}") for name in names)


def _torchvision(name: str) -> tuple[MetricWeights, ...]:
    return (MetricWeights("torchvision", name, f"https://download.pytorch.org/models/{name}"),)


def _clip(cache: Literal["clip", "openai-clip"], name: str, sha: str) -> tuple[MetricWeights, ...]:
    return (MetricWeights(cache, name, f"https://openaipublic.azureedge.net/clip/models/{sha}/{name}"),)


def _hub(name: str) -> tuple[MetricWeights, ...]:
    return (MetricWeights("hub", name, f"https://huggingface.co/{name}"),)


_ALEXNET, _VGG16 = _torchvision("alexnet-owt-7be5be79.pth"), _torchvision("vgg16-397923af.pth")
_CLIP_RN50 = _clip("clip", "RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762")
_CLIP_B32 = _clip("clip", "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af")
_CLIP_L14 = _clip("openai-clip", "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836")
_VIT_B8 = _hub("timm/vit_base_patch8_224.augreg2_in21k_ft_in1k")
_RESNET50, _INCEPTION = _hub("timm/resnet50.a1_in1k"), _hub("timm/inception_resnet_v2.tf_in1k")

KNOWN = {
    known.id: known
    for known in (
        Known("psnr_y", True, digits=2),
        Known("ssim_y", True),
        Known("psnr_rgb", True, digits=2),
        Known("ssim_rgb", True),
        Known("torchmetrics:ms_ssim", True),
        Known("torchmetrics:vif", True),
        Known("pyiqa:fsim", True),
        Known("pyiqa:gmsd", True),
        Known("pyiqa:vsi", True),
        Known("pyiqa:nlpd", True),
        Known("sharpness", False),
        Known("colourfulness", False),
        Known("neutrality", False),
        Known("pyiqa:piqe", False, digits=2),
        Known("pyiqa:lpips", True, _pyiqa("LPIPS_v0.1_alex-df73285e.pth") + _ALEXNET),
        Known("pyiqa:lpips-vgg", True, _pyiqa("LPIPS_v0.1_vgg-a78928a0.pth") + _VGG16),
        Known("pyiqa:dists", True, _pyiqa("DISTS_weights-f5e65c96.pth") + _VGG16),
        Known("pyiqa:topiq_fr", True, _pyiqa("cfanet_fr_kadid_res50-2c4cc61d.pth") + _RESNET50),
        Known("pyiqa:niqe", False, _pyiqa("niqe_modelparameters.mat")),
        Known("pyiqa:brisque", False, _pyiqa("brisque_svm_weights.pth"), 2),
        Known("pyiqa:ilniqe", False, _pyiqa("ILNIQE_templateModel.mat"), 2),
        Known("pyiqa:musiq", False, _pyiqa("musiq_koniq_ckpt-e95806b9.pth"), 2),
        Known("pyiqa:maniqa", False, _pyiqa("ckpt_koniq10k.pt") + _VIT_B8),
        Known("pyiqa:maniqa-pipal", False, _pyiqa("MANIQA_PIPAL-ae6d356b.pth") + _VIT_B8),
        Known("pyiqa:maniqa-kadid", False, _pyiqa("ckpt_kadid10k.pt") + _VIT_B8),
        Known("pyiqa:clipiqa", False, _CLIP_RN50),
        Known("pyiqa:clipiqa+", False, _pyiqa("CLIP-IQA+_learned_prompts-603f3273.pth") + _CLIP_RN50),
        Known("pyiqa:liqe", False, _pyiqa("liqe_koniq.pt") + _CLIP_B32),
        Known("pyiqa:liqe_mix", False, _pyiqa("liqe_mix.pt") + _CLIP_B32),
        Known("pyiqa:topiq_nr", False, _pyiqa("cfanet_nr_koniq_res50-9a73138b.pth") + _RESNET50),
        Known("pyiqa:nima", False, _pyiqa("NIMA_InceptionV2_ava-b0c77c00.pth") + _INCEPTION),
        Known("pyiqa:nima-koniq", False, _pyiqa("NIMA_koniq-250367ae.pth") + _INCEPTION),
        Known("pyiqa:laion_aes", False, _pyiqa("sac+logos+ava1-l14-linearMSE.pth") + _CLIP_L14),
        Known("pyiqa:qalign", False, _hub("q-future/one-align")),
        Known("pyiqa:fid", True, _pyiqa("pt_inception-2015-12-05-6726825d.pth"), 2),
    )
}
"""Metrics by id, in the tables' order."""

FID = "pyiqa:fid"
"""The only metric of a folder; the others are metrics of an image."""

WEIGHTLESS = tuple(name for name, known in KNOWN.items() if not known.weights)
"""Metrics that are computed by default."""

_SHORT = {"psnr": "psnr_y", "ssim": "ssim_y", "ms_ssim": "torchmetrics:ms_ssim", "vif": "torchmetrics:vif"}


def full_id(name: str) -> str:
    """The id that a name means: itself, or what `psnr`, `lpips`, `musiq` and the like stand for.

    Raises:
        UsageError: There is no such metric.
    """
    wanted = next((known for known in (name, _SHORT.get(name), f"pyiqa:{name}") if known in KNOWN), None)
    if wanted is None:
        raise UsageError(f"metrics={name} is unknown; isr metrics list names all, e.g. psnr, ssim, lpips, musiq")
    return wanted


def build(name: str, device: str | torch.device = "cpu") -> MetricProtocol:
    """Make a per-image metric, without downloading anything.

    Args:
        name: One of `KNOWN`, but for `FID`.
        device: Where its network runs.

    Raises:
        MetricUnavailableError: A library or weights are not here; the message is the reason.
    """
    check_weights(name)
    if name.startswith("torchmetrics:"):
        return _TORCHMETRICS[name]()
    return build_metric(name, device=device)


def check_weights(name: str) -> None:
    """Refuse a metric whose weights are not here.

    Raises:
        MetricUnavailableError: Naming the files and the command that fetches them.
    """
    absent = KNOWN[name].absent
    if absent:
        files = ", ".join(str(file.path) for file in absent)
        raise MetricUnavailableError(f"weights are not here: {files}; isr metrics fetch {name}")


def fid_protocol() -> str:
    """Everything that an FID depends on, except n, which stands beside each value."""
    version = importlib.metadata.version("pyiqa")
    return f"fid (clean, Inception v3, results against references) | RGB | no crop | 8 bits | pyiqa {version}"


def fid(results: Path, references: Path, device: torch.device) -> float:
    """Frechet inception distance of two folders.

    Raises:
        MetricUnavailableError: pyiqa or the weights are not here.
    """
    check_weights(FID)
    return float(_fid_network(device)(str(references), str(results)))


def fetch(name: str) -> None:
    """Make a metric, which downloads what it lacks.

    Raises:
        MetricUnavailableError: It cannot be had.
    """
    if name == FID:
        _fid_network(torch.device("cpu"))
    else:
        build_metric(name)


def _fid_network(device: torch.device) -> Callable[[str, str], float]:
    try:
        import pyiqa  # takes 5 s and is an extra

        with safe_loading():
            network: Callable[[str, str], float] = pyiqa.create_metric("fid", device=device)
    except Exception as error:  # a download fails in as many ways as pyiqa has loaders
        raise MetricUnavailableError(f"{FID}: {type(error).__name__}: {one_line(error)}") from error
    return network


def _from_torchmetrics(
    name: str, metric: str, space: str, function: Callable[[Image, Image | None], float]
) -> MetricProtocol:
    source = f"torchmetrics {importlib.metadata.version('torchmetrics')}"
    return MetricProtocol(name, metric, space, 0, "images rounded to 8 bits", source, False, True, function)


def _ms_ssim(sr: Image, hq: Image | None) -> float:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    assert hq is not None
    if min(sr.shape[:2]) <= _MS_SSIM_SIDE:
        raise ValueError(f"ms_ssim needs more than {_MS_SSIM_SIDE} px a side, an image is smaller")
    return float(ms_ssim(_batch(sr) / 255, _batch(hq) / 255, data_range=1.0))


def _vif(sr: Image, hq: Image | None) -> float:
    from torchmetrics.functional.image import visual_information_fidelity

    assert hq is not None
    return float(visual_information_fidelity(_luma(sr), _luma(hq)))


def _batch(image: Image) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float()


def _luma(image: Image) -> Tensor:
    """BT.601 Y less a constant, (1, 1, H, W), not rounded: VIF sees contrast alone, and small numbers suit fp32."""
    return torch.from_numpy(image.astype(np.float64) @ BT601_LUMA[0] - _GREY)[None, None].float()


_GREY = 110.0
_MS_SSIM_SIDE = 160  # (11 - 1) * 2^4: the window at the coarsest of five scales
_TORCHMETRICS = {
    "torchmetrics:ms_ssim": partial(
        _from_torchmetrics, "torchmetrics:ms_ssim", "ms_ssim (5 scales)", "RGB in [0, 1]", _ms_ssim
    ),
    "torchmetrics:vif": partial(
        _from_torchmetrics, "torchmetrics:vif", "vif (pixel domain)", "BT.601 Y (16..235)", _vif
    ),
}


class Finding(NamedTuple):
    """A result of the doctor: `value` is None where the metric is not installed, `verdict` is one line."""

    metric: str
    value: float | None
    expected: float
    ok: bool
    verdict: str


def examine(names: Sequence[str] = WEIGHTLESS) -> list[Finding]:
    """Compute weightless metrics on a fixed pair and compare with the recorded values.

    Args:
        names: Metrics that the record holds.

    Returns:
        A finding for each; a metric that cannot be had is no fault.
    """
    recorded: dict[str, float] = yaml.safe_load(_RECORD.read_text())["values"]
    sr, hq = fixed_pair()
    found = []
    for name in names:
        expected = recorded[name]
        try:
            value = build(name)(sr, hq)
        except MetricUnavailableError as error:
            found.append(Finding(name, None, expected, True, f"not here: {error}"))
            continue
        ok = abs(value - expected) <= _TOLERANCE * max(1.0, abs(expected))
        found.append(Finding(name, value, expected, ok, "ok" if ok else "DIFFERS from the record"))
    return found


def fixed_pair() -> tuple[Image, Image]:
    """A pattern and the same blurred by its four neighbours, both (192, 192, 3) uint8: the doctor's images."""
    y, x, c = np.mgrid[:192, :192, :3]
    waves = 127.5 + 90 * np.sin(x / 7 + c) * np.cos(y / 11 - c / 2) + 25 * ((x // 16 + y // 16) % 2)
    hq = np.rint(waves).clip(0, 255).astype(np.uint8)
    sides = [np.roll(hq.astype(np.int64), step, axis) for axis in (0, 1) for step in (-2, 2)]
    return (sum(sides) // 4).astype(np.uint8), hq


_RECORD = importlib.resources.files("launch.comparison") / "doctor.yaml"
_TOLERANCE = 1e-4  # of what single precision and another CPU may change
