"""Lists, tables, captions and prompts in any encoding that says what it is; others are named, never guessed."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from PIL import Image

from data.prompts import Prompts
from data.sources import list_entries, list_images
from launch.comparison.inputs import open_sets

ENCODINGS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16": b"",  # Python writes the mark
    "utf-32": b"",
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
WITHOUT_MARK = {"utf-16-le": b"", "utf-16-be": b"", "utf-32-le": b"", "utf-32-be": b""}
CASES = [*ENCODINGS.items(), *WITHOUT_MARK.items()]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("encoding", "mark"), CASES)
def test_lists_tables_and_prompts_are_read(tmp_path: Path, encoding: str, mark: bytes, end: str) -> None:
    for name in ("\xe9t\xe9.png", "\u7167\u7247.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)

    def write(name: str, *lines: str) -> Path:
        (tmp_path / name).write_bytes(mark + (end.join(lines) + end).encode(encoding))
        return tmp_path / name

    files = [tmp_path / "\u7167\u7247.png", tmp_path / "\xe9t\xe9.png"]
    listed = write("list.txt", "\u7167\u7247.png", "", "\xe9t\xe9.png (480,480,3)")
    assert [path for path, _ in list_images(listed)] == files
    table = write("table.csv", "image_path,prompt", '\u7167\u7247.png,"a photo, \u7167\u7247"', "\xe9t\xe9.png,summer")
    assert list_images(table) == [(files[0], "a photo, \u7167\u7247"), (files[1], "summer")]
    prompts = Prompts(write("prompts.csv", "name,prompt", "\u7167\u7247,chat \xe0 l'\xe9t\xe9"))
    assert prompts["\u7167\u7247"] == "chat \xe0 l'\xe9t\xe9"
    (tmp_path / "texts").mkdir()
    write("texts/a.txt", "the photo of an \xe9t\xe9")
    assert Prompts(tmp_path / "texts")["a"] == "the photo of an \xe9t\xe9"
    write("data.yaml", "data:", "  class_path: data.datamodules.Photos", "  # \xe9t\xe9")
    assert open_sets(data=[tmp_path / "data.yaml"])


@pytest.mark.parametrize(("encoding", "byte"), [("cp1252", "0xe9"), ("gb18030", "0xa8"), ("shift_jis", "0x83")])
def test_another_encoding_is_named_with_file_and_line(tmp_path: Path, encoding: str, byte: str) -> None:
    text = "\xe9" if encoding != "shift_jis" else "\u30a2"
    for name, head in (("list.txt", "a.png"), ("table.csv", "image_path,prompt")):
        (tmp_path / name).write_bytes(f"{head}\nb,c\n{text}.png, d\n".encode(encoding))
        with pytest.raises(
            ValueError, match=rf"train=.*{name}: line 3 is not UTF-8 \(byte {byte}: .*\); save the file"
        ):
            list_entries(tmp_path / name, "train")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "cat.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=rf"prompts=.*cat\.txt: line 1 is not UTF-8 \(byte {byte}"):
        Prompts(tmp_path / "p")["cat"]
    (tmp_path / "cut.txt").write_bytes(codecs.BOM_UTF16_LE + "a\nb".encode("utf-16-le")[:-1])
    with pytest.raises(ValueError, match=r"train=.*cut\.txt: line 2 is not UTF-16 \(byte 0x62: truncated data\)"):
        list_entries(tmp_path / "cut.txt", "train")


def test_a_cell_beyond_any_measure_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image_path,prompt\na.png,x\nb.png," + "x" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"train=.*t\.csv: line 3 is not valid csv \(field larger"):
        list_entries(tmp_path / "t.csv", "train")


@pytest.mark.parametrize("name", [" a.png", "a.png ", "a (1, 2)", "a\x0b.png", "a\x85.png", "a\u2028b.png", "-a.png"])
def test_a_list_names_any_file_of_one_line(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / name, format="PNG")
    (tmp_path / "list.txt").write_text(f"{name}\n", encoding="utf-8")
    assert [path.name for path, _ in list_images(tmp_path / "list.txt")] == [name]
