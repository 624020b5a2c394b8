"""The one model in a table of weights: under a prefix, beside the weights of other things."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from wm_inject.core.text import printable
from wm_victim.loading.contract import LoadingError

# What wrappers put in the middle of names; they change nothing of what a layer computes.
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Copies that follow a model in training: one that is none of these is taken before them.
_FOLLOWS = re.compile(r"ema|avg|averag|swa|teacher|momentum|target|shadow", re.IGNORECASE)


class Subtree(NamedTuple):
    """The weights of a model by their own names, and what else there was."""

    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    notes: tuple[str, ...]


def find_subtree(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> Subtree:
    """The weights under the prefix below which all ``expected`` names lie.

    Where none has all of them, the one with the most is taken: what is missing can be named.

    Raises:
        LoadingError: Two prefixes with all of them, and no way to tell which is the model.
    """
    names = {_WRAPPED.sub("", name): name for name in state}
    if len(names) < len(state):
        names = {name: name for name in state}
    counts = Counter(prefix for name in names for prefix, rest in _splits(name) if rest in expected)
    if not counts:
        return Subtree(dict(state), {}, ())
    least = sum(not name.endswith("num_batches_tracked") for name in expected)
    whole = [
        prefix
        for prefix, count in counts.items()
        if count >= least and _fits(prefix, names, expected) == least
    ]
    prefix = _choice(whole) if whole else max(counts, key=lambda one: (counts[one], -len(one)))
    weights: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, original in names.items():
        inside = name.startswith(prefix)
        (weights if inside else others)[name.removeprefix(prefix)] = state[original]
    notes = [f"weights taken from {prefix!r}"] if prefix and prefix != "module." else []
    if others:
        first_names = ", ".join(printable(name, 40) for name in list(others)[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        notes.append(f"left out what lies beside the model: {first_names}{more}")
    return Subtree(weights, others, tuple(notes))


def _splits(name: str) -> list[tuple[str, str]]:
    starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
    return [(name[:start], name[start:]) for start in starts]


def _fits(prefix: str, names: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]) -> int:
    return sum(
        prefix + name in names for name in expected if not name.endswith("num_batches_tracked")
    )


def _choice(prefixes: list[str]) -> str:
    """The prefix of the model among those of whole models."""
    own = [prefix for prefix in prefixes if not _FOLLOWS.search(prefix)] or prefixes
    if len(own) > 1:
        first_prefixes = ", ".join(repr(printable(prefix, 60)) for prefix in own[:4])
        raise LoadingError(
            f"the weights of {len(own)} models, under {first_prefixes}; save one of them"
        )
    return own[0]
