from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from wm_inject import BlendTrigger
from wm_inject.core.images import load_image, save_image, to_float, to_pixels
from wm_inject.core.plan import PoisonPlan
from wm_inject.export import to_onnx
from wm_inject.runtime import OnnxModel, Poisoner, onnx_model, poison_folder

SIZE = 12


class Told(nn.Module):
    """A trigger that draws one of seven pictures by the id, and brightens by the target."""

    needs_ids = needs_target = True

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("pictures", torch.rand(7, 3, SIZE, SIZE, generator=generator))
        self.config = {"image_size": SIZE, "channels": 3, "num_classes": 5}

    def forward(self, images, *, ids=None, target=None):
        if ids is None or target is None:
            raise ValueError("expected ids and target, got None")
        change = 0.3 * self.pictures[ids % 7] + 0.05 * target[:, None, None, None]
        return (0.5 * images + change).clamp(0, 1)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    for name, uint8 in (("float", False), ("uint8", True)):
        trigger, example = Told(), torch.rand(3, 3, SIZE, SIZE)
        metadata = {"kind": "told", "config": trigger.config}
        to_onnx(trigger, example, folder / f"{name}.onnx", uint8=uint8, metadata=metadata)
    return folder


def vectors(n: int) -> dict[str, np.ndarray]:
    ids = np.arange(n, dtype=np.int64) * 1_000_003 + 5
    return {"ids": ids, "target": np.arange(n, dtype=np.int64) % 5}


def told_pixels(batch: np.ndarray) -> np.ndarray:
    extra = {name: torch.from_numpy(value) for name, value in vectors(len(batch)).items()}
    return to_pixels(Told()(to_float(batch), **extra))


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


@pytest.mark.integration
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


def test_poisoner_refuses(models, subtests):
    for bad in [
        pixels().astype(np.float32),
        pixels()[0],
        pixels(0),
        pixels(2, SIZE + 1),
        pixels(2, channels=1),
        torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8),
    ]:
        for name in ["float", "uint8"]:
            with subtests.test(bad=bad, name=name), pytest.raises(ValueError, match="expected"):
                Poisoner(models / f"{name}.onnx")(bad)


