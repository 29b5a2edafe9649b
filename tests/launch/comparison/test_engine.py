"""A whole comparison: its files, its inputs, and the mistakes it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.comparison import compare, measures
from launch.errors import UsageError

from ..conftest import NAMES, QUICK, luma, photo, rows, save

ROOT = Path(__file__).resolve().parents[3]


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


def test_images_without_references_get_the_metrics_that_need_none(pairs: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(pairs / "test_LR", alone)
    data = compare(pairs=[pairs, alone], output=tmp_path / "out", **QUICK).data
    assert [dataset["paired"] for dataset in data.datasets] == [True, False]
    assert data.values["alone"]["bicubic"].keys() == {"sharpness"}
    assert data.images["alone"]["cat"]["hq"] is None
    lone = compare(pairs=[alone], output=tmp_path / "lone", **QUICK).data
    assert lone.missing["psnr_y"] == "no test set has references"


def test_two_comparisons_of_the_same_inputs_are_equal_byte_by_byte(pairs: Path, foreign: Path, tmp_path: Path) -> None:
    for folder in ("one", "two", "two"):
        compare(results={"GAN": foreign}, pairs=[pairs], output=tmp_path / folder, **QUICK)
        for name in ("metrics.csv", "summary.csv", "table.tex", "report.md", "report.html"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / folder / name).read_bytes()


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
