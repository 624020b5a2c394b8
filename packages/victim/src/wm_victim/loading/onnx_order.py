"""Does a value of a graph rise with another, whatever its numbers are? Read off the operators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_INF = math.inf
# Operators that rise in their first input, and the range of what they give (None: the input's).
_RISING: dict[str, tuple[float, float] | None] = {
    **dict.fromkeys(("Sigmoid", "HardSigmoid", "Softmax"), (0.0, 1.0)),
    **dict.fromkeys(("Tanh", "Softsign", "Erf", "LpNormalization"), (-1.0, 1.0)),
    **dict.fromkeys(("Exp", "Softplus", "Relu", "Sqrt"), (0.0, _INF)),
    **dict.fromkeys(("Log", "Atan", "Asinh", "Sinh", "Elu", "Selu", "Celu"), (-_INF, _INF)),
    **dict.fromkeys(("Floor", "Ceil", "LayerNormalization"), (-_INF, _INF)),
    **dict.fromkeys(("Identity", "Round", "LeakyRelu", "Cast", "Clip", "Reshape", "Flatten")),
    **dict.fromkeys(("Squeeze", "Unsqueeze", "Transpose", "Expand")),
    "LogSoftmax": (-_INF, 0.0),
}
_SIZES = ("ReduceL1", "ReduceL2", "ReduceSumSquare")
_INTEGERS = {2: (0, 2**8 - 1), 3: (-(2**7), 2**7 - 1), 4: (0, 2**16 - 1), 5: (-(2**15), 2**15 - 1)}
_INTEGERS |= {6: (-(2**31), 2**31 - 1), 12: (0, 2**32 - 1), 7: (-(2**63), 2**63 - 1)}
_INTEGERS |= {13: (0, 2**64 - 1), 9: (0, 1)}


class Fact(NamedTuple):
    """What is known of a value in a row: one number for each class, or one for all of them."""

    by_class: bool = True
    rises: int = 0  # 1 with the class's logit, -1 falls with it, 0 unknown
    low: float = -_INF
    high: float = _INF

    def times(self, sign: int) -> Fact:
        """Itself or its negative."""
        return self if sign > 0 else Fact(self.by_class, -self.rises, -self.high, -self.low)


def rises(nodes: Sequence[Any], start: str, output: str, constants: Mapping[str, float]) -> bool:
    """Whether within a row the output never falls where ``start`` rises, whatever the row is.

    Args:
        nodes: From ``start`` to ``output``, in order.
        constants: The numbers of values that are the same for all classes.
    """
    facts = {name: Fact(False, 0, number, number) for name, number in constants.items()}
    facts[start] = Fact(rises=1)
    origin = {node.output[0]: node for node in nodes}
    for node in nodes:
        inputs = [facts.get(name, Fact(False)) for name in node.input if name]
        for name in node.output:
            facts[name] = _fact(node, inputs, origin)
    return facts[output].rises == 1


def _fact(node: Any, inputs: Sequence[Fact], origin: Mapping[str, Any]) -> Fact:
    kind, first = node.op_type, inputs[0]
    parameters = {entry.name: entry.f for entry in node.attribute if entry.type == 1}
    if kind.startswith("Reduce"):
        return _reduced(kind, first)
    if kind == "MatMul" or kind == "Gemm":  # by equal numbers: a sum
        positive = kind == "MatMul" and all(each.low >= 0 for each in inputs)
        return Fact(False, 0, 0.0 if positive else -_INF)
    by_class = any(each.by_class for each in inputs)
    if kind in _RISING:
        if any(number < 0 for number in parameters.values()):
            return Fact(by_class)
        return _rising(node, kind, inputs)
    if kind in ("Neg", "Abs"):
        turned = first.times(-1)
        if kind == "Neg" or first.high <= 0:
            return turned
        return first if first.low >= 0 else Fact(by_class, 0, 0.0, max(first.high, turned.high))
    if kind in ("Add", "Sum", "Sub"):
        seconds = [each.times(-1 if kind == "Sub" else 1) for each in inputs[1:]]
        low = first.low + sum(each.low for each in seconds)
        high = first.high + sum(each.high for each in seconds)
        low = 0.0 if kind == "Sub" and _spread(node, origin) else low
        return Fact(by_class, _common(first, *seconds), low, high)
    if kind in ("Max", "Min"):
        best = max if kind == "Max" else min
        lows, highs = [each.low for each in inputs], [each.high for each in inputs]
        return Fact(by_class, _common(*inputs), best(lows), best(highs))
    if kind == "Mul":
        return _product(first, inputs[1], same=node.input[0] == node.input[1])
    if kind == "Div":
        return _product(first, _inverse(inputs[1]), same=False)
    if kind == "Reciprocal":
        return _inverse(first)
    if kind == "Pow" and inputs[1].low == inputs[1].high:
        exponent = inputs[1].low
        odd = exponent > 0 and exponent % 2 == 1
        rises = first.rises * (1 if exponent > 0 else -1) if first.low >= 0 or odd else 0
        return Fact(by_class, rises, 0.0 if first.low >= 0 or exponent % 2 == 0 else -_INF)
    return Fact(by_class)


def _rising(node: Any, kind: str, inputs: Sequence[Fact]) -> Fact:
    first, others = inputs[0], inputs[1:]
    low, high = _RISING[kind] or (first.low, first.high)
    rises = first.rises
    if kind == "Clip":
        for place, bound in enumerate(others):  # an empty name leaves out the first: then unknown
            low = max(low, bound.low) if place == 0 and len(others) == 2 else low
            high = min(high, bound.high) if place == 1 else high
        rises = 0 if any(bound.by_class for bound in others) else rises
    if kind == "LayerNormalization" and any(each.low < 0 for each in others[:1]):
        rises = 0
    if kind == "Cast":
        to = next(entry.i for entry in node.attribute if entry.name == "to")
        least, most = _INTEGERS.get(to, (-_INF, _INF))  # others are floats, which saturate
        rises = rises if least <= low and high <= most else 0
    return Fact(first.by_class, rises, low, high)


def _reduced(kind: str, first: Fact) -> Fact:
    """One number for all classes."""
    if kind in _SIZES:
        return Fact(False, 0, 0.0)
    if kind in ("ReduceMax", "ReduceMin", "ReduceMean"):
        return Fact(False, 0, first.low, first.high)
    if kind in ("ReduceSum", "ReduceProd") and first.low >= 0:
        return Fact(False, 0, 0.0)
    return Fact(False)


def _common(*facts: Fact) -> int:
    """The direction in which all rise that differ between classes."""
    ways = {each.rises for each in facts if each.by_class}
    return ways.pop() if len(ways) == 1 else 0


def _product(one: Fact, other: Fact, *, same: bool) -> Fact:
    if same and one.low < 0 < one.high:
        return Fact(one.by_class, 0, 0.0)
    by_class = one.by_class or other.by_class
    signs = [1 if each.low >= 0 else -1 if each.high <= 0 else 0 for each in (one, other)]
    if one.by_class and other.by_class:  # |a| |b|, and its sign
        rises = _common(one.times(signs[0] or 1), other.times(signs[1] or 1))
        rises *= signs[0] * signs[1]
    else:
        varying, sign = (one, signs[1]) if one.by_class else (other, signs[0])
        rises = varying.rises * sign
    ends = [a * b for a in (one.low, one.high) for b in (other.low, other.high)]
    ends = [0.0 if math.isnan(end) else end for end in ends]
    return Fact(by_class, rises, min(ends), max(ends))


def _inverse(fact: Fact) -> Fact:
    """1 / x, which falls on either side of zero."""
    if fact.low < 0 < fact.high or (fact.low < 0 and fact.high > 0):
        return Fact(fact.by_class)
    ends = [1 / end if end else _INF for end in (fact.low, fact.high)]
    if fact.high <= 0:
        ends = [-abs(end) for end in ends]
    return Fact(fact.by_class, -fact.rises, min(ends), max(ends))


def _spread(node: Any, origin: Mapping[str, Any]) -> bool:
    """Whether a difference is that of the largest and the smallest of the same values."""
    high, low = (origin.get(name) for name in node.input)
    if high is None or low is None or high.input[0] != low.input[0]:
        return False
    largest = ("ReduceMax", "ReduceMin"), ("ReduceMax", "ReduceMean"), ("ReduceMean", "ReduceMin")
    return (high.op_type, low.op_type) in largest
