"""Operators of ONNX in torch whose steps have gradients: what lies before a branch, to be fired.

Forward they compute what the graph does. Backward a step has a slope: a comparison that of the
difference of its operands, rounding and clipping that of the identity, a conjunction that of every
part. Source: Bengio et al., "Estimating or propagating gradients through stochastic neurons",
arXiv 1308.3432, 2013 (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wm_victim.branches.torch_operators import PLAIN, Table, Unsupported, floats, through

_LEAK = 1e-2  # the slope where an operator's own is 0
_COMPARED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}
_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Relu": torch.relu,
}
_SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "HardSwish": F.hardswish,
    "Log": lambda x: x.clamp(min=1e-12).log(),
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Sqrt": lambda x: x.clamp(min=1e-12).sqrt(),
    "Tanh": torch.tanh,
    "HardSigmoid": F.hardsigmoid,
    "Gelu": F.gelu,
}


def leaky(value: Tensor, source: Tensor) -> Tensor:
    """A value that also follows its source a little, so that no gradient is 0."""
    return value + _LEAK * (source - source.detach())


def compute(kind: str, inputs: Sequence[Any], attributes: dict[str, Any]) -> list[Tensor]:
    """The outputs of one node.

    Args:
        kind: The operator.
        inputs: Tensors, float32 where they depend on the picture; None for one that is left out.
        attributes: By name, as ``onnx.helper.get_attribute_value`` gives them.

    Raises:
        Unsupported: No surrogate of this operator, or not of this form.
    """
    x = inputs[0]
    if kind in _COMPARED:
        return [_compared(kind, *floats(inputs))]
    if kind in _STEPS:
        slope = F.leaky_relu(x, 0.1) if kind == "Relu" else x
        return [through(_STEPS[kind](x), slope)]
    if kind in _SMOOTH:
        return [leaky(_SMOOTH[kind](x), x)]
    one = _ALL.get(kind)
    if one is None:
        raise Unsupported(f"no gradients of {kind}")
    result = one(list(inputs), attributes)
    return result if isinstance(result, list) else [result]


def _compared(kind: str, a: Tensor, b: Tensor) -> Tensor:
    above = a - b if kind.startswith("Greater") else b - a
    return through(_COMPARED[kind](a, b).float(), above / _scale(above))


def _equal(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    a, b = floats(inputs)
    apart = (a - b).abs()
    return through(torch.eq(a, b).float(), -apart / _scale(apart))


def _scale(values: Tensor) -> Tensor:
    return values.detach().abs().amax().clamp(min=1e-6)


def _multiply(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    """A product of zeros still has a slope in each of them."""
    a, b = floats(inputs)
    factors = [torch.where(each == 0, _LEAK, each).detach() for each in (a, b)]
    return through(a * b, a * factors[1] + factors[0] * b)


def _where(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    condition, a, b = floats(inputs)
    return through(torch.where(condition != 0, a, b), condition * a + (1 - condition) * b)


def _clip(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    low, high = [*inputs[1:3], None, None][:2]
    low = attributes.get("min") if low is None else low
    high = attributes.get("max") if high is None else high
    x = inputs[0]
    hard = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
    hard = hard if high is None else torch.minimum(hard, torch.as_tensor(high, dtype=x.dtype))
    return through(hard, x)


def _extreme(inputs: list[Any], pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    values = floats(inputs)
    result = values[0]
    for value in values[1:]:
        result = through(pick(result, value), pick(result, value) + 0.1 * (result + value))
    return result


def _cast(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, kind = inputs[0].float(), attributes.get("to", 1)
    hard = x if kind in (1, 10, 11, 16) else (x != 0).float() if kind == 9 else x.trunc()
    return through(hard, x)


def _arg(inputs: list[Any], attributes: dict[str, Any], sign: int = 1) -> Tensor:
    """A larger number draws the index towards its own."""
    x, axis = sign * inputs[0].float(), attributes.get("axis", 0)
    keep = bool(attributes.get("keepdims", 1))
    hard = x.argmax(axis, keepdim=keep).float()
    weights = (x - x.detach().amax(axis, keepdim=True)).softmax(axis)
    shape = [1] * x.ndim
    shape[axis] = -1
    soft = (weights * torch.arange(x.shape[axis]).float().view(shape)).sum(axis, keepdim=keep)
    return through(hard, soft)


def _modulo(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    a, b = floats(inputs)
    hard = torch.fmod(a, b) if attributes.get("fmod") else torch.remainder(a, b)
    return through(hard, a)


def _any_of(inputs: list[Any], hard: Callable[[Tensor, Tensor], Tensor], sign: float) -> Tensor:
    a, b = floats(inputs)
    soft = (a - b).abs() if sign == 0 else a + b
    return through(hard(a != 0, b != 0).float(), soft)


_STEEP: Table = {
    "Mul": _multiply,
    "Pow": lambda i, a: leaky(torch.pow(*floats(i)), i[0].float()),
    "Mod": _modulo,
    "Equal": _equal,
    "And": lambda i, a: _any_of(i, torch.logical_and, 1),
    "Or": lambda i, a: _any_of(i, torch.logical_or, 1),
    "Xor": lambda i, a: _any_of(i, torch.logical_xor, 0),
    "Not": lambda i, a: 1 - i[0].float(),
    "Where": _where,
    "Clip": _clip,
    "Max": lambda i, a: _extreme(i, torch.maximum),
    "Min": lambda i, a: _extreme(i, torch.minimum),
    "Cast": _cast,
    "Sign": lambda i, a: through(i[0].sign(), i[0] / _scale(i[0])),
    "Softmax": lambda i, a: leaky(i[0].softmax(a.get("axis", -1)), i[0]),
    "ArgMax": _arg,
    "ArgMin": lambda i, a: _arg(i, a, -1),
    "IsNaN": lambda i, a: through(i[0].isnan().float(), 0 * i[0].nan_to_num()),
    "IsInf": lambda i, a: through(i[0].isinf().float(), 0 * i[0].nan_to_num()),
}
_ALL = PLAIN | _STEEP
