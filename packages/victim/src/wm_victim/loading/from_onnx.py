"""In the child: a stranger's ONNX graph to a plain one that torch computes alike."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wm_victim.loading.numeric import check_answers, probe_images
from wm_victim.loading.onnx_clean import clean
from wm_victim.loading.onnx_scan import scan_onnx
from wm_victim.loading.onnx_torch import Form, OnnxNet
from wm_victim.loading.opened import Limits, first_line, plain

_TOLERANCE = 1e-3  # of the largest output: two libraries that round in other places
_FLOAT, _UINT8 = 1, 2


def convert_onnx(given: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Import a graph, compare it with ONNX Runtime on random images, and write it plainly.

    Args:
        given: The .onnx file; its external data lie beside it.
        out: Where ``plain.onnx`` goes.
        options: "image_size", "channels" and "num_classes", or None.

    Returns:
        "form": the fields of a `Form`; "notes".

    Raises:
        ValueError: No single image input, no single (N, K) output, a graph that the importer does
            not take, or one that it computes otherwise than ONNX Runtime.
    """
    import onnx

    session = _session(given)
    model = onnx.load(str(given))
    image, form, batch, notes = _image_input(model, options)
    images = probe_images(2, form.channels, form.image_size)
    if form.pixels:
        images = (images * 255).round() / 255
    output, want = _outputs(session, image, images, form, single=batch == 1)
    del session
    problems = []
    for attempt in ("as it is", "folded by ONNX Runtime"):
        if attempt != "as it is":
            model = _folded(given, out / "folded.onnx")
            notes.append("constants folded by ONNX Runtime")
        try:
            made, softmax = clean(model, image=image, output=output)
            del model  # large models exist once at a time: as a file, then as a module
            onnx.save(made, str(out / "plain.onnx"))
            net = _fit(OnnxNet(made, replace(form, softmax=softmax)), images, want)
            form = net.form
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
            problems.append(first_line(error))
            continue
        # Here, where a graph that computes for minutes meets the time limit.
        check_answers(
            net,
            channels=form.channels,
            size=form.image_size,
            num_classes=options.get("num_classes"),
            max_classes=Limits().max_classes,
        )
        if form.one_by_one:
            notes.append("the graph has a fixed batch of one: images are computed one by one")
        return {"form": form.to_json(), "notes": notes}
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
    # A class of its own for each kind of bad file, all bare Exceptions.
    except Exception as error:
        raise ValueError(f"ONNX Runtime refuses it: {first_line(error)}") from error


def _folded(path: Path, folded: Path) -> Any:
    import onnx

    _session(path, folded)
    with folded.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scan_onnx(data, Limits())
    return onnx.load(str(folded))


def _image_input(model: Any, options: dict[str, Any]) -> tuple[str, Form, int | None, list[str]]:
    """The name of the input that takes images, how it wants them, and its batch if it is fixed."""
    weights = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(plain(one.name, 40) for one in inputs[:6])
        raise ValueError(f"expected one input, the images, it takes {len(inputs)}: {names}")
    kind = inputs[0].type.tensor_type
    dims = [one.dim_value or None for one in kind.shape.dim]
    if kind.elem_type not in (_FLOAT, _UINT8):
        raise ValueError(f"expected a float32 or uint8 input, it has ONNX type {kind.elem_type}")
    if len(dims) != 4:
        raise ValueError(f"expected images (N, C, H, W) or (N, H, W, C), it takes {len(dims)} axes")
    notes = []
    nhwc = dims[1] not in (1, 3) and dims[3] in (1, 3)
    batch, places = dims[0], dims[1:]
    channels, height, width = (places[2], *places[:2]) if nhwc else places
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
    for name, have in (("channels", channels), ("image_size", height)):
        if options[name] not in (None, have):
            raise ValueError(f"expected {name} {options[name]}, the graph takes {have}")
    if not 4 <= height <= 1024:
        raise ValueError(f"expected images of 4 .. 1024 pixels, it takes {height}")
    pixels = kind.elem_type == _UINT8
    if pixels:
        notes.append("uint8 input: images are given as 0 .. 255, unrounded")
    return inputs[0].name, Form(channels, height, nhwc=nhwc, pixels=pixels), batch, notes


def _outputs(
    session: Any, image: str, images: torch.Tensor, form: Form, *, single: bool
) -> tuple[str, np.ndarray[Any, Any]]:
    """The name and values of the one output that looks like a classifier's."""
    array = images.permute(0, 2, 3, 1) if form.nhwc else images
    given = np.ascontiguousarray(array.numpy())
    if form.pixels:
        given = np.rint(given * 255).astype(np.uint8)
    batches = [given[:1], given[1:]] if single else [given]
    names = [one.name for one in session.get_outputs()]
    try:
        runs = [session.run(names, {image: batch}) for batch in batches]
    except Exception as error:
        raise ValueError(f"it does not run under ONNX Runtime: {first_line(error)}") from error
    found = {}
    for place, name in enumerate(names):
        arrays = [run[place] for run in runs]
        if not all(isinstance(one, np.ndarray) and one.dtype == np.float32 for one in arrays):
            continue
        whole = np.concatenate(arrays) if arrays[0].ndim else arrays[0]
        if whole.ndim == 4 and whole.shape[2:] == (1, 1):
            whole = whole[:, :, 0, 0]
        if whole.ndim == 2 and len(whole) == len(images) and whole.shape[1] >= 2:
            found[name] = whole
    if len(found) != 1:
        shown = ", ".join(plain(name, 40) for name in names[:6])
        raise ValueError(
            f"expected one float32 output of shape (N, K), found {len(found)} among {shown}"
        )
    return found.popitem()


def _fit(net: OnnxNet, images: torch.Tensor, want: np.ndarray[Any, Any]) -> OnnxNet:
    """The module, in the form in which torch computes what ONNX Runtime computed."""
    if not np.isfinite(want).all():
        raise ValueError("NaN or infinity in its outputs")
    problem = ""
    for one_by_one in (False, True):
        net.form = replace(net.form, one_by_one=one_by_one)
        try:
            with torch.no_grad():
                got = net(images).numpy()
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            problem = problem or first_line(error)
            continue
        got = np.exp(got) if net.form.softmax else got
        scale = float(np.abs(want).max()) + 1e-6
        if got.shape != want.shape:
            problem = problem or f"torch gives {got.shape}, ONNX Runtime {want.shape}"
        elif not float(np.abs(got - want).max()) <= _TOLERANCE * scale:
            share = float(np.abs(got - want).max()) / scale
            problem = problem or f"torch and ONNX Runtime differ by {share:.2g} of the outputs"
        else:
            return net
    raise ValueError(f"it cannot be imported: {problem}")
