"""Folders, lists and manifests give their images in a fixed order; whatever they name wrongly is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data.sources import Entry, Window, list_entries, list_images, unique_names


class TestListImages:
    @staticmethod
    def make(folder: Path, *names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(folder / name, format="PNG")

    def test_folder_is_searched_in_depth_and_sorted(self, tmp_path: Path) -> None:
        self.make(tmp_path, "b.PNG", "a/z.jpg", "a/b/c.Jpeg", ".hidden.png", ".cache/x.png", "__MACOSX/a.png")
        (tmp_path / "notes.txt").touch()
        found = [path.relative_to(tmp_path).as_posix() for path, _ in list_images(tmp_path)]
        assert found == ["a/b/c.Jpeg", "a/z.jpg", "b.PNG"]

    def test_link_that_leads_back_is_followed_once(self, tmp_path: Path) -> None:
        self.make(tmp_path / "set", "a.png")
        self.make(tmp_path / "elsewhere", "b.png")
        (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
        (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
        assert [path.name for path, _ in list_images(tmp_path / "set")] == ["a.png", "b.png"]

    def test_txt_keeps_its_order_and_resolves_against_its_folder(self, tmp_path: Path) -> None:
        self.make(tmp_path / "set", "b.png", "a.png")
        (tmp_path / "list.txt").write_text(f"\ufeffset/b.png\r\n\n{tmp_path}/set/a.png (480,480,3)\nset/b.png\n")
        names = [path.relative_to(tmp_path).as_posix() for path, _ in list_images(tmp_path / "list.txt")]
        assert names == ["set/b.png", "set/a.png", "set/b.png"]

    @pytest.mark.parametrize("column", ["image_path", "path"])
    def test_csv_gives_prompts(self, tmp_path: Path, column: str) -> None:
        self.make(tmp_path, "a.png", "b.png")
        (tmp_path / "m.csv").write_text(f'{column},prompt\nb.png,"a cat, asleep"\na.png,\n')
        assert list_images(tmp_path / "m.csv") == [(tmp_path / "b.png", "a cat, asleep"), (tmp_path / "a.png", "")]
        (tmp_path / "m.csv").write_text(f"{column}\na.png\n")
        assert list_images(str(tmp_path / "m.csv")) == [(tmp_path / "a.png", None)]

    def test_sequence_is_joined_and_counts_repeats(self, tmp_path: Path) -> None:
        self.make(tmp_path, "x/a.png", "y/b.png")
        found = list_images([tmp_path / "y", tmp_path / "x", str(tmp_path / "y" / "b.png")])
        assert [path.name for path, _ in found] == ["b.png", "a.png", "b.png"]

    def test_parquet_without_pyarrow_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "m.parquet").touch()
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(ValueError, match=r"train=.*m\.parquet: parquet needs pyarrow; pip install pyarrow"):
            list_images(tmp_path / "m.parquet", "train")

    def test_parquet_rows_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.make(tmp_path, "a.png")
        (tmp_path / "m.parquet").touch()
        rows = [{"image_path": "a.png", "prompt": "a cat"}]

        class Batch:
            @staticmethod
            def to_pylist() -> list[dict[str, str]]:
                return rows

        class Table:
            def __init__(self, _path: Path) -> None: ...

            def iter_batches(self) -> list[type[Batch]]:
                return [Batch]

        class Reader:
            ParquetFile = Table

        monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
        monkeypatch.setattr("importlib.import_module", lambda _: Reader)
        assert list_images(tmp_path / "m.parquet") == [(tmp_path / "a.png", "a cat")]

    def test_missing_files_of_a_list_are_named_five_at_most(self, tmp_path: Path) -> None:
        self.make(tmp_path, "a.png")
        (tmp_path / "l.txt").write_text("a.png\n" + "".join(f"gone{i}.png\n" for i in range(7)))
        with pytest.raises(FileNotFoundError, match=r"train=.*l\.txt lists 7 of 8 files that do not exist") as caught:
            list_images(tmp_path / "l.txt", "train")
        message = str(caught.value)
        assert "gone4.png and 2 more; correct the list" in message
        assert "gone5" not in message
        assert "\n" not in message

    def test_errors_name_argument_value_and_fix(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty.txt").write_text("\n\n")
        (tmp_path / "wrong.csv").write_text("file,text\na,b\n")
        (tmp_path / "head.csv").write_text("path,prompt\n")
        (tmp_path / "weights.bin").touch()
        cases: list[tuple[str, type[Exception], str]] = [
            ("gone", FileNotFoundError, "does not exist; give a folder"),
            ("empty", ValueError, "holds no images; put files there that end in one of .*png"),
            ("empty.txt", ValueError, "is an empty list; write one image path per line"),
            ("wrong.csv", ValueError, "has columns file, text; name the one with files image_path"),
            ("head.csv", ValueError, "has no rows; give a table"),
            ("weights.bin", ValueError, "is of no known kind; give a folder"),
        ]
        for name, kind, text in cases:
            with pytest.raises(kind, match=rf"val={tmp_path}/{name} {text}") as caught:
                list_images(tmp_path / name, "val")
            assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=r"train=\[\] names nothing; give"):
            list_images([], "train")


class TestWindows:
    @pytest.fixture
    def manifest(self, tmp_path: Path) -> Path:
        Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
        return tmp_path / "m.csv"

    def test_rows_with_a_window_and_rows_without_go_together(self, manifest: Path) -> None:
        manifest.write_text("image_path,top,left,side,prompt\na.png,1,2,3,one\na.png,,,,all\na.png,0.0,4.0,5.0,two\n")
        path = manifest.with_name("a.png")
        assert list_entries(manifest) == [
            Entry(path, "one", Window(1, 2, 3)),
            Entry(path, "all", None),
            Entry(path, "two", Window(0, 4, 5)),
        ]
        assert all(isinstance(value, int) for value in list_entries(manifest)[2].window or ())

    def test_parquet_windows_are_those_of_the_csv(self, manifest: Path) -> None:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = {"path": ["a.png"] * 2, "top": [1, None], "left": [2, None], "side": [3, None], "prompt": ["one", "all"]}
        pq.write_table(pa.table(rows), manifest.with_suffix(".parquet"))
        manifest.write_text("path,top,left,side,prompt\na.png,1,2,3,one\na.png,,,,all\n")
        assert list_entries(manifest.with_suffix(".parquet")) == list_entries(manifest)

    def test_whole_images_do_not_come_with_windows(self, manifest: Path) -> None:
        manifest.write_text("path,top,left,side\na.png,1,2,3\n")
        with pytest.raises(ValueError, match=r"val=.*m\.csv lists 1 windows of photos .* give val whole images"):
            list_images(manifest, "val")
        manifest.write_text("path,top,left,side,prompt\na.png,,,,all\n")
        assert list_images(manifest) == [(manifest.with_name("a.png"), "all")]

    @pytest.mark.parametrize("cells", ["1,2,0", "-1,2,3", "1,,3", "1,2,x", "1.5,2,3", "nan,2,3", "inf,2,3"])
    def test_what_is_no_window_is_named_by_its_row(self, manifest: Path, cells: str) -> None:
        manifest.write_text(f"path,top,left,side\na.png,1,2,3\na.png,{cells}\n")
        top, left, side = cells.split(",")
        with pytest.raises(
            ValueError, match=rf"train=.*: row 2 has top={top}, left={left}, side={side}; give whole px"
        ):
            list_entries(manifest, "train")

    def test_half_a_windows_columns_are_refused(self, manifest: Path) -> None:
        manifest.write_text("path,top,left\na.png,1,2\n")
        with pytest.raises(ValueError, match=r"train=.* has of a window's columns only top, left; give all of top"):
            list_entries(manifest, "train")


class TestUniqueNames:
    def test_name_with_extension_never_meets_a_stem(self) -> None:
        names = unique_names([Path("/x/a.png"), Path("/x/a.jpg"), Path("/x/a.png.bmp")], Path("/x"))
        assert len(set(names)) == 3
