"""Checkpoints of a training run, exact enough to go on from to the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from wm_inject.core.files import write_json
from wm_inject.core.resume import load_state, save_state

KIND = "training"


class RunState(NamedTuple):
    """Where a run stands after some epochs."""

    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    seconds: tuple[float, ...]
    watched: tuple[dict[str, float], ...]
    state: dict[str, Any]


def save_run(path: Path, standing: RunState, *, run: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically; the seconds go to a sibling file, so its bytes repeat.

    Args:
        path: The checkpoint.
        standing: What to keep.
        run: What makes this run this run (JSON types); `load_run` compares it.
    """
    kept = {name: value for name, value in standing._asdict().items() if name != "seconds"}
    # The seconds first: a kill between the two writes leaves too many of them, which is harmless.
    write_json(_seconds_path(path), {"seconds": standing.seconds})
    save_state(path, kept, kind=KIND, run=run)


def load_run(path: Path, *, run: Mapping[str, Any]) -> RunState | None:
    """Read a checkpoint back; None if there is none.

    Raises:
        ValueError: The file belongs to another run, or is damaged.
    """
    kept = load_state(path, kind=KIND, run=run)
    if kept is None:
        return None
    try:
        seconds = _read_seconds(_seconds_path(path), len(kept["losses"]))
        return RunState(**kept, seconds=seconds)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is damaged: {error!r}") from error


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


__all__ = [
    "KIND",
    "RunState",
    "fingerprint",
    "load_run",
    "remove_run",
    "save_run",
]
