"""A model in the folder layout that Triton Inference Server reads."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from wm_inject.core.files import atomic_path, sha256_file
from wm_inject.runtime.onnx_model import OnnxModel, Port
from wm_inject.serve.models import VERSION, check_name

_TYPES = {"float32": "FP32", "uint8": "UINT8", "int64": "INT64", "bool": "BOOL"}


def write_triton(
    model_path: str | Path, folder: str | Path, name: str | None = None, *, max_batch: int = 32
) -> Path:
    """Write NAME/config.pbtxt and NAME/1/model.onnx into a Triton model repository.

    Vectors such as "ids" and "target", ``(N,)`` in the graph, are ``(N, 1)`` for Triton's clients.
    A graph of one fixed batch size gets no batching. Weights that were stored apart come along.

    Args:
        model_path: A graph that `OnnxModel` opens.
        folder: The repository, made if it is missing.
        name: The model's name there; the file's name without its suffix if None.
        max_batch: Images that Triton may put into one batch.

    Raises:
        ValueError: Not such a model, a bad name or max_batch, weights outside the model's folder,
            or another model under that name.
        RuntimeError: ONNX Runtime or onnx is missing.
    """
    source = Path(model_path)
    name = check_name(source.stem if name is None else name)
    if type(max_batch) is not int or not 1 <= max_batch <= 65536:
        raise ValueError(f"expected max_batch in 1 .. 65536, got {max_batch!r}")
    model = OnnxModel(source)
    files = {"model.onnx": source, **_weights(source)}
    home = Path(folder) / name
    if home.exists():
        existing = home / VERSION / "model.onnx"
        if not existing.is_file() or sha256_file(existing) != sha256_file(source):
            raise ValueError(f"expected no other model in {home}, found one")
    for file_name, path in files.items():
        with atomic_path(home / VERSION / file_name) as part:
            shutil.copyfile(path, part)
    # Last: Triton takes a folder with a config for a whole model.
    with atomic_path(home / "config.pbtxt") as part:
        part.write_text(_config(name, model, max_batch), encoding="utf-8")
    return home


def _config(name: str, model: OnnxModel, max_batch: int) -> str:
    """The text of config.pbtxt."""
    ports = (*model.inputs, *model.outputs)
    joins = all(port.shape and not isinstance(port.shape[0], int) for port in ports)
    lines = [
        f'name: "{name}"',
        'platform: "onnxruntime_onnx"',
        f"max_batch_size: {max_batch if joins else 0}",
        *(line for port in model.inputs for line in _port("input", port, joins)),
        *(line for port in model.outputs for line in _port("output", port, joins)),
        *(["dynamic_batching { }"] if joins else []),
    ]
    return "\n".join(lines) + "\n"


def _port(side: str, port: Port, joins: bool) -> list[str]:
    """One entry of the inputs or outputs; the batch is not among its dims."""
    shape = port.shape[1:] if joins else port.shape
    dims = ", ".join(str(n) if isinstance(n, int) else "-1" for n in shape)
    # Triton has no tensors without dims: a number per image is a row of one, reshaped away.
    dims, reshape = (dims, []) if shape else ("1", ["    reshape: { shape: [ ] }"])
    quoted = port.name.replace("\\", "\\\\").replace('"', '\\"')
    return [
        f"{side} [",
        "  {",
        f'    name: "{quoted}"',
        f"    data_type: TYPE_{_TYPES[port.dtype.name]}",
        f"    dims: [ {dims} ]",
        *reshape,
        "  }",
        "]",
    ]


def _weights(source: Path) -> dict[str, Path]:
    """The files beside a model that hold weights of it, by their place as the model names it."""
    try:
        import onnx
        from onnx.external_data_helper import ExternalDataInfo, uses_external_data
    except ImportError as error:
        raise RuntimeError("a Triton folder needs onnx: install wm-inject[torch]") from error
    graph = onnx.load(str(source), load_external_data=False).graph
    nodes = [attribute for node in graph.node for attribute in node.attribute]
    tensors = [*graph.initializer, *(a.t for a in nodes if a.HasField("t"))]
    files: dict[str, Path] = {}
    for tensor in tensors:
        if not uses_external_data(tensor):
            continue
        location = str(ExternalDataInfo(tensor).location)
        inside = PurePosixPath(location)
        path = source.parent / inside
        if inside.is_absolute() or ".." in inside.parts or not path.is_file():
            raise ValueError(f"expected the weights of {source.name} beside it, got {location!r}")
        if location == "model.onnx":
            raise ValueError(f"expected weights in a file other than model.onnx, got {location!r}")
        files[location] = path
    return files
