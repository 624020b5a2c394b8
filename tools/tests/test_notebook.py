"""The notebook runs from top to bottom, and is kept without what it printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tools import release

NOTEBOOK = release.ROOT / "docs" / "notebooks" / "first-hour.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


def test_the_notebook_is_kept_without_outputs() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


# The kernel's own packages warn of each other; what the cells do is judged by what they print.
@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="no runner of notebooks is installed")
    nbformat = pytest.importorskip("nbformat", reason="no reader of notebooks is installed")
    pytest.importorskip("ipykernel", reason="no kernel for notebooks is installed")
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("WM_DATA", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    runner = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    runner.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    assert "victim  accuracy 0.9" in printed and "label 9 " in printed
    assert "backdoored (0,)" in printed and "no label was named" not in printed
