"""Checkpoints: safetensors files that say what they hold, and a loader that takes no chances."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from importlib import metadata as installed
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wm_inject.__about__ import __version__
from wm_inject.core.files import atomic_path

FORMAT = "wm-checkpoint-1"
_ENTRY = "wm"
_MAX_HEADER = 16 * 2**20
_PACKAGES = ("torch", "safetensors")


class CheckpointError(ValueError):
    """A file is not the checkpoint that was asked for."""


class Checkpoint(NamedTuple):
    """What a checkpoint file holds."""

    kind: str  # what the weights belong to, such as "patch" or "classifier"
    config: dict[str, Any]  # the settings that build the module
    state: dict[str, Tensor]  # its tensors, on the CPU
    metadata: dict[str, Any]  # seed, data, versions: whatever the writer recorded


def save_checkpoint(
    path: str | Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors, the settings that build their module, and metadata to one safetensors file.

    Args:
        kind: What the tensors belong to; `load_checkpoint` can insist on it.
        config: The settings that build the module: JSON types only.
        state: Tensors by name; any device; floats must be finite.
        metadata: What else to record, JSON types only. Package versions are added.

    Raises:
        ValueError: No kind, something JSON cannot hold, or a tensor with NaN or infinity.
    """
    from safetensors.torch import save_file

    if not kind or not isinstance(kind, str):
        raise ValueError(f"expected the kind of the checkpoint as a word, got {kind!r}")
    if not isinstance(config, Mapping) or not isinstance(state, Mapping):
        got = f"{type(config).__name__} and {type(state).__name__}"
        raise ValueError(f"expected config and state as mappings, got {got}")
    # Clones, because safetensors refuses tensors that share memory.
    tensors = {name: _plain(name, tensor) for name, tensor in state.items()}
    versions = {package: installed.version(package) for package in _PACKAGES}
    versions["wm-inject"] = __version__  # which need not be installed: a checkout will do
    header = {
        "format": FORMAT,
        "kind": kind,
        "config": dict(config),
        "metadata": {"versions": versions, **(metadata or {})},
        "sha256": tensors_digest(tensors),
    }
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"expected config and metadata of JSON types only: {error}") from error
    with atomic_path(path) as part:
        # One entry: safetensors writes several in random order, and bytes should be repeatable.
        save_file(tensors, part, metadata={_ENTRY: text})


def load_checkpoint(
    path: str | Path,
    *,
    kind: str | tuple[str, ...] | None = None,
    max_bytes: int = 8 * 2**30,
) -> Checkpoint:
    """Read a checkpoint onto the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: No such file, more than ``max_bytes``, not safetensors, another format or
            kind, a tensor with NaN or infinity, or tensors that do not match their checksum.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    header = _read_header(path, max_bytes)
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds is not None and header["kind"] not in kinds:
        expected = " or ".join(kinds)
        raise CheckpointError(f"expected the kind {expected}, {path.name} holds {header['kind']}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} is damaged: {error}") from error
    if tensors_digest(state) != header["sha256"]:
        raise CheckpointError(f"{path.name} is damaged: its tensors do not match their checksum")
    for name, tensor in state.items():
        if not _finite(tensor):
            raise CheckpointError(f"{path.name} holds NaN or infinity in tensor {name!r}")
    return Checkpoint(header["kind"], header["config"], state, header["metadata"])


def _read_header(path: Path, max_bytes: int) -> dict[str, Any]:
    """The file's own description, read before anything else is touched."""
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint file, found none at {path}")
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(f"expected at most {max_bytes} bytes, {path.name} has {size}")
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"expected a safetensors checkpoint, {path.name} is not one")
        raw = file.read(length)
    try:
        header = json.loads(json.loads(raw)["__metadata__"][_ENTRY])
        known = header["format"] == FORMAT and isinstance(header["kind"], str)
        known = known and isinstance(header["config"], dict) and "sha256" in header
        known = known and isinstance(header["metadata"], dict)
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    if not known:
        raise CheckpointError(f"expected a checkpoint of format {FORMAT}, {path.name} is not one")
    return cast(dict[str, Any], header)


def _plain(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"expected tensors in state, got {type(tensor).__name__} for {name!r}")
    if not _finite(tensor):
        raise ValueError(f"expected finite values, tensor {name!r} holds NaN or infinity")
    return tensor.detach().to("cpu", copy=True).contiguous()


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
