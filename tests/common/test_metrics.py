"""The native metrics are pyiqa's numbers, from an independent path; the protocol says how each number came about.

- PSNR within 1e-4 dB and SSIM within 5e-6 of pyiqa 0.1.16, by golden values, live where pyiqa is installed, and within
  rounding error of a plain float64 implementation written from the definitions.
- A metric of pyiqa's that cannot be had says why, in one line, and none of them moves the global random states.
"""

import ast
import importlib.metadata
import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from common.metrics import MetricProtocol, build_metric, pyiqa_metric, to_uint8
from common.pyiqa import MetricUnavailableError
from common.rewards import build_reward

ROOT = Path(__file__).resolve().parents[2]


def reference_image() -> np.ndarray:
    """Chirps with edges, 80 x 96, in integer arithmetic so that every platform makes the same bytes."""
    y, x, c = np.meshgrid(np.arange(80), np.arange(96), np.arange(3), indexing="ij")
    return (((x * x + 3 * y * y + 17 * c * x) // 32) % 256).astype(np.uint8)


def noisy_image() -> np.ndarray:
    """The reference plus pseudo-random integers in -10..10."""
    y, x, c = np.meshgrid(np.arange(80), np.arange(96), np.arange(3), indexing="ij")
    noise = ((x * 31 + y * 17 + c * 7 + x * y) * 2654435761 >> 16) % 21 - 10
    return np.clip(reference_image().astype(np.int64) + noise, 0, 255).astype(np.uint8)


def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(sr, hq)."""
    hq = reference_image()
    if name == "noisy":
        return noisy_image(), hq
    if name == "darker":
        return (hq // 2 + 20).astype(np.uint8), hq
    if name == "negative":  # anti-correlated: pyiqa counts negative contrast-structure as zero
        return 255 - hq, hq
    if name == "one pixel":
        sr = hq.copy()
        sr[40, 40, 1] ^= 1
        return sr, hq
    assert name == "identical"
    return hq.copy(), hq


PAIRS = ("noisy", "darker", "negative", "one pixel", "identical")
PYIQA_ARGUMENTS: dict[str, tuple[str, dict]] = {
    "psnr_y": ("psnr", {"test_y_channel": True, "color_space": "ycbcr"}),
    "ssim_y": ("ssim", {"test_y_channel": True, "color_space": "ycbcr"}),
    "psnr_rgb": ("psnr", {}),
    "ssim_rgb": ("ssimc", {}),
}
# pyiqa 0.1.16, CPU: float(create_metric(name, **arguments)(sr / 255, hq / 255)), names and arguments as above
GOLDEN = {
    ("psnr_y", "noisy"): 36.64188766,
    ("psnr_y", "darker"): 15.50827408,
    ("psnr_y", "negative"): 7.46215630,
    ("psnr_y", "one pixel"): 79.78440857,
    ("psnr_y", "identical"): 80.0,
    ("ssim_y", "noisy"): 0.95120172,
    ("ssim_y", "darker"): 0.81142880,
    ("ssim_y", "negative"): 0.01394931,
    ("ssim_y", "one pixel"): 1.0,
    ("ssim_y", "identical"): 1.0,
    ("psnr_rgb", "noisy"): 32.49802780,
    ("psnr_rgb", "darker"): 13.54518986,
    ("psnr_rgb", "negative"): 4.74104452,
    ("psnr_rgb", "one pixel"): 79.71938324,
    ("psnr_rgb", "identical"): 80.0,
    ("ssim_rgb", "noisy"): 0.90718790,
    ("ssim_rgb", "darker"): 0.78654944,
    ("ssim_rgb", "negative"): 0.00442370,
    ("ssim_rgb", "one pixel"): 0.99999991,
    ("ssim_rgb", "identical"): 1.0,
}


def tolerance(metric_id: str) -> float:
    return 1e-4 if metric_id.startswith("psnr") else 5e-6


def plain_luma(image: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(image.astype(np.float64) / 255, -1, 0)
    return 16 + 65.481 * red + 128.553 * green + 24.966 * blue


def plain_psnr(x: np.ndarray, y: np.ndarray) -> float:
    mse = np.mean((x / 255 - y / 255) ** 2)
    return float(10 * np.log10(1 / (mse + 1e-8)))


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Window by window, two-dimensional Gaussian, covariances from centred values."""
    offset = np.arange(11) - 5
    weights = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    windows_x = np.lib.stride_tricks.sliding_window_view(x, (11, 11))
    windows_y = np.lib.stride_tricks.sliding_window_view(y, (11, 11))
    mean_x = (windows_x * weights).sum((-2, -1), keepdims=True)
    mean_y = (windows_y * weights).sum((-2, -1), keepdims=True)
    variance_x = (weights * (windows_x - mean_x) ** 2).sum((-2, -1))
    variance_y = (weights * (windows_y - mean_y) ** 2).sum((-2, -1))
    covariance = (weights * (windows_x - mean_x) * (windows_y - mean_y)).sum((-2, -1))
    mean_x, mean_y = mean_x[..., 0, 0], mean_y[..., 0, 0]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = np.maximum((2 * covariance + c2) / (variance_x + variance_y + c2), 0)
    return float((luminance * contrast).mean())


def plain(metric_id: str, sr: np.ndarray, hq: np.ndarray) -> float:
    if metric_id == "psnr_y":
        return plain_psnr(plain_luma(sr), plain_luma(hq))
    if metric_id == "psnr_rgb":
        return plain_psnr(sr.astype(np.float64), hq.astype(np.float64))
    if metric_id == "ssim_y":
        return plain_ssim(np.rint(plain_luma(sr)), np.rint(plain_luma(hq)))
    return float(np.mean([plain_ssim(sr[..., c].astype(float), hq[..., c].astype(float)) for c in range(3)]))


class TestNativeNumbers:
    @pytest.mark.parametrize(("metric_id", "name"), GOLDEN)
    def test_equals_the_golden_value_of_pyiqa(self, metric_id, name):
        assert build_metric(metric_id)(*pair(name)) == pytest.approx(
            GOLDEN[metric_id, name], rel=0, abs=tolerance(metric_id)
        )

    @pytest.mark.parametrize("metric_id", PYIQA_ARGUMENTS)
    @pytest.mark.parametrize("name", PAIRS)
    def test_equals_the_definition_in_float64(self, metric_id, name):
        # PSNR passes through float32 differences of integers, hence its tolerance
        close = 2e-5 if metric_id.startswith("psnr") else 1e-10
        assert build_metric(metric_id)(*pair(name)) == pytest.approx(plain(metric_id, *pair(name)), rel=0, abs=close)

    @pytest.mark.parametrize("metric_id", PYIQA_ARGUMENTS)
    def test_equals_pyiqa_as_installed(self, metric_id):
        pyiqa = pytest.importorskip("pyiqa")
        name, arguments = PYIQA_ARGUMENTS[metric_id]
        theirs = pyiqa.create_metric(name, device="cpu", **arguments)
        rng = np.random.default_rng(0)
        for sigma in (1, 8, 60):
            hq = rng.integers(0, 256, (70, 90, 3)).astype(np.uint8)
            sr = np.clip(hq + rng.normal(0, sigma, hq.shape), 0, 255).astype(np.uint8)
            x, y = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in (sr, hq))
            assert build_metric(metric_id)(sr, hq) == pytest.approx(
                float(theirs(x, y)), rel=0, abs=tolerance(metric_id)
            )

    def test_psnr_of_a_known_error(self):
        # every value off by 5: MSE 25, PSNR 10 log10(255^2 / 25); on Y the step is 5 * 219 / 255
        hq = np.full((16, 16, 3), 100, np.uint8)
        sr = hq + 5
        assert build_metric("psnr_rgb")(sr, hq) == pytest.approx(20 * np.log10(255 / 5), abs=1e-3)
        assert build_metric("psnr_y")(sr, hq) == pytest.approx(20 * np.log10(255 / (5 * 219 / 255)), abs=1e-3)

    def test_identical_images_read_80_db_and_an_ssim_of_one(self):
        hq = reference_image()
        assert build_metric("psnr_y")(hq, hq) == pytest.approx(80, abs=1e-9)
        assert build_metric("ssim_y")(hq, hq) == pytest.approx(1, abs=1e-12)

    def test_reads_red_first(self):
        # the same error weighs more in red than in blue, and most in green
        hq = np.full((16, 16, 3), 100, np.uint8)
        red, green, blue = (hq + np.eye(3, dtype=np.uint8)[c] * 9 for c in range(3))
        metric = build_metric("psnr_y")
        assert metric(green, hq) < metric(red, hq) < metric(blue, hq)

    @pytest.mark.parametrize("metric_id", PYIQA_ARGUMENTS)
    def test_is_symmetric_and_indifferent_to_memory_layout(self, metric_id):
        sr, hq = pair("noisy")
        metric = build_metric(metric_id)
        views = (np.asfortranarray(sr), hq.transpose(2, 0, 1).copy().transpose(1, 2, 0))
        assert metric(*views) == metric(sr, hq)
        assert metric(hq, sr) == pytest.approx(metric(sr, hq), rel=1e-12)

    @pytest.mark.parametrize("metric_id", PYIQA_ARGUMENTS)
    def test_crop_cuts_each_border_and_nothing_else(self, metric_id):
        sr, hq = pair("noisy")
        spoilt = sr.copy()
        spoilt[:4], spoilt[-4:], spoilt[:, :4], spoilt[:, -4:] = 0, 0, 0, 0
        cropped = build_metric(metric_id, crop=4)
        assert cropped(spoilt, hq) == build_metric(metric_id)(sr[4:-4, 4:-4], hq[4:-4, 4:-4])
        spoilt[4, 4] ^= 128
        assert cropped(spoilt, hq) != cropped(sr, hq)


class TestProtocol:
    def test_says_what_decided_the_number(self):
        assert str(build_metric("psnr_y")) == (
            "psnr | BT.601 Y (16..235) | no crop | images rounded to 8 bits | native"
        )
        assert str(build_metric("ssim_y")) == (
            "ssim | BT.601 Y (16..235) | no crop | images rounded to 8 bits, and Y too | native"
        )
        assert build_metric("psnr_rgb", crop=4).describe() == (
            "psnr | RGB (0..255) | crop 4 px | images rounded to 8 bits | native"
        )

    def test_two_protocols_are_equal_only_when_nothing_differs(self):
        assert build_metric("psnr_y") == build_metric("psnr_y")
        assert len({build_metric("psnr_y"), build_metric("psnr_y", crop=4), build_metric("psnr_rgb")}) == 3

    def test_native_metrics_need_the_reference_and_rise_with_quality(self):
        for metric_id in PYIQA_ARGUMENTS:
            metric = build_metric(metric_id)
            assert isinstance(metric, MetricProtocol)
            assert metric.id == metric_id
            assert metric.needs_hq
            assert not metric.lower_better
            assert metric(*pair("noisy")) > metric(*pair("darker"))


class TestRewardsAsMetrics:
    @pytest.mark.parametrize("name", ["sharpness", "colourfulness", "neutrality"])
    def test_they_are_the_rewards_of_the_8_bit_image(self, name):
        metric, reward = build_metric(name), build_reward(name)
        for image in (reference_image(), noisy_image()):
            x = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]
            assert metric(image) == pytest.approx(float(reward(x, [""])), rel=1e-4)
        assert metric(reference_image()) != metric(noisy_image())

    def test_colourfulness_is_the_published_formula_over_255(self):
        red, green, blue = noisy_image().astype(np.float64).transpose(2, 0, 1)
        rg, yb = red - green, (red + green) / 2 - blue
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert build_metric("colourfulness")(noisy_image()) == pytest.approx(expected / 255, rel=1e-6)

    def test_they_need_no_reference_look_at_none_and_say_so(self):
        for name in ("sharpness", "colourfulness", "neutrality"):
            metric = build_metric(name, crop=2)
            assert not metric.needs_hq
            assert not metric.lower_better
            sr, hq = pair("noisy")
            assert metric(sr) == metric(sr, hq) == build_metric(name)(sr[2:-2, 2:-2])
            assert str(metric).startswith(f"{name} | ")
            assert str(metric).endswith("| crop 2 px | images rounded to 8 bits | native")


