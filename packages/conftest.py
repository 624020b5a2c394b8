"""What benchmarks measure with: it is in no package, and no package may import it."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def speed() -> ModuleType:
    """The module `tools.speed`."""
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.append(root)
    return importlib.import_module("tools.speed")
