"""How the refusal tables are written: a public name, what is wrong, a call that must refuse it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# A call is given an empty folder and must raise ValueError with one clear line.
Call = Callable[[Path], object]
Cases = Mapping[str, Call]

# What every function that takes tensors refuses, at the least.
KINDS = frozenset({"shape", "dtype", "range", "empty"})

SIZE = 16
IMAGES = torch.rand(4, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])


class Table(NamedTuple):
    """What one package refuses."""

    module: str
    cases: Mapping[str, Cases]  # public name -> what is wrong -> the call
    # Names that take no outside values that could be wrong, each with the reason.
    nothing: Mapping[str, str] = {}
    # Names that take tensors but cannot check all four kinds, each with the reason.
    partly: Mapping[str, str] = {}


def images(call: Callable[[Tensor], object], good: Tensor = IMAGES) -> dict[str, Call]:
    """The four kinds, and NaN, for a function of an image batch."""
    return {
        "shape": lambda _: call(good[0]),
        "dtype": lambda _: call(good.double()),
        "range": lambda _: call(good + 1),
        "empty": lambda _: call(good[:0]),
        "nan": lambda _: call(torch.full_like(good, float("nan"))),
        "no pixels": lambda _: call(good[:, :, :0]),
        "type": lambda _: call(good.tolist()),  # type: ignore[arg-type]
    }


def labels(call: Callable[[Tensor], object], good: Tensor = LABELS) -> dict[str, Call]:
    """The same for a label vector that goes with a batch."""
    return {
        "labels shape": lambda _: call(good[:-1]),
        "labels dtype": lambda _: call(good.float()),
        "labels range": lambda _: call(good - 1),
        "labels empty": lambda _: call(good[:0]),
    }


def vectors(call: Callable[[Tensor], object], good: Tensor) -> dict[str, Call]:
    """The four kinds for a function of one float vector ``(K,)`` of scores."""
    return {
        "shape": lambda _: call(good.unsqueeze(0)),
        "dtype": lambda _: call(good.long()),
        "range": lambda _: call(torch.full_like(good, float("nan"))),
        "empty": lambda _: call(good[:0]),
    }


def write(path: Path, content: bytes = b"neither an image nor a model") -> Path:
    """A file with something useless in it."""
    path.write_bytes(content)
    return path
