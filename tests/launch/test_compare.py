"""`isr compare`: numbers against other implementations, nothing dropped silently, nothing made twice."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from common.figures import predicted_against_target, save_figure
from common.files import folder_name
from common.metrics import MetricUnavailableError
from data.images import Pixels, read_image
from launch.cli import main
from launch.comparison import WrittenReport, compare, engine, measures
from launch.comparison.efficiency import measure
from launch.comparison.inputs import Item
from launch.comparison.methods import Baseline, Method
from launch.comparison.outputs import copy_figures
from launch.comparison.pictures import NamedFigure, draw_grid, largest_differences, spread
from launch.comparison.published import published
from launch.comparison.report import Report
from launch.comparison.store import Store
from launch.comparison.tables import significantly_best
from launch.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["cat", "dog", "hat"]
QUICK: dict[str, Any] = {
    "metrics": ["psnr", "ssim", "sharpness"],
    "efficiency": False,
    "progress": False,
    "device": "cpu",
}


def photo(seed: int, side: int = 64) -> Pixels:
    """Blobs and edges, (side, side, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).copy()
    smooth[side // 3 : side // 2, side // 4 :] = rng.integers(0, 256, 3)
    return smooth


def save(path: Path, image: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "shots"
    for seed, name in enumerate(NAMES):
        hq = photo(seed)
        save(folder / "test_HR" / f"{name}.png", hq)
        save(folder / "test_LR" / f"{name}.png", hq[::4, ::4])
    return folder


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A program's results: the references, a little brighter."""
    folder = tmp_path / "foreign"
    for seed, name in enumerate(NAMES):
        save(folder / f"{name}.png", np.minimum(photo(seed), 250) + 5)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def luma(image: Pixels) -> NDArray[np.float64]:
    r, g, b = np.moveaxis(image.astype(np.float64), -1, 0)
    return 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255


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


def test_the_report_has_all_its_files_and_every_path_it_names(pairs: Path, foreign: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    made = compare(results={"GAN": foreign}, pairs=[pairs], output=output, **QUICK)
    files = ("metrics.csv", "summary.csv", "efficiency.csv", "report.md", "table.tex", "grid.png", "report.html")
    assert all((output / name).is_file() for name in files)
    assert (made.page, made.markdown) == (output / "report.html", output / "report.md")
    data = json.loads(json.dumps(vars(made.data)))
    assert data["methods"] == [
        {"name": "bicubic", "kind": "baseline", "failures": []},
        {"name": "GAN", "kind": "results", "failures": []},
    ]
    assert data["datasets"] == [{"name": "shots", "paired": True, "images": NAMES}]
    assert [metric["id"] for metric in data["metrics"]] == ["psnr_y", "ssim_y", "sharpness"]
    for image in data["images"]["shots"].values():
        for path in (image["lq"], image["hq"], *image["methods"].values()):
            assert (output / path).is_file()
        for crop in image["crops"]:
            assert crop["x"] % 4 == crop["y"] % 4 == crop["size"] % 4 == 0
            assert max(crop["x"], crop["y"]) + crop["size"] <= 64
    values = data["values"]["shots"]
    gain = data["gains"]["shots"]["GAN"]["psnr_y"]
    expected = np.mean([values["GAN"]["psnr_y"][name] - values["bicubic"]["psnr_y"][name] for name in NAMES])
    assert gain["mean"] == pytest.approx(expected)
    assert (gain["n"], gain["wins"]) == (3, 1.0)
    assert data["ranks"]["shots"]["GAN"]["psnr_y"] == 1.0
    assert "bicubic" not in data["gains"]["shots"] or not data["gains"]["shots"]["bicubic"]
    summary = {(row["method"], row["metric"]): row for row in rows(output / "summary.csv")}
    row = summary["GAN", "psnr_y"]
    assert float(row["gain"]) == pytest.approx(expected, abs=1e-6)
    assert (row["n"], row["gain_n"], row["wins"]) == ("3", "3", "1.000000")
    assert row["protocol"] == measures.build("psnr_y").describe()
    assert "**" in made.markdown.read_text()


def test_tensorboard_gets_the_newest_figures_under_the_names_that_its_text_says(pairs: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plot = tmp_path / "blur.png"
    save_figure(plot, predicted_against_target([1.0, 2.0], [1.5, 2.5], 3, "blur"), "what one sees")
    for _ in range(2):
        compare(pairs=[pairs], output=tmp_path / "out", figures=[NamedFigure("a/b", plot)], **QUICK)
    assert len(list((tmp_path / "out").glob("events.out.tfevents.*"))) == 1
    events = EventAccumulator(str(tmp_path / "out")).Reload()
    (shown,) = events.Images("figures/a/b/blur")
    assert (shown.width, shown.height) == (600, 600)
    (text,) = events.Tensors("report/text_summary")
    assert b"See the image `figures/a/b/blur`.\n\nwhat one sees" in text.tensor_proto.string_val[0]
    assert b"See the image `grid`." in text.tensor_proto.string_val[0]
    assert b"](" not in text.tensor_proto.string_val[0]


def test_tensorboard_gets_means_and_images(pairs: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = compare(pairs=[pairs], output=tmp_path / "out", **QUICK).data
    events = EventAccumulator(str(tmp_path / "out")).Reload()
    mean = data.means["shots"]["bicubic"]["psnr_y"]["mean"]
    assert events.Scalars("shots/psnr_y/bicubic")[0].value == pytest.approx(mean, abs=1e-4)
    assert {"grid", "cat/LQ", "cat/bicubic", "cat/HQ"} <= set(events.Tags()["images"])


def test_foreign_files_that_are_missing_extra_or_spoilt_are_named_and_counted(
    pairs: Path, foreign: Path, tmp_path: Path
) -> None:
    for seed, name in ((7, "gray"), (8, "deep"), (9, "glass"), (10, "broken"), (11, "small"), (12, "two")):
        save(pairs / "test_HR" / f"{name}.png", photo(seed))
        save(pairs / "test_LR" / f"{name}.png", photo(seed)[::4, ::4])
    (foreign / "cat.png").unlink()
    save(foreign / "notes.png", photo(3))
    Image.fromarray(photo(7)).convert("L").save(foreign / "gray.png")
    import cv2

    cv2.imwrite(str(foreign / "deep.png"), photo(8)[..., ::-1].astype(np.uint16) * 257)
    Image.fromarray(photo(9)).convert("RGBA").save(foreign / "glass.png")
    (foreign / "broken.png").write_bytes((foreign / "dog.png").read_bytes()[:200])
    save(foreign / "small.png", photo(11)[:32])
    save(foreign / "two.png", photo(12))
    Image.fromarray(photo(12)).save(foreign / "two.bmp")
    output = tmp_path / "out"
    for _ in range(2):  # the second time from what was kept
        data = compare(results={"GAN": foreign}, pairs=[pairs], output=output, **QUICK).data
        failures = {failure["image"]: failure["reason"] for failure in data.methods[1]["failures"]}
        assert failures.keys() == {"cat", "broken", "small", "two"}
        assert failures["cat"].startswith("missing: no file cat.*")
        assert "broken.png" in failures["broken"]
        assert failures["small"] == "wrong size: 64 x 32 px, 64 x 64 are wanted"
        assert failures["two"].startswith("ambiguous: two.bmp, two.png")
        assert "GAN: 1 extra files belong to no image of the test sets: notes.png." in data.notes
        converted = next(note for note in data.notes if "converted" in note)
        assert converted.startswith("GAN: 3 files were converted to 8-bit RGB: deep.png (16 bits")
        assert "glass.png (RGBA)" in converted
        assert "gray.png (L)" in converted
        assert data.means["shots"]["GAN"]["psnr_y"]["n"] == 5
        assert data.gains["shots"]["GAN"]["psnr_y"]["n"] == 5
        assert data.values["shots"]["GAN"]["psnr_y"]["deep"] == pytest.approx(80)  # the reference itself
        text = (output / "report.md").read_text()
        assert "| GAN | 5 of 9 |" in text
        assert "(n=5)" in text
        assert "- GAN has no result of 4 of 9 images of shots:\n  - broken: cannot read image" in text
        assert "  - small: wrong size" in text
        failed = [row for row in rows(output / "metrics.csv") if row["protocol"].startswith("failed: ")]
        assert [row["image"] for row in failed] == ["broken", "cat", "small", "two"]


def test_results_may_lie_in_a_folder_for_each_test_set(pairs: Path, foreign: Path, tmp_path: Path) -> None:
    other = tmp_path / "more"
    shutil.copytree(pairs, other)
    shutil.move(foreign, tmp_path / "all" / "more")
    data = compare(results={"GAN": tmp_path / "all"}, pairs=[pairs, other], output=tmp_path / "out", **QUICK).data
    assert {failure["dataset"] for failure in data.methods[1]["failures"]} == {"shots"}
    assert data.means["more"]["GAN"]["psnr_y"]["n"] == 3


def test_images_without_references_get_the_metrics_that_need_none(pairs: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(pairs / "test_LR", alone)
    data = compare(pairs=[pairs, alone], output=tmp_path / "out", **QUICK).data
    assert [dataset["paired"] for dataset in data.datasets] == [True, False]
    assert data.values["alone"]["bicubic"].keys() == {"sharpness"}
    assert data.images["alone"]["cat"]["hq"] is None
    lone = compare(pairs=[alone], output=tmp_path / "lone", **QUICK).data
    assert lone.missing["psnr_y"] == "no test set has references"


class Counting:
    """Counts the calls of a method's `restore`, and interrupts one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[str] = []
        self.measured: list[str] = []
        self.stop: int | None = None
        restore, build = Baseline.restore, measures.build

        def counted(method: Baseline, item: Item) -> Pixels:
            if len(self.images) == self.stop:
                raise KeyboardInterrupt
            self.images.append(f"{method.name} {item.name}")
            return restore(method, item)

        def built(name: str, device: Any) -> Any:
            metric = build(name, device)
            function = metric.function
            called = lambda sr, hq: (self.measured.append(name), function(sr, hq))[1]  # noqa: E731  # short-lived
            object.__setattr__(metric, "function", called)
            return metric

        monkeypatch.setattr(Baseline, "restore", counted)
        monkeypatch.setattr(measures, "build", built)

    def taken(self) -> tuple[list[str], list[str]]:
        """What was made and measured since the last call."""
        taken = self.images, self.measured
        self.images, self.measured = [], []
        return taken


def test_a_killed_comparison_goes_on_and_what_is_new_alone_is_made(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, call = Counting(monkeypatch), {**QUICK, "pairs": [pairs], "output": tmp_path / "out"}
    count.stop = 2
    with pytest.raises(KeyboardInterrupt):
        compare(**call)
    assert count.taken()[0] == ["bicubic cat", "bicubic dog"]
    count.stop = None
    compare(**{**call, "metrics": ["psnr"]})
    assert count.taken() == (["bicubic hat"], ["psnr_y"] * 3)
    compare(**{**call, "metrics": ["psnr", "ssim"]})
    assert count.taken() == ([], ["ssim_y"] * 3)
    compare(blurs={"blur": 1.0}, **{**call, "metrics": ["psnr", "ssim"]})
    made, measured = count.taken()
    assert made == ["blur cat", "blur dog", "blur hat"]
    assert measured == ["psnr_y", "ssim_y"] * 3
    save(pairs / "test_LR" / "dog.png", photo(9)[::4, ::4])  # another input: made and measured again
    compare(blurs={"blur": 1.0}, **{**call, "metrics": ["psnr"]})
    assert count.taken() == (["bicubic dog", "blur dog"], ["psnr_y"] * 2)
    save(pairs / "test_HR" / "hat.png", photo(9))  # another reference: measured again
    compare(blurs={"blur": 2.0}, **{**call, "metrics": ["psnr"]})  # and another blur: made again
    assert count.taken() == (["blur cat", "blur dog", "blur hat"], ["psnr_y"] * 4)


def test_two_comparisons_of_the_same_inputs_are_equal_byte_by_byte(pairs: Path, foreign: Path, tmp_path: Path) -> None:
    for folder in ("one", "two", "two"):
        compare(results={"GAN": foreign}, pairs=[pairs], output=tmp_path / folder, **QUICK)
        for name in ("metrics.csv", "summary.csv", "table.tex", "report.md", "report.html"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / folder / name).read_bytes()


def test_a_method_that_fails_is_reported_and_the_others_go_on(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Baseline.restore

    def failing(method: Baseline, item: Item) -> Pixels:
        if method.sigma and item.name == "dog":
            raise RuntimeError("out of\nmemory")
        return restore(method, item)

    monkeypatch.setattr(Baseline, "restore", failing)
    data = compare(blurs={"blur": 1.0}, pairs=[pairs], output=tmp_path / "out", **QUICK).data
    assert data.methods[1]["failures"] == [{"dataset": "shots", "image": "dog", "reason": "out of memory"}]
    assert data.means["shots"]["blur"]["psnr_y"]["n"] == 2
    assert data.means["shots"]["bicubic"]["psnr_y"]["n"] == 3
    assert "| blur | 2 of 3 |" in (tmp_path / "out" / "report.md").read_text()


def test_a_metric_that_cannot_run_is_not_computed_for_a_reason(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    quick = {**QUICK, "metrics": ["psnr", "lpips", "ms_ssim", "musiq"]}
    made = compare(pairs=[pairs], output=tmp_path / "out", fid=True, **quick)
    missing = made.data.missing
    assert "LPIPS_v0.1_alex" in missing["pyiqa:lpips"]
    assert missing["pyiqa:musiq"].endswith("isr metrics fetch pyiqa:musiq")
    assert missing["torchmetrics:ms_ssim"] == "ms_ssim needs more than 160 px a side, an image is smaller (3 results)"
    assert "isr metrics fetch pyiqa:fid" in missing["pyiqa:fid"]
    assert [metric["id"] for metric in made.data.metrics] == ["psnr_y"]
    assert "- pyiqa:lpips: not computed: weights are not here" in made.markdown.read_text()


def test_a_test_set_of_few_photos_is_said_to_tell_little(pairs: Path, tmp_path: Path) -> None:
    said = compare(pairs=[pairs], output=tmp_path / "out", **QUICK).data.notes
    assert said[0].startswith("shots: its 3 images show 3 photos. Of fewer than 6 photos the intervals are too narrow;")
    for name in "abc":
        for side, image in (("HR", photo(5)), ("LR", photo(5)[::4, ::4])):
            save(pairs / f"test_{side}" / f"{name}.png", image)
    assert compare(pairs=[pairs], output=tmp_path / "out", **QUICK).data.notes == []


def test_crops_of_few_photos_are_said_to_be_drawn_as_if_each_were_a_photo(tmp_path: Path) -> None:
    for side, step in (("HR", 1), ("LR", 4)):
        for place in range(4):
            save(tmp_path / f"shots/test_{side}/cat_r0c{place}_s0.png", photo(place)[::step, ::step])
    data = compare(pairs=[tmp_path / "shots"], output=tmp_path / "out", **QUICK).data
    assert data.notes[0].startswith(
        "shots: its 4 images show 1 photo. Of fewer than 6 photos the intervals draw the images, as if each were a "
        "photo of its own, and are too narrow;"
    )
    values = list(data.values["shots"]["bicubic"]["psnr_y"].values())
    mean = data.means["shots"]["bicubic"]["psnr_y"]
    assert min(values) < mean["low"] < mean["mean"] < mean["high"] < max(values)


def test_a_number_that_is_none_is_no_number(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = measures.build("sharpness")
    save(pairs / "test_LR" / "dog.png", np.zeros((16, 16, 3), np.uint8))
    object.__setattr__(metric, "function", lambda sr, hq: float("nan") if sr.max() == 0 else 1.0)
    monkeypatch.setattr(measures, "build", lambda name, device: metric)
    made = compare(pairs=[pairs], output=tmp_path / "out", **{**QUICK, "metrics": ["sharpness"]})
    assert made.data.means["shots"]["bicubic"]["sharpness"]["n"] == 2
    assert made.data.missing == {"sharpness": "its value is nan (1 results)"}
    json.dumps(vars(made.data), allow_nan=False)


def test_fid_stands_with_its_n_and_is_not_computed_twice(
    pairs: Path, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counted(results: Path, references: Path, device: Any) -> float:
        names = sorted(path.name for path in results.iterdir())
        assert names == sorted(path.name for path in references.iterdir())
        calls.append(len(names))
        return 12.5

    monkeypatch.setattr(measures, "fid", counted)
    monkeypatch.setattr(measures, "check_weights", lambda name: None)
    monkeypatch.setattr(measures, "fid_protocol", lambda: "fid | test")
    (foreign / "cat.png").unlink()
    for _ in range(2):
        made = compare(results={"GAN": foreign}, pairs=[pairs], output=tmp_path / "out", fid=True, **QUICK)
    assert calls == [3, 2]
    assert made.data.means["shots"]["GAN"]["pyiqa:fid"] == {"mean": 12.5, "low": None, "high": None, "n": 2}
    assert "12.50 (n=2)" in made.markdown.read_text()


def test_sets_and_methods_whose_names_are_nearly_the_same_keep_their_own_images(tmp_path: Path) -> None:
    """Each set's pixels are checked against a mean square error that numpy computes from the files."""
    folders = [tmp_path / "a/my set", tmp_path / "a/my_set", tmp_path / "b/My set"]
    results = {"my net": tmp_path / "net 1", "my_net": tmp_path / "net 2"}
    expected: dict[tuple[str, int], float] = {}
    for number, folder in enumerate(folders):
        hq = photo(number)
        save(folder / "test_HR/cat.png", hq)
        save(folder / "test_LR/cat.png", hq[::4, ::4])
        for shift, (method, images) in enumerate(results.items(), 1):
            made = np.roll(hq, shift, axis=1)
            save(images / ("a_my set", "a_my_set", "b_My set")[number] / "cat.png", made)
            x, y = luma(made), luma(hq)
            expected[method, number] = 10 * np.log10(255**2 / np.mean((x - y) ** 2))
    quick = {**QUICK, "metrics": ["psnr"]}
    for _ in range(2):  # kept results are as right as new ones
        data = compare(pairs=folders, results=results, output=tmp_path / "out", **quick).data
        names = [dataset["name"] for dataset in data.datasets]
        assert names == ["a_my set", "a_my_set-2", "b_My set"]
        found = data.values
        for number in (0, 2):
            for method in results:
                assert found[names[number]][method]["psnr_y"]["cat"] == pytest.approx(
                    expected[method, number], abs=1e-4
                )
    (tmp_path / "net 1/a_my_set").rename(tmp_path / "net 1/a_my_set-2")
    data = compare(pairs=folders, results=results, output=tmp_path / "out", **quick).data
    assert data.values["a_my_set-2"]["my net"]["psnr_y"]["cat"] == pytest.approx(expected["my net", 1], abs=1e-4)
    (failure,) = data.methods[2]["failures"]
    assert failure["reason"].startswith("missing: no file a_my_set-2/cat.* under")


def test_flat_results_are_of_no_set_where_two_have_an_image_of_that_name(foreign: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name / "test_HR/cat.png", photo(3))
        save(tmp_path / name / "test_LR/cat.png", photo(3)[::4, ::4])
    data = compare(
        results={"GAN": foreign}, pairs=[tmp_path / "a", tmp_path / "b"], output=tmp_path / "out", **QUICK
    ).data
    reasons = [failure["reason"] for failure in data.methods[1]["failures"]]
    assert len(reasons) == 2
    assert all("put the results of each set into a folder of its name" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "GAN"}, "reference=GAN is no method; take bicubic"),
        ({"metrics": ["pnsr"]}, "metrics=pnsr is unknown; isr metrics list"),
        ({"blurs": {"bicubic": 1.0}}, "two methods are called bicubic"),
        ({"images": {"x": Path()}}, "images names x, which is no run"),
        ({"runs": {"x": Path("nowhere")}}, "runs: nowhere has no checkpoint or configuration"),
        ({"data": [ROOT / "launch/configs/ddp8.yaml"]}, "has no data section"),
    ],
)
def test_mistakes_are_one_line(pairs: Path, tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(**{**QUICK, "pairs": [pairs], "output": tmp_path / "out", **arguments})


def test_bold_is_only_what_the_images_tell_apart_from_all_others() -> None:
    values = {
        "ours": {"m": {f"i{i}": 1.0 + 0.01 * i for i in range(9)}},
        "near": {"m": {f"i{i}": 1.0 + 0.01 * i + (-1) ** i * 0.1 - 0.001 for i in range(9)}},
        "far": {"m": {f"i{i}": 0.5 + 0.01 * i for i in range(9)}},
    }

    def best(*methods: str, lower: bool = False) -> str | None:
        kept = {method: values[method] for method in methods}
        means = {method: {"m": {"mean": float(np.mean(list(found["m"].values())))}} for method, found in kept.items()}
        metric = {"id": "m", "lower_better": lower}
        return significantly_best(Report(values={"set": kept}, means={"set": means}), "set", metric)

    assert best("ours", "far") == "ours"
    assert best("ours", "far", lower=True) == "far"
    assert best("ours", "near", "far") is None
    assert best("ours") is None


def test_latex_escapes_names_and_marks_directions(pairs: Path, foreign: Path, tmp_path: Path) -> None:
    compare(results={"my_GAN 50%": foreign}, pairs=[pairs], output=tmp_path / "out", **QUICK)
    text = (tmp_path / "out" / "table.tex").read_text()
    assert r"my\_GAN 50\% & 3 & " in text
    assert r"psnr\_y $\uparrow$" in text
    assert text.count(r"\begin{tabular}{lrrrr}") == text.count(r"\end{tabular}") == 1


def test_crops_are_where_results_differ_most() -> None:
    plain = photo(0, 128)
    changed = plain.copy()
    changed[64:96, 32:64] = 255 - changed[64:96, 32:64]
    changed[4:8, 100:104] = 0
    first, second = largest_differences([plain, plain, changed], 4)
    assert first == (32, 64, 32)
    assert second.x <= 100 < 104 <= second.x + second.size
    assert second.y <= 4 < 8 <= second.y + second.size
    assert largest_differences([plain]) == []
    assert largest_differences([plain, plain]) == []


CROPS = [f"{photo}_r0c{place}_s{seed}" for photo in ("cat", "hat") for place in range(4) for seed in range(3)]


def plain(value: int, side: int = 8) -> Pixels:
    return np.full((side, side, 3), value, np.uint8)


def test_the_grid_shows_each_image_twice_its_size_in_its_cell() -> None:
    gradient = np.arange(64, dtype=np.uint8).reshape(8, 8)[..., None].repeat(3, 2)
    pictures = {"cat": {"LQ": plain(10, 2), "net": gradient}, "hat": {"LQ": plain(20, 4), "net": None}}
    grid = draw_grid(pictures)
    pixels = np.asarray(grid)
    assert grid.width == 2 * (16 + 6) + 6
    head = grid.height - 2 * (18 + 16 + 6)
    assert head > 0
    top = head + 18
    np.testing.assert_array_equal(pixels[top : top + 16, 28:44], gradient.repeat(2, 0).repeat(2, 1))
    assert (pixels[top : top + 16, 6:22] == 10).all()
    assert (pixels[top + 40 : top + 56, 6:22] == 20).all()
    assert (pixels[top + 40 + 1, 29] == (211, 211, 211)).all()  # no image: light grey
    with pytest.raises(ValueError, match="pictures holds no image"):
        draw_grid({"cat": {"LQ": None}})


def test_a_long_title_is_wrapped_and_makes_the_head_higher() -> None:
    short, long = (draw_grid({"cat": {title: plain(0, 64)}}) for title in ("LQ", "bicubic and blur, sigma 2.5 px"))
    assert short.width == long.width
    assert (long.height - short.height) % 18 == 0
    assert long.height > short.height


def test_shown_images_are_spread_over_photos_places_and_seeds() -> None:
    chosen = spread(CROPS)
    assert len(set(chosen)) == 6
    assert [name[:3] for name in chosen] == ["cat"] * 3 + ["hat"] * 3
    assert {name[-2:] for name in chosen} == {"s0", "s1", "s2"}
    assert len({name[:8] for name in chosen}) == 6  # no place twice
    assert chosen == spread(list(reversed(CROPS)))
    assert spread(["b", "a"]) == ["a", "b"]
    assert len(spread([str(i) for i in range(100)], 4)) == 4


class Toy(Method):
    """A "U-Net" called three times an image, with a block within, and a part that no image sees."""

    kind = "run"

    def __init__(self) -> None:
        super().__init__("toy")
        self.unet = type("ToyUNet", (nn.Conv2d,), {})(3, 3, 3, padding=1)
        self.net = nn.ModuleDict({"unet": self.unet, "critic": nn.Linear(5, 5)})

    def key(self, item: Item) -> str:
        return "toy"

    def network(self) -> nn.Module:
        return self.net

    def trained(self) -> set[int]:
        return {id(self.unet.bias), id(self.net["critic"].weight)}

    def restore(self, item: Item) -> Pixels:
        with torch.no_grad():
            x = torch.zeros(1, 3, 10, 20)
            for _ in range(3):
                x = self.unet(x)
            torch.cat([x, x])
        return np.zeros((40, 40, 3), np.uint8)


def test_costs_are_counted_by_hand() -> None:
    item = Item("set", "a", "", Path(), None, "", "", (40, 40), 4)
    cost = measure(Toy(), item, torch.device("cpu"))
    weights = 3 * 3 * 9
    assert (cost.total, cost.trainable) == (weights + 3, 3)
    assert cost.macs == 3 * weights * 10 * 20
    assert cost.denoiser_calls == 3
    assert cost.seconds is not None
    assert cost.seconds > 0
    image = 3 * 10 * 20 * 4
    assert cost.memory_mb == pytest.approx((3 * image + 4 * (weights + 3)) / 1e6)  # the last output and twice its size


def test_efficiency_is_in_a_file_of_its_own(pairs: Path, foreign: Path, tmp_path: Path) -> None:
    quick = {**QUICK, "efficiency": True}
    compare(results={"GAN": foreign}, pairs=[pairs], output=tmp_path / "out", **quick)
    bicubic, gan = rows(tmp_path / "out" / "efficiency.csv")
    assert (bicubic["method"], bicubic["total"], bicubic["macs"], bicubic["denoiser_calls"]) == ("bicubic", *"000")
    assert float(bicubic["seconds"]) > 0
    assert set(gan.values()) == {"GAN", ""}


def test_published_tables_keep_their_protocols_and_stay_apart(pairs: Path, tmp_path: Path) -> None:
    tables = published()
    assert {"DFOSD", "DM-SR", "F2IDiff", "RFSR"} <= {table["paper"] for table in tables}
    assert all(table["protocol"] for table in tables)
    for table in tables:
        for methods in table["rows"].values():
            assert all(len(numbers) == len(table["columns"]) for numbers in methods.values())
    assert {table["paper"] for table in published(["dfosd"])} == {"DFOSD"}
    text = compare(pairs=[pairs], output=tmp_path / "out", **QUICK).markdown.read_text()
    for table in tables:
        assert f"### {table['paper']}, {table['table']}\n\nProtocol: {table['protocol']}\n" in text


def test_figures_are_copied_and_captioned(pairs: Path, tmp_path: Path) -> None:
    plot = tmp_path / "blur.png"
    save_figure(plot, predicted_against_target([1.0, 2.0], [1.5, 2.5], 3, "blur"), "what one sees")
    output = tmp_path / "out"
    made = compare(pairs=[pairs], output=output, figures=[NamedFigure("a/b", plot)], notes=["a note"], **QUICK)
    shown = {"label": "a/b: blur", "caption": "what one sees", "path": "figures/a-b-blur.png"}
    assert made.data.figures == [shown]
    assert (output / "figures/a-b-blur.png").read_bytes() == plot.read_bytes()
    assert "- a note" in made.markdown.read_text()
    compare(pairs=[pairs], output=output, **QUICK)
    assert not list((output / "figures").iterdir())


def test_two_figures_for_one_file_and_a_figure_that_is_not_there_are_errors(tmp_path: Path) -> None:
    for path in ("a/b-c.png", "a-b/c.png"):
        save(tmp_path / path, photo(0))
    figures = [NamedFigure("a", tmp_path / "a/b-c.png"), NamedFigure("a-b", tmp_path / "a-b/c.png")]
    with pytest.raises(ValueError, match=r"figures: two would be figures/a-b-c\.png"):
        copy_figures(tmp_path / "out", figures)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        copy_figures(tmp_path / "out", [NamedFigure("x", tmp_path / "none.png")])
    assert not (tmp_path / "out").exists()


def test_methods_are_compared_with_the_blurs_and_within_a_paper_with_its_first(
    pairs: Path, foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "Run", FakeRun)
    call = {**QUICK, "pairs": [pairs], "output": tmp_path / "out", "sources": ["GAN: from afar"]}
    runs = {name: Path(name) for name in ("x/first", "y/only", "x/ours")}
    made = compare(runs=runs, results={"GAN": foreign}, blurs={"blur": 1.0}, **call)
    found = made.data.pairs["shots"]
    over_blur = [f"{name} over blur" for name in ("GAN", "x/first", "y/only", "x/ours")]
    assert list(found) == ["x/ours over x/first", *over_blur]
    ours, base = (made.data.values["shots"][name]["psnr_y"] for name in ("x/ours", "x/first"))
    differences = [ours[name] - base[name] for name in NAMES]
    gain = found["x/ours over x/first"]["psnr_y"]
    assert gain["mean"] == pytest.approx(np.mean(differences))
    assert (gain["n"], gain["wins"]) == (3, np.mean([difference > 0 for difference in differences]))
    assert gain["low"] < gain["mean"] < gain["high"]
    assert set(found["GAN over blur"]) == {"psnr_y", "ssim_y", "sharpness"}
    text = made.markdown.read_text()
    shown = f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
    table = text.partition("### shots: differences to other methods")[2].partition("## ")[0]
    assert "| method over another | psnr_y (higher) | ssim_y (higher) | sharpness (higher) |" in table
    assert f"| x/ours over x/first | {shown} |" in table.replace("**", "")
    assert "- GAN: from afar" in text.partition("## Where the methods come from")[2]
    alone = compare(**{**call, "sources": []})
    assert alone.data.pairs == {"shots": {}}
    assert "differences to other" not in alone.markdown.read_text()
    assert "come from" not in alone.markdown.read_text()


class FakeRun(Method):
    """A run of the paper before the slash, that blurs by the length of its name."""

    kind = "run"

    def __init__(self, name: str, path: Path, device: torch.device, images: Path | None) -> None:
        super().__init__(name)
        self.paper, self.blur = name.partition("/")[0], Baseline("", len(name) / 4)

    def key(self, item: Item) -> str:
        return self.name

    def restore(self, item: Item) -> Pixels:
        return self.blur.restore(item)


def test_a_run_of_another_scale_is_refused_before_its_network_is_loaded(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"class_path": "papers.dfosd.DFOSD", "init_args": {"scale": 2, "pretrained": "nowhere"}}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": settings}))
    with pytest.raises(UsageError, match="scale=4 of the test set shots is not scale=2 of x2; compare methods"):
        compare(runs={"x2": tmp_path}, pairs=[pairs], output=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_somebody_elses_folder_and_one_among_the_inputs_are_no_output(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "version_0"
    (run / "events.out.tfevents.1").parent.mkdir()
    (run / "events.out.tfevents.1").write_bytes(b"curves")
    with pytest.raises(FileExistsError, match="holds files that this command has not made: events"):
        compare(pairs=[pairs], output=run, **QUICK)
    assert (run / "events.out.tfevents.1").read_bytes() == b"curves"
    with pytest.raises(ValueError, match="so the next run would read it"):
        compare(pairs=[pairs], output=pairs / "test_LR" / "report", **QUICK)
    assert not (pairs / "test_LR" / "report").exists()
    (pairs / "test_LR" / "a.heic").write_bytes(b"x")
    compare(pairs=[pairs], output=tmp_path / "out", **QUICK)
    assert "images (pairs in test_LR and test_HR); not used: 1 file (1 .heic)" in capsys.readouterr().out
    assert "a.heic" in (tmp_path / "out" / "skipped.csv").read_text()


def test_what_a_full_disk_left_of_a_record_is_made_again(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    before = compare(pairs=[pairs], output=output, **QUICK).data.values
    record = output / "cache/methods/bicubic/shots/cat.json"
    record.write_text(record.read_text()[:20])
    assert compare(pairs=[pairs], output=output, **QUICK).data.values == before


def test_the_key_of_a_number_holds_reference_and_protocol(pairs: Path, tmp_path: Path) -> None:
    metric = measures.build("psnr_y")
    one, other = (Item("s", "a", "", Path(), Path(), "", key, (8, 8), 4) for key in ("x", "y"))
    assert Store.key(metric, one) != Store.key(metric, other)
    free = measures.build("sharpness")
    assert Store.key(free, one) == Store.key(free, other)
    assert metric.describe() in Store.key(metric, one)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    runs = tmp_path_factory.mktemp("fit") / "runs"
    options = ["data.batch_size=1", "data.crop_size=32", "model.perceptual=none", "trainer.max_steps=1"]
    options += ["trainer.limit_val_batches=0", "trainer.enable_progress_bar=false"]
    config = ROOT / "papers/dfosd/configs/demo/01_dfosd.yaml"
    arguments = ["-c", str(config), "--runs", str(runs), "--name=demo-dfosd", *(f"--{option}" for option in options)]
    assert main(["fit", *arguments, "--debug"]) == 0
    return runs / "dfosd" / "demo-dfosd"


@pytest.mark.slow
def test_a_run_is_compared_by_what_isr_predict_makes_of_it(
    run: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "version_0/checkpoints/last.ckpt"
    predicted = tmp_path / "predicted"
    config = ROOT / "papers/dfosd/configs/demo/01_dfosd.yaml"
    options = ["--ckpt_path", checkpoint, "--data.predict", pairs / "test_LR", "--output", predicted]
    assert main(["predict", "-c", str(config), *map(str, options), "--debug"]) == 0
    output = tmp_path / "out"
    again = ["--metrics", "psnr,ssim", "--pairs", str(pairs), "-o", str(output), "--device", "cpu", "--debug"]
    assert main(["compare", "--runs", str(run), f"alone={checkpoint}", *again]) == 0
    for name in NAMES:
        expected = read_image(predicted / f"{name}.png")
        for method in (folder_name("dfosd/demo-dfosd"), "alone"):
            np.testing.assert_array_equal(read_image(output / f"cache/methods/{method}/shots/{name}.png"), expected)
    assert f"isr: report: {output / 'report.html'}" in capsys.readouterr().out
    cost = {row["method"]: row for row in rows(output / "efficiency.csv")}["dfosd/demo-dfosd"]
    assert cost["denoiser_calls"] == "1"
    assert 0 < int(cost["trainable"]) < int(cost["total"])
    assert int(cost["macs"]) > int(cost["total"])
    text = (output / "report.md").read_text()
    assert "### DFOSD, " in text
    assert "### F2IDiff, " not in text


@pytest.mark.slow
def test_images_that_isr_test_left_are_taken_and_the_model_serves_the_efficiency(
    run: Path, pairs: Path, foreign: Path, tmp_path: Path
) -> None:
    shutil.move(foreign, tmp_path / "test" / "shots")
    call = {**QUICK, "efficiency": True}
    output = tmp_path / "out"
    data = compare(runs={"r": run}, images={"r": tmp_path / "test"}, pairs=[pairs], output=output, **call).data
    np.testing.assert_array_equal(
        read_image(output / data.images["shots"]["cat"]["methods"]["r"]), read_image(tmp_path / "test/shots/cat.png")
    )
    assert data.efficiency[1]["denoiser_calls"] == 1


@pytest.mark.slow
def test_a_run_without_checkpoint_is_taken_as_configured(run: Path, pairs: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare/version_0"
    bare.mkdir(parents=True)
    shutil.copy(run / "version_0/config.yaml", bare)
    data = compare(runs={"bare": bare.parent}, pairs=[pairs], output=tmp_path / "out", **QUICK).data
    assert data.methods[1] == {"name": "bare", "kind": "run", "failures": []}


def test_a_network_from_a_weights_file_restores_as_spandrel_says(pairs: Path, tmp_path: Path) -> None:
    spandrel = pytest.importorskip("spandrel")
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(0)
    network = ESRGAN(num_filters=8, num_blocks=1, scale=4)
    torch.save(network.state_dict(), tmp_path / "tiny.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "bad.pth")
    output = tmp_path / "out"
    files = {"tiny": tmp_path / "tiny.pth", "bad": tmp_path / "bad.pth"}
    data = compare(weights=files, pairs=[pairs], output=output, **{**QUICK, "efficiency": True}).data
    tiny, bad = data.methods[1:]
    assert tiny == {"name": "tiny", "kind": "weights", "failures": []}
    assert len(bad["failures"]) == 3
    assert "is no file that spandrel can load" in bad["failures"][0]["reason"]
    lq = torch.from_numpy(photo(0)[::4, ::4].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = network.eval()(lq)[0].permute(1, 2, 0).clamp(0, 1) * 255
    found = read_image(output / data.images["shots"]["cat"]["methods"]["tiny"])
    np.testing.assert_allclose(found, expected, atol=0.501)
    cost = data.efficiency[1]
    assert cost["total"] == cost["trainable"] == sum(parameter.numel() for parameter in network.parameters())
    assert spandrel.__version__


def test_without_spandrel_the_extra_is_named(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spandrel", None)
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"x=.*x\.pth needs spandrel; pip install 'isr-papers\[compare\]'"):
        compare(weights={"x": tmp_path / "x.pth"}, pairs=[pairs], output=tmp_path / "out", **QUICK)


class TestCommand:
    """`isr compare` turns its arguments into those of `compare`."""

    @pytest.fixture
    def call(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
        import launch.comparison

        caught: dict[str, Any] = {}

        def fake(**arguments: Any) -> WrittenReport:
            caught.update(arguments)
            data = Report(missing={"m": "why"}, methods=[{"name": "x", "failures": [{"reason": "no"}]}])
            return WrittenReport(Path("page"), Path("markdown"), data)

        monkeypatch.setattr(launch.comparison, "compare", fake)
        monkeypatch.chdir(tmp_path)

        def run(*arguments: str) -> dict[str, Any]:
            assert main(["compare", *arguments, "--debug"]) == 0
            return caught

        return run

    def test_names_are_given_or_made(self, call: Callable[..., dict[str, Any]]) -> None:
        found = call(
            "--runs", "runs/dfosd/sd21", "mine=runs/a/b/version_3", "--results", "GAN=x", "--metrics", "a,b", "c"
        )
        assert found["runs"] == {"dfosd/sd21": Path("runs/dfosd/sd21"), "mine": Path("runs/a/b/version_3")}
        assert found["results"] == {"GAN": Path("x")}
        assert found["metrics"] == ["a", "b", "c"]
        checkpoint = "runs/dfosd/sd21/version_2/checkpoints/last.ckpt"
        assert list(call("--runs", checkpoint)["runs"]) == ["dfosd/sd21"]

    def test_the_defaults_are_all_runs_and_all_weightless_metrics(
        self, call: Callable[..., dict[str, Any]], run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("runs").symlink_to(run.parents[1])
        found = call()
        assert found["runs"] == {"dfosd/demo-dfosd": Path("runs/dfosd/demo-dfosd")}
        assert tuple(found["metrics"]) == measures.WEIGHTLESS
        assert (found["reference"], found["output"]) == ("bicubic", Path("runs/compare"))
        said = capsys.readouterr().out
        assert "x has no result of 1 images, e.g. no" in said
        assert "not computed: m: why" in said

    def test_a_name_that_lacks_or_is_there_twice_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compare", "--results", "folder"]) == 2
        assert "results=folder has no name; write results NAME=folder" in capsys.readouterr().err
        assert main(["compare", "--runs", "a=b", "a=c"]) == 2
        assert "runs: a is there twice" in capsys.readouterr().err
        assert main(["compare", "--runs", "runs/dfosd/x", "runs/dfosd/x"]) == 2
        assert "runs: dfosd/x is there twice" in capsys.readouterr().err

    def test_runs_of_one_name_get_what_tells_their_paths_apart(self, call: Callable[..., dict[str, Any]]) -> None:
        inside = "x/dfosd/sd21/version_1/checkpoints"
        paths = [f"{inside}/last.ckpt", f"{inside}/epoch=3.ckpt", "y/dfosd/sd21", "x/rfsr/sd21"]
        Path(inside).mkdir(parents=True)
        Path(paths[1]).touch()
        assert call("--runs", *paths)["runs"] == {
            "dfosd/sd21 (x/dfosd/sd21/version_1/checkpoints/last.ckpt)": Path(paths[0]),
            "dfosd/sd21 (x/dfosd/sd21/version_1/checkpoints/epoch=3.ckpt)": Path(paths[1]),
            "dfosd/sd21 (y/dfosd/sd21)": Path(paths[2]),
            "rfsr/sd21": Path(paths[3]),
        }
        assert list(call("--runs", "x/a/b/version_0", "x/a/b/version_1", "c=x/a/b")["runs"]) == [
            *("a/b (version_0)", "a/b (version_1)", "c")
        ]


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
