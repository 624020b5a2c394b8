"""In the child: the branches of an untrusted ONNX graph that pictures can steer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from wm_inject.core.image_size import size_to_json
from wm_inject.core.text import printable
from wm_victim.branches.graph_view import GraphView
from wm_victim.branches.looker import Looker
from wm_victim.branches.pictures import natural_images, resized
from wm_victim.branches.values import GraphRun
from wm_victim.loading.graph_ports import ImageInput, image_input, logits_output, ways_to_run
from wm_victim.loading.import_onnx import open_session
from wm_victim.loading.onnx_float32 import to_float32

_NATURAL = 24  # pictures, where there are none of the user's


def find_branches(path: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Look for branches around the trained layers, try to fire them, and measure what they do.

    Args:
        path: The .onnx file; its external data and "images.npy" are beside it.
        out: A folder for a copy of the graph.
        options: "image_size", "channels", "num_classes", "mean", "std", or None; "images": whether
            there are any.

    Returns:
        "branches", each as `Looker.branches` gives it, and facts of the graph.

    Raises:
        ValueError: No single image input, or no answer of a classifier.
    """
    import onnx

    beside = path.parent
    model, types = to_float32(onnx.load(str(path)))
    if types:
        path = out / "float32.onnx"
        onnx.save(model, str(path))
    session = open_session(path)
    port, is_open, notes = image_input(model, options)
    notes += [f"{kind} turned into float32" for kind in types]
    port, sizes = ways_to_run(session, port, is_open=is_open)
    if sizes:
        port = port.resized(max(size for size in sizes if size <= 224 or len(sizes) == 1))
        notes.append(f"runs on several sizes, {port.io_format.image_size} pixels taken")
    answer = _answer(model, session, port, options["num_classes"])
    del session
    io = port.io_format
    if options["images"]:
        pixels = np.load(beside / "images.npy")
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        images = resized(images, io.channels, io.image_size)
    else:
        images = natural_images(_NATURAL, io.channels, io.image_size)
    view = GraphView(model, image=port.name, answer=answer)
    run = GraphRun(view, port, options["mean"], options["std"])
    branches = Looker(run, images).branches()
    return {
        "branches": branches,
        "notes": notes,
        "layers": view.depth,
        "nodes": len(view.nodes),
        "images": len(images),
        "image_size": size_to_json(io.image_size),
        "channels": io.channels,
        "output": printable(answer, 60),
    }


def _answer(model: Any, session: Any, port: ImageInput, classes: int | None) -> str:
    """The output that answers: logits or probabilities, or else a label for each picture."""
    outputs = [output.name for output in session.get_outputs()]
    images = natural_images(2, port.io_format.channels, port.io_format.image_size)
    values = dict(zip(outputs, port.run(session, outputs, images), strict=True))
    try:
        return logits_output(model, values, len(images), classes)[0]
    except ValueError:
        labels = [
            name
            for name, value in values.items()
            if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size == 2
        ]
        if len(labels) != 1:
            raise
        return labels[0]
