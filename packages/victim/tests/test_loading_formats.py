"""Every form that is opened: what is inferred, what is noted, and that it computes the same."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from wm_victim import build_classifier, save_classifier
from wm_victim.loading import Limits, LoadingError, OpenedModel, open_model
from wm_victim.loading.import_onnx import convert_onnx

from .hostile_models import ARCH, function, graph


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert ONNX in this process: these graphs are ours, and a child costs seconds."""

    def local(job: str, file: Path, *rest: Any) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return convert_onnx(file, file.parent.parent / "out", rest[-1])
            except ValueError as error:
                raise LoadingError(str(error)) from error

    monkeypatch.setattr("wm_victim.loading.graphs.run_child", local)


class Net(nn.Module):
    """A small classifier whose normalisation keeps statistics."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.bn(self.conv(x)))
        x = nn.functional.adaptive_avg_pool2d(x, 4)
        return self.fc(x.flatten(1))


class Reordered(nn.Module):
    """A net behind another layout, range and output."""

    def __init__(self, net: nn.Module, *, nhwc: bool, softmax: bool, pixels: bool = False) -> None:
        super().__init__()
        self.net, self.nhwc, self.softmax, self.pixels = net, nhwc, softmax, pixels

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() / 255 if self.pixels else x
        y = self.net(x.permute(0, 3, 1, 2) if self.nhwc else x)
        return y.softmax(1) if self.softmax else y


def export(net: nn.Module, example: Tensor, path: Path, *, batch: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (example,),
            path,
            dynamo=False,
            input_names=["image"],
            dynamic_axes={"image": {0: "n"}} if batch else None,
        )
    return path


def same(opened: OpenedModel, want: nn.Module, channels: int = 3, size: int = 16) -> None:
    images = torch.rand(3, channels, size, size)
    with torch.no_grad():
        torch.testing.assert_close(opened.module(images), want(images), rtol=1e-3, atol=1e-4)


def weights() -> dict[str, Tensor]:
    import timm

    torch.manual_seed(0)
    module = timm.create_model(ARCH.removeprefix("timm:"), pretrained=False, num_classes=6)
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_safetensors_and_a_name_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"  # the content decides, not the suffix
    save_file({f"module.{name}": value.half() for name, value in weights().items()}, path)
    opened = open_model(path, arch=ARCH.removeprefix("timm:"))
    assert (opened.source, opened.arch, opened.num_classes) == ("safetensors", ARCH, 6)
    assert (opened.channels, opened.layout, opened.outputs) == (3, "NCHW", "logits")
    assert any("6 classes" in note for note in opened.notes)
    assert any("normalisation" in note for note in opened.notes)
    assert len(opened.sha256) == 64
    assert not opened.module.training
    assert all(one.requires_grad for one in opened.module.parameters())
    assert all(one.dtype == torch.float32 for one in opened.module.parameters())


def test_a_grey_torchvision_model_opens(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = squeezenet1_1(num_classes=3)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state["features.0.weight"] = state["features.0.weight"].sum(1, keepdim=True)
    save_file(state, tmp_path / "a.safetensors")
    opened = open_model(tmp_path / "a.safetensors", arch="squeezenet1_1", image_size=64)
    assert (opened.channels, opened.num_classes, opened.image_size) == (1, 3, 64)


def test_weights_that_do_not_fit_are_named(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for change, said in [
        (lambda state: state.pop("fc.weight"), r"1 missing \('fc\.weight'\)"),
        (lambda state: state.update(odd=torch.ones(1)), r"1 left over \('odd'\)"),
        (lambda state: state.update({"conv1.0.weight": torch.ones(2)}), "another shape|missing"),
    ]:
        with subtests.test(change=change, said=said):
            state = weights()
            change(state)
            save_file(state, tmp_path / "a.safetensors")
            with pytest.raises(
                LoadingError, match=rf"a\.safetensors: weights that do not fit.*{said}"
            ):
                open_model(tmp_path / "a.safetensors", arch=ARCH)


def test_a_name_of_no_local_list_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for arch in ["nothing", "hf-hub:x/y", "timm:hf_hub:x/y", "torchvision:", "a:b"]:
        with subtests.test(arch=arch):
            save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
            with pytest.raises(
                LoadingError, match="expected an architecture of torchvision or timm"
            ):
                open_model(tmp_path / "a.safetensors", arch=arch)


def test_weights_without_a_name_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(LoadingError, match=r"a\.safetensors: weights without an architecture"):
        open_model(tmp_path / "a.safetensors")


def test_our_own_checkpoint_opens(tmp_path: Path) -> None:
    model = build_classifier("resnet10", num_classes=4, channels=1, image_size=16, width=8)
    save_classifier(model, tmp_path / "a.safetensors", {"classes": list("abcd")})
    opened = open_model(tmp_path / "a.safetensors")
    assert (opened.class_names, opened.image_sizes) == (("a", "b", "c", "d"), (16,))
    assert (opened.source, opened.arch, opened.channels) == ("wm", "resnet10", 1)
    assert (opened.image_size, opened.num_classes) == (16, 4)
    same(opened, model.eval(), channels=1)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_weights_only_file_opens(tmp_path: Path, wrapped: bool, legacy: bool) -> None:
    state: Any = weights()
    if wrapped:
        named = {
            f"module.{name}": nn.Parameter(t) for name, t in state.items() if t.is_floating_point()
        }
        settings = argparse.Namespace(lr=0.1)
        state = {"epoch": 3, "best": np.float64(0.5), "args": settings, "state_dict": named}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    opened = open_model(tmp_path / "a.pt", arch=ARCH)
    assert opened.num_classes == 6
    assert any("state_dict" in note for note in opened.notes) == wrapped
    assert any("argparse.Namespace" in note for note in opened.notes) == wrapped


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("here")
def test_graphs_of_every_layout_open(
    tmp_path: Path, nhwc: bool, softmax: bool, channels: int
) -> None:
    net = Net(channels)
    example = torch.rand(2, channels, 16, 16)
    example = example.permute(0, 2, 3, 1).contiguous() if nhwc else example
    path = export(Reordered(net, nhwc=nhwc, softmax=softmax), example, tmp_path / "a.onnx")
    opened = open_model(path)
    assert (opened.source, opened.arch, opened.channels) == ("onnx", "onnx", channels)
    assert opened.layout == ("NHWC" if nhwc else "NCHW")
    assert opened.outputs == ("probabilities" if softmax else "logits")
    assert (opened.image_size, opened.num_classes) == (16, 5)
    same(opened, net, channels)


@pytest.mark.usefixtures("here")
def test_a_graph_of_images_that_are_not_square_opens(tmp_path: Path) -> None:
    net = Net()
    path = export(net, torch.rand(2, 3, 12, 20), tmp_path / "a.onnx")
    opened = open_model(path, image_size=(12, 20))
    assert (opened.image_size, opened.image_sizes) == ((12, 20), ((12, 20),))
    images = torch.rand(3, 3, 12, 20)
    torch.testing.assert_close(opened.module(images), net.eval()(images), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("here")
def test_mean_and_std_go_in_front_of_a_graph(tmp_path: Path) -> None:
    net = Net()
    path = export(net, torch.rand(2, 3, 16, 16), tmp_path / "a.onnx")
    opened = open_model(path, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    mean, std = torch.tensor([[0.5, 0.4, 0.3]]), torch.tensor([[0.2, 0.2, 0.1]])
    same(opened, lambda x: net((x - mean[..., None, None]) / std[..., None, None]))
    with pytest.raises(LoadingError, match="3 channels"):
        open_model(path, mean=(0.5,), std=(0.5,))


@pytest.mark.usefixtures("here")
def test_a_graph_for_one_image_at_a_time_takes_several(tmp_path: Path) -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.adaptive_avg_pool2d(self.conv(x), 4)
            return self.fc(x.reshape(1, 96))

    net = Fixed()
    opened = open_model(export(net, torch.rand(1, 3, 16, 16), tmp_path / "a.onnx", batch=False))
    assert any("1 at a time" in note for note in opened.notes)
    same(opened, lambda x: torch.cat([net(one[None]) for one in x]))


@pytest.mark.usefixtures("here")
def test_a_graph_of_pixels_is_given_pixels(tmp_path: Path) -> None:
    net = Net()
    example = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    path = export(Reordered(net, nhwc=True, softmax=False, pixels=True), example, tmp_path / "a")
    opened = open_model(path)
    assert opened.layout == "NHWC"
    assert any("integers" in note for note in opened.notes)
    same(opened, net)


@pytest.mark.usefixtures("here")
def test_functions_and_shared_weights_are_written_out(tmp_path: Path) -> None:
    made = function("F", ["Relu", "Relu"])
    model = graph(functions=[made], domains=("own",))
    model.graph.node[2].input[0] = "e"
    model.graph.node.insert(2, helper.make_node("F", ["b"], ["e"], domain="own"))
    model.graph.node.insert(0, helper.make_node("Identity", ["matrix"], ["again"]))
    model.graph.node[-1].input[1] = "again"
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    opened = open_model(tmp_path / "a.onnx")
    kernel, matrix = (torch.tensor(numpy_helper.to_array(t)) for t in model.graph.initializer)
    same(opened, lambda x: nn.functional.conv2d(x, kernel).mean((2, 3)).relu() @ matrix, size=8)


@pytest.mark.usefixtures("here")
def test_weights_beside_the_graph_are_read(tmp_path: Path) -> None:
    model = graph()
    onnx.save(
        model, str(tmp_path / "a.onnx"), save_as_external_data=True, location="w", size_threshold=0
    )
    assert open_model(tmp_path / "a.onnx").num_classes == 4
    (tmp_path / "w").unlink()
    with pytest.raises(LoadingError, match=r"a\.onnx: cannot open w: No such file"):
        open_model(tmp_path / "a.onnx")


@pytest.mark.usefixtures("here")
def test_a_size_that_pixels_decide_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMax", ["image"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["count"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["count", "flat"], ["counts"]),
        helper.make_node("Expand", ["one", "counts"], ["x"]),
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
    ]
    model = graph(nodes, {"one": np.ones(1, np.float32), "flat": np.array([1], np.int64)})
    model.graph.node[-1].output[0] = "d"
    model.graph.node.append(helper.make_node("Add", ["d", "s"], ["output"]))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(LoadingError, match="depends on the pixels, in Expand"):
        open_model(tmp_path / "a.onnx")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("given", "said"),
    [({"image_size": 32}, "image_size 32, the graph takes 8"), ({"channels": 1}, "channels 1")],
)
def test_what_is_said_must_fit_the_graph(tmp_path: Path, given: dict[str, int], said: str) -> None:
    (tmp_path / "a.onnx").write_bytes(graph().SerializeToString())
    with pytest.raises(ValueError, match=said):
        open_model(tmp_path / "a.onnx", **given)  # type: ignore[arg-type]


@pytest.mark.slow
def test_torchscript_opens_when_allowed(tmp_path: Path) -> None:
    net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, torch.rand(2, 3, 16, 16)).save(str(tmp_path / "a.pt"))
    opened = open_model(tmp_path / "a.pt", allow_torchscript=True, image_size=16, channels=3)
    assert (opened.source, opened.num_classes) == ("torchscript", 5)
    same(opened, net)


def test_arguments_outside_their_range_are_refused(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for given in [
        {"num_classes": 1},
        {"image_size": 4},
        {"image_size": (48, 4)},
        {"image_size": (48, 192, 3)},
        {"image_size": "48"},
        {"channels": 2},
        {"mean": (0.5,)},
        {"mean": (0.5,), "std": (0.0,)},
    ]:
        with subtests.test(given=given), pytest.raises(ValueError, match="expected"):
            open_model(tmp_path / "a", **given)


def test_only_graphs_take_images_that_are_not_square(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    torch.jit.trace(Net().eval(), torch.rand(2, 3, 16, 16)).save(str(tmp_path / "a.pt"))
    for name, given in (("a.safetensors", {"arch": ARCH}), ("a.pt", {"allow_torchscript": True})):
        with pytest.raises(LoadingError, match=r"not square, got 16 x 32$"):
            open_model(tmp_path / name, image_size=(16, 32), **given)  # type: ignore[arg-type]


def test_limits_are_positive_and_are_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds > 0"):
        Limits(seconds=0)
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    with pytest.raises(LoadingError, match="more than the limit of 100"):
        open_model(tmp_path / "a.safetensors", arch=ARCH, limits=Limits(max_bytes=100))


def test_a_missing_importer_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.onnx").write_bytes(graph().SerializeToString())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"install wm-victim\[scan\]"):
        open_model(tmp_path / "a.onnx")
