"""Files that are kept between two comparisons."""

from __future__ import annotations

from pathlib import Path

from launch.comparison import compare, measures
from launch.comparison.inputs import Item
from launch.comparison.store import Store

from ..conftest import QUICK


def test_what_a_full_disk_left_of_a_record_is_made_again(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    before = compare(pairs=[pairs], output=output, **QUICK).data.values
    record = output / "cache/methods/bicubic/shots/cat.json"
    record.write_text(record.read_text()[:20])
    assert compare(pairs=[pairs], output=output, **QUICK).data.values == before


def test_the_key_of_a_number_holds_reference_and_protocol(pairs: Path, tmp_path: Path) -> None:
    metric = measures.build("psnr_y")
    one, other = (Item("s", "a", "", Path(), Path(), "", key, (8, 8), 4) for key in ("x", "y"))
    assert Store.key(metric, one) != Store.key(metric, other)
    free = measures.build("sharpness")
    assert Store.key(free, one) == Store.key(free, other)
    assert metric.describe() in Store.key(metric, one)
