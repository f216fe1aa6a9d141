"""Criss-cross attention: the public function, its gradient, and CCNet's module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

CRISS_CROSS_OP = Operator("criss_cross_attention", backends=(Backend("triton"), Backend("cpu")))

_fwd = CRISS_CROSS_OP.raw_op(
    "criss_cross_fwd(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)",
    lambda query, key, value: (value.new_empty(value.shape), query.new_empty(query.shape[0], 2, *query.shape[2:])),
    triton=f"{__package__}.triton_impl",
    triton_fake=lambda query, key, value: (
        torch.empty_like(value),
        query.new_empty((query.shape[0], 2, *query.shape[2:]), dtype=_args.accumulator(query.dtype)),
    ),
)
_bwd = CRISS_CROSS_OP.raw_op(
    "criss_cross_bwd(Tensor query, Tensor key, Tensor value, Tensor result, Tensor statistics, Tensor grad) -> (Tensor, Tensor, Tensor)",
    lambda query, key, value, *rest: tuple(t.new_empty(t.shape) for t in (query, key, value)),
    triton=f"{__package__}.triton_impl",
    triton_fake=lambda *maps: tuple(torch.empty_like(t) for t in maps[:3]),
)


class _CrissCross(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, backend):
        result, statistics = _fwd[backend](query, key, value)
        ctx.save_for_backward(query, key, value, result, statistics)
        ctx.backend = backend
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_bwd[ctx.backend](*ctx.saved_tensors, grad), None


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, *, backend: str | None = None) -> Tensor:
    """Attention of every pixel over its row and its column: H + W − 1 keys, its own position once, no scaling (M2 Eq. 1, CCNet).

    Args:
        query, key: `Tensor[B, C', H, W]`, any floating type.
        value: `Tensor[B, C, H, W]`, same dtype and device.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[B, C, H, W]` in the dtype of `query`, accumulated in float32 or better.

    Gradient: with respect to `query`, `key` and `value`. The weights are not stored, only two statistics per pixel.

    Raises:
        TypeError: not tensors, integer tensors, mixed dtypes or devices.
        ValueError: wrong rank, an empty map, sizes that differ.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        _args.tensor("criss_cross_attention", name, t, "B×C×H×W", spatial=2)
    _args.same("criss_cross_attention", "query", query.shape, "key", key.shape, "shape")
    _args.same("criss_cross_attention", "query", query.shape[0], "value", value.shape[0], "batch size")
    _args.same("criss_cross_attention", "query", query.shape[2:], "value", value.shape[2:], "height and width")
    query, key, value = _args.align("criss_cross_attention", ("query", "key", "value"), (query, key, value))
    chosen = CRISS_CROSS_OP.resolve((query, key, value), backend)
    if chosen == "reference":
        return reference.criss_cross_attention(query, key, value)
    return _args.rounded(apply(_CrissCross, *_args.widen(chosen, query, key, value), chosen), query.dtype)


class CrissCrossAttention(nn.Module):
    """Drop-in for CCNet's `CrissCrossAttention`: same constructor, same parameters, `forward(x)` = gamma · attention + x.

    Args:
        in_dim: number of channels, at least 8 (queries and keys have in_dim // 8).
    """

    def __init__(self, in_dim: int):
        super().__init__()
        _args.integer("CrissCrossAttention", "in_dim", in_dim, 8)
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """`Tensor[B, in_dim, H, W]` → the same shape."""
        return self.gamma * criss_cross_attention(self.query_conv(x), self.key_conv(x), self.value_conv(x)) + x
