"""TorchScript: only when asked for, only in the sandbox, and only as the graph that comes out."""

from __future__ import annotations

import zipfile
from pathlib import Path

from wm_victim.loading.found import Found, Wanted
from wm_victim.loading.onnx_scan import BadGraph
from wm_victim.loading.open_onnx import require_packages, take_graph
from wm_victim.loading.opened import Limits, NotOpened, plain
from wm_victim.loading.runner import ChildFailed, run_child, sandboxed

_MAX_CODE = 16 * 2**20
# No classifier reads or writes files, or runs code of its own while it is loaded.
_ACTS = (
    *(b"torch.from_file(", b"torch.save(", b"torch.load(", b"aten.from_file", b"aten.save"),
    b"def __setstate__(",
)


def open_script(copy: Path, name: str, wanted: Wanted, limits: Limits) -> Found:
    """Open a TorchScript archive whose directory has been checked.

    Raises:
        NotOpened: Not allowed, no sandbox here, no image size or channels given, code that reads
            or writes files, or what the child refuses.
        RuntimeError: A package that reads ONNX is not installed.
    """
    if not wanted.allow_torchscript:
        raise NotOpened(
            f"cannot open {name}: TorchScript, which is code that runs when it is loaded; ask its "
            "maker for ONNX, or allow TorchScript to convert it inside the sandbox"
        )
    acts = _acts(copy)
    if acts:
        raise NotOpened(f"cannot open {name}: TorchScript with {acts}, which no classifier needs")
    if not sandboxed():
        raise NotOpened(
            f"cannot open {name}: TorchScript needs the sandbox, and this kernel has no Landlock"
        )
    if wanted.image_size is None or wanted.channels is None:
        raise NotOpened(f"cannot open {name}: TorchScript needs image_size and channels to be said")
    require_packages()
    size = copy.stat().st_size
    options = {
        "image_size": wanted.image_size,
        "channels": wanted.channels,
        "num_classes": wanted.num_classes,
    }
    try:
        told = run_child("torchscript", copy.parent.parent, copy.name, size, limits, options)
        if told.get("bonds", {}).get("landlock", 0) < 1:
            raise NotOpened(f"cannot open {name}: the sandbox could not be closed")
        return take_graph(copy, told, wanted, limits, size, "torchscript")
    except (BadGraph, ChildFailed) as error:
        raise NotOpened(f"cannot open {name}: {plain(error, 600)}") from error


def _acts(copy: Path) -> str:
    """The first call in the archive's code that acts on files or at load."""
    with zipfile.ZipFile(copy) as archive:
        for entry in archive.infolist():
            if not entry.filename.endswith(".py"):
                continue
            if entry.file_size > _MAX_CODE:
                return "a code file of more than 16 MiB"
            code = archive.read(entry)
            for mark in _ACTS:
                if mark in code:
                    return mark.decode().rstrip("(")
    return ""
