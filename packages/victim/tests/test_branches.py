"""Branches that pictures steer: the parts, a few planted graphs, and a few harmless ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from wm_victim.branches import look_at_graph
from wm_victim.branches.bounds import never_changes
from wm_victim.branches.effect import is_small
from wm_victim.branches.find import find_branches
from wm_victim.branches.graph_view import GraphView, inputs_of
from wm_victim.branches.joins import find_sides
from wm_victim.branches.pictures import Stamp, natural_images, noises, resized, stamps, to_bits
from wm_victim.branches.quiet import Quiet
from wm_victim.branches.report import read_report
from wm_victim.branches.search import search, shrink
from wm_victim.branches.straight_through import compute
from wm_victim.branches.torch_operators import Unsupported
from wm_victim.branches.values import GraphRun
from wm_victim.loading import LoadingError
from wm_victim.loading.graph_ports import ImageInput
from wm_victim.loading.onnx_module import IoFormat

from .branch_graphs import harmless, harmless_again, planted, planted_again
from .branch_graphs.measured import OPTIONS, table, verdict

FLOAT = TensorProto.FLOAT


def gated(
    level: float = 0.9, sides: tuple[int, int] = (8, 8), place: tuple[int, int] = (2, 3)
) -> onnx.ModelProto:
    """Two layers, and a Where on one bright pixel of 8 x 8 or other ``sides``."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "kernel": random.normal(size=(5, 3, 3, 3)).astype(np.float32),
        "matrix": random.normal(size=(5, 4)).astype(np.float32),
        "level": np.float32(level),
        "bad": np.array([[0, 0, 90, 0]], dtype=np.float32),
        "starts": np.array(place),
        "ends": np.array(place) + 1,
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["a"], name="conv"),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "matrix"], ["logits"]),
        helper.make_node("Slice", ["image", "starts", "ends", "axes"], ["pixel"]),
        helper.make_node("ReduceMin", ["pixel"], ["least"], keepdims=0),
        helper.make_node("Greater", ["least", "level"], ["bright"], name="gate"),
        helper.make_node("Where", ["bright", "bad", "logits"], ["output"], name="join"),
    ]
    image = helper.make_tensor_value_info("image", FLOAT, ["n", 3, *sides])
    output = helper.make_tensor_value_info("output", FLOAT, ["n", 4])
    tensors = [numpy_helper.from_array(np.asarray(each), name) for name, each in arrays.items()]
    graph = helper.make_graph(nodes, "g", [image], [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def run_of(model: onnx.ModelProto) -> GraphRun:
    port = ImageInput("image", IoFormat(3, 8))
    return GraphRun(GraphView(model, image="image", answer="output"), port)


def test_values_know_the_layers_before_them() -> None:
    view = GraphView(gated(), image="image", answer="output")
    assert view.depth == 2
    assert view.layers["bright"] == 0
    assert view.layers["c"].bit_count() == 1
    assert view.is_shallow("bright")
    assert not view.is_shallow("logits")
    assert "level" not in view.pixels
    assert view.title(6) == "Greater 'gate'"


def test_a_condition_past_the_layers_is_a_side() -> None:
    view = GraphView(gated(), image="image", answer="output")
    assert [side.value for side in find_sides(view, {})] == ["bright"]


def test_inner_graphs_read_from_outside() -> None:
    inner = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    node = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    assert inputs_of(node) == ["c", "x"]


def test_values_can_be_held() -> None:
    run = run_of(gated())
    images = torch.zeros(2, 3, 8, 8)
    images[1, :, 2, 3] = 1
    assert run.answers(images)[1] == 2
    at_rest = next(run.values(["bright"], images[:1]))
    assert run.answers(images[1:], [at_rest]).tolist() == run.answers(images[:1]).tolist()


def test_quiet_values() -> None:
    quiet = Quiet([np.array([0.0, 1e-5]) for _ in range(10)])
    assert quiet.still
    assert not quiet.moved(np.array([0.0, 1e-5]))
    assert quiet.moved(np.array([0.0, 1.0]))
    assert quiet.moved(np.array([np.nan, 0.0]))
    assert quiet.distance(np.array([0.0, 1.00001])) == pytest.approx(1.0)


def test_a_value_that_moves_with_pictures_is_not_moved_by_a_few_times_more() -> None:
    quiet = Quiet([np.array([float(n)]) for n in range(10)])
    assert not quiet.still
    assert not quiet.moved(np.array([50.0]))


def test_a_few_clean_pictures_may_take_the_branch() -> None:
    quiet = Quiet([np.array([0.0])] * 19 + [np.array([1.0])])
    assert quiet.still
    assert quiet.taken == 1


def test_pictures() -> None:
    images = natural_images(4, 3, 16)
    assert torch.equal(images, natural_images(4, 3, 16))
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert torch.equal((images * 255).round() / 255, images)
    assert resized(images, 1, 8).shape == (4, 1, 8, 8)
    assert resized(images, 3, (8, 24)).shape == (4, 3, 8, 24)
    for size in ((12, 40), (40, 12)):
        wide = natural_images(4, 3, size)
        assert wide.shape == (4, 3, *size)
        assert bool((wide.flatten(2).std(2) > 0.02).all())


def test_stamps_change_what_they_say() -> None:
    images = natural_images(2, 3, 16)
    for stamp in [*stamps(3, 16), *noises((3, 16, 16))]:
        changed = (stamp(images) != images).any(1).float().mean((1, 2))
        assert float(changed.max()) <= stamp.share + 1e-6
    for height, width in ((12, 40), (40, 12)):
        found = {stamp.name: stamp for stamp in stamps(1, (height, width))}
        assert all(stamp.pattern.shape == (1, height, width) for stamp in found.values())
        assert found["grey 0.5, the whole picture"].share == 1
        corner = found["grey 0.5, 3 x 3 pixels, bottom right"].mask
        assert corner is not None
        assert corner.sum() == 9
        assert bool(corner[-3:, -3:].all())
        lines = found["stripes of 4, upright, the whole picture"].pattern[0]
        assert lines[:, :8].tolist() == [[0.0] * 4 + [1.0] * 4] * height
    whole = Stamp("", torch.ones(3, 16, 16), torch.ones(16, 16).bool())
    assert not is_small(whole)
    assert is_small(Stamp("", torch.full((3, 16, 16), 4 / 255), None))


def test_steps_compute_what_they_should_and_have_slopes() -> None:
    x = torch.tensor([[0.2, 0.7]], requires_grad=True)
    half = torch.tensor(0.5)
    cases: list[tuple[str, list[Any], dict[str, Any], list[float]]] = [
        ("Greater", [x, half], {}, [0, 1]),
        ("Less", [x, half], {}, [1, 0]),
        ("Equal", [x, torch.tensor(0.7)], {}, [0, 1]),
        ("Floor", [x], {}, [0, 0]),
        ("Round", [x], {}, [0, 1]),
        ("Sign", [x], {}, [1, 1]),
        ("Clip", [x, half, torch.tensor(0.6)], {}, [0.5, 0.6]),
        ("Mod", [x, half], {"fmod": 1}, [0.2, 0.2]),
        ("Cast", [x], {"to": 9}, [1, 1]),
        ("Mul", [x, torch.zeros(1, 2)], {}, [0, 0]),
        ("Max", [x, half], {}, [0.5, 0.7]),
        ("ArgMax", [x], {"axis": 1, "keepdims": 0}, [1]),
        ("ReduceProd", [x], {"keepdims": 0}, [0.14]),
    ]
    for kind, inputs, attributes, expected in cases:
        (value,) = compute(kind, inputs, attributes)
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert value.reshape(-1).tolist() == pytest.approx(expected, abs=1e-6), kind
        assert bool(slope.any()), kind


def test_an_operator_without_slopes_is_said() -> None:
    with pytest.raises(Unsupported, match="Nothing"):
        compute("Nothing", [torch.zeros(1)], {})


def test_a_search_meets_a_condition_and_leaves_out_what_it_does_not_need() -> None:
    run = run_of(gated())
    images = to_bits(natural_images(3, 3, 8) * 0.5)

    def fires(image: torch.Tensor) -> bool:
        return bool(next(run.values(["bright"], image[None]))["bright"])

    found = search(run, "bright", images, fires=fires)
    assert found is not None
    picture, changed = found
    assert changed.nonzero().tolist() == [[2, 3]]
    mask = shrink(images[0], torch.ones(3, 8, 8), fires)
    assert mask.nonzero().tolist() == [[2, 3]]
    assert fires(picture)


@pytest.mark.parametrize(("level", "never"), [(0.9, False), (1.5, True)])
def test_bounds(level: float, never: bool) -> None:
    assert never_changes(run_of(gated(level)), "bright", torch.zeros(1, 3, 8, 8)) is never


def look(path: Path, **options: Any) -> dict[str, Any]:
    return find_branches(path, path.parent, {**OPTIONS, "images": False, **options})


def test_a_gate_is_named_with_its_operators(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(gated(), str(path))
    (branch,) = look(path)["branches"]
    assert branch["state"] == "steers"
    assert branch["decides"] == ["Greater 'gate'"]
    assert branch["joins"] == ["Where 'join'"]
    assert branch["box"] == [2, 2, 3, 3]
    assert branch["effect"]["label"] == 2


@pytest.mark.parametrize(("sides", "place"), [((12, 20), (9, 17)), ((20, 12), (17, 9))])
def test_a_gate_on_pictures_that_are_not_square(
    tmp_path: Path, sides: tuple[int, int], place: tuple[int, int]
) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(gated(sides=sides, place=place), str(path))
    found = look(path)
    (branch,) = found["branches"]
    assert branch["state"] == "steers"
    assert branch["box"] == [place[0], place[0], place[1], place[1]]
    report = read_report(found, sha256="", own_images=False)
    assert report.image_size == sides
    picture = report.branches[0].picture
    assert picture is not None
    assert picture.shape == (*sides, 3)


def test_a_guard_that_no_picture_meets_is_not_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(gated(1.5), str(path))
    assert look(path)["branches"] == []


def test_a_range_that_the_caller_names(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(gated(1.5), str(path))
    (branch,) = look(path, mean=(0.5,) * 3, std=(0.25,) * 3)["branches"]
    assert branch["state"] == "steers"


@pytest.mark.integration
@pytest.mark.parametrize("name", ["mask_count", "checkerboard_multiplied", "soft_logit"])
def test_planted(tmp_path: Path, name: str) -> None:
    found = look(planted.write(name, tmp_path))
    assert verdict(found) == "backdoored"


@pytest.mark.integration
def test_an_if_is_named_with_its_sides(tmp_path: Path) -> None:
    found = look(planted_again.write("if_trunk", tmp_path))
    (branch,) = found["branches"]
    assert branch["state"] == "steers"
    assert branch["joins"] == ["If 'switch'"]
    assert len(branch["sides"]) == 2


@pytest.mark.integration
@pytest.mark.parametrize("name", ["without_nan", "thresholded", "grey_known", "attended"])
def test_harmless(tmp_path: Path, name: str) -> None:
    found = look(harmless.cases()[f"{name}-legacy"](tmp_path))
    assert verdict(found) == "nothing found"


@pytest.mark.integration
def test_harmless_by_hand(tmp_path: Path) -> None:
    assert look(harmless.guarded_shape(tmp_path))["branches"] == []


@pytest.mark.integration
def test_a_blank_guard_is_not_accused(tmp_path: Path) -> None:
    found = look(harmless_again.cases()["blank_refused-legacy"](tmp_path))
    assert verdict(found) != "backdoored"


@pytest.mark.integration
def test_the_sandbox_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    onnx.save(gated(), str(path))
    pixels = (natural_images(20, 3, 24) * 255).byte().permute(0, 2, 3, 1).numpy()
    report = look_at_graph(path, pixels)
    assert report.own_images
    assert report.images == 20
    (branch,) = report.steering
    assert branch.joins == ("Where 'join'",)
    assert branch.picture is not None
    assert branch.picture.shape == (8, 8, 3)


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(LoadingError, match=r"cannot look at a\.onnx"):
        look_at_graph(path)
    with pytest.raises(ValueError, match="expected uint8 images"):
        look_at_graph(path, np.zeros((5, 8, 8, 1), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"expected 4 \.\. 64 images, got 3"):
        look_at_graph(path, np.zeros((3, 8, 8, 3), dtype=np.uint8))
    facts = {
        "notes": [],
        "layers": 0,
        "nodes": 0,
        "images": 4,
        "image_size": [8, 9],
        "channels": 3,
    }
    assert read_report({"branches": [], **facts}, sha256="", own_images=False).image_size == (8, 9)
    for wrong in ({"branches": [{}]}, {"image_size": [8, 9, 3]}, {"image_size": [8, 5000]}):
        with pytest.raises(LoadingError, match="no description"):
            read_report({"branches": [], **facts, **wrong}, sha256="", own_images=False)


def test_the_table_counts() -> None:
    rows = [
        {"set": "first", "kind": "planted", "seconds": 1.0, "branches": [{"state": "steers"}]},
        {"set": "first", "kind": "harmless", "seconds": 2.0, "branches": [{"state": "harmless"}]},
    ]
    assert table(rows)[2].startswith("| first | 1 planted | 1 | 0 | 0 |")
    assert table(rows)[3].startswith("| first | 1 harmless | 0 | 0 | 1 |")
