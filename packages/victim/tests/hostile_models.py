"""Hostile and corrupt model files, made by code: every one must be refused, and none may act.

Those that carry code only ever touch a marker file. Each case is a function that writes one file
into a folder and returns its path; its family is one of the classes of the corpus.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save, save_file

ARCH = "timm:test_resnet"
Build = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Case:
    """One file: how it is made, how it is opened, and whether it needs a child to be refused."""

    family: str
    build: Build
    child: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.family}: {self.build.__name__}"


CASES: list[Case] = []


def case(family: str, *, child: bool = False, **settings: Any) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        CASES.append(Case(family, build, child, {"arch": ARCH, **settings}))
        return build

    return add


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# --- Pickles that run code ---


class Acts:
    """Unpickled, it calls a function."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


def shell(marker: Path) -> Acts:
    return Acts(os.system, f"touch '{marker}'")


def archive(pickled: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """A zip as torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/byteorder", b"little")
        for name, data in (records or {}).items():
            file.writestr(f"archive/{name}", data)
    return out.getvalue()


@case("pickle runs code")
def system_in_an_archive(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pt", archive(pickle.dumps(shell(marker), 2)))


@case("pickle runs code")
def exec_in_a_bare_pickle(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pkl", pickle.dumps(Acts(exec, f"open({str(marker)!r}, 'w').close()"), 4))


@case("pickle runs code")
def inst_of_protocol_zero(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pth", f"(S'touch {marker}'\nios\nsystem\n.".encode())


@case("pickle runs code")
def inst_in_an_archive(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pt", archive(f"(S'touch {marker}'\nios\nsystem\n.".encode()))


@case("pickle runs code")
def stack_global_in_an_archive(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pt", archive(pickle.dumps(shell(marker), 4)))


@case("pickle runs code")
def getattr_chain_in_an_archive(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02cbuiltins\ngetattr\n(cpathlib\nPath\nX\x05\x00\x00\x00touchtR"
    text = str(marker).encode()
    code += b"(cpathlib\nPath\n(X" + struct.pack("<I", len(text)) + text + b"tRtR."
    return put(folder, "a.pt", archive(code))


@case("pickle runs code")
def build_with_setstate(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02ctorch.nn.modules.module\nModule\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    return put(folder, "a.pt", archive(code))


@case("pickle runs code")
def legacy_torch_file(folder: Path, marker: Path) -> Path:
    out = io.BytesIO()
    torch.save(
        {"weight": torch.ones(2), "x": shell(marker)}, out, _use_new_zipfile_serialization=False
    )
    return put(folder, "a.pth", out.getvalue())


@case("pickle runs code")
def compressed_as_joblib_writes(folder: Path, marker: Path) -> Path:
    return put(folder, "a.joblib", zlib.compress(pickle.dumps(shell(marker), 2)))


@case("pickle runs code")
def whole_module(folder: Path, marker: Path) -> Path:
    path = folder / "a.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    return path


@case("pickle runs code")
def named_as_safetensors(folder: Path, marker: Path) -> Path:
    return put(folder, "a.safetensors", pickle.dumps(shell(marker), 2))


# --- Ways around weights_only ---


def tensor_pickle(*, size: int, numel: int, tail: bytes = b".") -> bytes:
    """The instructions that make a float tensor (size,) on a storage of ``numel``, key 0."""
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
    code += b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
    code += struct.pack("<i", numel) + b"tQK\x00J" + struct.pack("<i", size) + b"\x85K\x01\x85"
    return code + b"\x89ccollections\nOrderedDict\n)RtR" + tail


@case("weights-only bypass")
def old_tar_form(folder: Path, marker: Path) -> Path:
    path = folder / "a.pt"
    with tarfile.open(path, "w") as file:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(shell(marker), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    return path


@case("weights-only bypass", child=True)
def item_set_on_a_tensor(folder: Path, marker: Path) -> Path:
    code = tensor_pickle(size=2, numel=2, tail=b"K\x00K\x01s.")
    return put(folder, "a.pt", archive(code, {"data/0": bytes(8)}))


@case("weights-only bypass", child=True)
def storage_shorter_than_it_says(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02}X\x01\x00\x00\x00w" + tensor_pickle(size=999, numel=999)[2:-1] + b"s."
    return put(folder, "a.pt", archive(code, {"data/0": bytes(8)}))


@case("weights-only bypass", child=True)
def view_beyond_its_storage(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02}X\x01\x00\x00\x00w" + tensor_pickle(size=999, numel=2)[2:-1] + b"s."
    return put(folder, "a.pt", archive(code, {"data/0": bytes(8)}))


@case("weights-only bypass")
def bytearray_of_six_gigabytes(folder: Path, marker: Path) -> Path:
    return put(
        folder, "a.pt", archive(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\x80\x01\x85R.")
    )


@case("weights-only bypass")
def rebuilding_from_a_type(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\n(tR."
    return put(folder, "a.pt", archive(code))


@case("weights-only bypass", child=True)
def tuples_that_double_as_a_key(folder: Path, marker: Path) -> Path:
    code = b"\x80\x02K\x01" + b"".join(b"q%cq\xff" % n + b"h%c\x86" % n for n in range(40))
    return put(folder, "a.pt", archive(b"\x80\x02}(" + code[2:] + b"K\x01u."))


@case("weights-only bypass", child=True)
def one_storage_as_a_thousand_tensors(folder: Path, marker: Path) -> Path:
    code = tensor_pickle(size=1, numel=4)
    wide = code.replace(b"\x85K\x01\x85", b"\x85K\x00\x85").replace(
        b"K\x00J" + struct.pack("<i", 1), b"K\x00J" + struct.pack("<i", 2**30)
    )
    body = b"".join(b"X\x02\x00\x00\x00" + b"%02d" % n + wide[2:-1] for n in range(60))
    return put(folder, "a.pt", archive(b"\x80\x02}(" + body + b"u.", {"data/0": bytes(16)}))


@case("weights-only bypass")
def two_pickles_in_one_archive(folder: Path, marker: Path) -> Path:
    bad = {"other/data.pkl": pickle.dumps(shell(marker), 2)}
    return put(folder, "a.pt", archive(pickle.dumps({}, 2), bad))


@case("weights-only bypass")
def code_behind_the_end_of_the_pickle(folder: Path, marker: Path) -> Path:
    code = pickle.dumps({}, 2) + pickle.dumps(shell(marker), 2)
    return put(folder, "a.pt", archive(code))


# --- Programs of torch.export ---


def program(folder: Path, records: dict[str, bytes]) -> Path:
    path = folder / "a.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/archive_format", b"pt2")
        file.writestr("a/models/model.json", b"{}")
        for name, data in records.items():
            file.writestr(f"a/{name}", data)
    return path


@case("pt2 pickle")
def pickled_weights(folder: Path, marker: Path) -> Path:
    weights = pickle.dumps(shell(marker), 2)
    config = json.dumps({"config": {"w": {"path_name": "weight_0", "use_pickle": True}}})
    return program(
        folder,
        {
            "data/weights/weight_0": weights,
            "data/weights/model_weights_config.json": config.encode(),
        },
    )


@case("pt2 pickle")
def pickled_sample_inputs(folder: Path, marker: Path) -> Path:
    return program(folder, {"data/sample_inputs/model.pt": archive(pickle.dumps(shell(marker), 2))})


@case("pt2 pickle")
def pickled_constants(folder: Path, marker: Path) -> Path:
    return program(folder, {"data/constants/custom_obj_0": pickle.dumps(shell(marker), 2)})


@case("pt2 pickle")
def pickled_program_as_pt(folder: Path, marker: Path) -> Path:
    path = program(folder, {"data.pkl": pickle.dumps(shell(marker), 2)})
    return path.rename(folder / "a.pt")


# --- TorchScript ---

SCRIPT = {"allow_torchscript": True, "image_size": 16, "channels": 3}


class WritesAtForward(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.path)
        return x.flatten(1)[:, :10]


class MapsAtForward(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.from_file(self.path, shared=True, size=16)
        return x.flatten(1)[:, :10] + y.sum()


class LoopsAtForward(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() < 1e30):
            x = x * 1.0
        return x.flatten(1)[:, :10]


class BranchesAtForward(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(1)[:, :10]
        if bool(x[0, 0, 0, 0] > 0.99):
            y = -y
        return y


class GrowsAtForward(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ones([8589934592])
        return x.flatten(1)[:, :10] + y.sum()


class ActsAtLoad(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.total = path, 0.0

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        # What comes of it must be kept, or the compiler leaves the call out.
        y = torch.from_file(state[0], shared=True, size=16)
        self.total = float(y.sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10]


def scripted(module: torch.nn.Module, folder: Path) -> Path:
    path = folder / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module.eval()).save(str(path))
    return path


@case("torchscript", **SCRIPT)
def writes_a_file_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(WritesAtForward(str(marker)), folder)


@case("torchscript", **SCRIPT)
def maps_a_file_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(MapsAtForward(str(marker)), folder)


@case("torchscript", **SCRIPT)
def acts_at_load(folder: Path, marker: Path) -> Path:
    return scripted(ActsAtLoad(str(marker)), folder)


@case("torchscript")
def acts_at_load_and_is_not_allowed(folder: Path, marker: Path) -> Path:
    return scripted(ActsAtLoad(str(marker)), folder)


@case("torchscript", child=True, **SCRIPT)
def loops_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(LoopsAtForward(), folder)


@case("torchscript", child=True, **SCRIPT)
def grows_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(GrowsAtForward(), folder)


@case("torchscript", child=True, **SCRIPT)
def branches_at_forward(folder: Path, marker: Path) -> Path:
    return scripted(BranchesAtForward(), folder)


# --- ONNX ---


def graph(
    nodes: list[Any] | None = None,
    weights: dict[str, np.ndarray] | None = None,
    *,
    classes: int = 4,
    functions: list[Any] | None = None,
    domains: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """A small classifier of 8-pixel images; further nodes come first and lead nowhere."""
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(5, 3, 3, 3)).astype(np.float32)
    matrix = generator.normal(size=(5, classes)).astype(np.float32)
    own = [
        helper.make_node("Conv", ["image", "kernel"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "matrix"], ["output"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", classes])
    arrays = {"kernel": kernel, "matrix": matrix, **(weights or {})}
    tensors = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    made = helper.make_graph([*(nodes or []), *own], "g", [image], [output], tensors)
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(one, 1) for one in domains)]
    return helper.make_model(made, opset_imports=opsets, functions=functions or [], ir_version=9)


def onnx_file(folder: Path, model: onnx.ModelProto) -> Path:
    return put(folder, "a.onnx", model.SerializeToString())


def external(folder: Path, entries: dict[str, str], *, side: str | None = "side.bin") -> Path:
    """A model whose matrix lies in another file."""
    model = graph()
    tensor = model.graph.initializer[1]
    if side is not None:
        put(folder, side, tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return onnx_file(folder, model)


@case("external data")
def parent_folder(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "../../../../../../etc/hostname"})


@case("external data")
def absolute_path(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "/etc/hostname"})


@case("external data")
def symbolic_link(folder: Path, marker: Path) -> Path:
    (folder / "link.bin").symlink_to("/etc/hostname")
    return external(folder, {"location": "link.bin"})


@case("external data")
def hard_link(folder: Path, marker: Path) -> Path:
    path = external(folder, {"location": "hard.bin"})
    os.link(folder / "side.bin", folder / "hard.bin")
    return path


@case("external data")
def a_pipe(folder: Path, marker: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return external(folder, {"location": "pipe"})


@case("external data")
def a_pebibyte(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "side.bin", "length": str(2**50)})


@case("external data")
def attribute_of_a_class(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "side.bin", "__class__": "x"})


@case("external data")
def shorter_than_it_says(folder: Path, marker: Path) -> Path:
    return external(folder, {"location": "side.bin", "offset": "64"})


def function(name: str, calls: list[str], *, leaf: str = "Relu") -> Any:
    names = ["x", *(f"v{n}" for n in range(len(calls) - 1)), "y"]
    nodes = [
        helper.make_node(call, [names[n]], [names[n + 1]], domain="" if call == leaf else "own")
        for n, call in enumerate(calls)
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["x"], ["y"], nodes, opsets)


def calling(functions: list[Any], name: str) -> onnx.ModelProto:
    node = helper.make_node(name, ["image"], ["spare"], domain="own")
    return graph([node], functions=functions, domains=("own",))


@case("nested functions")
def two_to_the_power_of_21(folder: Path, marker: Path) -> Path:
    made = [function(f"F{n}", [f"F{n - 1}"] * 2 if n else ["Relu"] * 2) for n in range(21)]
    return onnx_file(folder, calling(made, "F20"))


@case("nested functions")
def calls_itself(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, calling([function("F", ["F"])], "F"))


@case("nested functions")
def forty_deep(folder: Path, marker: Path) -> Path:
    made = [function(f"F{n}", [f"F{n - 1}"] if n else ["Relu"]) for n in range(40)]
    return onnx_file(folder, calling(made, "F39"))


@case("nested functions")
def calls_in_a_circle(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, calling([function("F", ["G"]), function("G", ["F"])], "F"))


def feeding(nodes: list[Any], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A graph whose nodes give a scalar "s" that is added to the output."""
    model = graph(nodes, weights)
    model.graph.node[-1].output[0] = "d"
    model.graph.node.append(helper.make_node("Add", ["d", "s"], ["output"]))
    return model


def summed(name: str) -> Any:
    return helper.make_node("ReduceSum", [name], ["s"], keepdims=0)


@case("shape bomb", child=True)
def constant_of_32_gigabytes(folder: Path, marker: Path) -> Path:
    nodes = [helper.make_node("ConstantOfShape", ["big"], ["x"]), summed("x")]
    return onnx_file(folder, feeding(nodes, {"big": np.array([2**33], np.int64)}))


@case("shape bomb", child=True)
def doubling_concats(folder: Path, marker: Path) -> Path:
    nodes = [
        helper.make_node("Concat", [f"x{n}", f"x{n}"], [f"x{n + 1}"], axis=0) for n in range(34)
    ]
    return onnx_file(folder, feeding([*nodes, summed("x34")], {"x0": np.ones(4, np.float32)}))


@case("shape bomb", child=True)
def expands_a_number(folder: Path, marker: Path) -> Path:
    nodes = [helper.make_node("Expand", ["one", "big"], ["x"]), summed("x")]
    weights = {"one": np.ones(1, np.float32), "big": np.array([2**34], np.int64)}
    return onnx_file(folder, feeding(nodes, weights))


@case("shape bomb", child=True)
def products_for_minutes(folder: Path, marker: Path) -> Path:
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["m"], keepdims=0),
        helper.make_node("Expand", ["m", "big"], ["x0"]),
        *(helper.make_node("MatMul", [f"x{n}", f"x{n}"], [f"x{n + 1}"]) for n in range(60)),
        helper.make_node("ReduceMax", ["x60"], ["s"], keepdims=0),
    ]
    return onnx_file(folder, feeding(nodes, {"big": np.array([3000, 3000], np.int64)}))


