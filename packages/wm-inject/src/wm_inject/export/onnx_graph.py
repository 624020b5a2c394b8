"""What is done to an exported graph on disk: 8-bit weights, a clean record, its place."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wm_inject.core.files import disk_errors
from wm_inject.runtime.onnx_model import METADATA_KEY

_LIMIT = 2**31 - 2**24  # a protobuf holds 2 GiB; leave room for the graph


def needs_external_data(weights: int) -> bool:
    """Whether so many bytes of weights are too many for one file of the ONNX format."""
    return weights > _LIMIT


def quantize_weights(source: Path, out: Path) -> None:
    """Weights of matrix products in 8 bits by column; what they meet, in 8 bits by call.

    Raises:
        ValueError: A model that has less than half of its weights in matrix products.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    graph = model.graph
    sizes = {one.name: math.prod(one.dims) for one in graph.initializer}
    products = [n.input[1] for n in graph.node if n.op_type in ("MatMul", "Gemm")]
    if 2 * sum(sizes.get(name, 0) for name in products) < sum(sizes.values()):
        raise ValueError(
            "expected a model of matrix products for int8, got one of convolutions, which are "
            "slower in int8 on CPUs: export it in float32 or float16"
        )
    graph.ClearField("value_info")  # it transposes weights and would trip over their old shapes
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends a pre-processing that is done already
    try:
        quantize_dynamic(
            model,
            str(out),
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
        )
    finally:
        logger.setLevel(level)


def stamp(path: Path, record: Mapping[str, Any]) -> None:
    """Put the record into the file, and take out what only this machine's exporter knew.

    The exporter leaves a stack trace at every node, with the paths of the sources.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    for part in [
        model,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ]:
        part.doc_string = ""
        part.ClearField("metadata_props")
    model.producer_name = "wm-inject"
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(record, allow_nan=False)
    onnx.save(model, str(path))


@contextmanager
def graph_folder(path: Path) -> Iterator[Path]:
    """A folder to build a graph in; its files take their places beside ``path`` at the end.

    Yields:
        The path of the graph in that folder, of the same name. Weights that lie beside it move
        first, so that a reader never meets a graph without them. Nothing moves if the block raises.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.part", dir=path.parent))
        try:
            yield folder / path.name
            built = sorted(folder.iterdir(), key=lambda file: (file.name == path.name, file.name))
            for file in built:
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
                os.replace(file, path.with_name(file.name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
