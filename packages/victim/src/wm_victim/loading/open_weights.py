"""Weights in safetensors or in a PyTorch archive, to a module of a named architecture."""

from __future__ import annotations

import mmap
import zipfile
from pathlib import Path
from typing import Any

from wm_victim.loading.architectures import BadFit, build
from wm_victim.loading.found import Found, Wanted, child_notes
from wm_victim.loading.open_script import open_script
from wm_victim.loading.opened import Limits, NotOpened, first_line
from wm_victim.loading.own import open_own
from wm_victim.loading.pickles import BadPickle, check_pickle
from wm_victim.loading.runner import run_child
from wm_victim.loading.snapshot import take_snapshot
from wm_victim.loading.sniff import SAVE_WEIGHTS, sniff_zip, with_name
from wm_victim.loading.tensors import read_header
from wm_victim.loading.zips import BadArchive, check_contents, list_archive

_MAX_PICKLE = 64 * 2**20
_WM_ENTRY = "wm"


def open_safetensors(
    copy: Path, name: str, wanted: Wanted, limits: Limits, notes: tuple[str, ...] = ()
) -> Found:
    """Open safetensors: this project's own, or weights of a named architecture.

    Raises:
        BadTensors: A header that lies.
        NotOpened: No architecture given, or weights that do not fit it.
        RuntimeError: The library of the architecture is not installed.
    """
    with copy.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = read_header(data, max_tensors=limits.max_tensors)
    if _WM_ENTRY in header.metadata:
        return open_own(copy, name, header)
    if wanted.arch is None:
        raise NotOpened(
            f"cannot open {name}: weights without an architecture; name one of torchvision or timm"
        )
    from safetensors.torch import load_file

    state = load_file(copy)
    try:
        built = build(
            wanted.arch,
            state,
            num_classes=wanted.num_classes,
            image_size=wanted.image_size,
            channels=wanted.channels,
            mean=wanted.mean,
            std=wanted.std,
        )
    # An architecture's constructor refuses sizes that it cannot have in ways of its own.
    except (BadFit, ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        raise NotOpened(f"cannot open {name}: {first_line(error)}") from error
    except RuntimeError as error:
        if "not installed" in str(error):
            raise
        raise NotOpened(f"cannot open {name}: {first_line(error)}") from error
    return Found(
        built.module,
        "safetensors",
        built.arch,
        built.channels,
        built.image_size,
        notes=(*notes, *built.notes),
    )


def open_zip(copy: Path, name: str, wanted: Wanted, limits: Limits) -> Found:
    """Open an archive: a PyTorch file of weights alone, or TorchScript.

    Raises:
        BadArchive: An archive that is damaged or made to deceive.
        BadPickle: A pickle that asks for more than weights.
        ChildFailed: What the child refuses.
        NotOpened: As `open_model`.
    """
    size = copy.stat().st_size
    records = list_archive(
        copy, max_entries=limits.max_tensors, max_bytes=min(limits.max_bytes, 8 * size + 2**26)
    )
    kind, why = sniff_zip(records)
    if why:
        raise NotOpened(f"cannot open {name}: {with_name(why, name)}")
    check_contents(copy)
    if kind == "torchscript":
        return open_script(copy, name, wanted, limits)
    roots = {one.partition("/")[0] for one in records}
    pickles = [one for one in records if one.lower().endswith(".pkl")]
    if len(roots) != 1 or pickles != [f"{next(iter(roots))}/data.pkl"]:
        raise BadArchive(
            f"an archive of {len(pickles)} pickles in {len(roots)} folders, not of one"
        )
    if records[pickles[0]].file_size > _MAX_PICKLE:
        raise BadArchive(f"a pickle of more than {_MAX_PICKLE} bytes")
    with zipfile.ZipFile(copy) as archive:
        data = archive.read(pickles[0])
    try:
        check_pickle(data)
    except BadPickle as error:
        raise BadPickle(f"{error}; {with_name(SAVE_WEIGHTS, name)}") from error
    if wanted.arch is None:
        raise NotOpened(
            f"cannot open {name}: weights without an architecture; name one of torchvision or timm"
        )
    options: dict[str, Any] = {"max_tensors": limits.max_tensors}
    told = run_child("state", copy.parent.parent, copy.name, size, limits, options)
    weights = copy.parent.parent / "in" / "weights"
    out = copy.parent.parent / "out" / "weights.safetensors"
    take_snapshot(out, weights, max_bytes=3 * size + 2**26, beside=True)
    return open_safetensors(weights, name, wanted, limits, child_notes(told))