@case("shape bomb", child=True)
def size_from_the_pixels(folder: Path, marker: Path) -> Path:
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["count"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["count", "flat"], ["counts"]),
        helper.make_node("Expand", ["one", "counts"], ["x"]),
        summed("x"),
    ]
    weights = {"one": np.ones(1, np.float32), "flat": np.array([1], np.int64)}
    return onnx_file(folder, feeding(nodes, weights))


def with_tensor(folder: Path, **changes: Any) -> Path:
    """A model with one more weight, whose fields say what they like."""
    model = graph()
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT)
    tensor.dims.extend(changes.get("dims", [1]))
    tensor.raw_data = changes.get("raw", bytes(4))
    tensor.data_type = changes.get("dtype", TensorProto.FLOAT)
    return onnx_file(folder, model)


@case("initialiser bomb")
def claims_four_terabytes(folder: Path, marker: Path) -> Path:
    return with_tensor(folder, dims=[2**40])


@case("initialiser bomb")
def negative_length(folder: Path, marker: Path) -> Path:
    return with_tensor(folder, dims=[-4])


@case("initialiser bomb")
def lengths_that_overflow(folder: Path, marker: Path) -> Path:
    return with_tensor(folder, dims=[2**32, 2**32, 4])


@case("initialiser bomb")
def text_as_a_weight(folder: Path, marker: Path) -> Path:
    return with_tensor(folder, dtype=TensorProto.STRING)


