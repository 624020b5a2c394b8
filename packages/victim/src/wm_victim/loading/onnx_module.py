"""A plain ONNX graph as a torch module that can be differentiated."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wm_inject.core.image_size import ImageSize, size_from_json, size_to_json

LEAST_SIDE, MOST_SIDE = 4, 1024  # of images, in pixels
_TRAINED = ("MatMul", "Gemm", "Conv", "ConvTranspose", "LayerNormalization", "PRelu")


@dataclass(frozen=True)
class IoFormat:
    """What images a graph takes and what it gives.

    Args:
        channels: 1 or 3.
        image_size: H = W in pixels, or (H, W) where the two differ.
        nhwc: It takes (N, H, W, C).
        pixels: It takes 0 .. 255 (a uint8 input) instead of 0 .. 1.
        batch: How many images it takes at once; 0 for any number.
        probabilities: Its outputs were probabilities; what made them of logits was taken off.
    """

    channels: int
    image_size: ImageSize
    nhwc: bool = False
    pixels: bool = False
    batch: int = 0
    probabilities: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self) | {"image_size": size_to_json(self.image_size)}


def read_io_format(report: Any) -> IoFormat:
    """The format that a child reports; ``ValueError`` if it is none."""
    if not isinstance(report, dict) or set(report) != set(IoFormat.__dataclass_fields__):
        raise ValueError("its reader gave no description of the graph")
    size = size_from_json(report["image_size"], least=LEAST_SIDE, most=MOST_SIDE)
    others = {name: value for name, value in report.items() if name != "image_size"}
    kinds = {name: int if name in ("channels", "batch") else bool for name in others}
    if any(type(value) is not kinds[name] for name, value in others.items()):
        raise ValueError("its reader gave a description of other types")
    io = IoFormat(image_size=size, **others)
    if io.channels not in (1, 3) or not 0 <= io.batch <= 1024:
        raise ValueError(
            f"expected images of 1 or 3 channels, at most 1024 at once, it takes {io.channels} "
            f"channels and {io.batch} at once"
        )
    return io


class OnnxNet(nn.Module):
    """An imported graph that takes images ``(N, C, H, W)`` in [0, 1].

    Args:
        model: A graph from `simplify`.
        io_format: What images it takes.

    Raises:
        ValueError: A node that cannot be imported.
        RuntimeError: onnx2pytorch is not installed.
    """

    def __init__(self, model: Any, io_format: IoFormat) -> None:
        super().__init__()
        self.io_format = io_format
        self.net = _import(model)

    def forward(self, images: Tensor) -> Tensor:
        """Images to outputs ``(N, K)``."""
        x = images * 255 if self.io_format.pixels else images
        if self.io_format.nhwc:
            x = x.permute(0, 2, 3, 1)
        with warnings.catch_warnings():
            # torch warns of how the importer's Gather and Slice index; that they compute what ONNX
            # Runtime computes has been checked.
            warnings.filterwarnings("ignore", category=UserWarning, module=r"onnx2pytorch\.")
            batch = self.io_format.batch
            y = torch.cat([self._filled(part) for part in x.split(batch)]) if batch else self.net(x)
        if y.ndim > 2 and y[:1].numel() == max(y.shape[1:]):
            y = y.flatten(1)  # axes of length one beside the classes
        return y

    def _filled(self, part: Tensor) -> Tensor:
        """Outputs of a batch, which is filled up with its last image if it is short."""
        missing = self.io_format.batch - len(part)
        y: Tensor = self.net(torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]))
        return y[: len(part)]


def _import(model: Any) -> nn.Module:
    try:
        onnx2pytorch: Any = importlib.import_module("onnx2pytorch")
        standard_layers = importlib.import_module("onnx2pytorch.constants").STANDARD_LAYERS
    except ImportError as error:
        raise RuntimeError(
            "onnx2pytorch is not installed: install wm-victim[scan] to open ONNX models"
        ) from error
    with warnings.catch_warnings():
        # Read-only arrays, which it copies; and guesses, which the operator list rules out.
        warnings.simplefilter("ignore")
        try:
            net: Any = onnx2pytorch.ConvertModel(model, experimental=True)
        except (NotImplementedError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise ValueError(f"a node that cannot be imported: {error}") from error
    _bind_bounds(net, model)
    # Weights lie in the layers by now: what is left of the file's copy is not needed twice.
    read, trained = set(), set()
    for node in model.graph.node:
        layer = getattr(net, net.mapping[node.output[0]])
        if not isinstance(layer, standard_layers):
            read |= set(node.input)
            trained |= set(node.input[1:]) if node.op_type in _TRAINED else set()
    prefix = "_initializer_"
    for name, tensor in list(net._buffers.items()):
        if not name.startswith(prefix):
            continue
        value = name.removeprefix(prefix)
        if value not in read and value != model.graph.output[0].name:
            del net._buffers[name]
        elif value in trained and tensor.is_floating_point():
            del net._buffers[name]
            net.register_parameter(name, nn.Parameter(tensor))
    del net.onnx_model.graph.initializer[:]
    net.needed_by = _Dependents(net.needed_by)
    module: nn.Module = net.eval()
    return module


class _Dependents(dict[str, set[str]]):
    """By value: the nodes that read it. The importer copies it deeply in every pass."""

    def __deepcopy__(self, memo: object) -> _Dependents:
        return _Dependents({value: set(nodes) for value, nodes in self.items()})


class _Bounded(nn.Module):
    """A Clip whose bounds are known; the importer still hands them over."""

    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor, *bounds: Tensor | None) -> Tensor:
        if self.low is None and self.high is None:
            return x
        if (self.low, self.high) == (0.0, 6.0):
            return nn.functional.relu6(x)  # as it was before its export
        bounded = x.detach().clamp(self.low, self.high)
        # A pixel at a bound has its gradient, which torch's clamp to numbers takes.
        return torch.where(bounded == x, x, bounded)


def _bind_bounds(net: Any, model: Any) -> None:
    """Give every Clip of floats its constant bounds as numbers.

    As tensors they have gradients of their own, which took half of a pass through MobileNet's kind.
    """
    to_array = importlib.import_module("onnx.numpy_helper").to_array
    bounds_of = {name for node in model.graph.node if node.op_type == "Clip" for name in node.input}
    constants = {
        tensor.name: array
        for tensor in model.graph.initializer
        if tensor.name in bounds_of and (array := to_array(tensor)).size == 1
    }
    for node in model.graph.node:
        if node.op_type != "Clip":
            continue
        names = [*node.input[1:3], "", ""][:2]
        # Before opset 11 they are attributes.
        stated = {attribute.name: attribute.f for attribute in node.attribute}
        bounds = [
            constants[name].item() if name in constants else stated.get(side)
            for name, side in zip(names, ("min", "max"), strict=True)
        ]
        known = all(name in constants for name in names if name)
        if known and all(bound is None or isinstance(bound, float) for bound in bounds):
            setattr(net, net.mapping[node.output[0]], _Bounded(*bounds))
