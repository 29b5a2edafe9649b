"""FID has its n and is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.comparison import compare, measures

from ..conftest import QUICK


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
