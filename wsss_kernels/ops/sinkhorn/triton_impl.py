"""Triton kernels of Sinkhorn normalisation, and the passes over a matrix that the random walk shares.

A pass multiplies a matrix, or its transpose, with a vector: a program owns rows, so that sums have one order and nothing is added
atomically. Where the tiles of the matrix come from is the pass's argument: a function of the interface of `stored_tile` and what it
reads. Vectors are float64, as (tensor, elements per image), and None for ones: they are few, and the gradient is a small difference
of large terms made of them. Tiles, and the vectors that multiply them, are float32 (float64 for float64).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import accumulator, config, dot, launch, multiply_adds, power_of_2

_EMPTY = tl.constexpr(torch.finfo(torch.float32).tiny)
"""A sum below the smallest normal float32 has nothing to normalise, in float64 too."""


def tile_side(dtype: torch.dtype) -> int:
    """Columns per tile product of a pass. Stored and recomputed matrices have the same, hence the same order of summation."""
    return 32 if dtype == torch.float64 else 64


@triton.jit
def stored_tile(source, image, row, column, n, TURNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr):
    """M_ij of rows i and columns j, with TURNED M_ji; 0 outside of the matrix."""
    matrix, per_image, per_row, per_column = source
    if TURNED:
        at = row.to(tl.int64)[:, None] * per_column + column.to(tl.int64)[None, :] * per_row
    else:
        at = row.to(tl.int64)[:, None] * per_row + column.to(tl.int64)[None, :] * per_column
    return tl.load(matrix + image * per_image + at, mask=(row < n)[:, None] & (column < n)[None, :], other=0.0).to(kind)


@triton.jit
def low_rank_tile(source, image, row, column, n, TURNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr):
    """Σ_ρ u_ρi v_ρj, summed in float64 because the terms nearly cancel; 0 where the final row or column scaling is 0."""
    u, v, rank = source[:3]
    row_scaling, col_scaling = source[3:5], source[5:]
    k = tl.arange(0, 16)
    acc = tl.zeros((row.shape[0], column.shape[0]), tl.float64)
    for start in range(0, rank, 16):
        place = (image * rank + start + k) * n
        left = (row < n)[:, None] & (start + k < rank)[None, :]
        right = (column < n)[None, :] & (start + k < rank)[:, None]
        if TURNED:
            a = tl.load(v + place[None, :] + row[:, None], mask=left, other=0.0)
            b = tl.load(u + place[:, None] + column[None, :], mask=right, other=0.0)
        else:
            a = tl.load(u + place[None, :] + row[:, None], mask=left, other=0.0)
            b = tl.load(v + place[:, None] + column[None, :], mask=right, other=0.0)
        acc = dot(a, b, acc, "ieee")
    if len(row_scaling) > 0:
        if TURNED:
            alive = (vector(col_scaling, image, row, n) != 0)[:, None] & (vector(row_scaling, image, column, n) != 0)[None, :]
        else:
            alive = (vector(row_scaling, image, row, n) != 0)[:, None] & (vector(col_scaling, image, column, n) != 0)[None, :]
        acc = tl.where(alive, acc, 0.0)
    return acc.to(kind)


@triton.jit
def vector(given, image, at, n):
    """Entries of a vector of (tensor, elements per image), ones for None; 0 beyond n."""
    if given is None:
        value = (at < n).to(tl.float64)
    else:
        value = tl.load(given[0] + image * given[1] + at, mask=at < n, other=0.0)
    return value


@triton.jit
def _single(w, kind: tl.constexpr):
    """A vector as the first of 16 columns: tile products sum in one order, whatever the shape of the tile."""
    return tl.where(tl.arange(0, 16)[None, :] == 0, w[:, None], 0.0).to(kind)


@triton.jit
def _pass_kernel(out_ptr, out_per_image, source, weight, grad, grad_weight, scaling, add, normalised, n, blocks,
                 TILE: tl.constexpr, TURNED: tl.constexpr, INVERT: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr,
                 PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """d = M w (+ (M ∘ grad) grad_weight) + add, then 1/d or −d·scaling²; with `normalised` its rows: diag(1/d) M diag(w)."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, 16), tl.float64)
    for start in range(0, n, BN):
        column = start + tl.arange(0, BN)
        m = TILE(source, image, row, column, n, TURNED, kind, OPTIONS)
        if grad is None:
            w = _single(vector(weight, image, column, n), kind)
        else:
            g = stored_tile(grad, image, row, column, n, TURNED, kind, OPTIONS) * vector(grad_weight, image, column, n).to(kind)[None, :]
            if weight is not None:
                g += vector(weight, image, column, n).to(kind)[None, :]
            m *= g
            w = _single(vector(None, image, column, n), kind)
        total += dot(m, w, tl.zeros((BM, 16), kind), PRECISION).to(tl.float64)
    d = tl.sum(total, axis=1)
    before = vector(scaling, image, row, n)
    if INVERT:
        # The sum of the normalised matrix decides, which is the scaling that it had times this sum.
        empty = before * d < _EMPTY
        result = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, d))
    else:
        if add is not None:
            d += vector(add, image, row, n)
        result = -(d * before) * before
    tl.store(out_ptr + image * out_per_image + row, result, mask=row < n)
    if normalised is not None:
        for start in range(0, n, BN):
            column = start + tl.arange(0, BN)
            m = TILE(source, image, row, column, n, TURNED, kind, OPTIONS)
            value = result.to(kind)[:, None] * m * vector(weight, image, column, n).to(kind)[None, :]
            at = (image * n + row)[:, None] * n + column[None, :]
            inside = (row < n)[:, None] & (column < n)[None, :]
            tl.store(normalised + at, value.to(normalised.dtype.element_ty), mask=inside)


