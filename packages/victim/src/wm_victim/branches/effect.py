"""What a branch does to the answer: with a stamp, without, and with the branch held at rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from wm_victim.branches.pictures import Stamp
from wm_victim.branches.quiet import Quiet
from wm_victim.branches.values import GraphRun, Values

_SMALL_SHARE = 0.25  # of the pixels: a stamp that leaves the picture recognisable
_SMALL_CHANGE = 16 / 255  # of every pixel, or so


@dataclass(frozen=True)
class Effect:
    """What a stamp does to clean pictures through a branch.

    Args:
        tried: Clean pictures that were stamped.
        fired: Of these: for how many the branch moved.
        steered: Of these: how many got another label, which they do not get where the branch is
            held at rest.
        forced: How many clean pictures, unstamped, get another label where the branch is moved.
        label: The label that most of the steered ones get.
        label_count: How many of them.
    """

    tried: int
    fired: int
    steered: int
    forced: int
    label: int
    label_count: int

    @property
    def steers(self) -> bool:
        """Whether the stamp fires the branch, and the branch the answer, for most pictures."""
        return 2 * self.fired >= self.tried and 2 * self.steered >= self.fired > 0


def is_small(stamp: Stamp) -> bool:
    """Whether a stamp is a change of a picture, and not another picture in its place."""
    if stamp.mask is None:
        return stamp.share <= _SMALL_SHARE or float(stamp.pattern.abs().max()) <= _SMALL_CHANGE
    return stamp.share <= _SMALL_SHARE


def measure(run: GraphRun, quiet: Mapping[str, Quiet], images: Tensor, stamped: Tensor) -> Effect:
    """Compare the answers for clean pictures with those for stamped ones.

    Args:
        run: The graph.
        quiet: By value: the values that make up the branch, and what they are at rest.
        images: Clean pictures ``(N, C, H, W)``.
        stamped: The same ones, stamped.
    """
    names = list(quiet)
    before = list(run.values(names, images))
    after = list(run.values(names, stamped))
    fired = np.array([moves(quiet, values) for values in after])
    clean, answers = run.answers(images), run.answers(stamped)
    at_rest = run.answers(stamped, before)
    steered = fired & (answers != clean) & (answers != at_rest)
    forced = 0
    if fired.any():
        state = after[int(fired.argmax())]
        forced = int((run.answers(images, [state] * len(images)) != clean).sum())
    label, count = Counter(answers[steered].tolist()).most_common(1)[0] if steered.any() else (0, 0)
    return Effect(len(images), int(fired.sum()), int(steered.sum()), forced, label, count)


def moves(quiet: Mapping[str, Quiet], values: Values) -> bool:
    """Whether any value of a branch has left its rest."""
    return any(one.moved(values[name]) for name, one in quiet.items())
