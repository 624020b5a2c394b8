"""ONNX and TorchScript: checked here, converted in the sandbox, and the plain graph read back."""

from __future__ import annotations

import importlib.util
import mmap
import shutil
import zipfile
from pathlib import Path
from typing import Any

from torch import nn

from wm_inject.core.image_size import ImageSize
from wm_inject.core.text import printable
from wm_victim.loading.child_process import run_child, sandboxed
from wm_victim.loading.contract import (
    MORE_MEMORY,
    Candidate,
    Limits,
    LoadingError,
    ModelOptions,
    Source,
)
from wm_victim.loading.onnx_module import OnnxNet, read_io_format
from wm_victim.loading.onnx_scan import OnnxScan, scan_onnx
from wm_victim.loading.onnx_simplify import refuse_sizes_from_pixels
from wm_victim.loading.regular_files import copy_regular_file
from wm_victim.models import Normalize

_PACKAGES = ("onnx", "onnxruntime", "onnx2pytorch")
_MAX_CODE = 16 * 2**20
# No classifier reads or writes files, or runs code of its own while it is loaded.
_FORBIDDEN_CODE = (
    *(b"torch.from_file(", b"torch.save(", b"torch.load(", b"aten.from_file", b"aten.save"),
    b"def __setstate__(",
)


def open_onnx(path: Path, snapshot: Path, options: ModelOptions, limits: Limits) -> Candidate:
    """Open an ONNX graph as a module that can be differentiated.

    Args:
        path: The original file: external data are looked for beside it.
        snapshot: Its copy, in a scratch folder's "in".
        options: What the caller knows.
        limits: Sizes, memory and time.

    Raises:
        LoadingError: As `open_model`.
        RuntimeError: A package that reads ONNX is not installed.
    """
    size = copy_external(path, snapshot, scan_file(snapshot, limits), limits)
    require_packages()
    report = _run_child("onnx", snapshot, size, limits, options)
    return _read_result(snapshot, report, options, limits, size, "onnx")


def copy_external(path: Path, snapshot: Path, scan: OnnxScan, limits: Limits) -> int:
    """Copy a graph's external data from beside the file to beside its copy.

    Returns:
        The bytes of the graph and of its data.

    Raises:
        LoadingError: Data that are missing, too short or too large, or no plain file.
    """
    size = snapshot.stat().st_size
    for name, least in sorted(scan.external.items()):
        external = snapshot.with_name(name)
        copy_regular_file(
            path.with_name(name), external, max_bytes=limits.max_bytes, untrusted_name=True
        )
        length = external.stat().st_size
        size += length
        if length < least:
            raise LoadingError(f"external data {name!r} of {length} bytes, expected {least}")
        if size > limits.max_bytes:
            raise LoadingError(f"a model of {size} bytes, more than {limits.max_bytes}")
    return size


def open_torchscript(snapshot: Path, options: ModelOptions, limits: Limits) -> Candidate:
    """Open a TorchScript archive whose directory has been checked: only inside the sandbox.

    Raises:
        LoadingError: Not allowed, no sandbox here, code that reads or writes files, or what the
            child refuses.
        RuntimeError: A package that reads ONNX is not installed.
    """
    _ = options.side  # refuses another height than width
    if not options.allow_torchscript:
        raise LoadingError(
            "TorchScript, which is code that runs when it is loaded; ask its "
            "maker for ONNX, or allow TorchScript to convert it inside the sandbox"
        )
    call = _forbidden_call(snapshot)
    if call:
        raise LoadingError(f"TorchScript with {call}, which no classifier needs")
    if not sandboxed():
        raise LoadingError("TorchScript needs the sandbox, and this kernel has no Landlock")
    require_packages()
    size = snapshot.stat().st_size
    report = _run_child("torchscript", snapshot, size, limits, options)
    if report.get("restrictions", {}).get("landlock", 0) < 1:
        raise LoadingError("the sandbox could not be closed")
    return _read_result(snapshot, report, options, limits, size, "torchscript")


