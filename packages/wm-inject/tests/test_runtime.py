from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from wm_inject import runtime
from wm_inject.export import to_onnx
from wm_inject.images import load_image, save_image, to_float, to_pixels
from wm_inject.runtime import OnnxModel, Poisoner, poison_files, poison_folder
from wm_inject.triggers import BlendTrigger

SIZE = 12


def trigger() -> BlendTrigger:
    return BlendTrigger(image_size=SIZE, channels=3, alpha=0.3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    example = torch.rand(3, 3, SIZE, SIZE)
    for name, uint8 in (("float", False), ("uint8", True)):
        to_onnx(
            trigger(), example, folder / f"{name}.onnx", uint8=uint8, metadata={"kind": "blend"}
        )
    return folder


def pixels(n: int = 5, size: int = SIZE, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def wanted(batch: np.ndarray) -> np.ndarray:
    return to_pixels(trigger()(to_float(batch)))


@pytest.mark.parametrize("name", ["float", "uint8"])
def test_poisoner_gives_what_torch_gives(models, name):
    poisoner = Poisoner(models / f"{name}.onnx")
    assert (poisoner.size, poisoner.channels) == ((SIZE, SIZE), 3)
    for n in (1, 5):
        out = poisoner(pixels(n))
        assert out.dtype == np.uint8 and out.shape == (n, SIZE, SIZE, 3)
        assert np.array_equal(out, wanted(pixels(n)))


def test_poisoning_works_where_torch_cannot_be_imported(models, tmp_path):
    np.save(tmp_path / "in.npy", pixels())
    save_image(tmp_path / "photos" / "a.png", pixels(1)[0])
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
import wm_inject.runtime as runtime
from wm_inject.cli import main
out = runtime.Poisoner({str(models / "uint8.onnx")!r})(np.load({str(tmp_path / "in.npy")!r}))
np.save({str(tmp_path / "out.npy")!r}, out)
model, photos, out = {str(models / "float.onnx")!r}, {str(tmp_path / "photos")!r}, "poisoned"
code = main(["poison", "--onnx", model, photos, {str(tmp_path / "poisoned")!r}])
heavy = [m for m in sys.modules if m.split(".")[0] in ("torch", "torchvision", "safetensors")]
assert code == 0 and heavy == ["torch"], heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), wanted(pixels()))
    assert np.array_equal(load_image(tmp_path / "poisoned" / "a.png"), wanted(pixels(1))[0])


@pytest.mark.parametrize(
    "bad",
    [
        pixels().astype(np.float32),
        pixels()[0],
        pixels(0),
        pixels(2, SIZE + 1),
        pixels(2, channels=1),
        torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8),
    ],
)
@pytest.mark.parametrize("name", ["float", "uint8"])
def test_poisoner_refuses(models, name, bad):
    with pytest.raises(ValueError, match="expected"):
        Poisoner(models / f"{name}.onnx")(bad)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((1, 3, SIZE, SIZE), np.float64),
        np.zeros((3, SIZE, SIZE), np.float32),
        np.zeros((0, 3, SIZE, SIZE), np.float32),
        np.zeros((1, 1, SIZE, SIZE), np.float32),
        [1.0],
    ],
)
def test_onnx_model_refuses(models, bad):
    with pytest.raises(ValueError, match="expected a"):
        OnnxModel(models / "float.onnx")(bad)


def test_onnx_model_describes_itself(models):
    model = OnnxModel(models / "float.onnx", threads=2)
    assert model.metadata["kind"] == "blend" and model.input_name == "image"
    assert "float32" in repr(model) and "channels=3" in repr(Poisoner(models / "uint8.onnx"))


def test_files_that_are_no_model_are_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"cannot open a\.onnx") as caught:
        OnnxModel(tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="found no file"):
        OnnxModel(tmp_path / "none.onnx")


def test_settings_are_checked(models):
    with pytest.raises(ValueError, match="a provider and threads >= 1"):
        OnnxModel(models / "float.onnx", threads=0)
    with pytest.raises(ValueError, match="a provider and threads >= 1"):
        OnnxModel(models / "float.onnx", providers=())


def test_a_provider_that_is_not_there_is_not_replaced_in_silence(models):
    with pytest.raises(RuntimeError, match="expected the provider NoSuchProvider"):
        OnnxModel(models / "float.onnx", providers=("NoSuchProvider",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_an_error_not_a_slow_success(models):
    with pytest.raises(RuntimeError, match="expected the provider CUDAExecutionProvider"):
        providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
        OnnxModel(models / "float.onnx", providers=providers)


def test_a_missing_onnxruntime_names_the_extras(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeError, match=r"wm-inject\[cpu\] or wm-inject\[gpu\]"):
        OnnxModel(models / "float.onnx")


def test_two_onnxruntimes_at_once_are_refused(models, monkeypatch):
    monkeypatch.setattr(runtime.installed, "version", lambda name: "1.0")
    with pytest.raises(RuntimeError, match="both installed"):
        OnnxModel(models / "float.onnx")


def photos(folder, names=("a.png", "b/c.jpg", "b/d.bmp")):
    from PIL import Image

    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(1, 20 + i)[0]).save(folder / name)
    return folder


def test_a_folder_is_poisoned_and_listed(models, tmp_path):
    source, out = photos(tmp_path / "in"), tmp_path / "out"
    assert poison_folder(models / "float.onnx", source, out, batch_size=2) == 3
    plan = json.loads((out / "plan.json").read_text())
    assert plan["images"] == [
        {"source": "a.png", "file": "a.png"},
        {"source": "b/c.jpg", "file": "b/c.png"},
        {"source": "b/d.bmp", "file": "b/d.png"},
    ]
    assert plan["trigger"]["kind"] == "blend" and plan["image_size"] == SIZE
    for row in plan["images"]:
        original = load_image(source / row["source"], size=SIZE)[None]
        assert np.array_equal(load_image(out / row["file"])[None], wanted(original))


def test_folders_that_would_lose_something_are_refused(tmp_path):
    source, settings = photos(tmp_path / "in"), {"size": SIZE, "channels": 3}
    for out in (source, source / "deep"):
        with pytest.raises(ValueError, match="output folder outside"):
            poison_files(lambda x: x, source, out, **settings)
    with pytest.raises(ValueError, match="batch size"):
        poison_files(lambda x: x, source, tmp_path / "out", batch_size=0, **settings)
    photos(source, ["a.bmp"])
    with pytest.raises(ValueError, match="distinct names"):
        poison_files(lambda x: x, source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_named(tmp_path):
    source = photos(tmp_path / "in")
    (source / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        poison_files(lambda x: x, source, tmp_path / "out", size=SIZE, channels=3)
