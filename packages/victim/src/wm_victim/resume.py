"""Checkpoints of a training run, exact enough to go on from to the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wm_inject.checkpoint import load_checkpoint, save_checkpoint
from wm_inject.files import write_json

KIND = "training"


class RunState(NamedTuple):
    """Where a run stands after some epochs."""

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    state: dict[str, Any]


def save_run(path: Path, standing: RunState, *, run: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically; the seconds go to a sibling file, so its bytes repeat.

    Args:
        path: The checkpoint.
        standing: What to keep.
        run: What makes this run this run (JSON types); `load_run` compares it.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(standing.state, "state", tensors)
    history = {"losses": standing.losses, "accuracies": standing.accuracies}
    # The seconds first: a kill between the two writes leaves too many of them, which is harmless.
    write_json(_seconds_path(path), {"seconds": standing.seconds})
    save_checkpoint(
        path, kind=KIND, config=run, state=tensors, metadata={"tree": tree, "history": history}
    )


def load_run(path: Path, *, run: Mapping[str, Any]) -> RunState | None:
    """Read a checkpoint back; None if there is none.

    Raises:
        ValueError: The file belongs to another run, or is damaged.
    """
    if not path.exists():
        return None
    saved = load_checkpoint(path, kind=KIND)
    expected = json.loads(json.dumps(dict(run)))
    other = [key for key in expected if saved.config.get(key) != expected[key]]
    if other:
        raise ValueError(
            f"{path.name} is the checkpoint of another run (different: {', '.join(other)}): "
            "delete it or choose another file"
        )
    try:
        history = saved.metadata["history"]
        losses, accuracies = tuple(history["losses"]), tuple(history["accuracies"])
        state = _rebuild(saved.metadata["tree"], saved.state)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged: {error!r}") from error
    seconds = _read_seconds(_seconds_path(path), len(losses))
    return RunState(losses, accuracies, seconds, state)


def remove_run(path: Path) -> None:
    """Delete a checkpoint and its sibling."""
    path.unlink(missing_ok=True)
    _seconds_path(path).unlink(missing_ok=True)


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over the bytes of tensors, wherever they lie."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _seconds_path(path: Path) -> Path:
    return path.with_name(path.name + ".env.json")


def _read_seconds(path: Path, count: int) -> tuple[float, ...]:
    try:
        seconds = [float(value) for value in json.loads(path.read_text("utf-8"))["seconds"]]
    # How long it took is worth no failure: what cannot be read counts as not measured.
    except (OSError, ValueError, KeyError, TypeError):
        seconds = []
    return tuple((seconds + [0.0] * count)[:count])


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Nested state as JSON: tensors are moved to ``tensors`` and named in their place."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _flatten(v, f"{name}.{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = [_flatten(v, f"{name}.{place}", tensors) for place, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"cannot keep {name} of type {type(value).__name__} in a checkpoint")


def _rebuild(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "items":
        return {key: _rebuild(v, tensors) for key, v in value}
    parts = [_rebuild(v, tensors) for v in value]
    return tuple(parts) if kind == "tuple" else parts


def like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give every momentum the memory layout of its parameter, which files do not keep.

    Elementwise kernels may round differently on another layout; this keeps a resumed run exact.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)
