"""DataModules and their parts: images, sources, degradations, datasets, test sets, embedded photos."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.datamodules import Photos, SRData

__all__ = ["Photos", "SRData"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # Lightning is imported only here, so `import data.photos` alone is fast
        from data import datamodules

        return getattr(datamodules, name)
    raise AttributeError(f"module 'data' has no attribute {name!r}")
