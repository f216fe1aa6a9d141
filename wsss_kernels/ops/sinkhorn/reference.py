"""Sinkhorn normalisation in plain PyTorch."""

from __future__ import annotations

import torch

EMPTY = torch.finfo(torch.float32).tiny
"""A row or column whose sum is smaller has nothing to normalise and stays 0; in float64 too, so that both precisions decide alike."""


def divide_by_sum(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    total = matrix.sum(dim, keepdim=True)
    empty = total < EMPTY
    return torch.where(empty, 0, matrix / torch.where(empty, 1, total))


def sinkhorn(matrix: torch.Tensor, num_iter: int = 3) -> torch.Tensor:
    """`num_iter` rounds of columns, then rows, each divided by its sum (M4 section 3.5.5).

    Args:
        matrix: Tensor[..., N, N], non-negative.

    Rows and columns that end empty have gradient 0.

    Returns:
        Tensor[..., N, N] in the dtype of `matrix`; half types are computed in float32.
    """
    result = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if result.requires_grad:
        row, col = sinkhorn_scaling(result.detach(), num_iter)
        result = torch.where((row == 0).unsqueeze(-1) | (col == 0).unsqueeze(-2), result.detach(), result)
    for _ in range(num_iter):
        result = divide_by_sum(divide_by_sum(result, -2), -1)
    return result.to(matrix.dtype)


def sinkhorn_scaling(matrix: torch.Tensor, num_iter: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors (row, col) with `sinkhorn(matrix) = diag(row) · matrix · diag(col)`.

    A sum of the normalised matrix divides the scaling that produced it, so the scalings are products of reciprocal sums.
    """
    result = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    row, col = torch.ones_like(result[..., 0]), torch.ones_like(result[..., 0, :])
    for _ in range(num_iter):
        for dim in (-2, -1):
            total = (row.unsqueeze(-1) * result * col.unsqueeze(-2)).sum(dim)
            inverse = torch.where(total < EMPTY, 0, 1 / torch.where(total < EMPTY, 1, total))
            row, col = (row, col * inverse) if dim == -2 else (row * inverse, col)
    return row, col
