"""In the child: a PyTorch file of weights, whatever lies beside them, to safetensors."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wm_inject.core.text import printable
from wm_victim.loading.archives import ALLOWED_GLOBALS, check_pickle
from wm_victim.loading.class_names import stored_names
from wm_victim.loading.file_formats import ASK_FOR_WEIGHTS
from wm_victim.loading.pickled_objects import without_objects

# Where training scripts keep the weights; averaged ones last, since they are the exception.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "module", "weights"),
    *("params", "state", "student", "state_dict_ema", "model_ema", "ema", "params_ema"),
)
_SETTINGS = ("hyper_parameters", "hparams", "config", "args", "meta", "metadata")
_SIZES = ("image_size", "img_size", "input_size", "imgsz")
_CHUNK = 2**20


def convert_state(path: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint with ``weights_only=True`` and write its tensors as safetensors.

    It is not mapped into memory: torch 2.15 then skips the check of a record's size and reads other
    records as weights.

    Args:
        path: The file, checked by `archives`.
        out: Where ``weights.safetensors`` goes.
        options: "max_tensors"; "objects", the globals of its pickle that no tensor needs, if any;
            "pickle", where that begins and ends, for torch's form without an archive.

    Returns:
        "notes"; and where the file stores them "class_names" and "image_size".

    Raises:
        ValueError: No dictionary of tensors, or tensors larger than the file.
    """
    from safetensors.torch import save_file

    size, objects, span = path.stat().st_size, options.get("objects", []), options.get("pickle")
    folder = _folder(path) if span is None else ""
    if objects or (span is None and folder.count("/") != 1):
        path = _plain_copy(path, out / "plain", span, folder)
    try:
        content = _load(path, legacy=span is not None)
    except pickle.UnpicklingError as error:
        # Its own text recommends to load the file without this protection.
        raise ValueError(
            "torch refuses its pickle: it is no dictionary of plain tensors"
        ) from error
    levels, notes = ([], []) if objects and not isinstance(content, Mapping) else _levels(content)
    state = _tensors(levels[-1], notes) if levels else {}
    if not state and objects:
        need = f"its weights lie in objects that need their code: {_few(objects)}"
        raise ValueError(f"{need}; {ASK_FOR_WEIGHTS}")
    if not state:
        raise ValueError("expected a dictionary of tensors, found no tensor in it")
    if len(state) > options["max_tensors"]:
        raise ValueError(f"{len(state)} tensors, more than {options['max_tensors']}")
    if sum(tensor.nbytes for tensor in state.values()) > 2 * size + 2**20:
        raise ValueError("tensors that are larger than the file: views that repeat its bytes")
    if objects:
        notes.append(f"left out unread what no tensor needs: {_few(objects)}")
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(plain, out / "weights.safetensors")
    settings = [table for level in levels for table in _settings(level)]
    names = next((names for table in settings if (names := stored_names(table))), None)
    sizes = [side for table in settings for side in map(_side, map(table.get, _SIZES)) if side]
    result = {"notes": notes, "class_names": names, "image_size": sizes[0] if sizes else None}
    return {key: value for key, value in result.items() if value is not None}


def _folder(path: Path) -> str:
    """Where in an archive the pickle lies: torch expects it one folder deep."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if f"/{name}".endswith("/data.pkl")]
    return names[0].removesuffix("data.pkl") if names else "archive/"


def _plain_copy(path: Path, copy: Path, span: list[int] | None, folder: str) -> Path:
    """A copy whose pickle describes tensors and plain values only, in a folder as torch has it."""

    def plain(data: bytes) -> bytes:
        data = without_objects(data, ALLOWED_GLOBALS)
        check_pickle(data)  # as strict as for any other file
        return data

    if span is not None:
        with path.open("rb") as old, copy.open("xb") as new:
            new.write(old.read(span[0]) + plain(old.read(span[1] - span[0])))
            shutil.copyfileobj(old, new, _CHUNK)
        return copy
    with zipfile.ZipFile(path) as old_zip, zipfile.ZipFile(copy, "x") as new_zip:
        for entry in old_zip.infolist():
            name = f"archive/{entry.filename.removeprefix(folder)}"
            if entry.is_dir():
                continue
            with (
                old_zip.open(entry) as record,
                new_zip.open(name, "w", force_zip64=entry.file_size > 2**31) as target,
            ):
                if name == "archive/data.pkl":
                    target.write(plain(record.read()))
                else:
                    shutil.copyfileobj(record, target, _CHUNK)
    return copy


def _load(path: Path, *, legacy: bool) -> Any:
    if not legacy:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    with path.open("rb") as file:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if file.read(1):
            raise ValueError("bytes behind its end")
    return content


def _levels(content: Any) -> tuple[list[Mapping[Any, Any]], list[str]]:
    """The tables from the file's own down to that of the weights, and notes on the way."""
    levels: list[Mapping[Any, Any]] = []
    notes: list[str] = []
    while True:
        if not isinstance(content, Mapping):
            raise ValueError(f"expected a dictionary of tensors, got {type(content).__name__}")
        levels.append(content)
        tables = [key for key, value in content.items() if isinstance(key, str) and _holds(value)]
        inner = next((key for key in _WRAPPERS if key in tables), None)
        if inner is None and len(tables) == 1 and not _holds(content, depth=0):
            inner = tables[0]
        if inner is None or len(levels) > 3:
            return levels, notes
        notes.append(f"weights taken from the entry {printable(inner, 40)!r}")
        content = content[inner]


def _holds(value: Any, depth: int = 2) -> bool:
    """Whether a value is a table with tensors by name, or leads to one."""
    return isinstance(value, Mapping) and any(
        isinstance(name, str)
        and (isinstance(inner, Tensor) or (depth and _holds(inner, depth - 1)))
        for name, inner in value.items()
    )


def _tensors(table: Mapping[Any, Any], notes: list[str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    skipped = []
    for name, value in table.items():
        if not isinstance(name, str):
            raise ValueError("expected tensors by name, got another key")
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if dense and not value.is_quantized and not value.is_complex():
            state[name] = value
        else:
            skipped.append(printable(name, 40))
    if skipped:
        notes.append(f"left out what is no plain tensor: {', '.join(skipped[:5])}")
    return state


def _settings(level: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    yield level
    yield from (level[key] for key in _SETTINGS if isinstance(level.get(key), Mapping))


def _side(value: Any) -> int | None:
    """H = W of a stored image size such as 32, (32, 32) or (3, 32, 32)."""
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    sides = [side for side in sides if type(side) is int and side >= 8]
    return sides[0] if len(set(sides)) == 1 and sides[0] <= 1024 else None


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(printable(name, 60) for name in names[:4]) + more
