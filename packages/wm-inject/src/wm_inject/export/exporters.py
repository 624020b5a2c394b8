"""Export to TorchScript and ONNX, each followed by a reload and a numerical comparison."""

from __future__ import annotations

import copy
import io
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from wm_inject.core.files import atomic_path
from wm_inject.core.images import check_images, to_pixels
from wm_inject.export.parity import Parity, compare
from wm_inject.export.record import export_record, with_parity

METADATA_FILE = "wm.json"  # inside a TorchScript archive
ScriptPrecision = Literal["float32", "bfloat16"]
OnnxPrecision = Literal["float32", "float16", "int8"]
# Largest difference to accept: of images in [0, 1], or of logits as a share of the largest.
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2, "int8": 5e-2}


class _Exportable(nn.Module):
    """Named inputs, and on request the codec between stored pixels and the module."""

    def __init__(self, module: nn.Module, *, uint8: bool) -> None:
        super().__init__()
        self.module, self.uint8 = module, uint8

    def forward(
        self, image: Tensor, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Any:
        named = {"ids": ids, "target": target}
        extra = {name: value for name, value in named.items() if value is not None}
        if not self.uint8:
            y = self.module(image, **extra)
            # torch 2.10 knows an input that is the output as well by the latter's name only.
            return y.clone() if y is image else y
        x = image.permute(0, 3, 1, 2).to(torch.float32) / 255  # (N, C, H, W)
        y = self.module(x, **extra)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return y
        return (y.clamp(0, 1) * 255 + 0.5).floor().permute(0, 2, 3, 1).to(torch.uint8)


class _Autocast(nn.Module):
    """A module in bfloat16 where autocast thinks it safe; float32 in and out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, image: Tensor, ids: Tensor | None = None, target: Tensor | None = None
    ) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = self.module(image, ids, target)
        return (
            tuple(one.float() for one in outputs) if isinstance(outputs, tuple) else outputs.float()
        )


def to_torchscript(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    precision: ScriptPrecision = "float32",
    tolerance: float | None = None,
    relative: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Parity:
    """Trace a module to a TorchScript file, and check the file against the module.

    A trigger with ``needs_ids`` or ``needs_target`` gives a file that takes them after the images,
    by these names: int64 ``(N,)``. Nothing is written if the comparison fails.

    Args:
        module: Images in, one tensor or a tuple of them out; it is copied, not changed.
        example: At least 3 images.
        precision: "float32", or "bfloat16" inside, with float32 in and out.
        tolerance: Largest difference to accept; that of `TOLERANCES` if None.
        relative: Measure it as max |a - b| / max |b| (logits) instead of absolutely (images).
        metadata: Recorded inside the file as JSON, under "wm.json".

    Returns:
        The differences from the float32 module at batch sizes 1 and N.

    Raises:
        ValueError: A bad example, precision or tolerance, or a module that does not give tensors.
        ParityError: The reloaded file computes something else.
    """
    tolerance = _tolerance(precision, tolerance, ("float32", "bfloat16"))
    exportable, inputs, outputs = _prepare(module, example, uint8=False)
    names = ("output",) if outputs == 1 else tuple(f"output_{n}" for n in range(outputs))
    record = export_record(
        module,
        example,
        metadata,
        uint8=False,
        precision=precision,
        inputs=inputs,
        outputs=names,
        tolerance=tolerance,
        relative=relative,
    )
    traceable = exportable if precision == "float32" else _Autocast(exportable)
    with atomic_path(path) as part, warnings.catch_warnings(), torch.no_grad():
        # Deprecated, and it suspects every Python number of being traced: the comparison decides.
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*")
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        traced = torch.jit.trace(traceable, example_kwarg_inputs=inputs, check_trace=False)
        _save_script(traced, part)
        loaded = torch.jit.load(str(part), map_location="cpu")
        parity = compare(_several(exportable), _several(loaded), inputs, tolerance, relative)
        files = {METADATA_FILE: json.dumps(with_parity(record, parity))}
        _save_script(traced, part, files)
        _without_sources(part)
        torch.jit.load(str(part), map_location="cpu")
        return parity


def to_onnx(
    module: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    precision: OnnxPrecision = "float32",
    tolerance: float | None = None,
    relative: bool = False,
    metadata: Mapping[str, Any] | None = None,
    uint8: bool = False,
    any_size: bool = False,
    external_data: bool | None = None,
    traced: bool = False,
    input_name: str = "image",
    output_names: Sequence[str] = ("output",),
) -> Parity:
    """Export a module to ONNX for any batch size, and check the file against the module.

    A trigger with ``needs_ids`` or ``needs_target`` gives a graph with the further int64 ``(N,)``
    inputs "ids" or "target"; the metadata list the ``inputs``.

    Args:
        module: Images in, one tensor or a tuple of them out; it is copied, not changed.
        example: float32 ``(N, C, H, W)`` in [0, 1] with N >= 3.
        path: The file to write; nothing is written if the comparison fails.
        precision: "float32"; "float16" inside, with float32 in and out; or "int8", where the
            weights of matrix products have 8 bits and so has, at run time, what they meet.
            bfloat16 is not offered: ONNX Runtime's CPU provider, which checks the file, lacks it.
        tolerance: Largest difference to accept; that of `TOLERANCES` if None.
        relative: Measure it as max |a - b| / max |b| (logits) instead of absolutely (images).
        metadata: Recorded inside the file as JSON, under the property "wm".
        uint8: Let the graph take uint8 ``(N, H, W, C)`` and, where the module gives one tensor of
            the images' shape, give uint8 as well. Then, in float32, one 8-bit value in a thousand
            may differ by one.
        any_size: Let the graph take images of any height and width that are multiples of 8, as
            far as the module can.
        external_data: Keep the weights in a file of their own beside ``path``. If None, only where
            they are too large for one file.
        traced: Export by tracing, for modules in which sizes pass through tensors, as they do in
            imported graphs; without ``any_size`` and ``external_data``.
        input_name: The graph's image input.
        output_names: The graph's outputs, in the module's order.

    Returns:
        The differences from the float32 module under ONNX Runtime on the CPU at batch sizes 1
        and N.

    Raises:
        ValueError: A bad example, precision or tolerance, a module that does not give so many
            tensors, a precision that does not fit it, or two inputs of one name.
        ParityError: The reloaded file computes something else.
        RuntimeError: A package of the torch extra, or ONNX Runtime, is not installed.
    """
    from wm_inject.export.onnx_graph import graph_folder, needs_external_data, quantize_weights
    from wm_inject.export.onnx_graph import stamp as stamp_graph
    from wm_inject.export.onnx_half import halve
    from wm_inject.runtime.onnx_model import OnnxModel

    tolerance = _tolerance(precision, tolerance, ("float32", "float16", "int8"))
    exportable, inputs, outputs = _prepare(module, example, uint8=uint8)
    names = [input_name, *(name for name in inputs if name != "image")]
    if len(set(names)) < len(names):
        raise ValueError(f"expected an input_name beside {', '.join(names[1:])}, got another")
    if len(output_names) != outputs:
        raise ValueError(f"expected {outputs} output_names, got {', '.join(output_names)}")
    size = sum(p.nbytes for p in [*exportable.parameters(), *exportable.buffers()])
    apart = needs_external_data(size) if external_data is None else external_data
    if traced and (apart or any_size):
        raise ValueError("expected traced without any_size and weights of at most 2 GiB inside")
    if apart and precision != "float32":
        raise ValueError(f"expected precision float32 with external data, got {precision}")
    record = export_record(
        module,
        example,
        metadata,
        uint8=uint8,
        precision=precision,
        inputs=names,
        outputs=output_names,
        tolerance=tolerance,
        relative=relative,
    )
    with graph_folder(Path(path)) as part, torch.no_grad():
        plain = part if precision == "float32" else part.with_name("float32.onnx")
        if traced:
            _trace_onnx(exportable, inputs, names, output_names, plain)
        else:
            program = _onnx_program(exportable, inputs, names, output_names, uint8, any_size)
            program.save(str(plain), external_data=apart)
            del program
        if precision != "float32":
            (halve if precision == "float16" else quantize_weights)(plain, part)
            plain.unlink()
        # Twice: the record holds the parity, which is measured on the file that it travels in.
        stamp_graph(part, record)
        model = OnnxModel(part)

        def run(image: Tensor, **extra: Tensor) -> list[Tensor]:
            feeds = {input_name: image, **extra}
            arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in feeds.items()}
            return [torch.from_numpy(one) for one in model.run(arrays).values()]

        parity = compare(_several(exportable), run, inputs, tolerance, relative)
        stamp_graph(part, with_parity(record, parity))
        return parity


def _trace_onnx(
    exportable: _Exportable,
    inputs: Mapping[str, Tensor],
    names: Sequence[str],
    output_names: Sequence[str],
    path: Path,
) -> None:
    """Write a graph by torch's older exporter, which runs the module once and records it."""
    with warnings.catch_warnings():
        # It is deprecated, and it warns of every size that becomes a constant: the comparison at
        # two batch sizes decides.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            exportable,
            tuple(inputs.values()),
            str(path),
            dynamo=False,
            input_names=list(names),
            output_names=list(output_names),
            dynamic_axes={name: {0: "batch"} for name in (*names, *output_names)},
        )


