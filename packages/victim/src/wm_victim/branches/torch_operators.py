"""Operators of ONNX in torch that have gradients of their own, and sums that share one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Run = Callable[[list[Any], dict[str, Any]], Tensor | list[Tensor]]
Table = dict[str, Run]


class Unsupported(ValueError):
    """An operator without a surrogate here."""


def through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of one, with the gradient of the other."""
    return soft + (hard - soft).detach()


def floats(inputs: Sequence[Any]) -> list[Tensor]:
    """Those inputs that are there, as float32."""
    return [each.float() for each in inputs if each is not None]


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
        keep = bool(attributes.get("keepdims", 1))
        mean = x.mean(axes, keepdim=keep)
        if how == "Mean":
            return mean
        total = x.sum(axes, keepdim=keep)
        if how == "Sum":
            return total
        if how == "L1":
            return x.abs().sum(axes, keepdim=keep)
        if how in ("L2", "SumSquare"):
            squares = x.square().sum(axes, keepdim=keep)
            return squares if how == "SumSquare" else squares.clamp(min=1e-12).sqrt()
        if how == "Prod":
            hard = x.detach()
            for axis in axes[::-1]:
                hard = hard.prod(axis, keepdim=keep)
            return through(hard, total)
        extreme = (torch.amax if how == "Max" else torch.amin)(x, axes, keepdim=keep)
        return extreme + 0.1 * (mean - mean.detach())

    return run


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
    with_pad = bool(attributes.get("count_include_pad", 0))
    return F.avg_pool2d(x, window, strides, (top, left), count_include_pad=with_pad)


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
    a, b, *c = floats(inputs)
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
    if given is None:
        raise Unsupported("no gradients of such axes")
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


PLAIN: Table = {
    "Add": lambda i, a: torch.add(*floats(i)),
    "Sub": lambda i, a: torch.sub(*floats(i)),
    "Div": lambda i, a: torch.div(*floats(i)),
    "Sum": lambda i, a: sum(floats(i)[1:], start=floats(i)[0]),
    "Identity": lambda i, a: i[0],
    "Dropout": lambda i, a: i[0],
    "LeakyRelu": lambda i, a: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "Elu": lambda i, a: F.elu(i[0], a.get("alpha", 1.0)),
    "TopK": _top,
    "AveragePool": lambda i, a: _pool(i, a, "Mean"),
    "MaxPool": lambda i, a: _pool(i, a, "Max"),
    "GlobalAveragePool": lambda i, a: i[0].mean((2, 3), keepdim=True),
    "GlobalMaxPool": lambda i, a: i[0].amax((2, 3), keepdim=True),
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda i, a: torch.matmul(*floats(i)),
    "BatchNormalization": _normalised,
    "Concat": lambda i, a: torch.cat(floats(i), a["axis"]),
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
    **{
        f"Reduce{how}": _reduce(how)
        for how in ("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2", "SumSquare")
    },
}
