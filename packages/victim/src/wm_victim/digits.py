"""The handwritten digits that scikit-learn brings, without the second and a half of its import."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FILE = "datasets/data/digits.csv.gz"  # a row: 64 pixels in 0 .. 16 and the label


def read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Pixels ``(1797, 8, 8)`` in 0 .. 16 and labels, as ``sklearn.datasets.load_digits``.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    path = Path(package.submodule_search_locations[0], _FILE)
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
