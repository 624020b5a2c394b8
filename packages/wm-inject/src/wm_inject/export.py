"""Export to TorchScript and ONNX, each followed by a reload and a numerical comparison."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata as installed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wm_inject.files import atomic_path
from wm_inject.images import check_images, to_pixels

METADATA_FILE = "wm.json"  # inside a TorchScript archive
_ONNX_LIMIT = 2**31 - 2**24  # a protobuf holds 2 GiB; leave room for the graph
_MAX_FLIPPED = 1e-3  # share of 8-bit values that may land on the other side of a half


class ParityError(RuntimeError):
    """An exported file does not compute what the module computes."""


class Parity(NamedTuple):
    """How far an exported file is from its module, at worst over the batches."""

    max_abs: float  # largest absolute difference
    max_rel: float  # largest of max |a - b| / max |b| over the batches
    batches: tuple[int, ...]  # the batch sizes that were compared


class _Exportable(nn.Module):
    """One positional input, and on request the codec between stored pixels and the module."""

    def __init__(self, module: nn.Module, *, uint8: bool) -> None:
        super().__init__()
        self.module, self.uint8 = module, uint8

    def forward(self, image: Tensor) -> Tensor:
        if not self.uint8:
            return self.module(image)
        x = image.permute(0, 3, 1, 2).to(torch.float32) / 255  # (N, C, H, W)
        y = self.module(x)
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
    record = _record(example, tolerance, relative, uint8=False, metadata=metadata)
    with atomic_path(path) as part, warnings.catch_warnings(), torch.no_grad():
        # Deprecated, and it suspects every Python number of being traced: the comparison decides.
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*")
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        traced = torch.jit.trace(exportable, (inputs,), check_trace=False)
        torch.jit.save(traced, str(part), _extra_files={METADATA_FILE: json.dumps(record)})
        loaded = torch.jit.load(str(part), map_location="cpu")
        return _compare(exportable, loaded, inputs, tolerance, relative)


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

    Args:
        module: Images in, one tensor out; it is copied, not changed.
        example: float32 ``(N, C, H, W)`` in [0, 1] with N >= 3.
        path: The file to write; nothing is written if the comparison fails.
        tolerance: Largest difference to accept.
        relative: Measure it as max |a - b| / max |b| (logits) instead of absolutely (images).
        metadata: Recorded inside the file as JSON, under the property "wm".
        uint8: Let the graph take uint8 ``(N, H, W, C)`` and, where the module gives images of the
            same shape, give uint8 as well. Then one 8-bit value in a thousand may differ by one.
        input_name: The graph's input.
        output_name: The graph's output.

    Returns:
        The differences under ONNX Runtime on the CPU at batch sizes 1 and N.

    Raises:
        ValueError: A bad example or tolerance, a module that does not give one tensor, or one of
            more than 2 GiB.
        ParityError: The reloaded file computes something else.
        RuntimeError: A package of the torch extra, or ONNX Runtime, is not installed.
    """
    from wm_inject.runtime import METADATA_KEY, OnnxModel

    exportable, inputs = _prepare(module, example, tolerance, uint8=uint8)
    record = _record(example, tolerance, relative, uint8=uint8, metadata=metadata)
    size = sum(p.nbytes for p in [*exportable.parameters(), *exportable.buffers()])
    if size > _ONNX_LIMIT:
        raise ValueError(f"expected at most {_ONNX_LIMIT} bytes of weights in ONNX, got {size}")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError("ONNX export needs onnxscript: install wm-inject[torch]") from error
    program = torch.onnx.export(
        exportable,
        (inputs,),
        input_names=[input_name],
        output_names=[output_name],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # what the dynamo exporter always gives
    program.model.metadata_props[METADATA_KEY] = json.dumps(record)
    program.model.producer_name = "wm-inject"
    with atomic_path(path) as part, torch.no_grad():
        program.save(str(part), external_data=False)
        model = OnnxModel(part)
        return _compare(
            exportable,
            lambda batch: torch.from_numpy(model(np.ascontiguousarray(batch.numpy()))),
            inputs,
            tolerance,
            relative,
        )


def _prepare(
    module: nn.Module, example: Tensor, tolerance: float, *, uint8: bool
) -> tuple[_Exportable, Tensor]:
    """A CPU copy in evaluation mode, and the example as the graph will take it."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"expected a torch module, got {type(module).__name__}")
    check_images(example, name="example")
    if len(example) < 3:
        raise ValueError(f"expected an example of at least 3 images, got {len(example)}")
    if not tolerance > 0:
        raise ValueError(f"expected a tolerance > 0, got {tolerance}")
    exportable = _Exportable(copy.deepcopy(module).cpu(), uint8=uint8).eval().requires_grad_(False)
    example = example.detach().cpu()
    inputs = torch.from_numpy(to_pixels(example)) if uint8 else example
    output = exportable(inputs)
    if not isinstance(output, Tensor) or output.shape[:1] != inputs.shape[:1]:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"expected a module that gives one tensor ({len(inputs)}, ...), got {got}")
    return exportable, inputs


def _record(
    example: Tensor,
    tolerance: float,
    relative: bool,
    *,
    uint8: bool,
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What travels inside the file."""
    record = {
        "format": "wm-export-1",
        "channels": example.shape[1],
        "image_size": list(example.shape[2:]),
        "uint8": uint8,
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


def _compare(
    reference: Callable[[Tensor], Tensor],
    exported: Callable[[Tensor], Tensor],
    inputs: Tensor,
    tolerance: float,
    relative: bool,
) -> Parity:
    """Run both on one image and on all; raise if they differ by more than the tolerance."""
    absolute, ratio, batches = 0.0, 0.0, (1, len(inputs))
    for size in batches:
        want, got = reference(inputs[:size]), exported(inputs[:size])
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ParityError(
                f"at batch size {size} the file gives {got.dtype} {tuple(got.shape)}, "
                f"the module {want.dtype} {tuple(want.shape)}"
            )
        pixels = want.dtype == torch.uint8
        want, got = want.double(), got.double()
        error = (want - got).abs()
        if pixels:
            flipped = float((error > 0).double().mean())
            if error.max() > 1 or flipped > _MAX_FLIPPED:
                raise ParityError(
                    f"at batch size {size} {flipped:.2%} of the 8-bit values differ, "
                    f"by up to {int(error.max())}"
                )
            error, want = error / 255, want / 255
        absolute = max(absolute, float(error.max()))
        ratio = max(ratio, float(error.max() / want.abs().max().clamp_min(1e-12)))
        found = ratio if relative else absolute
        # A comparison with NaN is false, so this refuses NaN as well.
        if not pixels and not found <= tolerance:
            kind = "relative" if relative else "absolute"
            raise ParityError(
                f"at batch size {size} the file differs from the module by {found:.3g} {kind}, "
                f"more than {tolerance:g}"
            )
    return Parity(absolute, ratio, batches)
