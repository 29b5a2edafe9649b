import numpy as np
import pytest

from common.images import write_png
from launch.front_page import ROOT, images_of, picture, rewritten, table


def test_the_readme_holds_the_table_that_the_papers_give() -> None:
    readme = (ROOT / "README.md").read_text()
    assert rewritten(readme) == readme, "run python -m launch.front_page"


def test_a_new_package_appears_with_its_line_its_rows_and_its_configs(tmp_path) -> None:
    paper = tmp_path / "papers" / "sixth"
    (paper / "configs" / "demo").mkdir(parents=True)
    (paper / "__init__.py").write_text('"""Sixth: a new idea, arXiv:1.\n\nMore."""\n')
    (paper / "configs" / "demo" / "02_small.yaml").touch()
    (paper / "configs" / "sd.yaml").touch()
    assert table(tmp_path).splitlines()[-1] == "| [sixth](papers/sixth) | Sixth: a new idea, arXiv:1 | small | `sd` |"


def test_the_picture_shows_each_image_under_its_title_at_one_size(tmp_path) -> None:
    files = {"lq": (2, 2, 10), "hq": (8, 8, 20)}
    for side, (height, width, value) in files.items():
        write_png(tmp_path / f"cache/inputs/set/{side}/a.0f.png", np.full((height, width, 3), value, np.uint8))
    for number, method in enumerate(("bicubic", "dfosd-demo-dfosd-1", "rfsr-x-2"), 3):
        write_png(tmp_path / f"cache/methods/{method}/set/a.png", np.full((8, 8, 3), 10 * number, np.uint8))
    found = images_of(tmp_path, "a")
    assert list(found) == ["LQ", "bicubic", "dfosd", "rfsr", "HQ"]
    drawn = np.asarray(picture(found))
    assert drawn.shape == (2 * (8 + 24) + 4, 4 * 8 + 3 * 4, 3)
    assert [drawn[24:32, left : left + 8].mean() for left in (0, 12, 24, 36)] == [10, 30, 40, 50]
    assert drawn[60:, :8].mean() == 20
    with pytest.raises(FileNotFoundError, match="no image 'b'"):
        images_of(tmp_path, "b")


def test_the_pictures_of_the_readme_and_of_each_card_are_there() -> None:
    papers = [package.parent.name for package in (ROOT / "papers").glob("*/__init__.py")]
    assert len(papers) >= 5
    for name in ("methods", *papers):
        assert (ROOT / "docs" / "images" / f"{name}.jpg").is_file()