class TestErrors:
    def test_sizes_that_differ_are_both_named(self):
        with pytest.raises(ValueError, match=r"sr is 96 x 80 px and hq is 95 x 80 px"):
            build_metric("psnr_y")(reference_image(), reference_image()[:, 1:])

    def test_float_images_are_refused(self):
        image = reference_image()
        with pytest.raises(ValueError, match=r"hq is float64 of shape \(80, 96, 3\)"):
            build_metric("psnr_y")(image, image / 255)

    def test_channels_first_images_are_refused(self):
        with pytest.raises(ValueError, match=r"sr is uint8 of shape \(3, 80, 96\)"):
            build_metric("psnr_y")(reference_image().transpose(2, 0, 1), reference_image())

    def test_a_missing_reference_is_named(self):
        with pytest.raises(ValueError, match="hq is missing: ssim_y"):
            build_metric("ssim_y")(reference_image())

    def test_an_image_smaller_than_the_window_is_named(self):
        small = reference_image()[:10, :20]
        with pytest.raises(ValueError, match="11 px per side and the image is 20 x 10 px"):
            build_metric("ssim_y")(small, small)

    def test_a_crop_that_leaves_nothing_is_named(self):
        small = reference_image()[:8, :20]
        with pytest.raises(ValueError, match="sr is 20 x 8 px, and crop=4"):
            build_metric("psnr_y", crop=4)(small, small)
        with pytest.raises(ValueError, match="crop is -1"):
            build_metric("psnr_y", crop=-1)

    def test_an_unknown_id_lists_the_known_ones(self):
        with pytest.raises(
            ValueError, match=r"'psnr' is unknown; use one of psnr_y, ssim_y, psnr_rgb, ssim_rgb, .*or pyiqa:"
        ):
            build_metric("psnr")


