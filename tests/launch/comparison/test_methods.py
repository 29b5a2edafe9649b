"""Results of other programs, trained runs and networks from weights files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.files import folder_name
from data.decoding import read_image
from launch.cli import main
from launch.comparison import compare
from launch.errors import UsageError

from ..conftest import NAMES, QUICK, photo, rows, save

ROOT = Path(__file__).resolve().parents[3]


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
