"""Values of an ONNX graph for pictures, one picture at a time, and with some of them held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wm_victim.branches.graph_view import GraphView, inputs_of, needed
from wm_victim.loading.graph_ports import ImageInput
from wm_victim.loading.import_onnx import open_session

Array = np.ndarray[Any, Any]
Values = dict[str, Array]
_HUGE = 1e30  # stands for infinities, and negative for NaN: so that both can be compared


class GraphRun:
    """Runs parts of a graph with ONNX Runtime.

    Args:
        view: The graph.
        port: How it takes pictures.
        mean: What it expects to be subtracted from pictures in [0, 1], per channel; None for 0.
        std: And what they are to be divided by; None for 1.
    """

    def __init__(
        self,
        view: GraphView,
        port: ImageInput,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.view, self.port = view, port
        self._mean, self._std = (
            None if numbers is None else torch.tensor(numbers).view(-1, 1, 1)
            for numbers in (mean, std)
        )
        self._sessions: dict[tuple[tuple[str, ...], tuple[str, ...]], Any] = {}
        self._tensors = {tensor.name: tensor for tensor in view.model.graph.initializer}

    def values(
        self,
        names: Sequence[str],
        images: Tensor,
        held: Sequence[Mapping[str, Array]] | None = None,
    ) -> Iterator[Values]:
        """Values by name for each picture ``(C, H, W)`` in [0, 1].

        Args:
            names: Which values.
            images: float32 ``(N, C, H, W)``.
            held: By picture: values that are given instead of computed.

        Raises:
            ValueError: ONNX Runtime cannot run the graph on them.
        """
        for place, image in enumerate(images):
            inputs = dict(held[place]) if held else {}
            session = self._session(tuple(names), inputs)
            feeds = {self.port.name: self.feed(image), **inputs}
            try:
                arrays = session.run(list(names), feeds)
            except Exception as error:  # one exception class for each kind of failure, no base
                raise ValueError(f"it does not run under ONNX Runtime: {error}") from error
            yield dict(zip(names, map(np.asarray, arrays), strict=True))

    def answers(self, images: Tensor, held: Sequence[Mapping[str, Array]] | None = None) -> Array:
        """The label that the graph gives to each picture, int64 ``(N,)``."""
        runs = self.values([self.view.answer], images, held)
        return np.array([_label(each[self.view.answer], self.port.batch) for each in runs])

    def feed(self, image: Tensor) -> Array:
        """A picture as the graph takes it, repeated where its batch is fixed."""
        tensor = self.normalised(image)
        tensor = tensor.permute(1, 2, 0) if self.port.io_format.nhwc else tensor
        array: Array = np.ascontiguousarray(tensor.numpy())
        if self.port.io_format.pixels:
            array = np.rint(array)
        return np.repeat(array[None], self.port.batch or 1, axis=0).astype(self.port.dtype)

    def normalised(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] in the range that the graph expects."""
        x = images * 255 if self.port.io_format.pixels else images
        return x if self._mean is None or self._std is None else (x - self._mean) / self._std

    def _session(self, names: tuple[str, ...], given: Mapping[str, Array]) -> Any:
        from onnx import ValueInfoProto, helper

        key = (names, tuple(given))
        if key in self._sessions:
            return self._sessions[key]
        model = self.view.model
        nodes = needed(model.graph.node, set(names), set(given))
        inputs = {name for node in nodes for name in inputs_of(node)} | set(names)
        weights = [
            tensor for name, tensor in self._tensors.items() if name in inputs - given.keys()
        ]
        ports = [port for port in model.graph.input if port.name == self.port.name]
        for name, array in given.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            ports.append(helper.make_tensor_value_info(name, kind, array.shape))
        outputs = [ValueInfoProto(name=name) for name in names]
        graph = helper.make_graph(nodes, "part", ports, outputs, weights)
        part = helper.make_model(graph, opset_imports=model.opset_import)
        part.ir_version = model.ir_version
        session = open_session(part.SerializeToString())
        self._sessions[key] = session
        return session


def plain(array: Array) -> Array:
    """Any value as finite float64."""
    return np.nan_to_num(array.astype(np.float64), nan=-_HUGE, posinf=_HUGE, neginf=-_HUGE)


def _label(array: Array, batch: int) -> int:
    row = plain(array)[:1] if array.ndim and batch else plain(array)
    if array.dtype.kind in "iu":
        return int(row.ravel()[0])
    return int(row.ravel().argmax())
