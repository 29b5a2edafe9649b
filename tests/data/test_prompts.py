"""Prompts by image name: from folders and tables, one an image."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.prompts import Prompts


class TestPrompts:
    def test_csv_names_may_have_extension_and_folder(self, tmp_path: Path) -> None:
        (tmp_path / "p.csv").write_text('name,prompt\na.png,"one, two"\nsub/b,three\n')
        prompts = Prompts(tmp_path / "p.csv")
        assert (prompts["a"], prompts["x/a.jpg"], prompts["sub/b"]) == ("one, two", "one, two", "three")
        prompts.require(["a", "sub/b"])
        with pytest.raises(KeyError):
            prompts["b"]

    def test_a_prompt_by_the_last_part_of_a_name_is_of_one_image_only(self, tmp_path: Path) -> None:
        (tmp_path / "p.csv").write_text("name,prompt\ns1/a,one\na,two\n")
        prompts = Prompts(tmp_path / "p.csv")
        prompts.require(["s1/a.png", "s2/a.png"])
        assert (prompts["s1/a"], prompts["s2/a"]) == ("one", "two")
        with pytest.raises(ValueError, match=r"one prompt for images of one name .*: s2/a, s3/a; name them with"):
            prompts.require(["s1/a", "s2/a", "s3/a"])

    def test_missing_prompts_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(ValueError, match=r"prompts=.* has no prompt for 6 of 7 images: b0, b1, b2, b3, b4 and 1"):
            Prompts(tmp_path).require(["a", *(f"b{i}" for i in range(6))])

    def test_errors_name_argument_value_and_fix(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"prompts=.*gone does not exist; give a folder of <name>\.txt"):
            Prompts(tmp_path / "gone")
        with pytest.raises(ValueError, match=r"prompts=.* holds no prompts; put one <name>\.txt"):
            Prompts(tmp_path)
        (tmp_path / "w.csv").write_text("file,text\na,b\n")
        with pytest.raises(ValueError, match=r"has columns file, text; it needs name and prompt"):
            Prompts(tmp_path / "w.csv")
        (tmp_path / "d.csv").write_text("name,prompt\na.png,x\na.jpg,y\n")
        with pytest.raises(ValueError, match=r"has two prompts for a; keep one"):
            Prompts(tmp_path / "d.csv")
