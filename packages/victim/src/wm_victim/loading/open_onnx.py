"""ONNX: a scan of the bytes, an import inside the sandbox, and the plain graph taken from it."""

from __future__ import annotations

import importlib.util
import mmap
from pathlib import Path
from typing import Any

from torch import nn

from wm_victim.loading.found import Found, Wanted, child_notes
from wm_victim.loading.onnx_clean import refuse_sizes_from_pixels
from wm_victim.loading.onnx_scan import BadGraph, OnnxScan, scan_onnx
from wm_victim.loading.onnx_torch import OnnxNet, read_form
from wm_victim.loading.opened import Limits, NotOpened, Source, plain
from wm_victim.loading.runner import ChildFailed, run_child
from wm_victim.loading.snapshot import take_snapshot
from wm_victim.models import Normalize

_PACKAGES = ("onnx", "onnxruntime", "onnx2pytorch")


def open_onnx(path: Path, copy: Path, wanted: Wanted, limits: Limits) -> Found:
    """Open an ONNX graph as a module that can be differentiated.

    Args:
        path: Where the file lies: external data are looked for beside it.
        copy: The snapshot, in a scratch folder's "in".
        wanted: What the caller says.
        limits: Sizes, memory and time.

    Raises:
        NotOpened: As `open_model`.
        RuntimeError: A package that reads ONNX is not installed.
    """
    name = plain(path.name)
    try:
        found = _scan(copy, limits)
        size = copy.stat().st_size
        for beside, least in sorted(found.external.items()):
            take_snapshot(
                path.parent / beside, copy.parent / beside, max_bytes=limits.max_bytes, beside=True
            )
            have = (copy.parent / beside).stat().st_size
            size += have
            if have < least:
                raise BadGraph(f"external data {beside!r} of {have} bytes, expected {least}")
            if size > limits.max_bytes:
                raise BadGraph(f"a model of {size} bytes, more than {limits.max_bytes}")
        require_packages()
        options = {
            "image_size": wanted.image_size,
            "channels": wanted.channels,
            "num_classes": wanted.num_classes,
        }
        told = run_child("onnx", copy.parent.parent, copy.name, size, limits, options)
        return take_graph(copy, told, wanted, limits, size, "onnx")
    except NotOpened as error:
        # Of a file beside it: name both.
        prefix = f"cannot open {name}: "
        text = str(error).removeprefix(prefix)
        raise NotOpened(f"{prefix}{text}") from error
    except (BadGraph, ChildFailed) as error:
        raise NotOpened(f"cannot open {name}: {plain(error, 600)}") from error


def require_packages() -> None:
    """Refuse to start where a package that reads ONNX is missing.

    Raises:
        RuntimeError: One is, with what to install.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(
                f"{package} is not installed: install wm-victim[scan] to open ONNX models"
            )


def take_graph(
    copy: Path, told: dict[str, Any], wanted: Wanted, limits: Limits, size: int, source: Source
) -> Found:
    """Read the plain graph that the child wrote, as suspiciously as the file it came from.

    Raises:
        BadGraph: Not what `clean` writes.
        NotOpened: No such file.
    """
    import onnx

    kept = copy.parent / "plain.onnx"
    take_snapshot(
        copy.parent.parent / "out" / "plain.onnx", kept, max_bytes=3 * size + 2**26, beside=True
    )
    if _scan(kept, limits).external:
        raise BadGraph("its reader left weights outside the graph")
    try:
        form = read_form(told.get("form"))
        model = onnx.load(str(kept), load_external_data=False)
        _check_plain(model)
        module: nn.Module = OnnxNet(model, form)
    except ValueError as error:
        raise BadGraph(str(error)) from error
    notes = child_notes(told)
    if wanted.mean is not None and wanted.std is not None:
        if len(wanted.mean) != form.channels or len(wanted.std) != form.channels:
            raise BadGraph(f"a mean and std for {form.channels} channels are needed")
        module = nn.Sequential(Normalize(wanted.mean, wanted.std), module)
    elif not form.pixels:
        notes = (*notes, "no mean and std given: the graph gets images in [0, 1] as they are")
    return Found(
        module,
        source,
        "onnx",
        form.channels,
        form.image_size,
        layout="NHWC" if form.nhwc else "NCHW",
        probabilities=form.softmax,
        notes=notes,
    )


def _check_plain(model: Any) -> None:
    """What `clean` promises, seen again on this side: one input, one output, names of ours."""
    graph = model.graph
    names = {name for node in graph.node for name in (*node.input, *node.output) if name}
    names |= {one.name for one in (*graph.initializer, *graph.input, *graph.output)}
    ours = all(name[0] == "v" and name[1:].isascii() and name[1:].isdigit() for name in names)
    alone = [one.name for one in graph.input] == ["v0"] and len(graph.output) == 1
    if not ours or not alone or model.functions:
        raise ValueError("its reader left a graph that is not plain")
    refuse_sizes_from_pixels(graph.node, "v0")


def _scan(path: Path, limits: Limits) -> OnnxScan:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return scan_onnx(data, limits)