@triton.jit
def _low_rank_kernel(out_ptr, source, grad, row_scaling, col_scaling, n, blocks, kind: tl.constexpr, BM: tl.constexpr):
    """out = Σ_ρ u_ρ v_ρᵀ, plus row_i grad_ij col_j where grad is given."""
    image = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    tile = tl.program_id(0) % (blocks * blocks)
    row = (tile // blocks) * BM + tl.arange(0, BM)
    column = (tile % blocks) * BM + tl.arange(0, BM)
    value = low_rank_tile(source, image, row, column, n, False, tl.float64, None)
    if grad is not None:
        g = stored_tile(grad, image, row, column, n, False, tl.float64, None)
        value += vector(row_scaling, image, row, n)[:, None] * g * vector(col_scaling, image, column, n)[None, :]
    at = (image * n + row)[:, None] * n + column[None, :]
    tl.store(out_ptr + at, value.to(kind).to(out_ptr.dtype.element_ty), mask=(row < n)[:, None] & (column < n)[None, :])


def kind_of(dtype: torch.dtype) -> tl.dtype:
    """In which type the tiles of a matrix are multiplied."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def stored(matrix: Tensor) -> tuple:
    """The source of `stored_tile`, for a matrix B×N×N of any strides."""
    return (matrix, *matrix.stride())


def of(vectors: Tensor, index: int) -> tuple[Tensor, int]:
    """Vector `index` of every image, of contiguous `Tensor[B, count, N]`."""
    return vectors[:, index], vectors.stride(0)


class Matrix:
    """What passes go over: B matrices of N×N, by a tile function and what it reads."""

    def __init__(self, like: Tensor, source: tuple, tile=stored_tile, options=None):
        self.batch, self.n = like.shape[0], like.shape[-1]
        self.source, self.tile, self.options, self.side = source, tile, options, tile_side(like.dtype)
        self.kind, self.precision = kind_of(like.dtype), multiply_adds(accumulator(like.dtype))

    def blocks(self) -> dict[str, int]:
        """16 rows a program, so that even 784 tokens occupy 49 multiprocessors; tiles that are recomputed are square."""
        if self.tile is not stored_tile:
            return {"BM": self.side, "BN": self.side, "num_warps": 8}
        default = {"BM": 16, "BN": self.side, "num_warps": 4, "num_stages": 3}
        other = [{**default, "BM": bm, "num_warps": w} for bm, w in ((16, 2), (32, 4), (64, 4), (64, 8))]
        return config(f"matrix_pass/n{power_of_2(self.n)}", default, other)

    def run(self, path: str, out: tuple[Tensor, int], weight, *, turned=False, invert=False, grad=None, grad_weight=None, scaling=None,
            add=None, normalised=None) -> None:  # fmt: skip
        """One pass; see `_pass_kernel`."""
        meta = self.blocks()
        blocks = triton.cdiv(self.n, meta["BM"])
        launch(path, _pass_kernel, (self.batch * blocks,), *out, self.source, weight, grad, grad_weight, scaling, add, normalised,
               self.n, blocks, TILE=self.tile, TURNED=turned, INVERT=invert, kind=self.kind, OPTIONS=self.options,
               PRECISION=self.precision, **meta)  # fmt: skip

    def scale(self, path: str, scales: Tensor, rounds: int, normalised: Tensor | None = None) -> None:
        """Fills scales with col_1, row_1, col_2, ... of float64[B, ≥ 2·rounds, N]; rounds ≥ 1."""
        ones = (scales.new_ones(self.n), 0)
        for t in range(rounds):
            row, col = of(scales, 2 * t - 1) if t else None, of(scales, 2 * t - 2) if t else None
            self.run(path, of(scales, 2 * t), row or ones, turned=True, invert=True, scaling=col)
            last = normalised if t == rounds - 1 else None
            self.run(path, of(scales, 2 * t + 1), of(scales, 2 * t), invert=True, scaling=row, normalised=last)


class LowRank:
    """A gradient Σ_ρ u_ρ v_ρᵀ, as which every adjoint adds to the gradient of a matrix: the last 2·rounds terms are Sinkhorn's."""

    def __init__(self, scales: Tensor, terms: int, rounds: int):
        """scales: those of the forward pass, from its first vector on; terms: how many precede Sinkhorn's."""
        self.scales, self.terms, self.rounds = scales, terms, rounds
        self.rank = terms + 2 * rounds
        self.u, self.v = scales.new_empty(2, scales.shape[0], self.rank, scales.shape[-1]).unbind()

    def row(self, t: int) -> tuple[Tensor, int] | None:
        return of(self.scales, 2 * t - 1) if t else None

    def col(self, t: int) -> tuple[Tensor, int] | None:
        return of(self.scales, 2 * t - 2) if t else None

    def first(self) -> tuple:
        """Where the gradient of the last row sums goes, and that of the last column sums."""
        return of(self.u, self.terms), of(self.v, self.terms + 1)

    def rounds_adjoint(self, path: str, matrix: Matrix) -> None:
        """The adjoint of all rounds, once what `first` names is there."""
        if not self.rounds:
            return
        at, end = self.terms, self.terms + 2 * self.rounds
        self.v[:, at:end:2] = self.scales[:, 0 : 2 * self.rounds : 2].flip(1)
        self.u[:, at + 1 : end - 1 : 2] = self.scales[:, 1 : 2 * self.rounds - 1 : 2].flip(1)
        self.u[:, end - 1] = 1
        for t in range(self.rounds - 1, 0, -1):
            matrix.run(path, of(self.u, at + 2), of(self.v, at + 1), scaling=self.row(t))
            matrix.run(path, of(self.v, at + 3), of(self.u, at + 2), turned=True, scaling=self.col(t))
            at += 2

    def source(self) -> tuple:
        """The source of `low_rank_tile`. Whatever ended empty has gradient 0, although its entries are part of the first sums.

        Flat and without None: Triton 3.6 takes neither tuples in tuples that hold ones, nor None.
        """
        return self.u, self.v, self.rank, *(self.row(self.rounds) or ()), *(self.col(self.rounds) or ())

    def write(self, path: str, out: Tensor, grad: Tensor | None = None) -> Tensor:
        """The gradient of the matrix; with grad, row_i grad_ij col_j is added."""
        blocks = triton.cdiv(out.shape[-1], 32)
        given = None if grad is None else stored(grad)
        launch(path, _low_rank_kernel, (len(out) * blocks**2,), out, self.source(), given, self.row(self.rounds), self.col(self.rounds),
               out.shape[-1], blocks, kind=kind_of(out.dtype), BM=32, num_warps=4)  # fmt: skip
        return out


def _batch(matrix: Tensor) -> Tensor:
    """`…×N×N` as `B×N×N`."""
    return matrix.reshape(math.prod(matrix.shape[:-2]), *matrix.shape[-2:])


def _scales(matrix: Tensor, num_iter: int, normalised: Tensor | None) -> Tensor:
    """float64[B][2·rounds][N], column and row scalings of every round; writes diag(row)·matrix·diag(col) where it is wanted."""
    scales = matrix.new_empty(matrix.shape[0], 2 * num_iter, matrix.shape[-1], dtype=torch.float64)
    if num_iter:
        Matrix(matrix, stored(matrix)).scale("sinkhorn.triton", scales, num_iter, normalised)
    return scales


def sinkhorn_fwd(matrix: Tensor, num_iter: int) -> tuple[Tensor, Tensor]:
    flat, normalised = _batch(matrix), matrix.new_empty(matrix.shape)
    if not num_iter:
        normalised.copy_(matrix)
    return normalised, _scales(flat, num_iter, _batch(normalised))


def sinkhorn_scaling_fwd(matrix: Tensor, num_iter: int) -> tuple[Tensor, Tensor]:
    scales = _scales(_batch(matrix), num_iter, None)
    row, col = (scales[:, k].to(accumulator(matrix.dtype), copy=True).reshape(matrix.shape[:-1]) for k in (-1, -2))
    return row, col


def sinkhorn_bwd(grad: Tensor, matrix: Tensor, scales: Tensor) -> Tensor:
    shape, grad, matrix = matrix.shape, _batch(grad), _batch(matrix)
    out, rounds, path = torch.empty_like(matrix, memory_format=torch.contiguous_format), scales.shape[1] // 2, "sinkhorn.triton.backward"
    if not rounds:
        return out.copy_(grad).reshape(shape)
    scales = scales.contiguous()
    passes, low = Matrix(matrix, stored(matrix)), LowRank(scales, 0, rounds)
    of_rows, of_columns = low.first()
    passes.run(path, of_rows, None, grad=stored(grad), grad_weight=low.col(rounds), scaling=low.row(rounds))
    passes.run(path, of_columns, of_rows, turned=True, grad=stored(grad), grad_weight=low.row(rounds), scaling=low.col(rounds))
    low.rounds_adjoint(path, passes)
    return low.write(path, out, grad).reshape(shape)
