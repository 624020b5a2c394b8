"""Which output of a model is which class of a folder: matched on the model's own answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import bdtrc
from torch import Tensor

from wm_inject.core.text import printable

Kind = Literal["names", "same order", "offset", "missing classes", "sort order", "permutation"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # the plainest first

_MAX_CELLS = 4_000_000  # of a table of classes and outputs that maps are fitted on
_SHOWN = 12  # classes that a description names
_Counts = np.ndarray  # int64 (F, K): images of each class that get each answer


@dataclass(frozen=True, eq=False)
class LabelMap:
    """From the labels of a folder to the outputs of a model.

    Args:
        kind: What explains it. "missing classes": in the same order, with outputs that have no
            images; "sort order": classes sorted as text, or "2" before "10".
        outputs: By label, the number of its output; a label without one is not in it.
        right: bool ``(N,)``: images whose answer is their class by this map. Where the map was
            fitted on answers, each half of the images is judged by the map of the other half.
    """

    kind: Kind
    outputs: Mapping[int, int]
    right: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of images that the map explains, in [0, 1]."""
        return float(self.right.mean())

    def apply(self, labels: Tensor) -> Tensor:
        """Labels of the folder as numbers of outputs.

        Raises:
            ValueError: A label without an output.
        """
        missing = sorted(set(labels.tolist()) - set(self.outputs))
        if missing:
            raise ValueError(f"expected labels with an output, got {missing[0]}, which has none")
        return torch.tensor([self.outputs[label] for label in labels.tolist()])

    def describe(self, classes: Sequence[str] | None = None) -> str:
        """The map in a line, with the classes whose output is not their own number."""
        pairs = sorted(self.outputs.items(), key=lambda pair: pair[1])
        if self.kind == "offset":
            return f"the labels count the first output as {pairs[0][0] - pairs[0][1]}"
        changes = [f"{_name(n, classes)} -> {output}" for n, output in pairs if n != output]
        more = f", and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        return f"{self.kind} ({', '.join(changes[:_SHOWN])}{more})" if changes else self.kind


def match_labels(
    answers: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    classes: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    offset: int | None = None,
) -> LabelMap:
    """The plainest map from labels to outputs that explains the answers as well as any.

    A map is passed over only where another explains clearly more images (sign test, p < 0.01): by
    name, in the same order, shifted by one, in the same order with outputs missing, in another
    order of the names, and last any one-to-one map.

    Args:
        answers: int64 ``(N,)``: outputs with the largest logit for clean images.
        labels: int64 ``(N,)``, of any numbers.
        num_classes: K, the outputs.
        classes: The folder's names, by label.
        output_names: The model's names, by output. They are used if every class is among them.
        offset: The number that the labels count the first output as; the only map that is tried.

    Raises:
        ValueError: No images, arrays of other shapes, or labels that the offset takes out of range.
    """
    if answers.shape != labels.shape or labels.ndim != 1 or not len(labels):
        shapes = f"{tuple(answers.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected as many answers (N,) as labels (N,), got {shapes}")
    outputs, numbers = answers.cpu().numpy(), labels.cpu().numpy()
    present = np.unique(numbers).tolist()
    names = {label: _name(label, classes) for label in present}
    if offset is not None:
        shifted = {label: label - offset for label in present}
        if not all(0 <= output < num_classes for output in shifted.values()):
            raise ValueError(
                f"expected labels {offset} .. {offset + num_classes - 1}, "
                f"got {present[0]} .. {present[-1]}"
            )
        return _fixed("offset", shifted, outputs, numbers)
    maps = [
        _fixed(kind, m, outputs, numbers) for kind, m in _plain(names, output_names, num_classes)
    ]
    if len(present) * num_classes <= _MAX_CELLS:
        maps += _fitted(names, outputs, numbers, num_classes)
    if not maps:
        raise ValueError(f"expected labels 0 .. {num_classes - 1}, got {present[-1]}")
    best = max(maps, key=lambda one: one.right.sum())
    return next(one for one in maps if not clearly_fewer(one.right, best.right))


