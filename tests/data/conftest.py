import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The plain torch version of the published degradation, loaded by path: tests are no package."""
    spec = importlib.util.spec_from_file_location(
        "reference_degradation", Path(__file__).with_name("reference_degradation.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