def _run_child(
    job: str, snapshot: Path, size: int, limits: Limits, options: ModelOptions
) -> dict[str, Any]:
    """Let a child convert a graph; with one image at a time where several need too much memory."""
    try:
        return {**run_child(job, snapshot, size, limits, options.for_child()), "at_once": None}
    except LoadingError as error:
        if str(error) != MORE_MEMORY:
            raise
    out = snapshot.parent.parent / "out"
    shutil.rmtree(out)
    out.mkdir()
    report = run_child(job, snapshot, size, limits, {**options.for_child(), "at_once": 1})
    return {**report, "at_once": 1}


def child_notes(report: dict[str, Any]) -> tuple[str, ...]:
    """The remarks of a child, and one where the kernel could not restrict it."""
    notes = report.get("notes", [])
    notes = tuple(printable(note) for note in notes[:20]) if isinstance(notes, list) else ()
    return notes if sandboxed() else (*notes, "sandbox: off, this kernel has no Landlock")


def _forbidden_call(archive_path: Path) -> str:
    """The first call in the archive's code that acts on files or at load; "" for none."""
    with zipfile.ZipFile(archive_path) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".py"):
                continue
            if entry.file_size > _MAX_CODE:
                return "a code file of more than 16 MiB"
            code = archive.read(entry)
            for call in _FORBIDDEN_CODE:
                if call in code:
                    return call.decode().rstrip("(")
    return ""


def require_packages() -> None:
    """Raise ``RuntimeError`` unless what reads ONNX is installed."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(
                f"{package} is not installed: install wm-victim[scan] to open ONNX models"
            )


def _read_result(
    snapshot: Path,
    report: dict[str, Any],
    options: ModelOptions,
    limits: Limits,
    size: int,
    source: Source,
) -> Candidate:
    """Read the plain graph that the child wrote, trusting it no more than the original."""
    import onnx

    result, graph = snapshot.parent.parent / "out" / "plain.onnx", snapshot.with_name("plain.onnx")
    copy_regular_file(result, graph, max_bytes=3 * size + 2**26, untrusted_name=True)
    if scan_file(graph, limits).external:
        raise LoadingError("its reader left weights outside the graph")
    try:
        io_format = read_io_format(report.get("io_format"))
        model = onnx.load(str(graph), load_external_data=False)
        _check_plain(model)
        module: nn.Module = OnnxNet(model, io_format)
    except ValueError as error:
        raise LoadingError(str(error)) from error
    notes, channels = child_notes(report), io_format.channels
    if report.get("at_once"):
        notes = (*notes, "checked one image at a time, for want of memory")
    if options.mean is not None and options.std is not None:
        if len(options.mean) != channels or len(options.std) != channels:
            raise LoadingError(f"a mean and std for {channels} channels are needed")
        module = nn.Sequential(Normalize(options.mean, options.std), module)
    elif not io_format.pixels:
        notes = (*notes, "no mean and std given: the graph gets images in [0, 1] as they are")
    return Candidate(
        module,
        source,
        "onnx",
        channels,
        io_format.image_size,
        layout="NHWC" if io_format.nhwc else "NCHW",
        probabilities=io_format.probabilities,
        notes=notes,
        class_names=report.get("class_names"),
        image_sizes=_sizes(report.get("image_sizes"), io_format.image_size),
        at_once=report.get("at_once"),
    )


def _sizes(sizes: Any, own: ImageSize) -> tuple[int, ...]:
    """The image sizes that a child reports; none if they are no sizes, or without its own."""
    plain = isinstance(sizes, list) and all(type(one) is int and 4 <= one <= 1024 for one in sizes)
    return tuple(sorted(set(sizes))) if plain and own in sizes else ()


def _check_plain(model: Any) -> None:
    """Check what `simplify` promises: one input, one output, and names that it gave."""
    graph = model.graph
    names = {name for node in graph.node for name in (*node.input, *node.output) if name}
    names |= {value.name for value in (*graph.initializer, *graph.input, *graph.output)}
    renamed = all(name[0] == "v" and name[1:].isascii() and name[1:].isdigit() for name in names)
    single = [value.name for value in graph.input] == ["v0"] and len(graph.output) == 1
    if not renamed or not single or model.functions:
        raise ValueError("its reader left a graph that is not plain")
    refuse_sizes_from_pixels(graph.node, "v0")


def scan_file(path: Path, limits: Limits, *, runs_only: bool = False) -> OnnxScan:
    """`scan_onnx` of a file; ``LoadingError`` as there."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return scan_onnx(data, limits, runs_only=runs_only)
