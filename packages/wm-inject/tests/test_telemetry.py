"""No library reports to its makers, and none leaves files behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wm_inject.core.telemetry import VARIABLES

# Runs a graph through our runtime, and waits as long as a library may take to begin reporting.
SESSION = """
import sys, time
import numpy as np
from wm_inject.runtime import OnnxModel
assert OnnxModel(sys.argv[1])(np.ones((1, 3, 8, 8), np.float32)).shape == (1, 3, 8, 8)
assert "torch" not in sys.modules
time.sleep(float(sys.argv[2]))
"""


def clean_environment(home: Path) -> dict[str, str]:
    """The environment without the variables, and with a home of its own."""
    variables = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    variables = {name: value for name, value in variables.items() if not name.startswith("XDG_")}
    return {**variables, "HOME": str(home), "TMPDIR": str(home)}


def test_all_packages_set_the_variables_when_they_are_imported(tmp_path):
    code = "import sys, os, {0}; print(*(os.environ[name] for name in sys.argv[1:]))"
    packages = ("wm_inject", "wm_extract", "wm_victim", "defense_nc", "defense_reverse", "wm_eval")
    for package in packages:
        process = subprocess.run(
            [sys.executable, "-c", code.format(package), *VARIABLES],
            env=clean_environment(tmp_path),
            capture_output=True,
            text=True,
            check=True,
        )
        assert process.stdout.split() == list(VARIABLES.values())
    environment = {**clean_environment(tmp_path), "ORT_DISABLE_TELEMETRY": "0"}
    command = [sys.executable, "-c", code.format("wm_inject"), "ORT_DISABLE_TELEMETRY"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "0\n"


@pytest.mark.integration
def test_a_session_leaves_no_file_behind(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    ports = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3, 8, 8])
        for name in ("image", "output")
    ]
    node = onnx.helper.make_node("Relu", ["image"], ["output"])
    graph = onnx.helper.make_graph([node], "relu", ports[:1], ports[1:])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-B", "-c", SESSION, str(tmp_path / "model.onnx"), "0.5"]
    subprocess.run(command, cwd=home, env=clean_environment(home), check=True)
    assert not list(home.rglob("*"))