@case("initialiser bomb")
def a_million_empty_nodes(folder: Path, marker: Path) -> Path:
    inner = b"\x0a\x00" * 1_000_000
    data = b"\x08\x09\x3a" + _varint(len(inner)) + inner + b"\x42\x02\x10\x11"
    return put(folder, "a.onnx", data)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def branch(name: str) -> Any:
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    value = numpy_helper.from_array(np.ones(1, np.float32))
    node = helper.make_node("Constant", [], [name], value=value)
    return helper.make_graph([node], name, [], [output])


@case("control flow")
def branch_on_the_image(folder: Path, marker: Path) -> Path:
    node = helper.make_node(
        "If", ["flag"], ["s"], then_branch=branch("yes"), else_branch=branch("no")
    )
    return onnx_file(folder, feeding([node], {"flag": np.array(True)}))


@case("control flow")
def endless_loop(folder: Path, marker: Path) -> Path:
    ports = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
    ]
    out = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    body = helper.make_graph([helper.make_node("Identity", ["go"], ["on"])], "b", ports, [out])
    node = helper.make_node("Loop", ["", "flag"], [], body=body)
    return onnx_file(folder, graph([node], {"flag": np.array(True)}))


@case("control flow")
def graph_inside_a_plain_operator(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph([helper.make_node("Relu", ["image"], ["s"], body=branch("x"))]))


