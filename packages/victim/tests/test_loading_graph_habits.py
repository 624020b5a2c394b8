"""Graphs and scripts as exporters write them: precision, batch, size, outputs, names of classes."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from wm_victim.loading import LoadingError, open_model
from wm_victim.loading.contract import MORE_MEMORY, ModelOptions
from wm_victim.loading.import_onnx import convert_onnx
from wm_victim.loading.onnx_module import IoFormat, OnnxNet, read_io_format
from wm_victim.loading.worker import _convert_script

CLASSES, FEATURES = 4, 5
GENERATOR = np.random.default_rng(0)
# Numbers that half precision holds exactly.
KERNEL = GENERATOR.normal(size=(FEATURES, 3, 3, 3)).astype(np.float16).astype(np.float32)
MATRIX = GENERATOR.normal(size=(FEATURES, CLASSES)).astype(np.float16).astype(np.float32)
SHAPES: list[Any] = ["n", 3, 16, 16]


def answers(images: Tensor) -> Tensor:
    """What every graph here computes."""
    features = nn.functional.conv2d(images, torch.tensor(KERNEL)).mean((2, 3)).relu()
    return features @ torch.tensor(MATRIX)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def write(
    path: Path,
    *,
    shape: list[Any] = SHAPES,
    dtype: int = TensorProto.FLOAT,
    numbers: Any = np.float32,
    first: list[Any] | None = None,
    last: list[Any] | None = None,
    outputs: dict[str, list[Any]] | None = None,
    inputs: tuple[str, ...] = ("image",),
    metadata: dict[str, str] | None = None,
    opset: int = 17,
    **weights: Any,
) -> Path:
    """A small classifier; ``first`` makes "x" of "image", ``last`` the outputs of "y" (N, 4)."""
    kernel, matrix = KERNEL.astype(numbers), MATRIX.astype(numbers)
    arrays = {"kernel": kernel, "matrix": matrix, **weights}
    body = [
        *(first or [node("Identity", "image", "x")]),
        node("Conv", "x kernel", "a"),
        node("GlobalAveragePool", "a", "b"),
        node("Flatten", "b", "c"),
        node("Relu", "c", "features"),
        node("MatMul", "features matrix", "y"),
        *(last or [node("Identity", "y", "output")]),
    ]
    outputs = outputs or {"output": ["n", CLASSES]}
    kind = TensorProto.FLOAT if dtype in (TensorProto.INT8, TensorProto.INT64) else dtype
    graph = helper.make_graph(
        body,
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name in inputs],
        [helper.make_tensor_value_info(name, kind, dims) for name, dims in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, str(path))
    return path


def convert(path: Path, **options: Any) -> tuple[OnnxNet, dict[str, Any]]:
    """The module that this process reads back, and what the child reports; without a child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = convert_onnx(path, path.parent, ModelOptions(**options).for_child())
    report = json.loads(json.dumps(report))
    plain = onnx.load(str(path.with_name("plain.onnx")))
    return OnnxNet(plain, read_io_format(report["io_format"])), report


def check(net: OnnxNet, size: int = 16) -> None:
    """The answers and their gradients, in batches of several sizes."""
    images = torch.rand(5, 3, size, size)
    for count in (1, 3, 5):
        part = images[:count].clone().requires_grad_()
        want = images[:count].clone().requires_grad_()
        torch.testing.assert_close(net(part), answers(want), rtol=1e-3, atol=1e-4)
        (gradient,) = torch.autograd.grad(net(part).square().sum(), part)
        (expected,) = torch.autograd.grad(answers(want).square().sum(), want)
        torch.testing.assert_close(gradient, expected, rtol=5e-3, atol=1e-4)


def _logits_and(other: str) -> list[Any]:
    return [node("Identity", "y", "output"), node(*other.split("|"))]


