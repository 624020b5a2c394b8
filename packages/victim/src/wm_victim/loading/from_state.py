"""In the child: a weights-only PyTorch file to safetensors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wm_victim.loading.opened import plain

# Where training scripts keep the weights; averaged ones last, since they are the exception.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "weights", "params", "state"),
    *("state_dict_ema", "model_ema"),
)


def convert_state(given: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint with ``weights_only=True`` and write its tensors as safetensors.

    Not by mapping the file into memory: that way torch 2.15 skips the check of a record's size and
    reads other records as weights.

    Args:
        given: The archive, checked by `pickles` and `zips`.
        out: Where ``weights.safetensors`` goes.
        options: "max_tensors".

    Raises:
        ValueError: No dictionary of tensors, or tensors larger than the file.
    """
    from safetensors.torch import save_file

    try:
        saved = torch.load(given, map_location="cpu", weights_only=True, mmap=False)
    except pickle.UnpicklingError as error:
        # Its own text recommends to load the file without this protection.
        raise ValueError(
            "torch refuses its pickle: it is no dictionary of plain tensors"
        ) from error
    state, notes = _weights(saved)
    if len(state) > options["max_tensors"]:
        raise ValueError(f"{len(state)} tensors, more than {options['max_tensors']}")
    bound = 2 * given.stat().st_size + 2**20
    if sum(tensor.nbytes for tensor in state.values()) > bound:
        raise ValueError("tensors that are larger than the file: views that repeat its bytes")
    plain_state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(plain_state, out / "weights.safetensors")
    return {"notes": notes}


def _weights(saved: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, from under the wrappers, and what was left out."""
    notes: list[str] = []
    for _ in range(3):
        if not isinstance(saved, Mapping):
            raise ValueError(f"expected a dictionary of tensors, got {type(saved).__name__}")
        inner = next((key for key in _WRAPPERS if isinstance(saved.get(key), Mapping)), None)
        if inner is None:
            break
        notes.append(f"weights taken from the entry {inner!r}")
        saved = saved[inner]
    state: dict[str, Tensor] = {}
    odd = []
    for name, value in saved.items():
        if not isinstance(name, str):
            raise ValueError("expected tensors by name, got another key")
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if dense and not value.is_quantized and not value.is_complex():
            state[name] = value
        else:
            odd.append(plain(name, 40))
    if not state:
        raise ValueError("expected a dictionary of tensors, found no tensor in it")
    if odd:
        notes.append(f"left out what is no plain tensor: {', '.join(odd[:5])}")
    return state, notes
