"""Weights in safetensors or in a PyTorch archive, to a module of a named architecture."""

from __future__ import annotations

import json
import mmap
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wm_inject.core.text import first_line, printable
from wm_victim.loading.architectures import build
from wm_victim.loading.archives import (
    MAX_PICKLE,
    check_contents,
    foreign_globals,
    legacy_pickles,
    list_archive,
)
from wm_victim.loading.child_process import run_child
from wm_victim.loading.class_names import stored_names
from wm_victim.loading.contract import Candidate, Limits, LoadingError, ModelOptions
from wm_victim.loading.file_formats import ASK_FOR_WEIGHTS, archive_format
from wm_victim.loading.graphs import child_notes, open_torchscript
from wm_victim.loading.regular_files import copy_regular_file
from wm_victim.loading.safetensors_header import Header, read_header
from wm_victim.models import build_classifier, load_classifier

_WM_ENTRY = "wm"
_NO_ARCH = "weights without an architecture; name one of torchvision or timm"


def open_safetensors(
    file: Path, options: ModelOptions, limits: Limits, notes: tuple[str, ...] = ()
) -> Candidate:
    """Open safetensors: a checkpoint of this project, or weights of a named architecture.

    Raises:
        LoadingError: A bad header, no architecture given, or weights that do not fit it.
        RuntimeError: The library of the architecture is not installed.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = read_header(data, max_tensors=limits.max_tensors)
    if _WM_ENTRY in header.metadata:
        return _open_checkpoint(file, header)
    if options.arch is None:
        raise LoadingError(_NO_ARCH)
    from safetensors.torch import load_file

    state = load_file(file)
    try:
        candidate = build(state, options)
    # Constructors of torchvision and timm refuse sizes with exceptions of their own choice.
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        raise LoadingError(first_line(error)) from error
    except RuntimeError as error:
        if "not installed" in str(error):
            raise
        raise LoadingError(first_line(error)) from error
    names = stored_names(header.metadata)
    return replace(candidate, notes=(*notes, *candidate.notes), class_names=names)


def _open_checkpoint(file: Path, header: Header) -> Candidate:
    """Open what `save_classifier` wrote, or what claims to be that."""
    try:
        description = json.loads(header.metadata[_WM_ENTRY])
        kind, config = description["kind"], description["config"]
        if kind != "classifier":
            raise ValueError(f"a checkpoint of kind {printable(kind, 40)}, no classifier")
        # Without memory first: a small file may name a large architecture.
        with torch.device("meta"):
            expected = build_classifier(**config).state_dict()
        shapes = {name: tuple(value.shape) for name, value in expected.items()}
        wrong = sorted(set(header.shapes) ^ set(shapes))
        wrong += [name for name in shapes if header.shapes.get(name) != shapes[name]]
        if wrong:
            raise ValueError(f"its tensors do not fit its config, the first of them {wrong[0]!r}")
        model, metadata = load_classifier(file), description.get("metadata")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadingError(first_line(error).replace(file.name, "it")) from error
    except (RuntimeError, RecursionError, AssertionError) as error:
        raise LoadingError(first_line(error)) from error
    settings: dict[str, Any] = model.config
    names = stored_names(metadata) if isinstance(metadata, dict) else None
    size: int = settings["image_size"]
    return Candidate(model, "wm", settings["name"], settings["channels"], size, class_names=names)


def open_archive(file: Path, options: ModelOptions, limits: Limits) -> Candidate:
    """Open a zip archive: a PyTorch file of weights alone, or TorchScript.

    Raises:
        LoadingError: A damaged or deceptive archive, a pickle that asks for more than weights, or
            what the child refuses.
    """
    size = file.stat().st_size
    records = list_archive(
        file, max_entries=limits.max_tensors, max_bytes=min(limits.max_bytes, 8 * size + 2**26)
    )
    kind = archive_format(records)
    check_contents(file)
    if kind == "torchscript":
        return open_torchscript(file, options, limits)
    pickles = [name for name in records if name.lower().endswith(".pkl")]
    folder = pickles[0].removesuffix("data.pkl") if pickles else ""
    elsewhere = [name for name in records if not name.startswith(folder) and name[-1] != "/"]
    if len(pickles) != 1 or elsewhere or not f"/{pickles[0]}".endswith("/data.pkl"):
        raise LoadingError(
            f"an archive of {len(pickles)} pickles and {len(elsewhere)} records beside them, not "
            "of one pickle and its storages"
        )
    if records[pickles[0]].file_size > MAX_PICKLE:
        raise LoadingError(f"a pickle of more than {MAX_PICKLE} bytes")
    with zipfile.ZipFile(file) as archive:
        data = archive.read(pickles[0])
    return _open_state(file, data, None, options, limits)


def open_legacy(file: Path, options: ModelOptions, limits: Limits) -> Candidate:
    """Open torch's older form of a file of weights: pickles and storages without an archive.

    Raises:
        LoadingError: As `open_archive`.
    """
    span = legacy_pickles(file)[3]
    with file.open("rb") as opened:
        opened.seek(span[0])
        data = opened.read(span[1] - span[0])
    return _open_state(file, data, span, options, limits)


def _open_state(
    file: Path, data: bytes, span: tuple[int, int] | None, options: ModelOptions, limits: Limits
) -> Candidate:
    """Check the pickle of a file of weights, and let a child turn the file into safetensors."""
    try:
        objects = foreign_globals(data)
    except LoadingError as error:
        raise LoadingError(f"{error}; {ASK_FOR_WEIGHTS}") from error
    if options.arch is None:
        raise LoadingError(_NO_ARCH)
    size = file.stat().st_size
    settings = {"max_tensors": limits.max_tensors, "objects": objects, "pickle": span}
    report = run_child("state", file, size, limits, settings)
    weights, out = file.with_name("weights"), file.parent.parent / "out" / "weights.safetensors"
    copy_regular_file(out, weights, max_bytes=3 * size + 2**26, untrusted_name=True)
    notes, side = child_notes(report), report.get("image_size")
    if options.image_size is None and type(side) is int and 8 <= side <= 1024:
        options = replace(options, image_size=side)
        notes = (*notes, f"image size {side}, as the file says")
    candidate = open_safetensors(weights, options, limits, notes)
    return replace(candidate, class_names=report.get("class_names"))