@case("control flow")
def branch_inside_a_function(folder: Path, marker: Path) -> Path:
    made = function("F", ["Relu"])
    made.node.append(
        helper.make_node("If", ["x"], ["z"], then_branch=branch("p"), else_branch=branch("q"))
    )
    return onnx_file(folder, calling([made], "F"))


@case("not differentiable")
def trees_of_scikit_learn(folder: Path, marker: Path) -> Path:
    node = helper.make_node(
        "TreeEnsembleClassifier", ["image"], ["label", "p"], domain="ai.onnx.ml"
    )
    return onnx_file(folder, graph([node], domains=("ai.onnx.ml",)))


@case("not differentiable")
def quantised(folder: Path, marker: Path) -> Path:
    node = helper.make_node("DynamicQuantizeLinear", ["image"], ["q", "scale", "zero"])
    return onnx_file(folder, graph([node]))


@case("not differentiable", child=True)
def answers_by_rounding(folder: Path, marker: Path) -> Path:
    model = graph()
    model.graph.node[-1].output[0] = "d"
    model.graph.node.append(helper.make_node("Floor", ["d"], ["output"]))
    return onnx_file(folder, model)


@case("foreign operators")
def operator_of_nobody(folder: Path, marker: Path) -> Path:
    node = helper.make_node("Anything", ["image"], ["s"], domain="com.example")
    return onnx_file(folder, graph([node], domains=("com.example",)))