class TestToUint8:
    def test_every_8_bit_value_survives_the_round_trip(self):
        levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, 16, 16)
        assert torch.equal(to_uint8(levels.float() / 255), levels)
        assert torch.equal(to_uint8((levels.double() / 255)[None]), levels[None])

    def test_rounds_to_the_nearest_with_halves_up_and_clamps(self):
        values = torch.tensor([-0.2, 0.49, 0.5, 1.5, 2.5, 2.51, 254.49, 254.5, 300.0]).double() / 255
        rounded = to_uint8(values.float().expand(3, 1, 9))
        assert rounded[0, 0].tolist() == [0, 0, 1, 2, 3, 3, 254, 255, 255]

    def test_half_precision_is_rounded_in_float32(self):
        x = torch.tensor([0.6015625], dtype=torch.bfloat16)  # exact in bfloat16; times 255 it is 153.398
        assert to_uint8(x.expand(3, 1, 1)).unique().tolist() == [153]

    def test_refuses_what_is_no_image_in_0_1(self):
        with pytest.raises(ValueError, match="not finite"):
            to_uint8(torch.full((3, 2, 2), float("nan")))
        with pytest.raises(ValueError, match=r"torch.uint8 of shape \(3, 2, 2\)"):
            to_uint8(torch.zeros(3, 2, 2, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"shape \(2, 2, 3\)"):
            to_uint8(torch.zeros(2, 2, 3))


class FakeMetric(torch.nn.Module):
    """Stands where pyiqa's InferenceModel does; draws from every random state, as pyiqa's networks may."""

    def __init__(self, metric_mode: str) -> None:
        super().__init__()
        random.random(), np.random.rand()
        self.offset = torch.nn.Parameter(torch.rand(()))
        self.lower_better, self.metric_mode = True, metric_mode
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.seen.append(images)
        return self.offset + torch.rand(1) + random.random() + np.random.rand()


@pytest.fixture
def fake_pyiqa(monkeypatch):
    """A package with pyiqa's interface and no weights; returns the list of models it made."""
    made: list[FakeMetric] = []
    configs = {
        "sharpness": {"metric_mode": "NR", "metric_opts": {"type": "Sharp", "pretrained": "koniq"}},
        "distance": {"metric_mode": "FR", "metric_opts": {"type": "Distance"}},
        "broken": {"metric_mode": "NR", "metric_opts": {"type": "Broken"}},
        "fid": {"metric_mode": "NR", "metric_opts": {"type": "FID"}},
    }

    def create_metric(name: str, device: torch.device) -> FakeMetric:
        if name == "broken":
            raise OSError("<urlopen error: no route to host>\nand a long tail")
        made.append(FakeMetric(configs[name]["metric_mode"]).to(device))
        return made[-1]

    package, config_module = ModuleType("pyiqa"), ModuleType("pyiqa.default_model_configs")
    package.create_metric, config_module.DEFAULT_CONFIGS = create_metric, configs
    monkeypatch.setitem(sys.modules, "pyiqa", package)
    monkeypatch.setitem(sys.modules, "pyiqa.default_model_configs", config_module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"pyiqa": "9.9"}[name])
    return made