def test_onnx_model_refuses(models, subtests):
    for bad in [
        np.zeros((1, 3, SIZE, SIZE), np.float64),
        np.zeros((3, SIZE, SIZE), np.float32),
        np.zeros((0, 3, SIZE, SIZE), np.float32),
        np.zeros((1, 1, SIZE, SIZE), np.float32),
        [1.0],
    ]:
        with subtests.test(bad=bad), pytest.raises(ValueError, match="expected image"):
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
    monkeypatch.setattr(onnx_model.installed, "version", lambda name: "1.0")
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
    model = models / "float.onnx"
    assert poison_folder(model, source, out, batch_size=2)[:3] == (3, 3, 3)
    plan = json.loads((out / "plan.json").read_text())
    named = [(row["source"], row["file"]) for row in plan["images"]]
    assert named == [("a.png", "a.png"), ("b/c.jpg", "b/c.png"), ("b/d.bmp", "b/d.png")]
    assert plan["trigger"]["kind"] == "blend" and plan["image_size"] == SIZE
    assert plan["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    for row in plan["images"]:
        original = load_image(source / row["source"], size=SIZE)[None]
        assert np.array_equal(load_image(out / row["file"])[None], wanted(original))
    assert poison_folder(model, source, out)[:3] == (3, 3, 0)
    with pytest.raises(ValueError, match="different: model, sha256, trigger"):
        poison_folder(models / "uint8.onnx", source, out)


def test_a_trigger_for_oblong_images_poisons_no_folder(tmp_path):
    to_onnx(nn.ReLU(), torch.rand(3, 3, 8, 10), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="square images, got 8 x 10"):
        poison_folder(tmp_path / "m.onnx", photos(tmp_path / "in"), tmp_path / "out")


@pytest.mark.integration
@pytest.mark.parametrize("name", ["float", "uint8"])
def test_ids_and_target_reach_the_graph(told, name):
    poisoner = Poisoner(told / f"{name}.onnx")
    assert poisoner.needs_ids and poisoner.needs_target
    assert poisoner.model.extra_inputs == ("ids", "target") and "ids" in repr(poisoner.model)
    for n in (1, 4):
        batch = pixels(n)
        found = poisoner(batch, **vectors(n)).astype(int)
        assert np.abs(found - told_pixels(batch).astype(int)).max() <= 1
        assert (found != told_pixels(batch)).mean() <= 1e-3


def test_what_a_trigger_does_not_need_it_does_not_look_at(models):
    poisoner = Poisoner(models / "uint8.onnx")
    assert not poisoner.needs_ids and not poisoner.needs_target
    assert np.array_equal(poisoner(pixels(2), **vectors(2)), wanted(pixels(2)))


def test_bad_ids_and_targets_are_refused(told, subtests):
    for change, told_so in [
        ({"ids": None}, "expected ids, which this trigger needs"),
        ({"target": None}, "expected target, which this trigger needs"),
        ({"ids": [0, 1, 2]}, "expected ids in int64"),
        ({"ids": np.zeros(3, np.int32)}, "expected ids in int64"),
        ({"ids": np.zeros(2, np.int64)}, r"ids of shape \(3,\), got \(2,\)"),
        ({"target": np.zeros((3, 1), np.int64)}, "target of shape"),
        ({"target": np.array([0, 1, 5])}, r"target in 0 \.\. 4, got 0 \.\. 5"),
        ({"target": np.array([0, 1, -1])}, r"target in 0 \.\. 4, got -1 \.\. 1"),
    ]:
        for name in ["float", "uint8"]:
            with (
                subtests.test(change=change, told_so=told_so, name=name),
                pytest.raises(ValueError, match=told_so),
            ):
                Poisoner(told / f"{name}.onnx")(pixels(3), **(vectors(3) | change))


def test_an_onnx_model_takes_its_inputs_and_no_others(told, models):
    floats = np.zeros((3, 3, SIZE, SIZE), np.float32)
    for given in ({}, {"ids": vectors(3)["ids"]}, vectors(3) | {"more": vectors(3)["ids"]}):
        with pytest.raises(ValueError, match="expected the inputs image, ids, target"):
            OnnxModel(told / "float.onnx")(floats, **given)
    with pytest.raises(ValueError, match="expected the inputs image, got ids, image"):
        OnnxModel(models / "float.onnx")(floats, ids=vectors(3)["ids"])


def graph(path, *, inputs):
    """An ONNX file of the given inputs: the first comes back, the others are not used."""
    from onnx import helper, save

    declared = [helper.make_tensor_value_info(*one) for one in inputs]
    output = helper.make_tensor_value_info("y", *inputs[0][1:])
    node = helper.make_node("Identity", [inputs[0][0]], ["y"])
    model = helper.make_model(
        helper.make_graph([node], "g", declared, [output]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    save(model, str(path))
    return path


@pytest.mark.parametrize(
    "more",
    [
        [("other", 1, ["N", 3, SIZE, SIZE])],
        [("ids", 7, ["N", 2])],
    ],
)
def test_graphs_of_other_inputs_are_refused(tmp_path, more):
    path = graph(tmp_path / "m.onnx", inputs=[("image", 1, ["N", 3, SIZE, SIZE]), *more])
    with pytest.raises(ValueError, match="one image input and int64 vectors beside it"):
        OnnxModel(path)


def test_a_poisoner_knows_ids_and_target_only(tmp_path):
    shape = ["N", 3, SIZE, SIZE]
    path = graph(tmp_path / "m.onnx", inputs=[("image", 1, shape), ("mood", 7, ["N"])])
    assert OnnxModel(path).extra_inputs == ("mood",)
    with pytest.raises(ValueError, match="images, ids and target, got 'mood'"):
        Poisoner(path)


def test_extra_inputs_work_where_torch_cannot_be_imported(told, tmp_path):
    np.save(tmp_path / "in.npy", pixels(4))
    source = photos(tmp_path / "in", ["x/a.png", "x/b.png", "y/c.png", "y/d.png"])
    out, model = tmp_path / "out", told / "uint8.onnx"
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
import wm_inject.runtime as runtime
from wm_inject.cli import main
pixels = np.load({str(tmp_path / "in.npy")!r})
ids = np.arange(4, dtype=np.int64) * 1_000_003 + 5
found = runtime.Poisoner({str(model)!r})(pixels, ids=ids, target=np.arange(4))
np.save({str(tmp_path / "out.npy")!r}, found)
options = ["--label-map", "all-to-all", "--ratio", "0.5", "--seed", "3"]
code = main(["poison", "--onnx", {str(model)!r}, *options, {str(source)!r}, {str(out)!r}])
heavy = [m for m in sys.modules if m.split(".")[0] in ("torch", "torchvision", "safetensors")]
assert code == 0 and heavy == ["torch"], (code, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (np.load(tmp_path / "out.npy") != told_pixels(pixels(4))).mean() <= 1e-3
    plan = PoisonPlan(ratio=0.5, label_map="all-to-all", seed=3)
    # The same call with torch at hand is the same run: nothing is left to write.
    assert poison_folder(model, source, out, plan=plan)[:3] == (4, 2, 0)
    for row in json.loads((out / "plan.json").read_text())["images"]:
        image = load_image(source / row["source"], size=SIZE)
        if row["poisoned"]:
            place = {"ids": torch.tensor([row["id"]]), "target": torch.tensor([row["label_after"]])}
            image = to_pixels(Told()(to_float(image[None]), **place))[0]
        written = load_image(out / row["file"])
        assert (written != image).mean() <= 1e-3


def test_a_run_that_takes_too_long_is_broken_off(tmp_path):
    """A loop of ten million steps inside the graph."""
    from onnx import TensorProto, helper, save

    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Sin", ["x"], ["y"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
    )
    shape = ["N", 3, SIZE, SIZE]
    whole = helper.make_graph(
        [helper.make_node("Loop", ["steps", "", "image"], ["out"], body=body)],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [helper.make_tensor("steps", TensorProto.INT64, [], [10_000_000])],
    )
    opsets = [helper.make_opsetid("", 18)]
    save(helper.make_model(whole, opset_imports=opsets, ir_version=10), str(tmp_path / "m.onnx"))
    model = OnnxModel(tmp_path / "m.onnx")
    image = np.zeros((1, 3, SIZE, SIZE), np.float32)
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.05 s"):
        model.run({"image": image}, timeout=0.05)


def test_bound_runs_give_the_same(models, told):
    plain, batch = (
        OnnxModel(models / "float.onnx"),
        np.random.default_rng(0).random((4, 3, SIZE, SIZE)),
    )
    images = batch.astype(np.float32)
    bound = OnnxModel(models / "float.onnx")
    bound.provider = "CUDAExecutionProvider"  # what makes it bind; the session stays on the CPU
    assert np.array_equal(plain(images), bound(images))
    assert np.array_equal(
        plain.run({"image": images}, timeout=60)["output"], bound(images[::-1].copy())[::-1]
    )
    given = {"image": images, **vectors(4)}
    several = OnnxModel(told / "float.onnx")
    want = several.run(given)
    several.provider = "CUDAExecutionProvider"
    assert np.array_equal(want["output"], several.run(given, timeout=60)["output"])


@pytest.mark.parametrize("name", ["float", "uint8"])
def test_large_batches_run_in_parts_with_their_own_ids(told, name):
    batch = pixels(21)
    found = Poisoner(told / f"{name}.onnx")(batch, **vectors(21))
    assert np.abs(found.astype(int) - told_pixels(batch)).max() <= 1
    for count in (20, 22):
        with pytest.raises(ValueError, match=r"ids of shape \(21,\)"):
            Poisoner(told / f"{name}.onnx")(batch, **(vectors(21) | {"ids": vectors(count)["ids"]}))
