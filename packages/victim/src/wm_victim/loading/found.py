"""What the steps of the ladder hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from wm_victim.loading.opened import Source, plain
from wm_victim.loading.runner import sandboxed


@dataclass(frozen=True)
class Wanted:
    """What the caller says of a model; None where it is to be found out."""

    arch: str | None = None
    num_classes: int | None = None
    image_size: int | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    allow_torchscript: bool = False


@dataclass(frozen=True)
class Found:
    """A module on its way through the last checks."""

    module: nn.Module
    source: Source
    arch: str
    channels: int
    image_size: int
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    probabilities: bool = False  # the graph ended in a Softmax, which was taken off
    notes: tuple[str, ...] = ()


def child_notes(told: dict[str, Any]) -> tuple[str, ...]:
    """The remarks that a child made, and one where the kernel could not bind it."""
    notes = told.get("notes", [])
    found = tuple(plain(note) for note in notes[:20]) if isinstance(notes, list) else ()
    return found if sandboxed() else (*found, "sandbox: off, this kernel has no Landlock")
