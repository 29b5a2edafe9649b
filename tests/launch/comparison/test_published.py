"""Published tables."""

from __future__ import annotations

from pathlib import Path

from launch.comparison import compare
from launch.comparison.published import published

from ..conftest import QUICK


def test_published_tables_keep_their_protocols_and_stay_apart(pairs: Path, tmp_path: Path) -> None:
    tables = published()
    assert {"DFOSD", "DM-SR", "F2IDiff", "RFSR"} <= {table["paper"] for table in tables}
    assert all(table["protocol"] for table in tables)
    for table in tables:
        for methods in table["rows"].values():
            assert all(len(numbers) == len(table["columns"]) for numbers in methods.values())
    assert {table["paper"] for table in published(["dfosd"])} == {"DFOSD"}
    text = compare(pairs=[pairs], output=tmp_path / "out", **QUICK).markdown.read_text()
    for table in tables:
        assert f"### {table['paper']}, {table['table']}\n\nProtocol: {table['protocol']}\n" in text
