"""Pretrained weights: injectors that ship in the wheel, each with its extractor in wm-extract's.

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

from wm_inject.core.checks import check_choice
from wm_inject.core.files import sha256_file

if TYPE_CHECKING:
    from wm_inject.core.checkpoint import Checkpoint

FOLDER = Path(__file__).parents[1] / "weights"


def pretrained_card(name: str, *, folder: Path = FOLDER) -> dict[str, Any]:
    """The model card of pretrained weights: data, recipe, figures, SHA-256 of the file.

    ``name`` is one of `PRETRAINED`; ``folder`` holds the weights and ``cards.json``.
    """
    cards = _cards(folder)
    check_choice("pretrained weights", name, cards)
    return copy.deepcopy(cards[name])


def read_pretrained(name: str, *, kind: str, folder: Path = FOLDER) -> Checkpoint:
    """Read pretrained weights as float32, after comparing the file with the SHA-256 of its card.

    Raises:
        ValueError: No weights of this name.
        CheckpointError: The file is not there, not the one that was shipped, or of another kind.
    """
    from wm_inject.core.checkpoint import CheckpointError, load_checkpoint

    expected = pretrained_card(name, folder=folder)["sha256"]
    path = folder / f"{name}.safetensors"
    digest = sha256_file(path) if path.is_file() else "no file"
    if digest != expected:
        raise CheckpointError(
            f"the pretrained weights {name} are not those that were shipped, install the package "
            f"again: expected the SHA-256 {expected[:16]}, got {digest[:16]}"
        )
    saved = load_checkpoint(path, kind=kind)
    state = {key: x.float() if x.is_floating_point() else x for key, x in saved.state.items()}
    return saved._replace(state=state)


@cache
def _cards(folder: Path) -> dict[str, dict[str, Any]]:
    cards: dict[str, dict[str, Any]] = json.loads((folder / "cards.json").read_text("utf-8"))
    return cards


PRETRAINED = tuple(_cards(FOLDER))
