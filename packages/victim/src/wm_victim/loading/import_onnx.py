"""In the child: an untrusted ONNX graph to a plain one that torch computes to the same outputs."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wm_inject.core.text import first_line, printable
from wm_victim.loading.contract import Limits
from wm_victim.loading.onnx_module import IoFormat, OnnxNet
from wm_victim.loading.onnx_scan import scan_onnx
from wm_victim.loading.onnx_simplify import simplify
from wm_victim.loading.output_checks import check_outputs, probe_images

_TOLERANCE = 1e-3  # of the largest output: two libraries that round in other places
_FLOAT, _UINT8 = 1, 2


def convert_onnx(path: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Import a graph, compare it with ONNX Runtime on random images, and write it plainly.

    Args:
        path: The .onnx file; its external data are beside it.
        out: Where ``plain.onnx`` goes.
        options: "image_size", "channels" and "num_classes", or None.

    Returns:
        "io_format": the fields of an `IoFormat`; "notes".

    Raises:
        ValueError: No single image input, no single (N, K) output, a graph that the importer does
            not take, or one that it computes otherwise than ONNX Runtime.
    """
    import onnx

    session = _session(path)
    model = onnx.load(str(path))
    image, io_format, batch, notes = _image_input(model, options)
    images = probe_images(2, io_format.channels, io_format.image_size)
    if io_format.pixels:
        images = (images * 255).round() / 255
    output, expected = _outputs(session, image, images, io_format, single=batch == 1)
    del session
    problems = []
    for attempt in ("as it is", "folded by ONNX Runtime"):
        if attempt != "as it is":
            model = _folded(path, out / "folded.onnx")
            notes.append("constants folded by ONNX Runtime")
        try:
            simplified, softmax = simplify(model, image=image, output=output)
            del model  # large models exist once at a time: as a file, then as a module
            onnx.save(simplified, str(out / "plain.onnx"))
            net = _matching(
                OnnxNet(simplified, replace(io_format, softmax=softmax)), images, expected
            )
            io_format = net.io_format
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
            problems.append(first_line(error))
            continue
        # Here, where a graph that computes for minutes meets the time limit.
        check_outputs(
            net,
            channels=io_format.channels,
            size=io_format.image_size,
            num_classes=options.get("num_classes"),
            max_classes=Limits().max_classes,
        )
        if io_format.one_by_one:
            notes.append("the graph has a fixed batch of one: images are computed one by one")
        return {"io_format": io_format.to_json(), "notes": notes}
    raise ValueError(problems[0])


def _session(path: Path, folded: Path | None = None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_DISABLE_ALL
    if folded is not None:
        options.graph_optimization_level = level.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(folded)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # ONNX Runtime has one exception class for each kind of bad file, with no common base.
    except Exception as error:
        raise ValueError(f"ONNX Runtime refuses it: {first_line(error)}") from error


def _folded(path: Path, folded: Path) -> Any:
    import onnx

    _session(path, folded)
    with folded.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scan_onnx(data, Limits())
    return onnx.load(str(folded))


def _image_input(
    model: Any, options: dict[str, Any]
) -> tuple[str, IoFormat, int | None, list[str]]:
    """The name of the input that takes images, its format, and its batch size if that is fixed."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(printable(value.name, 40) for value in inputs[:6])
        raise ValueError(f"expected one input, the images, it takes {len(inputs)}: {names}")
    kind = inputs[0].type.tensor_type
    dims = [dim.dim_value or None for dim in kind.shape.dim]
    if kind.elem_type not in (_FLOAT, _UINT8):
        raise ValueError(f"expected a float32 or uint8 input, it has ONNX type {kind.elem_type}")
    if len(dims) != 4:
        raise ValueError(f"expected images (N, C, H, W) or (N, H, W, C), it takes {len(dims)} axes")
    notes = []
    nhwc = dims[1] not in (1, 3) and dims[3] in (1, 3)
    batch, axes = dims[0], dims[1:]
    channels, height, width = (axes[2], *axes[:2]) if nhwc else axes
    if channels is None:
        channels = options["channels"] or 3
        notes.append(f"{channels} channels: the graph does not say how many")
    if height is None or width is None:
        height = width = options["image_size"] or height or width or 224
        notes.append(f"image size {height}: the graph takes any")
    if height != width:
        raise ValueError(f"expected square images, it takes {height} x {width}")
    if channels not in (1, 3):
        raise ValueError(f"expected 1 or 3 channels, it takes {channels}")
    for name, actual in (("channels", channels), ("image_size", height)):
        if options[name] not in (None, actual):
            raise ValueError(f"expected {name} {options[name]}, the graph takes {actual}")
    if not 4 <= height <= 1024:
        raise ValueError(f"expected images of 4 .. 1024 pixels, it takes {height}")
    pixels = kind.elem_type == _UINT8
    if pixels:
        notes.append("uint8 input: images are given as 0 .. 255, unrounded")
    return inputs[0].name, IoFormat(channels, height, nhwc=nhwc, pixels=pixels), batch, notes


def _outputs(
    session: Any, image: str, images: torch.Tensor, io_format: IoFormat, *, single: bool
) -> tuple[str, np.ndarray[Any, Any]]:
    """The name and values of the one output that looks like a classifier's."""
    tensor = images.permute(0, 2, 3, 1) if io_format.nhwc else images
    array = np.ascontiguousarray(tensor.numpy())
    if io_format.pixels:
        array = np.rint(array * 255).astype(np.uint8)
    batches = [array[:1], array[1:]] if single else [array]
    names = [output.name for output in session.get_outputs()]
    try:
        runs = [session.run(names, {image: batch}) for batch in batches]
    except Exception as error:
        raise ValueError(f"it does not run under ONNX Runtime: {first_line(error)}") from error
    logits = {}
    for index, name in enumerate(names):
        arrays = [run[index] for run in runs]
        if not all(isinstance(a, np.ndarray) and a.dtype == np.float32 for a in arrays):
            continue
        whole = np.concatenate(arrays) if arrays[0].ndim else arrays[0]
        if whole.ndim == 4 and whole.shape[2:] == (1, 1):
            whole = whole[:, :, 0, 0]
        if whole.ndim == 2 and len(whole) == len(images) and whole.shape[1] >= 2:
            logits[name] = whole
    if len(logits) != 1:
        shown = ", ".join(printable(name, 40) for name in names[:6])
        raise ValueError(
            f"expected one float32 output of shape (N, K), found {len(logits)} among {shown}"
        )
    return logits.popitem()


def _matching(net: OnnxNet, images: torch.Tensor, expected: np.ndarray[Any, Any]) -> OnnxNet:
    """The module, run in one batch or one by one so that it gives ONNX Runtime's outputs."""
    if not np.isfinite(expected).all():
        raise ValueError("NaN or infinity in its outputs")
    problem = ""
    for one_by_one in (False, True):
        net.io_format = replace(net.io_format, one_by_one=one_by_one)
        try:
            with torch.no_grad():
                outputs = net(images).numpy()
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            problem = problem or first_line(error)
            continue
        outputs = np.exp(outputs) if net.io_format.softmax else outputs
        scale = float(np.abs(expected).max()) + 1e-6
        if outputs.shape != expected.shape:
            problem = problem or f"torch gives {outputs.shape}, ONNX Runtime {expected.shape}"
        elif not float(np.abs(outputs - expected).max()) <= _TOLERANCE * scale:
            share = float(np.abs(outputs - expected).max()) / scale
            problem = problem or f"torch and ONNX Runtime differ by {share:.2g} of the outputs"
        else:
            return net
    raise ValueError(f"it cannot be imported: {problem}")
