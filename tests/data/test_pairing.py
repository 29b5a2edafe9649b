"""Files are paired by name, never by position, and whatever does not fit is named."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.decoding import ImageError
from data.pairing import Pairs


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def make_pairs(tmp_path: Path, names: dict[str, str], scale: int = 4) -> tuple[Path, Path]:
    """LQ name -> HQ name; each pair has a colour of its own."""
    for i, (lq, hq) in enumerate(names.items()):
        save(tmp_path / "lq" / lq, np.full((4, 6, 3), 20 * i + 5, np.uint8))
        save(tmp_path / "hq" / hq, np.full((4 * scale, 6 * scale, 3), 20 * i + 5, np.uint8))
    return tmp_path / "lq", tmp_path / "hq"


class TestPairs:
    @pytest.mark.parametrize(
        "names",
        [
            {"a.png": "a.png", "b.png": "b.jpg", "sub/a.png": "sub/a.png"},  # equal stems
            {"Canon_001_LR4.png": "Canon_001_HR.png", "Nikon_1_LR4.png": "Nikon_1_HR.png"},  # RealSR v3
            {"Canon_001_LR4.png": "Canon_001_LR4.png", "Canon_10_x1.png": "Canon_10_x1.png"},  # StableSR test sets
            {"0001x4.png": "0001.png", "0002x4.png": "0002.png"},  # DIV2K
            {"a_x4.png": "a_x1.png", "b_x4.png": "b_x1.png"},  # DRealSR
            {"a_LQ.png": "a_GT.png", "b.png": "b_HQ.png"},
            {"a.png": "A.png", "Img_lr4.PNG": "img_HR.png", "b.png": "b.png"},
        ],
    )
    def test_usual_names_find_each_other(self, tmp_path: Path, names: dict[str, str]) -> None:
        pairs = Pairs(*make_pairs(tmp_path, names))
        assert len(pairs) == len(names)
        for sample in (pairs[i] for i in range(len(pairs))):
            assert sample["lq"].unique().tolist() == pytest.approx(sample["hq"].unique().tolist(), abs=1)
        assert {pair.lq.name for pair in pairs.pairs} == {Path(name).name for name in names}
        assert sorted(sample.name for sample in pairs.pairs) == sorted(
            str(Path(name).with_suffix("")) for name in names
        )

    def test_sorted_position_would_pair_these_wrongly(self, tmp_path: Path) -> None:
        # Sorted, LQ is a10_LR4, a1_LR4 ("0" < "_") but HQ is a1, a10: position pairs a10 with a1.
        lq_dir, hq_dir = make_pairs(tmp_path, {"a1_LR4.png": "a1.png", "a10_LR4.png": "a10.png"})
        by_position = list(zip(sorted(lq_dir.iterdir()), sorted(hq_dir.iterdir()), strict=True))
        assert by_position[0][0].stem == "a10_LR4"
        assert by_position[0][1].stem == "a1"
        pairs = Pairs(lq_dir, hq_dir)
        assert {(pair.lq.stem, pair.hq.stem) for pair in pairs.pairs} == {("a1_LR4", "a1"), ("a10_LR4", "a10")}
        assert all(torch.equal(s["lq"].unique(), s["hq"].unique()) for s in (pairs[i] for i in range(2)))

    def test_realsr_keeps_both_in_one_folder(self, tmp_path: Path) -> None:
        for i in (1, 2):
            save(tmp_path / f"Canon_00{i}_HR.png", noise(16, 16, i))
            for scale in (2, 4):
                save(tmp_path / f"Canon_00{i}_LR{scale}.png", noise(16 // scale, 16 // scale, i))
        for scale in (2, 4):
            pairs = Pairs(tmp_path, tmp_path, scale)
            assert [(pair.lq.stem, pair.hq.stem) for pair in pairs.pairs] == [
                (f"Canon_00{i}_LR{scale}", f"Canon_00{i}_HR") for i in (1, 2)
            ]

    def test_unmatched_files_are_named_or_skipped(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        lq_dir, hq_dir = make_pairs(tmp_path, {"a.png": "a.png"})
        for i in range(6):
            save(lq_dir / f"x{i}.png", noise(4, 6))
        save(hq_dir / "y.png", noise(16, 24))
        with pytest.raises(ValueError, match=r"lq_dir=.*lq, hq_dir=.*hq: 7 files do not pair up") as caught:
            Pairs(lq_dir, hq_dir)
        assert "LQ without HQ" in str(caught.value)
        assert "x4.png and 2 more; rename them, give csv=" in str(caught.value)
        with caplog.at_level(logging.WARNING):
            pairs = Pairs(lq_dir, hq_dir, on_error="skip")
        assert [pair.name for pair in pairs.pairs] == ["a"]
        assert len(pairs.skipped) == 7
        assert "skipped 7" in caplog.text

    def test_ambiguous_files_are_named(self, tmp_path: Path) -> None:
        lq_dir, hq_dir = make_pairs(tmp_path, {"a.png": "a.png", "b_LR4.png": "b_HR.png"})
        save(hq_dir / "a.jpg", noise(16, 24))
        save(hq_dir / "b_GT.png", noise(16, 24))
        with pytest.raises(ValueError, match=r"2 files do not pair up: ambiguous .*lq/a.png / .*ambiguous .*lq/b_LR4"):
            Pairs(lq_dir, hq_dir)
        with pytest.raises(ValueError, match="no pairs found; name LQ and HQ files alike, or give csv="):
            Pairs(lq_dir, hq_dir, on_error="skip")

    def test_csv_overrules_names(self, tmp_path: Path) -> None:
        lq_dir, hq_dir = make_pairs(tmp_path, {"a.png": "b.png", "b.png": "a.png"})
        (tmp_path / "pairs.csv").write_text("lq,hq,prompt\nb.png,a.png,second\na.png,b.png,first\n")
        pairs = Pairs(lq_dir, hq_dir, csv=tmp_path / "pairs.csv")
        assert [pairs[i]["prompt"] for i in range(2)] == ["second", "first"]
        assert all(torch.equal(s["lq"].unique(), s["hq"].unique()) for s in (pairs[i] for i in range(2)))
        (tmp_path / "pairs.csv").write_text("lq,hq\nb.png,gone.png\n")
        with pytest.raises(ValueError, match=r"1 files do not pair up: missing .*hq/gone\.png"):
            Pairs(lq_dir, hq_dir, csv=tmp_path / "pairs.csv")
        (tmp_path / "pairs.csv").write_text("lq,hq\nb.png,a.png\nb.png,b.png\n")
        with pytest.raises(ValueError, match=r"csv=.*pairs\.csv pairs .*lq/b\.png more than once; keep one"):
            Pairs(lq_dir, hq_dir, csv=tmp_path / "pairs.csv")

    def test_wrong_size_names_file_and_both_sizes(self, tmp_path: Path) -> None:
        lq_dir, hq_dir = make_pairs(tmp_path, {"a.png": "a.png", "b.png": "b.png"})
        save(hq_dir / "b.png", noise(15, 24))
        with pytest.raises(
            ValueError,
            match=r"scale=4 does not fit the sizes of 1 of 2 pairs: .*lq/b\.png is 6x4, .*hq/b\.png is 24x15",
        ):
            Pairs(lq_dir, hq_dir)
        with pytest.raises(ValueError, match=r"scale=2 does not fit.*set scale to the set's factor"):
            Pairs(lq_dir, hq_dir, scale=2)

    def test_lq_at_the_size_of_hq_is_said_to_be_up_sampled(self, tmp_path: Path) -> None:
        save(tmp_path / "lq" / "a.png", noise(16, 24))
        save(tmp_path / "hq" / "a.png", noise(16, 24))
        with pytest.raises(ValueError, match=r"LQ has the size of HQ already in 1 of 1 pairs: .*a\.png \(24x16\).*own"):
            Pairs(tmp_path / "lq", tmp_path / "hq")

    def test_corrupt_file_is_fatal_or_skipped_and_named(self, tmp_path: Path) -> None:
        lq_dir, hq_dir = make_pairs(tmp_path, {"a.png": "a.png", "b.png": "b.png"})
        (hq_dir / "b.png").write_text("no image")
        with pytest.raises(ImageError, match=r"hq/b\.png"):
            Pairs(lq_dir, hq_dir)
        pairs = Pairs(lq_dir, hq_dir, on_error="skip")
        assert [pair.name for pair in pairs.pairs] == ["a"]
        assert "hq/b.png" in pairs.skipped[0]

    def test_missing_folder_is_named(self, tmp_path: Path) -> None:
        save(tmp_path / "lq" / "a.png", noise(4, 4))
        with pytest.raises(FileNotFoundError, match=r"hq_dir=.*hq is not a folder; give"):
            Pairs(tmp_path / "lq", tmp_path / "hq")
        (tmp_path / "hq").mkdir()
        with pytest.raises(ValueError, match=r"hq_dir=.*hq holds no images; put"):
            Pairs(tmp_path / "lq", tmp_path / "hq")
