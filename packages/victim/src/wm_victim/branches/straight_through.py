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


class Unsupported(ValueError):
    """An operator without a surrogate here."""


def through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of one, with the gradient of the other."""
    return soft + (hard - soft).detach()


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
        return [_compared(kind, *_floats(inputs))]
    if kind in _STEPS:
        slope = F.leaky_relu(x, 0.1) if kind == "Relu" else x
        return [through(_STEPS[kind](x), slope)]
    if kind in _SMOOTH:
        return [leaky(_SMOOTH[kind](x), x)]
    one = _ONE.get(kind)
    if one is None:
        raise Unsupported(f"no gradients of {kind}")
    result = one(list(inputs), attributes)
    return result if isinstance(result, list) else [result]


def _floats(inputs: Sequence[Any]) -> list[Tensor]:
    return [each.float() for each in inputs if each is not None]


def _compared(kind: str, a: Tensor, b: Tensor) -> Tensor:
    above = a - b if kind.startswith("Greater") else b - a
    return through(_COMPARED[kind](a, b).float(), above / _scale(above))


def _equal(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    a, b = _floats(inputs)
    apart = (a - b).abs()
    return through(torch.eq(a, b).float(), -apart / _scale(apart))


def _scale(values: Tensor) -> Tensor:
    return values.detach().abs().amax().clamp(min=1e-6)


def _multiply(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    """A product of zeros still has a slope in each of them."""
    a, b = _floats(inputs)
    filled = [torch.where(each == 0, _LEAK, each).detach() for each in (a, b)]
    return through(a * b, a * filled[1] + filled[0] * b)


def _where(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    chosen, a, b = _floats(inputs)
    return through(torch.where(chosen != 0, a, b), chosen * a + (1 - chosen) * b)


def _clip(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    low, high = [*inputs[1:3], None, None][:2]
    low = attributes.get("min") if low is None else low
    high = attributes.get("max") if high is None else high
    x = inputs[0]
    hard = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
    hard = hard if high is None else torch.minimum(hard, torch.as_tensor(high, dtype=x.dtype))
    return through(hard, x)


def _extreme(inputs: list[Any], pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    values = _floats(inputs)
    result = values[0]
    for value in values[1:]:
        result = through(pick(result, value), pick(result, value) + 0.1 * (result + value))
    return result


def _cast(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, kind = inputs[0].float(), attributes.get("to", 1)
    hard = x if kind in (1, 10, 11, 16) else (x != 0).float() if kind == 9 else x.trunc()
    return through(hard, x)


def _axes(inputs: list[Any], attributes: dict[str, Any], rank: int) -> list[int]:
    axes = attributes.get("axes")
    if len(inputs) > 1 and inputs[1] is not None:
        axes = inputs[1].tolist()
    axes = list(range(rank)) if axes is None or (axes == [] and rank) else list(axes)
    return sorted(int(axis) % rank for axis in axes)


def _reduce(how: str) -> Callable[[list[Any], dict[str, Any]], Tensor]:
    def run(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
        x = inputs[0].float()
        axes = _axes(inputs, attributes, x.ndim)
        kept = bool(attributes.get("keepdims", 1))
        mean = x.mean(axes, keepdim=kept)
        if how == "Mean":
            return mean
        total = x.sum(axes, keepdim=kept)
        if how == "Sum":
            return total
        if how == "L1":
            return x.abs().sum(axes, keepdim=kept)
        if how in ("L2", "SumSquare"):
            squares = x.square().sum(axes, keepdim=kept)
            return squares if how == "SumSquare" else squares.clamp(min=1e-12).sqrt()
        if how == "Prod":
            hard = x.detach()
            for axis in axes[::-1]:
                hard = hard.prod(axis, keepdim=kept)
            return through(hard, total)
        extreme = (torch.amax if how == "Max" else torch.amin)(x, axes, keepdim=kept)
        return extreme + 0.1 * (mean - mean.detach())

    return run


def _arg(inputs: list[Any], attributes: dict[str, Any], sign: int = 1) -> Tensor:
    """A larger number draws the index towards its own."""
    x, axis = sign * inputs[0].float(), attributes.get("axis", 0)
    kept = bool(attributes.get("keepdims", 1))
    hard = x.argmax(axis, keepdim=kept).float()
    weights = (x - x.detach().amax(axis, keepdim=True)).softmax(axis)
    shape = [1] * x.ndim
    shape[axis] = -1
    soft = (weights * torch.arange(x.shape[axis]).float().view(shape)).sum(axis, keepdim=kept)
    return through(hard, soft)


def _pool(inputs: list[Any], attributes: dict[str, Any], how: str) -> Tensor:
    x, window = inputs[0], attributes["kernel_shape"]
    plain = attributes.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    ceil = bool(attributes.get("ceil_mode", 0))
    if len(window) != 2 or not plain:
        raise Unsupported("no gradients of such a pooling")
    strides = attributes.get("strides", [1, 1])
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    if how == "Max":
        padded = F.pad(x, (left, right, top, bottom), value=-1e30)
        dilation = attributes.get("dilations", [1, 1])
        return F.max_pool2d(padded, window, strides, 0, dilation, ceil_mode=ceil)
    if (top, left) != (bottom, right) or ceil:
        raise Unsupported("no gradients of such a pooling")
    counted = bool(attributes.get("count_include_pad", 0))
    return F.avg_pool2d(x, window, strides, (top, left), count_include_pad=counted)


def _conv(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, weight, *bias = inputs
    if weight.ndim != 4 or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise Unsupported("no gradients of such a convolution")
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    return F.conv2d(
        F.pad(x, (left, right, top, bottom)),
        weight,
        bias[0] if bias else None,
        attributes.get("strides", [1, 1]),
        0,
        attributes.get("dilations", [1, 1]),
        attributes.get("group", 1),
    )


def _gemm(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    a, b, *c = _floats(inputs)
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    product = attributes.get("alpha", 1.0) * a @ b
    return product + attributes.get("beta", 1.0) * c[0] if c else product


def _normalised(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, scale, bias, mean, variance = inputs[:5]
    epsilon = attributes.get("epsilon", 1e-5)
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


def _slice(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x = inputs[0]
    if len(inputs) > 1:
        starts, ends = inputs[1].tolist(), inputs[2].tolist()
        axes = inputs[3].tolist() if len(inputs) > 3 and inputs[3] is not None else None
        steps = inputs[4].tolist() if len(inputs) > 4 else [1] * len(starts)
    else:
        starts, ends = attributes["starts"], attributes["ends"]
        axes, steps = attributes.get("axes"), [1] * len(attributes["starts"])
    for axis, start, end, step in zip(
        axes or range(len(starts)), starts, ends, steps, strict=False
    ):
        axis = axis % x.ndim
        places = list(range(x.shape[axis]))[_bounds(start, end, step, x.shape[axis])]
        x = x.index_select(axis, torch.tensor(places, dtype=torch.long))
    return x


def _bounds(start: int, end: int, step: int, size: int) -> slice:
    if step < 0 and end < -size:
        return slice(start, None, step)
    return slice(start, end, step)


def _gather(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    """An index that depends on the picture has the slope between its two neighbours."""
    x, index = inputs
    axis = attributes.get("axis", 0) % x.ndim
    places = index.detach().long()
    size = x.shape[axis]

    def take(at: Tensor) -> Tensor:
        flat: Tensor = x.float().index_select(axis, at.reshape(-1))
        return flat.reshape(*x.shape[:axis], *at.shape, *x.shape[axis + 1 :])

    hard = take(places % size)
    if not index.requires_grad:
        return hard
    slope = take((places + 1) % size).detach() - hard.detach()
    move = (index - index.detach()).reshape(*index.shape, *[1] * (x.ndim - axis - 1))
    return hard + slope * move


def _reshape(inputs: list[Any], _: dict[str, Any]) -> Tensor:
    x, shape = inputs[0], inputs[1].tolist()
    return x.reshape([x.shape[place] if size == 0 else size for place, size in enumerate(shape)])


def _squeeze(inputs: list[Any], attributes: dict[str, Any], out: bool) -> Tensor:
    x = inputs[0]
    given = inputs[1].tolist() if len(inputs) > 1 else attributes.get("axes")
    if out:
        axes = [a for a in range(x.ndim) if x.shape[a] == 1] if given is None else given
        drop = {axis % x.ndim for axis in axes}
        return x.reshape([size for axis, size in enumerate(x.shape) if axis not in drop])
    rank = x.ndim + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


def _flatten(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x, axis = inputs[0], attributes.get("axis", 1)
    axis = axis % x.ndim if axis < 0 else axis
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, -1)


def _split(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    x, axis = inputs[0], attributes.get("axis", 0)
    sizes = inputs[1].tolist() if len(inputs) > 1 else attributes.get("split")
    if sizes is None:
        raise Unsupported("no gradients of such a split")
    return list(x.split(sizes, axis))


def _pad(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    x = inputs[0]
    pads = inputs[1].tolist() if len(inputs) > 1 else attributes["pads"]
    if len(inputs) > 3 or attributes.get("mode", b"constant") != b"constant":
        raise Unsupported("no gradients of such padding")
    half = len(pads) // 2
    flat = [each for axis in reversed(range(half)) for each in (pads[axis], pads[axis + half])]
    return F.pad(x, flat)


def _top(inputs: list[Any], attributes: dict[str, Any]) -> list[Tensor]:
    x, count = inputs[0].float(), int(inputs[1].reshape(-1)[0])
    largest = bool(attributes.get("largest", 1))
    values, places = x.topk(count, attributes.get("axis", -1), largest)
    return [values, places.float() + 0 * values]


def _modulo(inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
    a, b = _floats(inputs)
    hard = torch.fmod(a, b) if attributes.get("fmod") else torch.remainder(a, b)
    return through(hard, a)


def _any_of(inputs: list[Any], hard: Callable[[Tensor, Tensor], Tensor], sign: float) -> Tensor:
    a, b = _floats(inputs)
    soft = (a - b).abs() if sign == 0 else a + b
    return through(hard(a != 0, b != 0).float(), soft)


_ONE: dict[str, Callable[[list[Any], dict[str, Any]], Tensor | list[Tensor]]] = {
    "Add": lambda i, a: torch.add(*_floats(i)),
    "Sub": lambda i, a: torch.sub(*_floats(i)),
    "Mul": _multiply,
    "Div": lambda i, a: torch.div(*_floats(i)),
    "Pow": lambda i, a: leaky(torch.pow(*_floats(i)), i[0].float()),
    "Mod": _modulo,
    "Sum": lambda i, a: sum(_floats(i)[1:], start=_floats(i)[0]),
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
    "Identity": lambda i, a: i[0],
    "Dropout": lambda i, a: i[0],
    "LeakyRelu": lambda i, a: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "Elu": lambda i, a: F.elu(i[0], a.get("alpha", 1.0)),
    "Softmax": lambda i, a: leaky(i[0].softmax(a.get("axis", -1)), i[0]),
    "ArgMax": _arg,
    "ArgMin": lambda i, a: _arg(i, a, -1),
    "TopK": _top,
    "AveragePool": lambda i, a: _pool(i, a, "Mean"),
    "MaxPool": lambda i, a: _pool(i, a, "Max"),
    "GlobalAveragePool": lambda i, a: i[0].mean((2, 3), keepdim=True),
    "GlobalMaxPool": lambda i, a: i[0].amax((2, 3), keepdim=True),
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda i, a: torch.matmul(*_floats(i)),
    "BatchNormalization": _normalised,
    "Concat": lambda i, a: torch.cat(_floats(i), a["axis"]),
    "Slice": _slice,
    "Gather": _gather,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": lambda i, a: _squeeze(i, a, True),
    "Unsqueeze": lambda i, a: _squeeze(i, a, False),
    "Transpose": lambda i, a: i[0].permute(a.get("perm", list(range(i[0].ndim))[::-1])),
    "Expand": lambda i, a: i[0] + torch.zeros(i[1].tolist()),
    "Tile": lambda i, a: i[0].repeat(i[1].tolist()),
    "Split": _split,
    "Pad": _pad,
    "IsNaN": lambda i, a: through(i[0].isnan().float(), 0 * i[0].nan_to_num()),
    "IsInf": lambda i, a: through(i[0].isinf().float(), 0 * i[0].nan_to_num()),
    **{
        f"Reduce{how}": _reduce(how)
        for how in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare")
    },
}
