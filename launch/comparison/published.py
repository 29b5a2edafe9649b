"""Numbers that the papers publish, from `papers/*/results.yaml`: each table by itself, with its protocol."""

from __future__ import annotations

import importlib.resources
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml


def published(papers: Collection[str] = (), root: Path | None = None) -> list[dict[str, Any]]:
    """Read the tables.

    Args:
        papers: Folders of the papers wanted; all where it is empty.
        root: Folder of the papers; default: the installed package.

    Returns:
        `paper`, `table`, `protocol`, `columns`, and `rows`: data set -> method -> numbers, None where there is none.
    """
    folder = root or Path(str(importlib.resources.files("papers")))
    tables = []
    for path in sorted(folder.glob("*/results.yaml")):
        if papers and path.parent.name not in papers:
            continue
        content = yaml.safe_load(path.read_text())
        tables += [
            {
                "paper": content["paper"],
                "table": table["table"],
                "protocol": table["protocol"],
                "columns": table["columns"],
                "rows": table["rows"],
            }
            for table in content["tables"]
        ]
    return tables
