from launch.front_page import ROOT, rewritten, table


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
