"""In the child: an untrusted ONNX graph to a plain one that torch computes to the same outputs."""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wm_inject.core.errors import out_of_memory
from wm_inject.core.text import first_line, printable
from wm_victim.loading.class_names import stored_names
from wm_victim.loading.contract import Limits
from wm_victim.loading.graph_ports import image_input, logits_output, ways_to_run
from wm_victim.loading.image_sizes import guess_note, likely_size, sizes_that_run
from wm_victim.loading.onnx_float32 import to_float32
from wm_victim.loading.onnx_module import OnnxNet
from wm_victim.loading.onnx_scan import scan_onnx
from wm_victim.loading.onnx_simplify import simplify
from wm_victim.loading.output_checks import check_outputs, probe_images
from wm_victim.loading.output_ends import cut_end
from wm_victim.logits import are_probabilities

_TOLERANCE = 1e-3  # of the largest output: two libraries that round in other places


def convert_onnx(path: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Import a graph, compare it with ONNX Runtime on random images, and write it plainly.

    Args:
        path: The .onnx file; its external data are beside it.
        out: Where ``plain.onnx`` goes.
        options: "image_size", "channels" and "num_classes", or None; "at_once", how many images are
            computed together at most, if memory is short.

    Returns:
        "io_format": the fields of an `IoFormat`; "notes"; "image_sizes" that it runs on, where its
        own is a guess; "class_names", where the file stores them.

    Raises:
        ValueError: No single image input, no (N, K) output that answers, a graph that the importer
            does not take, or one that it computes otherwise than ONNX Runtime.
    """
    import onnx

    model, types = to_float32(onnx.load(str(path)))
    if types:
        path = out / "float32.onnx"
        onnx.save(model, str(path))
    session = open_session(path)
    port, is_open, notes = image_input(model, options)
    notes += [f"{kind} turned into float32" for kind in types]
    names = stored_names(_metadata(model))
    port, sizes = ways_to_run(session, port, is_open=is_open)
    if sizes:
        port = port.resized(max(size for size in sizes if size <= 224 or len(sizes) == 1))
    io_format = port.io_format
    images = probe_images(2, io_format.channels, io_format.image_size)
    if io_format.pixels:
        images = (images * 255).round() / 255
    at_once = options.get("at_once")
    if at_once and not port.batch:
        port = replace(port, batch=at_once)
    outputs = [output.name for output in session.get_outputs()]
    values = dict(zip(outputs, port.run(session, outputs, images), strict=True))
    output, expected = logits_output(model, values, len(images), options.get("num_classes"))
    del session
    if not np.isfinite(expected).all():
        raise ValueError("NaN or infinity in its outputs")
    if len(outputs) > 1:
        others = ", ".join(printable(name, 40) for name in outputs if name != output)
        notes.append(f"output {printable(output, 40)!r} taken as the answer, {others} left out")

    def inner_values(graph: Any, names: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """Values inside a plain graph, for the same images."""
        probe = onnx.ModelProto()
        probe.CopyFrom(graph)
        probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        onnx.save(probe, str(out / "probe.onnx"))
        return replace(port, name="v0").run(open_session(out / "probe.onnx"), names, images)

    problems = []
    for attempt in ("as it is", "folded by ONNX Runtime"):
        if attempt != "as it is":
            model = _folded(path, out / "folded.onnx")
            notes.append("constants folded by ONNX Runtime")
        try:
            simplified = simplify(model, image=port.name, output=output)
            del model  # large models exist once at a time: as a file, then as a module
            end = cut_end(
                simplified,
                expected,
                batch=port.batch or None,
                open_session=open_session,
                values=inner_values,
            )
            onnx.save(simplified, str(out / "plain.onnx"))
            net = _matching(
                OnnxNet(simplified, io_format),
                images,
                expected if end is None else end.logits,
                batches=(port.batch,) if port.batch > 1 else (0, 1),
                at_once=at_once,
            )
            io_format = net.io_format
        except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
            if out_of_memory(error):
                raise
            problems.append(first_line(error))
            continue
        if sizes:
            sizes = sizes_that_run(net, io_format.channels, only=sizes)
            size = likely_size(net, io_format.channels, sizes)
            io_format = replace(io_format, image_size=size)
            notes.append(guess_note(size, sizes))
        # Here, where a graph that computes for minutes meets the time limit.
        check_outputs(
            net,
            channels=io_format.channels,
            size=io_format.image_size,
            num_classes=options.get("num_classes"),
            max_classes=Limits().max_classes,
            at_once=at_once,
        )
        if end is not None:
            probabilities = are_probabilities(torch.from_numpy(expected))
            io_format = replace(io_format, probabilities=probabilities)
            notes.append(
                f"logits read before {', '.join(end.operators[:6])}: what follows them keeps the "
                "order of the classes"
            )
        if io_format.batch:
            notes.append(f"a fixed batch: images are computed {io_format.batch} at a time")
        return {
            "io_format": io_format.to_json(),
            "notes": notes,
            "image_sizes": sizes,
            "class_names": names,
        }
    raise ValueError(problems[0])


def _metadata(model: Any) -> dict[str, Any]:
    """The metadata of a model; records that are JSON tables, such as our own, are opened."""
    entries: dict[str, Any] = {}
    for entry in model.metadata_props:
        entries[entry.key] = entry.value
        if entry.value[:1] == "{":
            with contextlib.suppress(ValueError, RecursionError):
                inner = json.loads(entry.value)
                entries.update({k: v for k, v in inner.items() if k not in entries})
    return entries


def open_session(source: Path | bytes, folded: Path | None = None) -> Any:
    """A session of ONNX Runtime on one core; ``ValueError`` for a graph that it refuses."""
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
        graph = source if isinstance(source, bytes) else str(source)
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    # ONNX Runtime has one exception class for each kind of bad file, with no common base.
    except Exception as error:
        raise ValueError(f"ONNX Runtime refuses it: {first_line(error)}") from error


def _folded(path: Path, folded: Path) -> Any:
    import onnx

    open_session(path, folded)
    with folded.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scan_onnx(data, Limits())
    return onnx.load(str(folded))


def _matching(
    net: OnnxNet,
    images: torch.Tensor,
    expected: np.ndarray[Any, Any],
    *,
    batches: tuple[int, ...],
    at_once: int | None,
) -> OnnxNet:
    """The module, with the first of the batch sizes in which it gives ONNX Runtime's outputs."""
    problem = ""
    for batch in batches:
        net.io_format = replace(net.io_format, batch=batch)
        try:
            with torch.no_grad():
                parts = [net(part) for part in images.split(at_once or len(images))]
            outputs = torch.cat(parts).numpy()
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            if out_of_memory(error):
                raise
            problem = problem or first_line(error)
            continue
        scale = float(np.abs(expected).max()) + 1e-6
        if outputs.shape != expected.shape:
            problem = problem or f"torch gives {outputs.shape}, ONNX Runtime {expected.shape}"
        elif not float(np.abs(outputs - expected).max()) <= _TOLERANCE * scale:
            share = float(np.abs(outputs - expected).max()) / scale
            problem = problem or f"torch and ONNX Runtime differ by {share:.2g} of the outputs"
        else:
            return net
    raise ValueError(f"it cannot be imported: {problem}")
