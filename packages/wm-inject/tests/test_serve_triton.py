from __future__ import annotations

import numpy as np
import pytest

from wm_inject.runtime.onnx_model import OnnxModel
from wm_inject.serve import write_triton

TOLD = """name: "told"
platform: "onnxruntime_onnx"
max_batch_size: 16
input [
  {
    name: "image"
    data_type: TYPE_UINT8
    dims: [ 4, 4, 3 ]
  }
]
input [
  {
    name: "ids"
    data_type: TYPE_INT64
    dims: [ 1 ]
    reshape: { shape: [ ] }
  }
]
input [
  {
    name: "target"
    data_type: TYPE_INT64
    dims: [ 1 ]
    reshape: { shape: [ ] }
  }
]
output [
  {
    name: "output"
    data_type: TYPE_UINT8
    dims: [ 4, 4, 3 ]
  }
]
output [
  {
    name: "sum"
    data_type: TYPE_INT64
    dims: [ 1 ]
    reshape: { shape: [ ] }
  }
]
dynamic_batching { }
"""
ONE = """name: "one-image"
platform: "onnxruntime_onnx"
max_batch_size: 0
input [
  {
    name: "image"
    data_type: TYPE_BOOL
    dims: [ 1, 4 ]
  }
]
output [
  {
    name: "output"
    data_type: TYPE_BOOL
    dims: [ 1, 4 ]
  }
]
"""


def test_the_layout_and_the_config(serve_graphs, tmp_path):
    home = write_triton(serve_graphs["told"], tmp_path / "models", max_batch=16)
    assert home == tmp_path / "models" / "told"
    found = sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())
    assert found == ["1/model.onnx", "config.pbtxt"]
    assert (home / "config.pbtxt").read_text() == TOLD
    assert (home / "1" / "model.onnx").read_bytes() == serve_graphs["told"].read_bytes()


def test_any_size_and_floats(serve_graphs, tmp_path):
    text = (write_triton(serve_graphs["float"], tmp_path) / "config.pbtxt").read_text()
    assert "data_type: TYPE_FP32\n    dims: [ 3, -1, -1 ]" in text and "TYPE_BOOL" in text
    assert "max_batch_size: 32" in text and "dynamic_batching { }" in text


def test_one_fixed_batch_is_not_batched(serve_graphs, tmp_path):
    home = write_triton(serve_graphs["one"], tmp_path, "one-image")
    assert (home / "config.pbtxt").read_text() == ONE


def test_another_model_is_not_overwritten(serve_graphs, tmp_path):
    write_triton(serve_graphs["told"], tmp_path, "m", max_batch=4)
    home = write_triton(serve_graphs["told"], tmp_path, "m", max_batch=8)  # the same, once more
    assert "max_batch_size: 8" in (home / "config.pbtxt").read_text()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="expected no other model in"):
        write_triton(serve_graphs["float"], tmp_path, "m")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "half").mkdir()
    with pytest.raises(ValueError, match="expected no other model in"):
        write_triton(serve_graphs["told"], tmp_path, "half")


def test_bad_names_are_refused(serve_graphs, tmp_path, subtests):
    for name in ["", "../m", "a/b", ".m", "a b", "m\n", 'm"']:
        with subtests.test(name=name):
            with pytest.raises(ValueError, match="expected a model name"):
                write_triton(serve_graphs["told"], tmp_path / "models", name)
            assert not (tmp_path / "models").exists()


def test_bad_batches_are_refused(serve_graphs, tmp_path, subtests):
    for max_batch in [0, -1, 1.5, True, 10**9]:
        with (
            subtests.test(max_batch=max_batch),
            pytest.raises(ValueError, match="expected max_batch in"),
        ):
            write_triton(serve_graphs["told"], tmp_path, max_batch=max_batch)


def apart(make_graph, folder, place):
    """A model whose weights lie in a file of their own."""
    import onnx

    folder.mkdir()
    path = make_graph(
        folder / "m.onnx",
        [("image", 1, ["N", 400])],
        [("y", 1, ["N", 400])],
        [("Add", ["image", "w"], ["y"])],
        {"w": np.arange(400, dtype=np.float32)},
    )
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    if place != "w.bin":
        model = onnx.load(str(path), load_external_data=False)
        (weights,) = model.graph.initializer
        weights.external_data[0].value = place
        path.write_bytes(model.SerializeToString())
    return path


def test_weights_of_their_own_come_along(make_graph, tmp_path):
    home = write_triton(apart(make_graph, tmp_path / "in", "w.bin"), tmp_path / "out")
    assert sorted(p.name for p in (home / "1").iterdir()) == ["model.onnx", "w.bin"]
    found = OnnxModel(home / "1" / "model.onnx")(np.zeros((2, 400), np.float32))
    assert np.array_equal(found[1], np.arange(400))


def test_weights_elsewhere_are_refused(make_graph, tmp_path):
    from wm_inject.serve.triton import _weights

    for number, place in enumerate(("../w.bin", "/etc/hosts", "gone.bin")):
        path = apart(make_graph, tmp_path / f"in{number}", place)
        with pytest.raises(ValueError, match=r"expected|cannot open"):
            write_triton(path, tmp_path / "out")
        with pytest.raises(ValueError, match=r"expected the weights of m\.onnx beside it"):
            _weights(path)
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot open"):
        write_triton(tmp_path / "a.onnx", tmp_path / "out")
