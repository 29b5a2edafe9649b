"""Contract of data.degradations.

- Each operation equals, pixel for pixel or in law, the published float pipeline as `reference_degradation.py` has it.
- The whole pipeline has the reference's statistics within sampling error, for every preset.
- A sample depends on (seed, epoch, index) and the image, on nothing else.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from data.degradations import kernels, operations
from data.degradations.config import INVSR, OMGSR, OSEDIFF, DegradationConfig, StageConfig, preset
from data.degradations.realesrgan import Degradation, bicubic_downsample, sample_rng

QUIET = StageConfig(
    blur_prob=0, resize_prob=(0, 0, 1), gaussian_noise_prob=1, noise_range=(0, 0), jpeg_range=(100, 100)
)


def textured(seed: int, size: int = 128) -> np.ndarray:
    """Overlapping discs of fine texture and smooth shading: edges, flat parts and a photo-like spectrum."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    image = np.full((size, size, 3), 128.0)
    for _ in range(60):
        centre, radius = rng.uniform(0, size, 2), size * rng.uniform(0.03, 0.3)
        inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        wave = rng.uniform(0, 40) * np.sin(rng.normal(0, 0.7) * x + rng.normal(0, 0.7) * y + rng.uniform(0, 6))
        image[inside] = (rng.uniform(10, 245, 3) + wave[..., None])[inside]
    return np.clip(image, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return textured(0)


def to_torch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor[0].permute(1, 2, 0).numpy()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Every operation called, in order: (name, second argument, height of the result)."""
    log: list[tuple] = []

    def record(name: str) -> Callable[..., np.ndarray]:
        original = getattr(operations, name)

        def call(*args: object) -> np.ndarray:
            out = original(*args)
            log.append((name, args[1], out.shape[0]))
            return out

        return call

    for name in ("blur", "resize", "gaussian_noise", "poisson_noise", "jpeg"):
        monkeypatch.setattr(operations, name, record(name))
    return log


class TestKernels:
    def test_sum_to_one_in_float32(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(200):
            kernel = kernels.draw_kernel(OSEDIFF.first, rng)
            assert kernel.dtype == np.float32
            assert kernel.shape[0] == kernel.shape[1]
            assert kernel.sum() == pytest.approx(1, abs=2e-6)

    def test_are_symmetric_about_the_centre(self) -> None:
        rng = np.random.default_rng(1)
        for _ in range(100):
            kernel = kernels.draw_kernel(OSEDIFF.first, rng)
            np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-8)

    @pytest.mark.parametrize("angle", [0.3, 1.0, -2.0])
    def test_isotropic_is_anisotropic_with_equal_sigmas_at_any_angle(self, angle: float) -> None:
        np.testing.assert_allclose(kernels.gaussian(13, 1.7, 1.7), kernels.gaussian(13, 1.7, 1.7, angle), atol=1e-8)

    def test_gaussian_has_its_second_moments(self) -> None:
        sigma_x, sigma_y, theta = 2.0, 1.0, 0.4
        kernel = kernels.gaussian(21, sigma_x, sigma_y, theta)
        offsets = np.arange(21) - 10
        covariance = (kernel * np.outer(offsets, offsets)).sum()
        # Off-diagonal entry of R diag(4, 1) R^T: (4 - 1) sin cos
        assert covariance == pytest.approx(3 * np.sin(theta) * np.cos(theta), abs=2e-3)
        variance_x = (kernel * offsets[None] ** 2).sum()
        assert variance_x == pytest.approx(4 * np.cos(theta) ** 2 + np.sin(theta) ** 2, abs=5e-3)

    def test_generalized_gaussian_of_exponent_one_is_the_gaussian(self) -> None:
        expected = kernels.gaussian(11, 1.2, 2.3, 0.5)
        np.testing.assert_allclose(kernels.generalized_gaussian(11, 1.2, 2.3, 0.5, 1.0), expected, atol=1e-8)

    def test_plateau_by_hand(self) -> None:
        # sigma 1, beta 1: taps 1 / (1 + r^2) = 1 at the centre, 1/2 beside it, 1/3 at the corners
        expected = np.array([[2, 3, 2], [3, 6, 3], [2, 3, 2]]) / 26
        np.testing.assert_allclose(kernels.plateau(3, 1.0, 1.0, 0.0, 1.0), expected, atol=1e-7)

    @pytest.mark.parametrize("cutoff", [np.pi / 3, np.pi / 2])
    def test_sinc_passes_below_its_cut_off_and_stops_above(self, cutoff: float) -> None:
        spectrum = np.abs(np.fft.fft2(kernels.sinc(21, cutoff), (256, 256)))
        frequency = np.hypot(*np.meshgrid(*(2 * np.pi * np.fft.fftfreq(256),) * 2))
        assert spectrum[frequency < 0.7 * cutoff].min() > 0.8
        assert spectrum[frequency > 1.3 * cutoff].max() < 0.15

    def test_agree_with_the_reference_formulas(self, reference: ModuleType) -> None:
        shape = (15, 2.5, 0.8, 0.7)
        for ours, kind, beta in (
            (kernels.gaussian(*shape), "gaussian", 1.0),
            (kernels.generalized_gaussian(*shape, 0.6), "generalized", 0.6),
            (kernels.plateau(*shape, 1.6), "plateau", 1.6),
        ):
            np.testing.assert_allclose(ours, reference.bell_kernel(kind, *shape, beta), atol=1e-7)
        np.testing.assert_allclose(kernels.sinc(9, 1.5), reference.sinc_kernel(9, 1.5), atol=1e-7)

    def test_kinds_come_up_as_often_as_published(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: Counter[str] = Counter()

        def count(name: str) -> Callable[..., np.ndarray]:
            def call(size: int, first: float, second: float = 0.0, *rest: float) -> np.ndarray:
                shape = "" if name == "sinc" else ("_iso" if first == second else "_aniso")
                drawn[name + shape] += 1
                return np.ones((1, 1))

            return call

        for name in ("gaussian", "generalized_gaussian", "plateau", "sinc"):
            monkeypatch.setattr(kernels, name, count(name))
        rng, total = np.random.default_rng(2), 20000
        for _ in range(total):
            kernels.draw_kernel(OSEDIFF.first, rng)
        expected = {"sinc": 0.1, "gaussian_iso": 0.405, "gaussian_aniso": 0.225, "generalized_gaussian_iso": 0.108}
        expected |= {"generalized_gaussian_aniso": 0.027, "plateau_iso": 0.108, "plateau_aniso": 0.027}
        assert stats.chisquare([drawn[k] for k in expected], [total * p for p in expected.values()]).pvalue > 1e-3

    def test_half_of_the_generalized_exponents_lie_below_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        betas: list[float] = []
        monkeypatch.setattr(kernels, "generalized_gaussian", lambda *args: betas.append(args[-1]))
        stage = replace(OSEDIFF.first, kernel_probs=(0, 0, 1, 0, 0, 0), sinc_prob=0)
        rng = np.random.default_rng(3)
        for _ in range(4000):
            kernels.draw_kernel(stage, rng)
        assert np.mean(np.array(betas) < 1) == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
        assert 0.5 <= min(betas) < 0.51
        assert 3.9 < max(betas) <= 4.0

    def test_sinc_cut_offs_span_the_published_ranges(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[tuple[int, float]] = []
        monkeypatch.setattr(kernels, "sinc", lambda size, cutoff: drawn.append((size, cutoff)))
        rng, stage = np.random.default_rng(12), replace(OSEDIFF.first, sinc_prob=1)
        for _ in range(2000):
            kernels.draw_kernel(stage, rng)
        final = len(drawn)
        for _ in range(800):
            kernels.draw_final_sinc(INVSR.final_sinc_sizes, rng)
        small = [cutoff for size, cutoff in drawn[:final] if size < 13]
        large = [cutoff for size, cutoff in drawn[:final] if size >= 13]
        last = [cutoff for _, cutoff in drawn[final:]]
        for cutoffs, low in ((small, np.pi / 3), (large, np.pi / 5), (last, np.pi / 3)):
            assert low <= min(cutoffs) < low + 0.03
            assert stats.kstest(cutoffs, stats.uniform(low, np.pi - low).cdf).pvalue > 1e-3
        assert {size for size, _ in drawn[:final]} == {7, 9, 11, 13, 15, 17, 19, 21}
        assert {size for size, _ in drawn[final:]} == {3, 5, 7, 9, 11, 13}

    def test_trim_keeps_what_matters(self) -> None:
        narrow = kernels.trim(kernels.gaussian(21, 0.5, 0.5), 1e-3)
        assert narrow.shape == (5, 5)  # two px are four sigmas
        flat = np.full((7, 7), 1 / 49, dtype=np.float32)
        np.testing.assert_array_equal(kernels.trim(flat, 1e-3), flat)

    def test_separate_rebuilds_the_kernel_within_its_tolerance(self) -> None:
        rng = np.random.default_rng(4)
        for _ in range(60):
            kernel = kernels.draw_kernel(OSEDIFF.first, rng)
            pairs = kernels.separate(kernel, 2e-3)
            rebuilt = sum(np.outer(column, row) for column, row in pairs)
            assert np.abs(rebuilt - kernel).sum() <= 2.1e-3
            for vector in (v for pair in pairs for v in pair):
                assert np.array_equal(vector, vector[::-1]) or np.array_equal(vector, -vector[::-1])

    def test_one_pair_is_enough_for_an_isotropic_gaussian(self) -> None:
        assert len(kernels.separate(kernels.gaussian(21, 2.0, 2.0), 1e-6)) == 1


class TestOperations:
    def test_blur_equals_the_full_convolution(self, reference: ModuleType, image: np.ndarray) -> None:
        rng = np.random.default_rng(5)
        drawn = [kernels.draw_kernel(OSEDIFF.first, rng) for _ in range(60)]
        drawn += [kernels.draw_final_sinc(OSEDIFF.final_sinc_sizes, rng) for _ in range(10)]
        drawn += [kernels.gaussian(21, 3.0, 0.4, 0.6), kernels.gaussian(9, 0.2, 0.2)]
        for kernel in drawn:
            expected = to_numpy(reference.filter2d(to_torch(image), kernel.astype(np.float64), depthwise=True))
            error = operations.blur(image, kernel) - expected
            assert np.abs(error).max() < 0.5
            assert np.sqrt(np.mean(error**2)) < 0.1

    def test_blur_takes_float_images_beyond_the_grey_range(self) -> None:
        ramp = np.broadcast_to(np.linspace(-50, 300, 40, dtype=np.float32)[:, None, None], (40, 30, 3)).copy()
        out = operations.blur(ramp, kernels.gaussian(7, 1.0, 1.0))
        np.testing.assert_allclose(out[5:-5], ramp[5:-5], atol=1e-2)  # a linear ramp passes a symmetric filter

    @pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
    @pytest.mark.parametrize("size", [(96, 96), (19, 37), (150, 131), (200, 100), (100, 200), (256, 128), (32, 32)])
    def test_resize_equals_torch(self, image: np.ndarray, mode: str, size: tuple[int, int]) -> None:
        expected = to_numpy(torch.nn.functional.interpolate(to_torch(image), size=size, mode=mode))
        ours = operations.resize(image.astype(np.float32), *size, mode)
        np.testing.assert_allclose(ours, expected, atol=0.01)

    @pytest.mark.parametrize("gray", [False, True])
    def test_gaussian_noise_has_its_sigma_and_shares_channels_when_gray(self, gray: bool) -> None:
        base = np.full((200, 200, 3), 128, dtype=np.float32)
        noise = operations.gaussian_noise(base, 12.0, gray, np.random.default_rng(6)) - base
        count = noise.size / (3 if gray else 1)
        assert abs(noise.mean()) < 4 * 12 / count**0.5
        assert noise.std() == pytest.approx((12**2 + 1 / 12) ** 0.5, rel=4 / (2 * count) ** 0.5)  # with the rounding
        correlation = np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]
        assert correlation == pytest.approx(1 if gray else 0, abs=4 / 200)

    @pytest.mark.parametrize("peak", [1, 2, 64, 256])
    @pytest.mark.parametrize("level", [1, 3, 60, 255])
    def test_poisson_counts_follow_the_law(self, level: int, peak: int) -> None:
        count, mean = 200_000, level / 255 * peak
        drawn = operations.poisson_counts(np.full(count, level, np.uint8), peak, np.random.default_rng(level + peak))
        assert drawn.mean() == pytest.approx(mean, abs=4 * (mean / count) ** 0.5)
        assert drawn.var() == pytest.approx(mean, abs=4 * ((mean + 2 * mean**2) / count) ** 0.5)
        law = stats.poisson(mean)
        low, high = int(law.ppf(5e-5)), int(law.ppf(1 - 5e-5))  # about ten draws in either tail
        edges = np.arange(low, high + 1)
        expected = np.concatenate([[law.cdf(low - 1)], law.pmf(edges), [law.sf(high)]]) * count
        seen = np.bincount(np.clip(drawn, low - 1, high + 1) - (low - 1), minlength=len(expected))
        kept = expected > 5
        seen_all, expected_all = [*seen[kept], seen[~kept].sum()], [*expected[kept], expected[~kept].sum()]
        statistic = sum((s - e) ** 2 / max(e, 1) for s, e in zip(seen_all, expected_all, strict=True))
        assert statistic < stats.chi2(len(seen_all) - 1).ppf(1 - 1e-4)

    def test_poisson_counts_reach_the_far_tail(self) -> None:
        # A bare table of 4096 cells would stop at its last cell: here about 49 of 200000 draws lie beyond it.
        drawn = operations.poisson_counts(np.full(200_000, 255, np.uint8), 256, np.random.default_rng(7))
        threshold = int(stats.poisson(256).ppf(1 - 1 / 8192))
        expected = 200_000 * stats.poisson(256).sf(threshold)
        assert abs((drawn > threshold).sum() - expected) < 4 * expected**0.5
        assert len(np.unique(drawn[drawn > threshold])) >= 4

    def test_poisson_counts_do_not_mix_up_pixels(self) -> None:
        levels = np.random.default_rng(8).integers(0, 256, (97, 101, 3), dtype=np.uint8)  # no multiple of a chunk
        drawn = operations.poisson_counts(levels, 256, np.random.default_rng(9))
        mean = levels / 255 * 256
        score = ((drawn - mean) / np.sqrt(np.maximum(mean, 1e-9)))[levels > 20]
        assert np.abs(score).max() < 6.5
        assert (drawn[levels == 0] == 0).all()

    @pytest.mark.parametrize(("distinct", "peak"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (129, 256)])
    def test_poisson_noise_counts_distinct_levels(self, distinct: int, peak: int) -> None:
        base = np.full((120, 120, 3), 100, dtype=np.float32)
        base.reshape(-1)[:distinct] = 100 + np.arange(distinct)
        noise = (operations.poisson_noise(base, 0.3, False, np.random.default_rng(10)) - base).reshape(-1)[distinct:]
        sigma = 0.3 * 255 * (100 / 255 / peak) ** 0.5  # factor * 255 * sqrt(x / peak)
        if peak > 2:  # below, the noise leaves the grey range
            assert noise.std() == pytest.approx((sigma**2 + 1 / 12) ** 0.5, rel=0.03)
        counts = np.unique(noise[(noise > -100) & (noise < 155)])  # not clipped
        spacing = 0.3 * 255 / peak
        if spacing > 2:  # the grid of counts shows through the rounding
            assert np.diff(counts).min() == pytest.approx(spacing, abs=1)

    @pytest.mark.parametrize("gray", [False, True])
    def test_poisson_noise_has_the_references_moments(
        self, reference: ModuleType, image: np.ndarray, gray: bool
    ) -> None:
        base = image.astype(np.float32) * 0.5 + 60
        rng, generator = np.random.default_rng(11), torch.Generator().manual_seed(0)
        rgb = cv2.cvtColor(base, cv2.COLOR_BGR2RGB)
        ours = operations.poisson_noise(base, 1.5, gray, rng) - base
        theirs = to_numpy(reference.add_poisson_noise(to_torch(rgb) / 255, 1.5, gray, generator)) * 255 - rgb
        count = ours.size / (3 if gray else 1)
        assert abs(ours.mean() - theirs.mean()) < 4 * theirs.std() * (2 / count) ** 0.5
        assert ours.std() == pytest.approx(theirs.std(), rel=4 * (1.2 / count) ** 0.5)
        for noise in (ours, theirs):  # shared by the channels but for the rounding and clipping
            assert (np.median(np.ptp(noise, axis=2)) <= 1) == gray

    @pytest.mark.parametrize("quality", [30, 60, 95])
    def test_jpeg_is_a_standard_one_of_that_quality(self, image: np.ndarray, quality: int) -> None:
        buffer = io.BytesIO()
        Image.fromarray(image[..., ::-1].copy()).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        expected = np.asarray(Image.open(buffer))[..., ::-1]
        ours = operations.jpeg(image, quality + 0.3)
        assert np.abs(ours.astype(int) - expected).mean() < 0.5

    @pytest.mark.parametrize("quality", [30.0, 60.0, 95.0])
    def test_jpeg_distorts_luma_as_the_reference_does(
        self, reference: ModuleType, image: np.ndarray, quality: float
    ) -> None:
        gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
        ours = operations.jpeg(gray, quality).astype(np.float64)
        theirs = to_numpy(reference.jpeg(to_torch(gray) / 255, quality)) * 255
        distortion = np.mean((theirs - gray) ** 2)
        assert np.mean((ours - theirs) ** 2) < max(0.03 * distortion, 0.6)  # the latter: 8-bit rounding


class TestPipeline:
    def test_same_triple_same_bytes_and_any_change_changes_them(self, image: np.ndarray) -> None:
        degrade = Degradation(OSEDIFF)
        first = degrade(image, sample_rng(1, 2, 3))
        cv2.setRNGSeed(5)  # OpenCV's own generator must not matter
        assert first.tobytes() == degrade(image, sample_rng(1, 2, 3)).tobytes()
        assert first.tobytes() == Degradation(OSEDIFF)(image, sample_rng(1, 2, 3)).tobytes()
        for triple in ((0, 2, 3), (1, 0, 3), (1, 2, 4), (2, 1, 3), (3, 2, 1)):
            assert first.tobytes() != degrade(image, sample_rng(*triple)).tobytes()

    def test_leaves_the_input_and_the_global_generators_alone(self, image: np.ndarray) -> None:
        before, copy = np.random.get_state(), image.copy()
        torch_state = torch.get_rng_state()
        degrade = Degradation(OSEDIFF)
        for index in range(10):
            degrade(image, sample_rng(0, 0, index))
        after = np.random.get_state()
        assert before[2:] == after[2:]
        np.testing.assert_array_equal(before[1], after[1])
        assert torch.equal(torch_state, torch.get_rng_state())
        np.testing.assert_array_equal(image, copy)

    @pytest.mark.parametrize("shape", [(128, 128), (64, 96), (16, 12), (4, 4)])
    @pytest.mark.parametrize("config", [OSEDIFF, OMGSR, INVSR])
    def test_shape_and_type_at_any_size(self, shape: tuple[int, int], config: DegradationConfig) -> None:
        hq = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        degrade = Degradation(config)
        for index in range(12):
            lq = degrade(hq, sample_rng(0, 0, index))
            assert lq.shape == (shape[0] // 4, shape[1] // 4, 3)
            assert lq.dtype == np.uint8

    def test_is_the_identity_when_all_is_off(self, image: np.ndarray) -> None:
        config = DegradationConfig(scale=1, first=QUIET, second=QUIET, final_sinc_prob=0)
        smooth = cv2.GaussianBlur(image, (0, 0), 3)  # so that JPEG's half-resolution chroma costs little
        assert np.abs(Degradation(config)(smooth, sample_rng(0, 0, 0)).astype(int) - smooth).mean() < 1.5

    def test_keeps_rgb_order(self) -> None:
        red = np.zeros((64, 64, 3), np.uint8)
        red[..., 0] = 230
        config = DegradationConfig(first=QUIET, second=QUIET)
        mean = Degradation(config)(red, sample_rng(0, 0, 0)).mean((0, 1))
        np.testing.assert_allclose(mean, (230, 0, 0), atol=4)

    def test_order_of_operations(self, image: np.ndarray, calls: list[tuple]) -> None:
        first = replace(OSEDIFF.first, gaussian_noise_prob=1)
        second = replace(OSEDIFF.second, gaussian_noise_prob=0, blur_prob=1)
        config = replace(OSEDIFF, first=first, second=second, final_sinc_prob=1, final_jpeg_last_prob=1)
        Degradation(config)(image, sample_rng(0, 0, 0))
        names = [
            "blur",
            "resize",
            "gaussian_noise",
            "jpeg",
            "blur",
            "resize",
            "poisson_noise",
            "resize",
            "blur",
            "jpeg",
        ]
        assert [name for name, *_ in calls] == names
        calls.clear()
        Degradation(replace(config, final_jpeg_last_prob=0))(image, sample_rng(0, 0, 0))
        assert [name for name, *_ in calls] == [*names[:7], "jpeg", "resize", "blur"]

    def test_second_order_and_sinc_can_be_forced_off(self, image: np.ndarray, calls: list[tuple]) -> None:
        Degradation(replace(OSEDIFF, second_order_prob=0, final_sinc_prob=0))(image, sample_rng(0, 0, 0))
        count = Counter(name for name, *_ in calls)
        assert count["blur"] == 1
        assert count["resize"] == 2
        assert count["gaussian_noise"] + count["poisson_noise"] == 1
        assert count["jpeg"] == 2  # the last JPEG belongs to no stage

    def test_branches_come_up_as_often_as_configured(self, calls: list[tuple]) -> None:
        hq, total = textured(3, 32), 800
        degrade = Degradation(INVSR)
        for index in range(total):
            degrade(hq, sample_rng(4, 0, index))
        seen = Counter(name for name, *_ in calls)
        for name, mean, variance in (
            # first stage 1; second stage 0.5 * 0.8; final sinc 0.8
            ("blur", 1 + 0.4 + 0.8, 0.4 * 0.6 + 0.8 * 0.2),
            ("resize", 2.5, 0.25),
            ("gaussian_noise", 0.75, 0.5),
            ("jpeg", 2, 0),
        ):
            assert abs(seen[name] - total * mean) <= 4 * (total * variance) ** 0.5, name

    def test_parameters_span_their_ranges(self, calls: list[tuple]) -> None:
        hq, degrade = textured(3, 64), Degradation(OMGSR)
        first_q, last_q, factors, sigmas, scales = [], [], [], [], []
        for index in range(500):
            calls.clear()
            degrade(hq, sample_rng(5, 0, index))
            qualities = [value for name, value, _ in calls if name == "jpeg"]
            first_q.append(qualities[0])
            last_q.append(qualities[1])
            factors.append(next(height for name, _, height in calls if name == "resize") / 64)
            stage_noise = next((name, value) for name, value, _ in calls if name.endswith("noise"))
            (sigmas if stage_noise[0] == "gaussian_noise" else scales).append(stage_noise[1])
        for values, low, high in ((first_q, 60, 95), (last_q, 60, 100), (sigmas, 1, 15), (scales, 0.05, 2)):
            width = high - low
            assert low <= min(values) < low + 0.03 * width
            assert high - 0.03 * width < max(values) <= high
            assert stats.kstest(values, stats.uniform(low, width).cdf).pvalue > 1e-3
        assert 0.29 <= min(factors) < 0.35
        assert 1.4 < max(factors) <= 1.5
        keep = np.mean(np.array(factors) == 1)
        assert keep == pytest.approx(0.1, abs=0.06)  # flooring to whole px adds a few of the draws near 1
        assert np.mean(np.array(factors) > 1) == pytest.approx(0.2, abs=4 * (0.16 / 500) ** 0.5)

    @pytest.mark.slow
    @pytest.mark.parametrize("config", [OSEDIFF, OMGSR, INVSR], ids=["osediff", "omgsr", "invsr"])
    def test_statistics_are_the_references(self, reference: ModuleType, config: DegradationConfig) -> None:
        """Means, spreads and whole distributions of seven measures, each within four standard errors."""
        images, count = [textured(seed) for seed in range(8)], 160
        torch.set_num_threads(1)
        ours = measure(Degradation(config), images, count, 0)
        theirs = measure(reference.ReferenceDegradation(config, depthwise=True), images, count, 1)
        for name in ours:
            a, b = ours[name], theirs[name]
            error = np.sqrt((a.var() + b.var()) / count)
            assert abs(a.mean() - b.mean()) < 4 * error, name
            spread = [x.std() * np.sqrt((stats.kurtosis(x, fisher=False) - 1) / 4 / count) for x in (a, b)]
            assert abs(a.std() - b.std()) < 4 * np.hypot(*spread), name
            assert stats.ks_2samp(a, b).pvalue > 1e-4, name


def measure(
    degrade: Callable[[np.ndarray, np.random.Generator], np.ndarray], images: list[np.ndarray], count: int, epoch: int
) -> dict[str, np.ndarray]:
    rows = []
    for index in range(count):
        hq = images[index % len(images)]
        rows.append(describe(degrade(hq, sample_rng(11, epoch, index)), bicubic_downsample(hq, 4)))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def describe(lq: np.ndarray, clean: np.ndarray) -> dict[str, float]:
    """PSNR, mean colour error, log power in three radial bands, noise level, blockiness of one image."""
    difference = lq.astype(np.float64) - clean
    luma = lq.astype(np.float64) @ (0.299, 0.587, 0.114)
    window = np.outer(*(np.hanning(len(luma)),) * 2)
    power = np.abs(np.fft.fft2((luma - luma.mean()) * window)) ** 2
    radius = np.hypot(*np.meshgrid(*(np.fft.fftfreq(len(luma)),) * 2))
    bands = [np.log10(power[(radius > low) & (radius <= low + 0.15)].mean() + 1) for low in (0.05, 0.2, 0.35)]
    diagonal = luma[1:, 1:] - luma[1:, :-1] - luma[:-1, 1:] + luma[:-1, :-1]
    step = np.abs(np.diff(luma, n=2, axis=1))
    at_edge = np.arange(step.shape[1]) % 8 >= 6
    return {
        "psnr": 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-3)),
        "bias": difference.mean(),
        "low band": bands[0],
        "middle band": bands[1],
        "high band": bands[2],
        "noise": np.log(np.median(np.abs(diagonal)) + 0.5),
        "blockiness": np.log((step[:, at_edge].mean() + 0.5) / (step[:, ~at_edge].mean() + 0.5)),
    }


class TestConfig:
    def test_osediff_numbers(self) -> None:
        config = preset("osediff")
        assert config == OSEDIFF == DegradationConfig()
        assert config.first.kernel_sizes == tuple(range(7, 22, 2)) == config.final_sinc_sizes
        assert (config.first.sigma, config.second.sigma) == ((0.2, 3.0), (0.2, 1.5))
        assert (config.first.resize_range, config.second.resize_range) == ((0.15, 1.5), (0.3, 1.2))
        assert (config.first.resize_prob, config.second.resize_prob) == ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))
        assert (config.first.noise_range, config.second.noise_range) == ((1, 30), (1, 25))
        assert (config.first.poisson_scale_range, config.second.poisson_scale_range) == ((0.05, 3), (0.05, 2.5))
        assert config.first.jpeg_range == config.second.jpeg_range == (30, 95)
        assert (config.first.blur_prob, config.second.blur_prob) == (1, 0.8)
        assert (config.second_order_prob, config.final_sinc_prob, config.final_jpeg_last_prob) == (1, 0.8, 0.5)
        for stage in (config.first, config.second):
            assert stage.kernel_probs == (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
            assert (stage.betag, stage.betap, stage.sinc_prob) == ((0.5, 4), (1, 2), 0.1)
            assert (stage.gaussian_noise_prob, stage.gray_noise_prob) == (0.5, 0.4)

    def test_omgsr_numbers_are_milder(self) -> None:
        first, second = preset("omgsr").first, preset("omgsr").second
        assert (first.resize_range, first.noise_range, first.jpeg_range) == ((0.3, 1.5), (1, 15), (60, 95))
        assert first.poisson_scale_range == (0.05, 2)
        assert (second.blur_prob, second.resize_range, second.jpeg_range) == (0.5, (0.6, 1.2), (60, 100))
        assert (second.noise_range, second.poisson_scale_range) == ((1, 12), (0.05, 1))

    def test_invsr_numbers_are_osediffs_but_for_kernels_and_second_order(self) -> None:
        config = preset("invsr")
        assert config.second_order_prob == 0.5
        assert config.first.kernel_sizes == tuple(range(3, 21, 2))
        assert config.second.kernel_sizes == config.final_sinc_sizes == tuple(range(3, 15, 2))
        assert replace(config.first, kernel_sizes=OSEDIFF.first.kernel_sizes) == OSEDIFF.first
        assert replace(config.second, kernel_sizes=OSEDIFF.second.kernel_sizes) == OSEDIFF.second

    def test_unknown_preset_names_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=r"'bsrgan'.*invsr, omgsr, osediff"):
            preset("bsrgan")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("blur_prob", 1.2),
            ("kernel_sizes", (7, 8)),
            ("kernel_probs", (0.5, 0.5, 0.5, 0.0, 0.0, 0.0)),
            ("resize_prob", (0.5, 0.5)),
            ("resize_range", (1.1, 1.5)),
            ("betag", (1.5, 4.0)),
            ("noise_range", (5.0, 1.0)),
            ("jpeg_range", (30.0, 101.0)),
        ],
    )
    def test_names_the_field_that_is_out_of_range(self, field: str, value: object) -> None:
        with pytest.raises(ValueError, match=field):
            StageConfig(**{field: value})

    def test_every_field_can_be_set_from_yaml(self) -> None:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser()
        parser.add_class_arguments(Degradation, "degradation")
        text = (
            '{"degradation": {"config": {"scale": 2, "second_order_prob": 0.25, "first": {"jpeg_range": [50, 90],'
            ' "kernel_sizes": [3, 5]}, "second": {"noise_range": [2, 3]}}}}'
        )
        config = parser.instantiate(parser.parse_string(text)).degradation.config
        assert (config.scale, config.second_order_prob) == (2, 0.25)
        assert config.first == replace(OSEDIFF.first, jpeg_range=(50, 90), kernel_sizes=(3, 5))
        assert config.second.noise_range == (2, 3)


class TestErrors:
    def test_sizes_that_are_no_multiple_of_the_scale(self) -> None:
        with pytest.raises(ValueError, match=r"130x128.*scale=4.*crop"):
            Degradation(OSEDIFF)(np.zeros((130, 128, 3), np.uint8), sample_rng(0, 0, 0))
        with pytest.raises(ValueError, match="scale=3"):
            bicubic_downsample(np.zeros((128, 128, 3), np.uint8), 3)

    @pytest.mark.parametrize("bad", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
    def test_other_types_and_shapes(self, bad: np.ndarray) -> None:
        with pytest.raises(ValueError, match=r"uint8 RGB"):
            Degradation(OSEDIFF)(bad, sample_rng(0, 0, 0))


class TestBicubic:
    def test_averages_detail_the_small_image_cannot_hold(self) -> None:
        board = np.indices((64, 64)).sum(0) % 2 * 200
        small = bicubic_downsample(np.repeat(board[..., None], 3, 2).astype(np.uint8), 4)
        np.testing.assert_allclose(small, 100, atol=2)  # without anti-aliasing it would stay black and white

    def test_keeps_a_ramp_in_place(self) -> None:
        ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (64, 64, 3)).copy()
        expected = 3 * (4 * np.arange(16) + 1.5)  # centres of groups of four
        np.testing.assert_allclose(bicubic_downsample(ramp, 4)[8, 2:-2, 0], expected[2:-2], atol=0.6)
