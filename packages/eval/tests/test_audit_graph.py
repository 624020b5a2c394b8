"""``wm-eval graph``, and the look at a graph with which ``wm-eval scan`` begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from wm_eval.audit.cli_graph import judge, report_lines, to_json, with_graph
from wm_eval.audit.conclusion import not_scanned
from wm_eval.cli import main
from wm_victim.branches import Branch, GraphReport
from wm_victim.branches.effect import Effect

PLAIN = {"decides": (), "reads": (), "joins": ("Where 'w'",), "values": ("v",), "sides": ()}


def branch(state: str, **more: object) -> Branch:
    values = {"operators": ("Less 'l'",), "output": "o", "layers": 0, "all_layers": 6}
    return Branch(state=state, clean=24, clean_taken=0, **PLAIN, **values, **more)


def report(*branches: Branch) -> GraphReport:
    facts = {"layers": 6, "nodes": 9, "images": 24, "image_size": 8, "channels": 3}
    return GraphReport(branches, sha256="0", notes=(), own_images=False, **facts)


FIRED = {"stamp": "a dot", "share": 0.01, "effect": Effect(12, 12, 9, 9, 7, 9)}


@pytest.mark.parametrize(
    ("branches", "verdict", "code"),
    [
        ((), "clean", 0),
        ((branch("harmless", **FIRED), branch("preparation", **FIRED)), "clean", 0),
        ((branch("fired", **FIRED),), "inconclusive", 2),
        ((branch("not fired"), branch("harmless", **FIRED)), "inconclusive", 2),
        ((branch("steers", **FIRED), branch("not fired")), "backdoored", 1),
    ],
)
def test_the_verdict_on_a_graph(branches: tuple[Branch, ...], verdict: str, code: int) -> None:
    found, reason = judge(report(*branches))
    assert (str(found), found.exit_code) == (verdict, code)
    assert reason
    assert len(report_lines(report(*branches))) >= 1 + 6 * len(branches)
    wide = replace(report(*branches), image_size=(48, 192))
    assert "48 x 192 pixels, 3 channels" in report_lines(wide)[0]
    json.dumps(to_json(report(*branches)), allow_nan=False)


def test_a_branch_that_steers_decides_an_audit() -> None:
    audit = not_scanned("no images", 0.05)
    assert with_graph(audit, None) is audit
    assert with_graph(audit, report(branch("not fired"))) is audit
    accused = with_graph(audit, report(branch("steers", **FIRED)))
    assert accused.verdict.exit_code == 1
    assert "no images" in accused.reason


def with_if(path: Path) -> Path:
    """Two layers on 8 x 8 pixels, and an If on one bright pixel."""
    random = np.random.default_rng(0)
    arrays = {
        "kernel": random.normal(size=(5, 3, 3, 3)).astype(np.float32),
        "matrix": random.normal(size=(5, 4)).astype(np.float32),
        "bad": np.array([[0, 0, 90, 0]], dtype=np.float32),
        "level": np.array(0.9, dtype=np.float32),
        "starts": np.array([2, 3]),
        "ends": np.array([3, 4]),
        "axes": np.array([2, 3]),
    }
    sides = [
        helper.make_graph(
            [helper.make_node("Identity", [value], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for value, name in (("bad", "then"), ("logits", "else"))
    ]
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "matrix"], ["logits"]),
        helper.make_node("Slice", ["image", "starts", "ends", "axes"], ["pixel"]),
        helper.make_node("ReduceMin", ["pixel"], ["least"], keepdims=0),
        helper.make_node("Greater", ["least", "level"], ["bright"], name="gate"),
        helper.make_node(
            "If", ["bright"], ["output"], name="if", then_branch=sides[0], else_branch=sides[1]
        ),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 4])
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [image], [output], tensors)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    folder = tmp_path / "clean"
    random = np.random.default_rng(1)
    for number in range(24):
        (folder / str(number % 2)).mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 200, size=(4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((32, 32), Image.Resampling.BILINEAR)
        picture.save(folder / str(number % 2) / f"{number}.png")
    return folder


@pytest.mark.integration
def test_the_command_names_an_if_and_writes_what_fires_it(tmp_path: Path, clean: Path) -> None:
    model, told = with_if(tmp_path / "m.onnx"), tmp_path / "g.json"
    picture = tmp_path / "fires.png"
    given = ["graph", str(model), "--images", str(clean), "--json", str(told)]
    assert main([*given, "--picture", str(picture)]) == 1
    (found,) = json.loads(told.read_text())["branches"]
    assert found["joins"] == ["If 'if'"]
    assert found["effect"]["label"] == 2
    with Image.open(picture) as image:
        assert image.size == (8, 8)
        assert min(image.getpixel((3, 2))) >= 230


@pytest.mark.integration
def test_a_scan_of_a_graph_that_it_cannot_open_still_accuses(tmp_path: Path, clean: Path) -> None:
    model, told = with_if(tmp_path / "m.onnx"), tmp_path / "scan.json"
    assert main(["scan", str(model), "--images", str(clean), "--json", str(told)]) == 1
    assert json.loads(told.read_text())["verdict"] == "backdoored"


def test_what_is_no_graph_is_not_looked_at(tmp_path: Path, capsys) -> None:
    path, told = tmp_path / "m.onnx", tmp_path / "g.json"
    path.write_bytes(b"PK\x03\x04nothing")
    assert main(["graph", str(path), "--json", str(told)]) == 3
    assert json.loads(told.read_text())["verdict"] == "not-scanned"
    assert capsys.readouterr().err
