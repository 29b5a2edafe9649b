"""Numbers equal those of independent implementations; a metric without weights is not built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from common.pyiqa import MetricUnavailableError
from data.decoding import read_image
from launch.comparison import compare, measures

from ..conftest import NAMES, QUICK, luma, photo


def reference_ssim(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Wang et al. 2004, one window after the other."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (plane[top : top + 11, left : left + 11] for plane in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            c_1, c_2 = 0.01**2 * 255**2, 0.03**2 * 255**2
            structure = max(0.0, (2 * cov + c_2) / (var_a + var_b + c_2))
            found.append((2 * mean_a * mean_b + c_1) / (mean_a**2 + mean_b**2 + c_1) * structure)
    return float(np.mean(found))


def test_psnr_and_ssim_of_every_image_equal_an_independent_float64_computation(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    data = compare(pairs=[pairs], output=output, **QUICK).data
    found = data.values["shots"]["bicubic"]
    for name in NAMES:
        sr, hq = read_image(output / data.images["shots"][name]["methods"]["bicubic"]), photo(NAMES.index(name))
        lq = torch.from_numpy(hq[::4, ::4].copy()).permute(2, 0, 1)[None].double() / 255
        big = nn.functional.interpolate(lq, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
        np.testing.assert_allclose(sr, 255 * big[0].permute(1, 2, 0), atol=0.5001)
        x, y = luma(sr), luma(hq)
        psnr = 10 * np.log10(255**2 / np.mean((x - y) ** 2))
        assert found["psnr_y"][name] == pytest.approx(psnr, abs=1e-4)
        assert found["ssim_y"][name] == pytest.approx(reference_ssim(np.rint(x), np.rint(y)), abs=1e-5)


def test_metrics_through_torchmetrics_are_1_for_equal_images_and_ms_ssim_refuses_small_ones() -> None:
    sr, hq = measures.fixed_pair()
    for name in ("torchmetrics:ms_ssim", "torchmetrics:vif"):
        metric = measures.build(name)
        assert metric(hq, hq) == pytest.approx(1, abs=1e-4)
        assert 0.3 < metric(sr, hq) < 0.99
        assert metric.describe().endswith(f"torchmetrics {measures.importlib.metadata.version('torchmetrics')}")
    with pytest.raises(ValueError, match="ms_ssim needs more than 160 px"):
        measures.build("torchmetrics:ms_ssim")(sr[:160], hq[:160])


def test_vif_in_fp32_equals_torchmetrics_in_float64() -> None:
    from torchmetrics.functional.image import visual_information_fidelity

    sr, hq = measures.fixed_pair()
    expected = visual_information_fidelity(*(torch.from_numpy(luma(image))[None, None] for image in (sr, hq)))
    assert measures.build("torchmetrics:vif")(sr, hq) == pytest.approx(float(expected), abs=2e-5)


def test_a_metric_without_weights_here_is_refused_before_pyiqa_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "pyiqa", None)
    with pytest.raises(MetricUnavailableError, match="weights are not here"):
        measures.build("pyiqa:niqe")
    (tmp_path / "pyiqa").mkdir()
    (tmp_path / "pyiqa" / "niqe_modelparameters.mat").write_bytes(b"x")
    with pytest.raises(MetricUnavailableError, match="pyiqa cannot be imported"):
        measures.build("pyiqa:niqe")