def map_names(classes: Sequence[str], output_names: Sequence[str]) -> dict[int, int]:
    """By number of a class, the output of the same name; case, blanks, "_" and "-" do not count.

    Raises:
        ValueError: A class that no output is named after, or two outputs of one name.
    """
    outputs = {_key(name): output for output, name in enumerate(output_names)}
    if len(outputs) != len(output_names):
        raise ValueError(f"expected {len(output_names)} different names, got {len(outputs)}")
    missing = [name for name in classes if _key(name) not in outputs]
    if missing:
        near = get_close_matches(_key(missing[0]), outputs, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise ValueError(
            f"expected the model's class names for all of the folder's, none is "
            f"{', '.join(printable(name, 40) for name in missing[:5])}{hint}"
        )
    return {label: outputs[_key(name)] for label, name in enumerate(classes)}


def clearly_fewer(right: np.ndarray, other: np.ndarray, level: float = 0.01) -> bool:
    """Whether ``right`` is true for fewer images than ``other``, by a one-sided sign test."""
    gains, losses = int((other & ~right).sum()), int((right & ~other).sum())
    return gains > losses and float(bdtrc(gains - 1, gains + losses, 0.5)) < level


def _plain(
    names: Mapping[int, str], output_names: Sequence[str] | None, num_classes: int
) -> Iterator[tuple[Kind, dict[int, int]]]:
    """Maps that need no answers, the plainest first."""
    if output_names is not None:
        try:
            mapped = map_names(list(names.values()), output_names)
        except ValueError:
            pass  # other names: the answers decide
        else:
            yield "names", dict(zip(names, mapped.values(), strict=True))
    for kind, offset in (("same order", 0), ("offset", 1), ("offset", -1)):
        shifted = {label: label - offset for label in names}
        if all(0 <= output < num_classes for output in shifted.values()):
            yield kind, shifted  # type: ignore[misc]


def _fixed(
    kind: Kind, outputs: Mapping[int, int], answers: np.ndarray, labels: np.ndarray
) -> LabelMap:
    return LabelMap(kind, outputs, _expected(outputs, labels) == answers)


def _expected(outputs: Mapping[int, int], labels: np.ndarray) -> np.ndarray:
    present, places = np.unique(labels, return_inverse=True)
    return np.array([outputs.get(label, -1) for label in present.tolist()])[places]


def _fitted(
    names: Mapping[int, str], answers: np.ndarray, labels: np.ndarray, num_classes: int
) -> Iterator[LabelMap]:
    """Maps that are fitted on the answers: in an order of the names, then one to one."""
    half = np.empty(len(labels), np.int64)
    half[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % 2

    def fit(kind: Kind, order: Sequence[int]) -> LabelMap:
        rank = {label: row for row, label in enumerate(order)}
        rows = np.array([rank[label] for label in labels.tolist()])

        def best(chosen: np.ndarray) -> dict[int, int]:
            table = np.zeros((len(order), num_classes), np.int64)
            np.add.at(table, (rows[chosen], answers[chosen]), 1)
            columns = _one_to_one(table, order) if kind == "permutation" else _increasing(table)
            return {label: int(out) for label, out in zip(order, columns, strict=True) if out >= 0}

        right = np.empty(len(labels), bool)
        for part in (half == 0, half == 1):
            right[part] = _expected(best(~part), labels[part]) == answers[part]
        return LabelMap(kind, best(half >= 0), right)

    by_number = sorted(names)
    if len(names) <= num_classes:
        yield fit("missing classes", by_number)
        orders = [by_number]
        for key in (str, _natural, str.casefold):
            order = sorted(names, key=lambda label: key(names[label]))
            if order not in orders:
                orders.append(order)
                yield fit("sort order", order)
    yield fit("permutation", by_number)


def _increasing(table: _Counts) -> np.ndarray:
    """A column for each row, in the order of the rows, so that the sum of the cells is largest."""
    rows, columns = table.shape
    spare = np.arange(columns - rows + 1)  # columns that were passed over before a row
    total, best = np.zeros(len(spare), np.int64), np.empty((rows, len(spare)), np.int64)
    for row in range(rows):
        cells = total + table[row, row + spare]
        total = np.maximum.accumulate(cells)
        first = np.append(True, cells[1:] > total[:-1])
        best[row] = np.maximum.accumulate(np.where(first, spare, 0))
    result, at = np.empty(rows, np.int64), len(spare) - 1
    for row in reversed(range(rows)):
        at = best[row, at]
        result[row] = row + at
    return result


def _one_to_one(table: _Counts, labels: Sequence[int]) -> np.ndarray:
    """A column for each row, or -1 where there are more rows, with the largest sum of cells."""
    # Where the answers do not say, a class keeps its number.
    own = np.equal.outer(labels, np.arange(table.shape[1])) / (2 * len(labels))
    rows, columns = linear_sum_assignment(table + own, maximize=True)
    result = np.full(len(table), -1)
    result[rows] = columns
    return result


def _name(label: int, classes: Sequence[str] | None) -> str:
    has_name = classes is not None and 0 <= label < len(classes)
    return classes[label] if has_name and classes is not None else str(label)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts "2" before "10"."""
    parts = re.findall(r"\d+|\D+", name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