def _onnx_program(
    exportable: _Exportable,
    inputs: Mapping[str, Tensor],
    names: Sequence[str],
    output_names: Sequence[str],
    uint8: bool,
    any_size: bool,
) -> Any:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError("ONNX export needs onnxscript: install wm-inject[torch]") from error
    batch = torch.export.Dim("batch")
    shapes: dict[str, dict[int, Any]] = {name: {0: batch} for name in inputs}
    if any_size:
        first = 1 if uint8 else 2
        for axis, side in enumerate(("height", "width"), first):
            shapes["image"][axis] = 8 * torch.export.Dim(f"{side}_8", min=1)
    with warnings.catch_warnings():
        # Inputs that share the batch size are to share its name; the exporter remarks on it.
        warnings.filterwarnings("ignore", message=".*The axis name: .* will not be used")
        try:
            program = torch.onnx.export(
                exportable,
                kwargs=dict(inputs),
                input_names=list(names),
                output_names=list(output_names),
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
            )
        # The exporter answers with an essay; the line that says why stands in its cause.
        except torch.onnx.OnnxExporterError as error:
            why = str(error.__cause__ or error).strip().splitlines()[0]
            name = type(exportable.module).__name__
            raise ValueError(f"cannot export {name} to ONNX: {why}") from error
    assert program is not None  # what the dynamo exporter always gives
    return program


