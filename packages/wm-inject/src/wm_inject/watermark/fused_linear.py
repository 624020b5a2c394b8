"""Linear layers fused with what follows them, and norms, with fixed weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm:
    """A layer norm in float32 over rows ``(M, D)``."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight.float(), bias.float(), eps

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the rows."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class FusedLinear:
    """A linear layer ``(M, K)`` to ``(M, N)``, with what follows it in the same pass.

    The operators of oneDNN are those that torch.compile writes into its CPU code. They have no
    public name; where they are missing the public ones do the same, more slowly. Products are of
    ``dtype``, sums float32; ``rows`` is the M for which the weight is packed, others run as well.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, rows: int) -> None:
        self.dtype, self.bias = dtype, bias.to(dtype, copy=True)
        weight = weight.to(dtype, copy=True).contiguous()
        self.packed = packed_weight(weight, rows)
        self.weight = weight.t().contiguous() if self.packed is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """The product, in ``dtype``."""
        return self._product(x, "none", "")

    def gelu(self, x: Tensor) -> Tensor:
        """The exact GELU, by erf, of the product."""
        return self._product(x, "gelu", "none")

    def add(self, x: Tensor, to: Tensor) -> Tensor:
        """The product and the float32 rows ``to``, which may be overwritten, in float32."""
        if self.packed is None or self.dtype != torch.float32:
            return to.add_(self(x))
        ops = torch.ops.mkldnn
        out: Tensor = ops._linear_pointwise.binary(x, to, self.packed, self.bias, "add")
        return out

    def _product(self, x: Tensor, after: str, form: str) -> Tensor:
        x = x.to(self.dtype)
        if self.packed is not None:
            ops = torch.ops.mkldnn
            fused: Tensor = ops._linear_pointwise(x, self.packed, self.bias, after, [], form)
            return fused
        assert self.weight is not None  # kept where nothing is packed
        out = torch.addmm(self.bias, x, self.weight)
        return F.gelu(out) if after == "gelu" else out


def packed_weight(weight: Tensor, rows: int) -> Tensor | None:
    """A weight ``(N, K)`` in oneDNN's own layout for products of ``rows`` rows, if it can."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    ops = torch.ops.mkldnn
    try:
        if weight.dtype == torch.bfloat16 and not ops._is_mkldnn_bf16_supported():
            return None
        packed: Tensor = ops._reorder_linear_weight(weight, rows)
        ops._linear_pointwise(weight.new_ones(1, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return packed
