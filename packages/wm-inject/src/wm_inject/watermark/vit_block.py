"""Encoder blocks of the injector: timm's, run over tokens as rows of one matrix.

timm's own `forward` keeps tokens as ``(N, L, D)``. With ``(N * L, D)`` every linear layer is one
matrix product with its bias, in torch and as one Gemm node in ONNX, and ONNX Runtime keeps the
queries, keys and values apart without extra copies. The mathematics and the weights are timm's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn


def make_block(width: int, heads: int) -> Block:
    """A pre-norm block of timm with an MLP of four times the width."""
    return Block(width, heads, mlp_ratio=4, qkv_bias=True)


def run_blocks(blocks: Iterable[nn.Module], tokens: Tensor) -> Tensor:
    """Run blocks of `make_block` one after the other: ``(N, L, D)`` to the same shape."""
    length, width = tokens.shape[1:]
    x = tokens.reshape(-1, width)  # (N * L, D)
    block: Any
    for block in blocks:
        x = x + attend(block.attn, block.norm1(x), length)
        x = x + block.mlp(block.norm2(x))
    return x.reshape(-1, length, width)


def attend(attention: Any, x: Tensor, length: int) -> Tensor:
    """Self-attention of timm's module over rows ``(N * L, D)``, L = ``length``.

    Plain softmax(q k^T) v: half the time of the fused kernel in bf16 on CPUs at these lengths.
    """
    heads, size = attention.num_heads, attention.head_dim
    parts = attention.qkv(x).chunk(3, dim=-1)
    q, k, v = (part.reshape(-1, length, heads, size).transpose(1, 2) for part in parts)
    scores = (q * attention.scale) @ k.transpose(-2, -1)  # (N, heads, L, L)
    mixed = scores.softmax(dim=-1) @ v  # (N, heads, L, size)
    out: Tensor = attention.proj(mixed.transpose(1, 2).reshape(-1, heads * size))
    return out
