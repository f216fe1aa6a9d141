"""Sinkhorn normalisation: the matrix itself, or only the two vectors that normalise it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

SINKHORN_OP = Operator("sinkhorn", backends=(Backend("cuda"), Backend("triton"), Backend("cpu")))
SCALING_OP = Operator("sinkhorn_scaling", backends=(Backend("cuda"), Backend("triton"), Backend("cpu")))

_TRITON = f"{__package__}.triton_impl"


def _fake_fwd(matrix, num_iter):
    batch, n = math.prod(matrix.shape[:-2]), matrix.shape[-1]
    return matrix.new_empty(matrix.shape), matrix.new_empty(batch, 2 * num_iter, n, dtype=torch.float64)


_fwd = SINKHORN_OP.raw_op("sinkhorn_fwd(Tensor matrix, int num_iter) -> (Tensor, Tensor)", _fake_fwd, triton=_TRITON)
_bwd = SINKHORN_OP.raw_op(
    "sinkhorn_bwd(Tensor grad, Tensor matrix, Tensor scales) -> Tensor",
    lambda grad, matrix, scales: torch.empty_like(matrix, memory_format=torch.contiguous_format),
    triton=_TRITON,
)
_scaling = SCALING_OP.raw_op(
    "sinkhorn_scaling_fwd(Tensor matrix, int num_iter) -> (Tensor, Tensor)",
    lambda matrix, num_iter: tuple(matrix.new_empty(matrix.shape[:-1], dtype=_args.accumulator(matrix.dtype)) for _ in range(2)),
    triton=_TRITON,
)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, num_iter, backend):
        result, scales = _fwd[backend](matrix, num_iter)
        ctx.save_for_backward(matrix, scales)
        ctx.backend = backend
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _bwd[ctx.backend](grad, *ctx.saved_tensors), None, None


def _checked(op: str, matrix: Tensor, num_iter: int) -> int:
    _args.tensor(op, "matrix", matrix, "…×N×N", spatial=2)
    _args.same(op, "the rows", matrix.shape[-2], "the columns of matrix", matrix.shape[-1], "number")
    return _args.integer(op, "num_iter", num_iter, 0)


def sinkhorn(matrix: Tensor, num_iter: int = 3, *, backend: str | None = None) -> Tensor:
    """Sinkhorn normalisation: `num_iter` rounds of columns, then rows, each divided by its sum (M4 section 3.5.5).

    No epsilon: a row or column whose sum is below the smallest normal float32 has nothing to normalise and stays 0.

    Args:
        matrix: `Tensor[..., N, N]`, any floating type. Entries must be ≥ 0: not checked, since a check would stop a GPU.
        num_iter: number of rounds, ≥ 0.
        backend: `"cuda"`, `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[..., N, N]` in the dtype of `matrix` (float32 under autocast), whose rows sum to 1 and columns nearly so.

    Gradient: with respect to `matrix`, through every round exactly; 0 in empty rows and columns.

    Raises:
        TypeError: not a floating-point tensor, `num_iter` not an int.
        ValueError: not square, N = 0, `num_iter` < 0.
    """
    num_iter = _checked("sinkhorn", matrix, num_iter)
    (matrix,) = _args.align("sinkhorn", ("matrix",), (matrix,), autocast="fp32")
    chosen = SINKHORN_OP.resolve((matrix,), backend)
    if chosen == "reference":
        return reference.sinkhorn(matrix, num_iter)
    (wide,) = _args.widen(chosen, matrix)
    return _args.rounded(apply(_Sinkhorn, wide, num_iter, chosen), matrix.dtype)


def sinkhorn_scaling(matrix: Tensor, num_iter: int = 3, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The vectors (row, col) with `sinkhorn(matrix, num_iter) = diag(row) · matrix · diag(col)`; nothing N×N is written.

    Args:
        matrix: `Tensor[..., N, N]`, any floating type, entries ≥ 0 (not checked).
        num_iter: number of rounds, ≥ 0.
        backend: `"cuda"`, `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        Two `Tensor[..., N]`, in the dtype of `matrix`, float32 for half types. Empty rows and columns have 0.

    Gradient: none; use `sinkhorn` or `random_walk`.

    Raises:
        TypeError: not a floating-point tensor, `num_iter` not an int.
        ValueError: not square, N = 0, `num_iter` < 0.
        NotImplementedError: `matrix` requires a gradient.
    """
    num_iter = _checked("sinkhorn_scaling", matrix, num_iter)
    _args.no_gradient("sinkhorn_scaling", matrix=matrix)
    (matrix,) = _args.align("sinkhorn_scaling", ("matrix",), (matrix,), autocast="fp32")
    chosen = SCALING_OP.resolve((matrix,), backend)
    if chosen == "reference":
        return reference.sinkhorn_scaling(matrix, num_iter)
    (wide,) = _args.widen(chosen, matrix)
    if num_iter == 0:
        ones = wide.new_ones(wide.shape[:-1], dtype=_args.accumulator(wide.dtype))
        return ones, ones.clone()
    return _scaling[chosen](wide, num_iter)