SHAPED = {"dims": np.array([-1, CLASSES, 1, 1]), "flat": np.array([1, CLASSES])}
HABITS: dict[str, dict[str, Any]] = {
    "a second output, the features": {
        "last": _logits_and("Identity|features|embedding"),
        "outputs": {"embedding": ["n", FEATURES], "output": ["n", CLASSES]},
    },
    "normalised features beside the answers": {
        "last": _logits_and("LpNormalization|features|embedding"),
        "outputs": {"embedding": ["n", FEATURES], "output": ["n", CLASSES]},
    },
    "probabilities beside logits": {
        "last": _logits_and("Softmax|y|probabilities"),
        "outputs": {"probabilities": ["n", CLASSES], "output": ["n", CLASSES]},
    },
    "(N, K, 1, 1)": {
        "last": [node("Reshape", "y dims", "output")],
        "outputs": {"output": ["n", CLASSES, 1, 1]},
        "dims": np.array([-1, CLASSES, 1, 1]),
    },
    "(N, 1, K)": {
        "last": [node("Reshape", "y dims", "output")],
        "outputs": {"output": ["n", 1, CLASSES]},
        "dims": np.array([-1, 1, CLASSES]),
    },
    "a batch of 8": {
        "shape": [8, 3, 16, 16],
        "last": [node("Reshape", "y dims", "output")],
        "outputs": {"output": [8, CLASSES]},
        "dims": np.array([8, CLASSES]),
    },
    "a batch of 8 inside": {
        "last": [node("Reshape", "y dims", "output")],
        "outputs": {"output": [8, CLASSES]},
        "dims": np.array([8, CLASSES]),
    },
    "a batch of 1 inside": {
        "last": [node("Reshape", "y dims", "output")],
        "outputs": {"output": ["n", CLASSES]},
        "dims": np.array([1, CLASSES]),
    },
    "NHWC in a batch of 2": {
        "shape": [2, 16, 16, 3],
        "first": [node("Transpose", "image", "x", perm=[0, 3, 1, 2])],
        "last": [node("Reshape", "y dims", "output")],
        "outputs": {"output": [2, CLASSES]},
        "dims": np.array([2, CLASSES]),
    },
    "float16": {"dtype": TensorProto.FLOAT16, "numbers": np.float16},
    "float64": {"dtype": TensorProto.DOUBLE, "numbers": np.float64},
    "float16 inside": {
        "numbers": np.float16,
        "first": [node("Cast", "image", "x", to=TensorProto.FLOAT16)],
        "last": [node("Cast", "y", "output", to=TensorProto.FLOAT)],
    },
    "open axes written as -1": {"shape": [-1, 3, 16, 16]},
    "int64 pixels": {
        "dtype": TensorProto.INT64,
        "first": [node("Cast", "image", "f", to=TensorProto.FLOAT), node("Mul", "f scale", "x")],
        "scale": np.float32(1 / 255),
    },
}