def _prepare(
    module: nn.Module, example: Tensor, *, uint8: bool
) -> tuple[_Exportable, dict[str, Tensor], int]:
    """A CPU copy in evaluation mode, example inputs by name, and the number of outputs."""
    if not isinstance(module, nn.Module):
        raise ValueError(f"expected a torch module, got {type(module).__name__}")
    check_images(example, name="example")
    if len(example) < 3:
        raise ValueError(f"expected an example of at least 3 images, got {len(example)}")
    exportable = _Exportable(copy.deepcopy(module).cpu(), uint8=uint8).eval().requires_grad_(False)
    example = example.detach().cpu()
    image = torch.from_numpy(to_pixels(example)) if uint8 else example
    inputs = {"image": image, **_extra_inputs(module, len(image))}
    result = exportable(**inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    for one in outputs:
        if not isinstance(one, Tensor) or one.shape[:1] != image.shape[:1]:
            got = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
            raise ValueError(f"expected a module that gives tensors ({len(image)}, ...), got {got}")
    return exportable, inputs, len(outputs)


def _several(module: nn.Module) -> Any:
    """A module that always gives a tuple."""

    def run(**inputs: Tensor) -> tuple[Tensor, ...]:
        result = module(**inputs)
        return result if isinstance(result, tuple) else (result,)

    return run


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


def _tolerance(precision: str, given: float | None, known: Sequence[str]) -> float:
    if precision not in known:
        raise ValueError(f"expected a precision in {', '.join(known)}, got {precision!r}")
    tolerance = TOLERANCES[precision] if given is None else given
    if not tolerance > 0:
        raise ValueError(f"expected a tolerance > 0, got {tolerance}")
    return tolerance


def _save_script(traced: Any, path: Path, files: Mapping[str, str] | None = None) -> None:
    """Write a TorchScript archive by way of memory: torch's own writer hides why a disk refuses."""
    archive = io.BytesIO()
    torch.jit.save(traced, archive, _extra_files=files)
    path.write_bytes(archive.getbuffer())


def _without_sources(path: Path) -> None:
    """Take the debugging records out of a TorchScript archive: they hold the sources' paths."""
    slim = path.with_name(f"{path.name}.slim")
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(slim, "w") as out:
            for entry in archive.infolist():
                if not entry.filename.endswith(".debug_pkl"):
                    out.writestr(entry, archive.read(entry))
        slim.replace(path)
    finally:
        slim.unlink(missing_ok=True)
