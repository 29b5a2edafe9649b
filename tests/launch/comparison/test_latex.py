"""LaTeX tables."""

from __future__ import annotations

from pathlib import Path

from launch.comparison import compare

from ..conftest import QUICK


def test_latex_escapes_names_and_marks_directions(pairs: Path, foreign: Path, tmp_path: Path) -> None:
    compare(results={"my_GAN 50%": foreign}, pairs=[pairs], output=tmp_path / "out", **QUICK)
    text = (tmp_path / "out" / "table.tex").read_text()
    assert r"my\_GAN 50\% & 3 & " in text
    assert r"psnr\_y $\uparrow$" in text
    assert text.count(r"\begin{tabular}{lrrrr}") == text.count(r"\end{tabular}") == 1