@pytest.mark.integration
def test_graphs_of_every_habit_are_opened(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name, settings in HABITS.items():
        with subtests.test(name=name):
            net, report = convert(write(tmp_path / "a.onnx", **settings))
            check(net)
            assert bool(report["notes"]) == (not name.startswith(("(N", "open")))


CLIPS: dict[str, dict[str, Any]] = {
    "both": {
        "first": [node("Clip", "image low high", "x")],
        "low": np.float32(0),
        "high": np.float32(1),
    },
    "one": {"first": [node("Clip", "image low", "x")], "low": np.float32(0)},
    "attributes": {"first": [node("Clip", "image", "x", min=0.0, max=1.0)], "opset": 10},
    "another value": {
        "first": [
            node("ReduceMax", "image", "high", keepdims=0),
            node("Clip", "image low high", "x"),
        ],
        "low": np.float32(0),
    },
    "ReLU6": {  # of the features, which are below 6
        "last": [
            node("Clip", "features low high", "bounded"),
            node("MatMul", "bounded matrix", "output"),
        ],
        "low": np.float32(0),
        "high": np.float32(6),
    },
}


def test_bounds_are_those_of_the_graph(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name, settings in CLIPS.items():
        with subtests.test(bounds=name):
            check(convert(write(tmp_path / "a.onnx", **settings))[0])


@pytest.mark.parametrize("bounds", ["both", "attributes"])
def test_pixels_at_the_bounds_of_a_clip_have_gradients(tmp_path: Path, bounds: str) -> None:
    net, _ = convert(write(tmp_path / "m.onnx", **CLIPS[bounds]))
    images = torch.rand(4, 3, 16, 16).round().requires_grad_()
    found, expected = (
        torch.autograd.grad(answer(images).square().sum(), images)[0] for answer in (net, answers)
    )
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-4)


def test_bfloat16_is_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx")
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
        tensor.raw_data, tensor.data_type = raw.tobytes(), TensorProto.BFLOAT16
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.elem_type = TensorProto.BFLOAT16
    onnx.save(model, str(path))
    net, _ = convert(path)
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(net(images), answers(images), rtol=0.05, atol=0.05)


def test_graphs_that_leave_it_open_are_refused_by_name(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    two = {
        "last": [node("Identity", "y", "one"), node("Neg", "y", "two")],
        "outputs": {"one": ["n", CLASSES], "two": ["n", CLASSES]},
    }
    for reason, settings in [
        (r"found 2 among one \(2, 4\), two \(2, 4\)", two),
        ("takes 2: image, other", {"inputs": ("image", "other")}),
        ("type 3", {"dtype": TensorProto.INT8, "first": [
            node("Cast", "image", "x", to=TensorProto.FLOAT)]}),
    ]:  # fmt: skip
        with subtests.test(said=reason), pytest.raises(ValueError, match=reason):
            convert(write(tmp_path / "a.onnx", **settings))


def test_an_open_size_is_tried_and_said(tmp_path: Path, subtests: pytest.Subtests) -> None:
    shape = ["n", 3, "h", "w"]
    fixed = {
        "last": [
            node("Flatten", "a", "pixels"),
            node("MatMul", "pixels wide", "output"),
        ],
        "wide": GENERATOR.normal(size=(FEATURES * 62 * 62, CLASSES)).astype(np.float32),
    }
    for name, settings, options, sizes, size in [
        ("any", {}, {}, [32, 64, 96, 128, 224], 32),
        ("given", {}, {"image_size": 48}, [], 48),
        ("one", fixed, {}, [64], 64),
    ]:
        with subtests.test(name=name):
            net, report = convert(write(tmp_path / "a.onnx", shape=shape, **settings), **options)
            assert report["image_sizes"] == sizes
            assert net.io_format.image_size == size
            notes = [note for note in report["notes"] if f"image size {size}" in note]
            assert len(notes) == (not options)
            if name == "any":
                check(net, 224)


# A layer that takes maps of 10 x 18 alone, as images of 12 x 20 pixels have them.
WIDE = {
    "last": [node("Flatten", "a", "pixels"), node("MatMul", "pixels all", "output")],
    "all": GENERATOR.normal(size=(FEATURES * 10 * 18, CLASSES)).astype(np.float32),
}


def test_images_need_not_be_square(tmp_path: Path, subtests: pytest.Subtests) -> None:
    turn = [node("Transpose", "image", "x", perm=[0, 3, 1, 2])]
    option = {"image_size": (12, 20)}
    for name, shape, settings, options in [
        ("fixed", ["n", 3, 12, 20], WIDE, {}),
        ("fixed and stated", ["n", 3, 12, 20], WIDE, option),
        ("one side open", ["n", 3, 12, "w"], WIDE, option),
        ("the other side open", ["n", 3, "h", 20], WIDE, option),
        ("both sides open", ["n", 3, "h", "w"], WIDE, option),
        ("channels last", ["n", 12, 20, 3], {**WIDE, "first": turn}, {}),
        ("one at a time", [1, 3, 12, 20], WIDE, {}),
    ]:
        with subtests.test(name=name):
            net, report = convert(write(tmp_path / "a.onnx", shape=shape, **settings), **options)
            assert report["io_format"]["image_size"] == [12, 20]
            assert net.io_format.image_size == (12, 20)
            assert report["image_sizes"] == [] and "guess" not in str(report["notes"])
            images = torch.rand(3, 3, 12, 20)
            maps = nn.functional.conv2d(images, torch.tensor(KERNEL))
            expected = maps.flatten(1) @ torch.tensor(WIDE["all"])
            torch.testing.assert_close(net(images), expected, rtol=1e-3, atol=1e-3)


def test_a_side_that_alone_is_open_is_a_guess(tmp_path: Path) -> None:
    net, report = convert(write(tmp_path / "a.onnx", shape=["n", 3, 12, "w"]))
    assert net.io_format.image_size == 12
    assert "image size 12, a guess: one side is open" in "\n".join(report["notes"])
    check(net, 12)


def test_sizes_that_a_graph_does_not_take_are_refused(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for shape, settings, size, reason in [
        (["n", 3, 12, 20], {}, 12, "expected image_size 12, the graph takes 12 x 20"),
        (["n", 3, 12, 20], {}, (20, 12), "expected image_size 20 x 12, the graph takes 12 x 20"),
        (["n", 3, 12, "w"], {}, (16, 20), "expected image_size 16 x 20, the graph takes 12 x any"),
        (["n", 3, 12, 2000], {}, None, "it takes 12 x 2000"),
        (["n", 3, 12, "w"], WIDE, None, "HEIGHTxWIDTH.*12 pixels do not run"),
        (["n", 3, "h", "w"], WIDE, (20, 16), "does not run under ONNX Runtime"),
    ]:
        with subtests.test(said=reason), pytest.raises(ValueError, match=reason):
            convert(write(tmp_path / "a.onnx", shape=shape, **settings), image_size=size)


def test_what_a_child_says_of_its_images_is_not_trusted(subtests: pytest.Subtests) -> None:
    report = IoFormat(3, (12, 20)).to_json()
    assert read_io_format(report) == IoFormat(3, (12, 20))
    for change in [
        {"image_size": [12, 20, 3]},
        {"image_size": [12, 2000]},
        {"image_size": [12, 20.0]},
        {"image_size": "12x20"},
        {"image_size": True},
        {"image_size": 2},
        {"channels": 3.0},
        {"channels": 2},
        {"batch": 2000},
        {"nhwc": 1},
    ]:
        with subtests.test(change=change), pytest.raises(ValueError, match=r"expected|types"):
            read_io_format(report | change)


def test_class_names_are_read_from_the_metadata(tmp_path: Path) -> None:
    for metadata in (
        {"names": "{0: 'a', 1: 'b', 2: 'c', 3: 'd'}"},
        {"other": "x", "labels": '["a", "b", "c", "d"]'},
        {"record": '{"kind": "classifier", "classes": ["a", "b", "c", "d"]}'},
    ):
        _, report = convert(write(tmp_path / "a.onnx", metadata=metadata))
        assert report["class_names"] == ["a", "b", "c", "d"]


class Script(nn.Module):
    """A classifier of any size, whose answers come with its features if ``pair``."""

    def __init__(self, channels: int, *, pair: bool = False, single: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(channels, 6, 3), nn.Linear(6, 5)
        self.pair, self.single = pair, single

    def forward(self, x: Tensor) -> Any:
        features = self.conv(x).relu().mean((2, 3))
        features = features.reshape(1, 6) if self.single else features
        return (features, self.fc(features)) if self.pair else self.fc(features)


def test_scripts_say_their_channels_and_sizes(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for channels, habit, options in [
        (3, {"pair": True}, {}),
        (1, {}, {}),
        (3, {"single": True}, {"image_size": 48}),
    ]:
        with subtests.test(channels=channels, habit=habit), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = Script(channels, **habit).eval()
            torch.jit.trace(net, torch.rand(1, channels, 16, 16)).save(str(tmp_path / "a.pt"))
            settings = ModelOptions(**options).for_child()
            report = _convert_script(tmp_path / "a.pt", tmp_path, settings)
        io_format = report["io_format"]
        assert io_format["channels"] == channels
        assert io_format["image_size"] == options.get("image_size", 28 if channels == 1 else 32)
        assert any("image size" in note for note in report["notes"]) == (not options)
        assert io_format["batch"] == ("single" in habit)


def test_memory_that_does_not_suffice_means_one_image_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.onnx")
    options = {**ModelOptions().for_child(), "at_once": 1}
    report = convert_onnx(path, tmp_path, options)
    assert report["io_format"]["batch"] == 0

    def short_of_memory(job: str, file: Path, *rest: Any) -> dict[str, Any]:
        if rest[-1].get("at_once") is None:
            raise LoadingError(MORE_MEMORY)
        return convert_onnx(file, file.parent.parent / "out", rest[-1])

    monkeypatch.setattr("wm_victim.loading.graphs.run_child", short_of_memory)
    opened = open_model(path)
    assert any("one image at a time" in note for note in opened.notes)
    assert (opened.num_classes, opened.image_sizes) == (CLASSES, (16,))
