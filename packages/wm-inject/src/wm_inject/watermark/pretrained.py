"""Ready-made weights: injectors that ship in the wheel, each with its extractor in wm-extract's.

A folder of weights holds ``NAME.safetensors`` for every name, a checkpoint whose floats are rounded
to 16 bits, and ``cards.json``: what each is, was trained on and measured, and the SHA-256 of its
file. ``tools/train_weights.py`` of the repository makes both.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wm_inject.core.files import sha256_file

if TYPE_CHECKING:
    from wm_inject.core.checkpoint import Checkpoint

FOLDER = Path(__file__).parents[1] / "weights"


def pretrained_card(name: str, *, folder: Path = FOLDER) -> dict[str, Any]:
    """What the model card says of ready-made weights: data, recipe, figures, SHA-256 of the file.

    Args:
        name: One of `PRETRAINED`.
        folder: Where the weights and ``cards.json`` lie.

    Raises:
        ValueError: No weights of this name.
    """
    cards = _cards(folder)
    if name not in cards:
        raise ValueError(f"expected ready-made weights in {', '.join(cards)}, got {name!r}")
    return copy.deepcopy(cards[name])


def read_pretrained(name: str, *, kind: str, folder: Path = FOLDER) -> Checkpoint:
    """Read ready-made weights, after comparing the file with the SHA-256 of its card.

    Args:
        name: One of `PRETRAINED`.
        kind: The kind of checkpoint that is expected.
        folder: Where the weights and ``cards.json`` lie.

    Returns:
        The checkpoint, its floats as float32.

    Raises:
        ValueError: No weights of this name.
        CheckpointError: The file is not there, not the one that was shipped, or of another kind.
    """
    from wm_inject.core.checkpoint import CheckpointError, load_checkpoint

    wanted = pretrained_card(name, folder=folder)["sha256"]
    path = folder / f"{name}.safetensors"
    found = sha256_file(path) if path.is_file() else "no file"
    if found != wanted:
        raise CheckpointError(
            f"the ready-made weights {name} are not those that were shipped, install the package "
            f"again: expected the SHA-256 {wanted[:16]}, got {found[:16]}"
        )
    saved = load_checkpoint(path, kind=kind)
    state = {key: x.float() if x.is_floating_point() else x for key, x in saved.state.items()}
    return saved._replace(state=state)


@cache
def _cards(folder: Path) -> dict[str, dict[str, Any]]:
    cards: dict[str, dict[str, Any]] = json.loads((folder / "cards.json").read_text("utf-8"))
    return cards


PRETRAINED = tuple(_cards(FOLDER))

__all__ = ["PRETRAINED", "pretrained_card", "read_pretrained"]