@case("foreign operators")
def named_like_a_function_of_torch(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph([helper.make_node("Save", ["image", "image"], ["s"])]))


@case("foreign operators")
def random_numbers(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph([helper.make_node("RandomNormalLike", ["image"], ["s"])]))


# --- Weights as safetensors, whole ---


def weights(classes: int = 10, seed: int = 0) -> "OrderedDict[str, torch.Tensor]":
    import timm

    torch.manual_seed(seed)
    module = timm.create_model(ARCH.removeprefix("timm:"), pretrained=False, num_classes=classes)
    return OrderedDict((name, value.clone()) for name, value in module.state_dict().items())


def changed(folder: Path, name: str, value: float) -> Path:
    state = weights()
    state[name].view(-1)[0] = value
    path = folder / "a.safetensors"
    save_file(state, path)
    return path


# --- Truncated files ---


@case("truncated")
def half_an_archive(folder: Path, marker: Path) -> Path:
    data = archive(pickle.dumps({}, 2), {"data/0": bytes(4096)})
    return put(folder, "a.pt", data[: len(data) // 2])


@case("truncated")
def half_a_graph(folder: Path, marker: Path) -> Path:
    data = graph().SerializeToString()
    return put(folder, "a.onnx", data[: len(data) // 2])


@case("truncated")
def half_a_safetensors_file(folder: Path, marker: Path) -> Path:
    data = save(weights())
    return put(folder, "a.safetensors", data[: len(data) // 2])


@case("truncated")
def no_byte_at_all(folder: Path, marker: Path) -> Path:
    return put(folder, "a.onnx", b"")


@case("truncated")
def four_bytes(folder: Path, marker: Path) -> Path:
    return put(folder, "a.safetensors", b"\x10\0\0\0")


# --- Archives that deceive ---


@case("zip bomb")
def a_gigabyte_of_nothing(folder: Path, marker: Path) -> Path:
    path = folder / "a.pt"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("archive/data/0", "w") as record,
    ):
        for _ in range(256):
            record.write(bytes(2**20))
    return path


@case("zip bomb")
def record_that_leaves_the_archive(folder: Path, marker: Path) -> Path:
    return put(folder, "a.pt", archive(pickle.dumps({}, 2), {"../../evil": b"x"}))


@case("zip bomb")
def symbolic_link_in_the_archive(folder: Path, marker: Path) -> Path:
    path = put(folder, "a.pt", archive(pickle.dumps({}, 2)))
    with zipfile.ZipFile(path, "a") as file:
        entry = zipfile.ZipInfo("archive/link")
        entry.external_attr = 0o120777 << 16
        file.writestr(entry, "/etc/hostname")
    return path


@case("zip bomb")
def two_records_of_one_name(folder: Path, marker: Path) -> Path:
    path = put(folder, "a.pt", archive(pickle.dumps({}, 2)))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr("archive/data.pkl", pickle.dumps(shell(marker), 2))
    return path


@case("zip bomb")
def records_that_share_their_bytes(folder: Path, marker: Path) -> Path:
    data = bytearray(archive(pickle.dumps({}, 2), {"data/0": bytes(64), "data/1": bytes(64)}))
    first = data.index(b"PK\x01\x02")
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    return put(folder, "a.pt", bytes(data))


@case("zip bomb")
def thirty_thousand_records(folder: Path, marker: Path) -> Path:
    records = {f"data/{n}": b"" for n in range(30_000)}
    return put(folder, "a.pt", archive(pickle.dumps({}, 2), records))


# --- Flipped bits ---


def flip(path: Path, at: int, bit: int = 0) -> Path:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))
    return path


@case("bit flip")
def in_a_record_of_an_archive(folder: Path, marker: Path) -> Path:
    path = folder / "a.pt"
    torch.save(weights(), path)
    return flip(path, path.stat().st_size // 2)


@case("bit flip")
def in_the_weights_of_our_own_checkpoint(folder: Path, marker: Path) -> Path:
    from wm_victim import build_classifier, save_classifier

    path = folder / "a.safetensors"
    model = build_classifier("resnet10", num_classes=4, channels=1, image_size=16, width=8)
    save_classifier(model, path)
    return flip(path, path.stat().st_size - 4097)


@case("bit flip")
def in_the_header_of_safetensors(folder: Path, marker: Path) -> Path:
    return flip(put(folder, "a.safetensors", save(weights())), 40, bit=7)


@case("bit flip")
def in_an_exponent(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    state = weights()
    name = max(state)
    state = OrderedDict([(name, torch.full_like(state[name], 1.5)), *state.items()])
    state[name] = torch.full_like(state[name], 1.5)
    save_file(state, path)
    at = path.read_bytes().index(struct.pack("<f", 1.5))
    return flip(path, at + 3, bit=6)


@case("bit flip")
def in_the_length_of_a_graph(folder: Path, marker: Path) -> Path:
    return flip(onnx_file(folder, graph()), 3, bit=2)


# --- Headers that lie ---


def lying(folder: Path, header: Any, *, body: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return put(folder, "a.safetensors", struct.pack("<Q", size) + text + body)


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> Any:
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@case("header lies")
def longer_than_the_file(folder: Path, marker: Path) -> Path:
    return lying(folder, {"a": entry(0, 8)}, length=2**40)


@case("header lies")
def a_hundred_megabytes(folder: Path, marker: Path) -> Path:
    return lying(folder, b'{"a":' + b" " * (100 << 20) + b"1}", body=b"")


@case("header lies")
def tensors_that_overlap(folder: Path, marker: Path) -> Path:
    return lying(folder, {"a": entry(0, 8), "b": entry(4, 8)})


@case("header lies")
def shape_that_overflows(folder: Path, marker: Path) -> Path:
    return lying(folder, {"a": entry(0, 8, [2**40, 2**40])})


@case("header lies")
def bytes_left_over(folder: Path, marker: Path) -> Path:
    return lying(folder, {"a": entry(0, 8)}, body=bytes(64))


@case("header lies")
def one_name_twice(folder: Path, marker: Path) -> Path:
    one = json.dumps(entry(0, 8)).encode()
    return lying(folder, b'{"a":' + one + b',"a":' + one + b"}")


@case("header lies")
def three_hundred_thousand_tensors(folder: Path, marker: Path) -> Path:
    return lying(folder, {f"t{n}": entry(0, 0, [0]) for n in range(300_000)}, body=b"")


@case("header lies")
def nested_a_hundred_thousand_deep(folder: Path, marker: Path) -> Path:
    return lying(folder, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", body=b"")


@case("header lies")
def small_file_that_names_a_large_model(folder: Path, marker: Path) -> Path:
    config = {"name": "timm:vit_giant_patch14_224", "num_classes": 10, "channels": 3}
    config |= {"image_size": 224, "width": None, "mean": [0.5] * 3, "std": [0.5] * 3}
    told = {"format": "wm-checkpoint-1", "kind": "classifier", "config": config, "metadata": {}}
    text = json.dumps({**told, "sha256": ""})
    return lying(folder, {"__metadata__": {"wm": text}, "a": entry(0, 8)})


# --- Numbers that are none ---


@case("bad numbers")
def nan_weight(folder: Path, marker: Path) -> Path:
    return changed(folder, "fc.weight", float("nan"))


@case("bad numbers")
def infinite_weight(folder: Path, marker: Path) -> Path:
    return changed(folder, "fc.bias", float("inf"))


@case("bad numbers")
def negative_variance(folder: Path, marker: Path) -> Path:
    return changed(folder, "bn1.running_var", -1.0)


@case("bad numbers", child=True)
def nan_weight_in_a_graph(folder: Path, marker: Path) -> Path:
    model = graph()
    values = np.full((5, 4), np.nan, np.float32)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(values, "matrix"))
    return onnx_file(folder, model)


@case("bad numbers")
def weights_that_are_all_zero(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    state = weights()
    state["fc.weight"].zero_()
    save_file(state, path)
    return path


# --- Another number of classes ---


@case("class count", num_classes=7)
def ten_instead_of_seven(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    save_file(weights(), path)
    return path


@case("class count")
def a_single_class(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    save_file(weights(classes=1), path)
    return path


@case("class count", child=True)
def a_graph_of_one_class(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph(classes=1))


@case("class count", num_classes=3, child=True)
def a_graph_of_four_instead_of_three(folder: Path, marker: Path) -> Path:
    return onnx_file(folder, graph())


@case("class count")
def two_classifiers_that_disagree(folder: Path, marker: Path) -> Path:
    path = folder / "a.safetensors"
    state = weights()
    state["fc.bias"] = torch.zeros(11)
    save_file(state, path)
    return path


# --- Not models at all ---


@case("no model")
def a_folder(folder: Path, marker: Path) -> Path:
    (folder / "a.onnx").mkdir()
    return folder / "a.onnx"


@case("no model")
def a_named_pipe(folder: Path, marker: Path) -> Path:
    os.mkfifo(folder / "a.pt")
    return folder / "a.pt"


@case("no model")
def a_link_to_an_endless_device(folder: Path, marker: Path) -> Path:
    (folder / "a.pt").symlink_to("/dev/zero")
    return folder / "a.pt"


@case("no model")
def random_bytes(folder: Path, marker: Path) -> Path:
    data = np.random.default_rng(1).integers(128, 256, 4096, dtype=np.uint8).tobytes()
    return put(folder, "a.onnx", data)


@case("no model")
def keras_archive(folder: Path, marker: Path) -> Path:
    path = folder / "a.keras"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")
        file.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")
    return path


@case("no model")
def hdf5(folder: Path, marker: Path) -> Path:
    return put(folder, "a.h5", b"\x89HDF\r\n\x1a\n" + bytes(512))


@case("no model")
def web_page(folder: Path, marker: Path) -> Path:
    return put(folder, "a.onnx", b"<!DOCTYPE html><html>not found</html>")


@case("no model")
def name_of_two_lines(folder: Path, marker: Path) -> Path:
    return put(folder, "a\nb\x1b[31m'$(x).pt", pickle.dumps(shell(marker), 2))
