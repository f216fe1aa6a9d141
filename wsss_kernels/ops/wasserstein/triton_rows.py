"""Both ends of the Triton launchers: centred and unit rows of both sides in one launch, and the gradients of the inputs in another one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import _row_blocks, _unit_backward_kernel, _unit_kernel, accumulator, launch


@triton.jit
def _rows(rows_ptr, centre_ptr, square_ptr, sem_x, sem_y, unit_ptr, norm_ptr, first, second, depth, semantic,
          SEMANTIC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Both sides, one above the other: rows less the centre in place, their squares; unit semantic rows and norms."""
    side = tl.program_id(1).to(tl.int64)
    skip, count = side * first, tl.where(side == 0, first, second)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, BK)
    square = tl.zeros((BM,), rows_ptr.dtype.element_ty)
    for start in range(0, depth, BK):
        inside = (row < count)[:, None] & (start + column < depth)[None, :]
        at = rows_ptr + (skip + row)[:, None] * depth + start + column[None, :]
        centre = tl.load(centre_ptr + start + column, mask=start + column < depth, other=0.0)
        x = tl.where(inside, tl.load(at, mask=inside, other=0.0) - centre[None, :], 0.0)
        tl.store(at, x, mask=inside)
        square += tl.sum(x * x, axis=1)
    tl.store(square_ptr + skip + row, square, mask=row < count)
    if SEMANTIC:
        if side == 0:
            _unit_kernel(sem_x, unit_ptr, norm_ptr, count, semantic, BM, BK)
        else:
            _unit_kernel(sem_y, unit_ptr + skip * semantic, norm_ptr + skip, count, semantic, BM, BK)


@triton.jit
def _half(rows_ptr, gathered_ptr, total, out_ptr, row, count, features, BK: tl.constexpr):
    """2 (x Σα − α y) of μ or σ."""
    column = tl.arange(0, BK)
    for start in range(0, features, BK):
        inside = (row < count)[:, None] & (start + column < features)[None, :]
        at = row[:, None] * features * 2 + start + column[None, :]
        value = tl.load(rows_ptr + at, mask=inside, other=0.0) * total[:, None] - tl.load(gathered_ptr + at, mask=inside, other=0.0)
        out = out_ptr + row[:, None] * features + start + column[None, :]
        tl.store(out, (2 * value).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _side_gradients(rows_ptr, gathered_ptr, total_ptr, unit_ptr, norm_ptr, mixed_ptr, dsem, dmu, dsigma, count, features, semantic,
                    SEMANTIC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.load(total_ptr + row, mask=row < count, other=0.0)
    _half(rows_ptr, gathered_ptr, total, dmu, row, count, features, BK)
    _half(rows_ptr + features, gathered_ptr + features, total, dsigma, row, count, features, BK)
    if SEMANTIC:
        _unit_backward_kernel(unit_ptr, norm_ptr, mixed_ptr, dsem, count, semantic, BM, BK)


@triton.jit
def _gradients(rows_ptr, gathered_ptr, total_ptr, unit_ptr, norm_ptr, mixed_ptr, dsem_x, dmu_x, dsigma_x, dsem_y, dmu_y, dsigma_y, first, second,
               features, semantic, SEMANTIC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """The gradients of both sides from what the products gathered, which lies one side above the other."""
    if tl.program_id(1) == 0:
        _side_gradients(rows_ptr, gathered_ptr, total_ptr, unit_ptr, norm_ptr, mixed_ptr, dsem_x, dmu_x, dsigma_x, first, features, semantic,
                        SEMANTIC, BM, BK)  # fmt: skip
    else:
        skip = tl.program_id(1).to(tl.int64) * first
        wide, deep = skip * features * 2, skip * semantic
        _side_gradients(rows_ptr + wide, gathered_ptr + wide, total_ptr + skip, unit_ptr + deep, norm_ptr + skip, mixed_ptr + deep,
                        dsem_y, dmu_y, dsigma_y, second, features, semantic, SEMANTIC, BM, BK)  # fmt: skip


class Sides(NamedTuple):
    """Both sides, x above y: centred rows [μ, σ] and their squares, unit semantic rows and their norms; and how many are x."""

    rows: Tensor
    square: Tensor
    unit: Tensor
    norm: Tensor
    first: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.first, len(self.rows) - self.first

    def products(self, own: slice, product: Tensor, cosine: Tensor | None = None) -> None:
        """x·yᵀ and ŝx·ŝyᵀ of some rows of x."""
        torch.mm(self.rows[own], self.rows[self.first :].T, out=product)
        if cosine is not None:
            torch.mm(self.unit[own], self.unit[self.first :].T, out=cosine)


def both_sides(path: str, sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y) -> Sides:
    """Both sides less their common mean, so that an offset of the batch costs no accuracy; without semantic rows if `sem_x` is None."""
    (first, width), second, kind = mu_x.shape, len(mu_y), accumulator(mu_x.dtype)
    rows = mu_x.new_empty((first + second, 2 * width), dtype=kind)
    torch.cat((mu_x, mu_y), out=rows[:, :width])
    torch.cat((sigma_x, sigma_y), out=rows[:, width:])
    centre, square = rows.mean(0), rows.new_empty(len(rows))
    unit, norm, semantic = rows, square, 0
    if sem_x is not None:
        semantic = sem_x.shape[1]
        unit, norm = rows.new_empty(len(rows), semantic), rows.new_empty(len(rows))
        sem_x, sem_y = sem_x.contiguous(), sem_y.contiguous()
    blocks = _row_blocks(max(2 * width, semantic))
    launch(f"{path}.rows", _rows, (triton.cdiv(max(first, second), blocks["BM"]), 2), rows, centre, square, *((rows, rows) if sem_x is None else (sem_x, sem_y)),
           unit, norm, first, second, 2 * width, semantic, SEMANTIC=sem_x is not None, **blocks)  # fmt: skip
    return Sides(rows, square, unit, norm, first)


def gradients(
    path: str, sides: Sides, gathered: Tensor, total: Tensor, mixed: Tensor | None, like: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients of tensors `like`: (sem, mu, sigma) of x and of y, or without sem."""
    out = tuple(t.new_empty(t.shape) for t in like)
    first, second = sides.shape
    features, semantic = sides.rows.shape[1] // 2, 0 if mixed is None else mixed.shape[1]
    given = out if mixed is not None else (out[0], *out[:2], out[0], *out[2:])
    blocks = _row_blocks(max(features, semantic))
    launch(path, _gradients, (triton.cdiv(max(first, second), blocks["BM"]), 2), sides.rows, gathered, total, sides.unit, sides.norm,
           gathered if mixed is None else mixed, *given, first, second, features, semantic, SEMANTIC=mixed is not None, **blocks)  # fmt: skip
    return out
