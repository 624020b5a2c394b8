"""Save the nested state of a long run, and resume from it to the same bits."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wm_inject.core.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def save_state(path: str | Path, state: Any, *, kind: str, run: Mapping[str, Any]) -> None:
    """Write the state of a run atomically, as a checkpoint without code.

    Args:
        state: Mappings, lists and tuples of tensors, numbers, text and None, nested as they come.
        kind: What kind of run it is.
        run: What tells this run from others (JSON types); `load_state` compares it.

    Raises:
        ValueError: Something else among the state, or a tensor with NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, "state", tensors)
    save_checkpoint(path, kind=kind, config=run, state=tensors, metadata={"tree": tree})


def load_state(path: str | Path, *, kind: str, run: Mapping[str, Any]) -> Any:
    """Read back what `save_state` wrote; None if there is no file.

    Raises:
        ValueError: The file is damaged, or belongs to another run.
    """
    path = Path(path)
    if not path.exists():
        return None
    saved = load_checkpoint(path, kind=kind)
    expected = json.loads(json.dumps(dict(run)))
    other = [key for key in expected if saved.config.get(key) != expected[key]]
    if other:
        raise ValueError(
            f"{path.name} is the checkpoint of another run (different: {', '.join(other)}): "
            "delete it or choose another file"
        )
    try:
        return _rebuild(saved.metadata["tree"], saved.state)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name} is damaged: {error!r}") from error


class ResumeFile:
    """The state of one run in a file; without a path it does nothing.

    Args:
        kind: What kind of run it is.
        run: What makes this run this run (JSON types): the state of another one is refused.
        pause: Seconds that must pass between two writes of `save_sometimes`.
    """

    def __init__(
        self, path: str | Path | None, *, kind: str, run: Mapping[str, Any], pause: float = 30.0
    ) -> None:
        self._path = None if path is None else Path(path)
        self._kind, self._run, self._pause = kind, run, pause
        self._saved = time.monotonic()

    def load(self) -> Any:
        """The state to continue from, or None.

        Raises:
            ValueError: The file is damaged, or belongs to another run.
        """
        if self._path is None:
            return None
        return load_state(self._path, kind=self._kind, run=self._run)

    def save(self, state: Any) -> None:
        """Write the state, as `save_state` does."""
        if self._path is not None:
            save_state(self._path, state, kind=self._kind, run=self._run)
            self._saved = time.monotonic()

    def save_sometimes(self, state: Callable[[], Any]) -> None:
        """Write the state that ``state`` gives, if the last write is longer ago than the pause."""
        if self._path is not None and time.monotonic() - self._saved >= self._pause:
            self.save(state())

    def remove(self) -> None:
        """Delete the file: the run is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over the types, shapes and bytes of tensors on any device: for ``run`` above."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give every momentum the memory layout of its parameter, which files do not keep.

    Elementwise kernels may round differently on another layout; this keeps a resumed run exact.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter).copy_(value)


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
