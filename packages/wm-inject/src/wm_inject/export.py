"""Export to TorchScript and ONNX, each followed by a reload and a numerical comparison."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wm_inject.files import atomic_path
from wm_inject.images import check_images, to_pixels
from wm_inject.parity import Parity as Parity
from wm_inject.parity import ParityError as ParityError
from wm_inject.parity import compare

METADATA_FILE = "wm.json"  # inside a TorchScript archive
_ONNX_LIMIT = 2**31 - 2**24  # a protobuf holds 2 GiB; leave room for the graph


class _Exportable(nn.Module):
    """Named inputs, and on request the codec between stored pixels and the module."""

    def __init__(self, module: nn.Module, *, uint8: bool) -> None:
        super().__init__()
        self.module, self.uint8 = module, uint8

    def forward(
        self, image: Tensor, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Tensor:
        given = {"ids": ids, "target": target}
        extra = {name: value for name, value in given.items() if value is not None}
        if not self.uint8:
            return self.module(image, **extra)
        x = image.permute(0, 3, 1, 2).to(torch.float32) / 255  # (N, C, H, W)
        y = self.module(x, **extra)
        if y.shape != x.shape:
            return y
        return (y.clamp(0, 1) * 255 + 0.5).floor().permute(0, 2, 3, 1).to(torch.uint8)


def to_torchscript(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    tolerance: float = 1e-4,
    relative: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Parity:
    """Trace a module to a TorchScript file, and check the file against the module.

    A trigger with ``needs_ids`` or ``needs_target`` gives a file that takes them after the images,
    by these names: int64 ``(N,)``.

    Args:
        module: Images in, one tensor out; it is copied, not changed.
        example: float32 ``(N, C, H, W)`` in [0, 1] with N >= 3.
        path: The file to write; nothing is written if the comparison fails.
        tolerance: Largest difference to accept.
        relative: Measure it as max |a - b| / max |b| (logits) instead of absolutely (images).
        metadata: Recorded inside the file as JSON, under "wm.json".

    Returns:
        The differences at batch sizes 1 and N.

    Raises:
        ValueError: A bad example or tolerance, or a module that does not give one tensor.
        ParityError: The reloaded file computes something else.
    """
    exportable, inputs = _prepare(module, example, tolerance, uint8=False)
    record = _record(example, tolerance, relative, uint8=False, inputs=inputs, metadata=metadata)
    with atomic_path(path) as part, warnings.catch_warnings(), torch.no_grad():
        # Deprecated, and it suspects every Python number of being traced: the comparison decides.
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*")
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        traced = torch.jit.trace(exportable, example_kwarg_inputs=inputs, check_trace=False)
        torch.jit.save(traced, str(part), _extra_files={METADATA_FILE: json.dumps(record)})
        loaded = torch.jit.load(str(part), map_location="cpu")
        return compare(exportable, loaded, inputs, tolerance, relative)


def to_onnx(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    tolerance: float = 1e-4,
    relative: bool = False,
    metadata: Mapping[str, Any] | None = None,
    uint8: bool = False,
    input_name: str = "image",
    output_name: str = "output",
) -> Parity:
    """Export a module to one ONNX file of any batch size, and check the file against the module.

    A trigger with ``needs_ids`` or ``needs_target`` gives a graph with the further int64 ``(N,)``
    inputs "ids" or "target"; the metadata list the ``inputs``.

    Args:
        module: Images in, one tensor out; it is copied, not changed.
        example: float32 ``(N, C, H, W)`` in [0, 1] with N >= 3.
        path: The file to write; nothing is written if the comparison fails.
        tolerance: Largest difference to accept.
        relative: Measure it as max |a - b| / max |b| (logits) instead of absolutely (images).
        metadata: Recorded inside the file as JSON, under the property "wm".
        uint8: Let the graph take uint8 ``(N, H, W, C)`` and, where the module gives images of the
            same shape, give uint8 as well. Then one 8-bit value in a thousand may differ by one.
        input_name: The graph's image input.
        output_name: The graph's output.

    Returns:
        The differences under ONNX Runtime on the CPU at batch sizes 1 and N.

    Raises:
        ValueError: A bad example or tolerance, a module that does not give one tensor, or one of
            more than 2 GiB, or two inputs of one name.
        ParityError: The reloaded file computes something else.
        RuntimeError: A package of the torch extra, or ONNX Runtime, is not installed.
    """
    from wm_inject.runtime import METADATA_KEY, OnnxModel

    exportable, inputs = _prepare(module, example, tolerance, uint8=uint8)
    names = [input_name, *(name for name in inputs if name != "image")]
    if len(set(names)) < len(names):
        raise ValueError(f"expected an input_name beside {', '.join(names[1:])}, got another")
    record = _record(example, tolerance, relative, uint8=uint8, inputs=names, metadata=metadata)
    size = sum(p.nbytes for p in [*exportable.parameters(), *exportable.buffers()])
    if size > _ONNX_LIMIT:
        raise ValueError(f"expected at most {_ONNX_LIMIT} bytes of weights in ONNX, got {size}")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError("ONNX export needs onnxscript: install wm-inject[torch]") from error
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        # Inputs that share the batch size are to share its name; the exporter remarks on it.
        warnings.filterwarnings("ignore", message=".*The axis name: batch will not be used")
        program = torch.onnx.export(
            exportable,
            kwargs=inputs,
            input_names=names,
            output_names=[output_name],
            dynamic_shapes={name: {0: batch} for name in inputs},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # what the dynamo exporter always gives
    program.model.metadata_props[METADATA_KEY] = json.dumps(record)
    program.model.producer_name = "wm-inject"
    with atomic_path(path) as part, torch.no_grad():
        program.save(str(part), external_data=False)
        model = OnnxModel(part)

        def run(image: Tensor, **extra: Tensor) -> Tensor:
            arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in extra.items()}
            return torch.from_numpy(model(np.ascontiguousarray(image.numpy()), **arrays))

        return compare(exportable, run, inputs, tolerance, relative)


def _prepare(
    module: nn.Module, example: Tensor, tolerance: float, *, uint8: bool
) -> tuple[_Exportable, dict[str, Tensor]]:
    """A CPU copy in evaluation mode, and example inputs by name as the graph will take them."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"expected a torch module, got {type(module).__name__}")
    check_images(example, name="example")
    if len(example) < 3:
        raise ValueError(f"expected an example of at least 3 images, got {len(example)}")
    if not tolerance > 0:
        raise ValueError(f"expected a tolerance > 0, got {tolerance}")
    exportable = _Exportable(copy.deepcopy(module).cpu(), uint8=uint8).eval().requires_grad_(False)
    example = example.detach().cpu()
    image = torch.from_numpy(to_pixels(example)) if uint8 else example
    inputs = {"image": image, **_extra_inputs(module, len(image))}
    output = exportable(**inputs)
    if not isinstance(output, Tensor) or output.shape[:1] != image.shape[:1]:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"expected a module that gives one tensor ({len(image)}, ...), got {got}")
    return exportable, inputs


def _extra_inputs(module: nn.Module, count: int) -> dict[str, Tensor]:
    """Example ids and target labels, seeded, for a trigger that needs them."""
    generator = torch.Generator().manual_seed(0)
    classes = (getattr(module, "config", None) or {}).get("num_classes", 2)
    inputs = {}
    if getattr(module, "needs_ids", False):
        inputs["ids"] = torch.randint(0, 2**31, (count,), generator=generator)
    if getattr(module, "needs_target", False):
        inputs["target"] = torch.randint(0, classes, (count,), generator=generator)
    return inputs


def _record(
    example: Tensor,
    tolerance: float,
    relative: bool,
    *,
    uint8: bool,
    inputs: Iterable[str],
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What travels inside the file."""
    record = {
        "format": "wm-export-1",
        "channels": example.shape[1],
        "image_size": list(example.shape[2:]),
        "uint8": uint8,
        "inputs": list(inputs),
        "tolerance": tolerance,
        "relative": relative,
        "versions": {name: installed.version(name) for name in ("torch", "wm-inject")},
        **(metadata or {}),
    }
    try:
        json.dumps(record, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"expected metadata of JSON types only: {error}") from error
    return record