class TestPyiqaMetrics:
    def test_protocol_names_version_options_and_direction(self, fake_pyiqa):
        metric = build_metric("pyiqa:sharpness", crop=2)
        assert str(metric) == (
            "sharpness (pretrained=koniq) | RGB in [0, 1] | crop 2 px | images rounded to 8 bits | pyiqa 9.9"
        )
        assert metric.id == "pyiqa:sharpness"
        assert metric.lower_better
        assert not metric.needs_hq
        assert build_metric("pyiqa:distance").needs_hq

    def test_images_reach_the_network_as_rgb_in_0_1(self, fake_pyiqa):
        sr, hq = pair("noisy")
        build_metric("pyiqa:distance")(sr, hq)
        x, y = fake_pyiqa[0].seen[0]
        assert x.shape == (1, 3, 80, 96)
        assert torch.equal((x[0] * 255).round().to(torch.uint8), torch.from_numpy(sr).permute(2, 0, 1))
        assert torch.equal((y[0] * 255).round().to(torch.uint8), torch.from_numpy(hq).permute(2, 0, 1))
        assert x.max() <= 1

    def test_a_metric_without_reference_does_not_look_at_one(self, fake_pyiqa):
        metric = build_metric("pyiqa:sharpness")
        metric(noisy_image(), reference_image())
        metric(noisy_image())
        assert [len(images) for images in fake_pyiqa[0].seen] == [1, 1]

    def test_numbers_repeat_and_the_global_random_states_stay_where_they_were(self, fake_pyiqa):
        def draw() -> tuple[float, float, float]:
            return random.random(), float(np.random.rand()), float(torch.rand(1))

        for seed in (3, 4):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            metric = build_metric("pyiqa:sharpness")
            values, drawn = [], []
            for _ in range(2):
                values.append(metric(noisy_image()))
                drawn.append(draw())
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            assert drawn == [draw(), draw()]
            assert values[0] == values[1]
        assert torch.equal(fake_pyiqa[0].offset, fake_pyiqa[1].offset)

    def test_weights_that_cannot_be_had_give_a_reason_of_one_line(self, fake_pyiqa):
        with pytest.raises(MetricUnavailableError) as caught:
            build_metric("pyiqa:broken")
        assert str(caught.value) == "pyiqa:broken: OSError: <urlopen error: no route to host>"

    def test_unknown_names_are_told_from_unavailable_ones(self, fake_pyiqa):
        with pytest.raises(ValueError, match="no metric 'sharpnes'; it has sharpness"):
            pyiqa_metric("sharpnes")
        with pytest.raises(ValueError, match="fid judges a folder"):
            pyiqa_metric("fid")

    def test_without_pyiqa_the_reason_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyiqa", None)
        with pytest.raises(MetricUnavailableError, match=r"pip install 'isr-papers\[metrics\]'") as caught:
            build_metric("pyiqa:musiq")
        assert "\n" not in str(caught.value)

    def test_the_installed_pyiqa_runs_through_the_same_door(self):
        pytest.importorskip("pyiqa")
        metric = build_metric("pyiqa:psnr")
        assert metric(*pair("noisy")) == pytest.approx(GOLDEN["psnr_rgb", "noisy"], abs=1e-4)
        assert str(metric).startswith("psnr (test_y_channel=False) | RGB in [0, 1] | no crop |")
        assert metric.needs_hq

    def test_the_installed_clipiqa_gets_past_its_imports_to_the_weights(self, monkeypatch):
        # openai-clip imports pkg_resources, which setuptools 82 dropped; the loader of CLIP's weights comes after it
        pytest.importorskip("pyiqa")

        def no_download(*arguments: object) -> None:
            raise RuntimeError("the loader of CLIP's weights was reached")

        monkeypatch.setattr("pyiqa.archs.clipiqa_arch.load", no_download)
        with pytest.raises(MetricUnavailableError, match="RuntimeError: the loader of CLIP's weights was reached"):
            build_metric("pyiqa:clipiqa")


def test_the_environment_has_what_pyiqas_metrics_import() -> None:
    """By the sources of all its metrics that are offered: what is imported is in the tested set of versions."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    spec = importlib.util.find_spec("pyiqa")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "archs"
    owners = importlib.metadata.packages_distributions()
    lacking = set()
    for path in [*folder.glob("*.py"), *folder.glob("q_align/*.py")]:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"pyiqa"}:
                known = {owner.lower().replace("_", "-") for owner in owners.get(top, [top])}
                if not known & pinned:
                    lacking.add(f"{path.name}: {top}")
    assert not lacking
