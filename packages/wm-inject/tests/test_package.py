from __future__ import annotations

import subprocess
import sys
from unittest.mock import Mock

import pytest

import wm_inject
from wm_inject import serve

BLOCK_TORCH = "import sys; sys.modules['torch'] = None\n"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_every_public_name_is_there():
    for name in wm_inject.__all__:
        assert getattr(wm_inject, name) is not None
    assert set(wm_inject.__all__) <= set(dir(wm_inject))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = wm_inject.nothing


def test_a_service_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.delitem(vars(serve), "Service", raising=False)
    monkeypatch.setitem(sys.modules, "wm_inject.serve.app", None)
    with pytest.raises(ImportError, match=r"wm_inject\.serve\.app"):  # a fault of ours stays one
        _ = serve.Service
    lacking = ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
    monkeypatch.setattr(serve, "import_module", Mock(side_effect=lacking))
    with pytest.raises(RuntimeError, match=r"wm-inject\[serve\]"):
        _ = serve.Service


@pytest.mark.parametrize("module", ["wm_inject", "wm_inject.runtime", "wm_inject.cli"])
def test_import_brings_no_torch(module):
    heavy = "{'torch', 'torchvision', 'timm', 'lpips', 'onnx', 'safetensors'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = run_python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_image_checks_that_need_no_torch_work_without_it():
    code = (
        "import numpy as np; from wm_inject import check_pixels\n"
        "print(check_pixels(np.zeros((1, 2, 2, 3), np.uint8)).shape)"
    )
    assert run_python(BLOCK_TORCH + code).stdout.strip() == "(1, 2, 2, 3)"
