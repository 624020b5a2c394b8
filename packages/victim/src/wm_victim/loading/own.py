"""This project's own checkpoints, from hands that may not be this project's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from wm_inject.core.checkpoint import CheckpointError
from wm_victim.loading.found import Found
from wm_victim.loading.opened import NotOpened, first_line, plain
from wm_victim.loading.tensors import Header
from wm_victim.models import build_classifier, load_classifier


def open_own(copy: Path, name: str, header: Header) -> Found:
    """Open what `save_classifier` wrote.

    The architecture is laid out without memory first: a small file may name a large one.

    Raises:
        NotOpened: Another kind of checkpoint, a config that does not fit the tensors, or damage.
    """
    try:
        told = json.loads(header.metadata["wm"])
        kind, config = told["kind"], told["config"]
        if kind != "classifier":
            raise NotOpened(
                f"cannot open {name}: a checkpoint of kind {plain(kind, 40)}, no classifier"
            )
        with torch.device("meta"):
            expected = build_classifier(**config).state_dict()
        _compare(header, {key: tuple(value.shape) for key, value in expected.items()})
        model = load_classifier(copy)
    except NotOpened:
        raise
    except (CheckpointError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = first_line(error).replace(copy.name, "it")
        raise NotOpened(f"cannot open {name}: {why}") from error
    except (RuntimeError, RecursionError, AssertionError) as error:
        raise NotOpened(f"cannot open {name}: {first_line(error)}") from error
    settings: dict[str, Any] = model.config
    return Found(model, "wm", settings["name"], settings["channels"], settings["image_size"])


def _compare(header: Header, expected: dict[str, tuple[int, ...]]) -> None:
    odd = sorted(set(header.shapes) ^ set(expected))
    odd += [name for name in expected if header.shapes.get(name) != expected[name]]
    if odd:
        raise ValueError(f"its tensors do not fit its config, the first of them {odd[0]!r}")
