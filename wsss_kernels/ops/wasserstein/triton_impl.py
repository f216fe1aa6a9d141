"""Triton kernels of the Wasserstein distance, similarity and loss: tiles of pairs made from two products, nothing N×N is stored.

With x, y the centred rows [μ, σ] and ŝ the unit semantic rows, a tile of pairs needs x·yᵀ (D_2W) and ŝx·ŝyᵀ (cos and D_s); the rest
happens in registers. The loss works on score = ŝim − 1 = −(1 − cos)·exp(−q), q = lam·D_u/D_s, which is small where float32 is precise.

Backward, a strip of rows at a time: one kernel makes the pairs again and writes α = ∂/∂D_2W and β = ∂/∂cos of the strip, a second
one gathers α·y, αᵀ·x, β·ŝy, βᵀ·ŝx and the sums of α, so that dx = 2 (x Σα − α·y). With g = ∂/∂score and t = −g·score/D_s:
α = t·lam·a, β = g·exp(−q) + t·q/D_s, da = Σ t·lam·D_2W, db = Σ t·lam, dlam = Σ t·D_u, dτ = −Σ g·score/τ (the g of a row add up to 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, accumulator, config, dot, launch, precision, unit_rows, unit_rows_backward


@triton.jit
def _product(x_ptr, y_ptr, row, column, rows, columns, depth, BK: tl.constexpr, PRECISION: tl.constexpr):
    k = tl.arange(0, BK)
    acc = tl.zeros((row.shape[0], column.shape[0]), x_ptr.dtype.element_ty)
    for start in range(0, depth, BK):
        inside = start + k < depth
        x = tl.load(x_ptr + row[:, None] * depth + start + k[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        y = tl.load(y_ptr + column[None, :] * depth + start + k[:, None], mask=(column < columns)[None, :] & inside[:, None], other=0.0)
        acc = dot(x, y, acc, PRECISION)
    return acc


@triton.jit
def _squares(x_ptr, square_ptr, rows, depth, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """|x|² as the diagonal of a product, so that the distance of equal rows is exactly 0."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    acc = _product(x_ptr, x_ptr, row, row, rows, rows, depth, BK, PRECISION)
    tl.store(square_ptr + row, tl.sum(tl.where(row[:, None] == row[None, :], acc, 0.0), axis=1), mask=row < rows)


@triton.jit
def _distance(product, square_x, square_y, row, column, rows, columns):
    x = tl.load(square_x + row, mask=row < rows, other=0.0)
    y = tl.load(square_y + column, mask=column < columns, other=0.0)
    distance = x[:, None] + y[None, :] - 2 * product
    return tl.where(distance < 0, 0.0, distance)


@triton.jit
def _score(distance, cosine, norm_x, norm_y, constants_ptr, row, column, rows, columns):
    """(score, exp(−q), q, D_s, D_u, whether D_s is above its clamp) of a tile."""
    kind = cosine.dtype
    a, b, lam = (
        tl.load(constants_ptr).to(kind),
        tl.load(constants_ptr + 1).to(kind),
        tl.load(constants_ptr + 2).to(kind),
    )
    x = (tl.load(norm_x + row, mask=row < rows, other=1.0) > 0).to(kind)
    y = (tl.load(norm_y + column, mask=column < columns, other=1.0) > 0).to(kind)
    square = x[:, None] + y[None, :] - 2 * cosine
    far = square > 1e-12
    apart = tl.sqrt(tl.where(far, square, 1e-12))
    uncertain = a * distance + b
    q = lam * uncertain / apart
    decay = tl.exp2(-q * LOG2E)
    return (cosine - 1) * decay, decay, q, apart, uncertain, far


@triton.jit
def _pairs(x_ptr, y_ptr, square_x, square_y, sem_x, sem_y, norm_x, norm_y, constants_ptr, out_ptr, kept_product, kept_cosine, rows, columns,
           depth, semantic, SEMANTIC: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    product = _product(x_ptr, y_ptr, row, column, rows, columns, depth, BK, PRECISION)
    value = _distance(product, square_x, square_y, row, column, rows, columns)
    inside, at = (row < rows)[:, None] & (column < columns)[None, :], row[:, None] * columns + column[None, :]
    if SEMANTIC:
        cosine = _product(sem_x, sem_y, row, column, rows, columns, semantic, BK, PRECISION)
        if KEEP:
            tl.store(kept_product + at, product, mask=inside)
            tl.store(kept_cosine + at, cosine, mask=inside)
        score, _decay, _q, _apart, _du, _far = _score(value, cosine, norm_x, norm_y, constants_ptr, row, column, rows, columns)
        value = score + 1
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _loss(x_ptr, y_ptr, square_x, square_y, sem_x, sem_y, norm_x, norm_y, constants_ptr, by_row, by_column, kept_product, kept_cosine, count, depth,
          semantic, groups, shares, span,
          KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Running maxima and sums of exponentials of a group of row blocks against a share of the columns, by row and by column.

    by_row: (maximum, sum, score of the own partner) × share × row; by_column: (maximum, sum) × group × column.
    """
    kind = x_ptr.dtype.element_ty
    group, share = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tau = tl.load(constants_ptr + 3).to(kind)
    for first in range(group * BM, count, groups * BM):
        row = first + tl.arange(0, BM).to(tl.int64)
        top, total, own = tl.full((BM,), float("-inf"), kind), tl.zeros((BM,), kind), tl.zeros((BM,), kind)
        for start in range(share * span, tl.minimum(share * span + span, count), BN):
            column = start + tl.arange(0, BN).to(tl.int64)
            product = _product(x_ptr, y_ptr, row, column, count, count, depth, BK, PRECISION)
            cosine = _product(sem_x, sem_y, row, column, count, count, semantic, BK, PRECISION)
            if KEEP:
                at = row[:, None] * count + column[None, :]
                inside = (row < count)[:, None] & (column < count)[None, :]
                tl.store(kept_product + at, product, mask=inside)
                tl.store(kept_cosine + at, cosine, mask=inside)
            distance = _distance(product, square_x, square_y, row, column, count, count)
            score, _decay, _q, _apart, _du, _far = _score(distance, cosine, norm_x, norm_y, constants_ptr, row, column, count, count)
            own += tl.sum(tl.where(row[:, None] == column[None, :], score, 0.0), axis=1)
            of_row = tl.where((column < count)[None, :], score, float("-inf"))
            above = tl.maximum(top, tl.max(of_row, axis=1))
            total = total * tl.exp2((top - above) / tau * LOG2E) + tl.sum(tl.exp2((of_row - above[:, None]) / tau * LOG2E), axis=1)
            top = above
            of_column = tl.where((row < count)[:, None], score, float("-inf"))
            at = by_column + group * count + column
            later = (column < count) & (first > group * BM)
            before = tl.load(at, mask=later, other=float("-inf"))
            above = tl.maximum(before, tl.max(of_column, axis=0))
            rest = tl.load(at + groups * count, mask=later, other=0.0) * tl.exp2((before - above) / tau * LOG2E)
            rest += tl.sum(tl.exp2((of_column - above[None, :]) / tau * LOG2E), axis=0)
            tl.store(at, above, mask=column < count)
            tl.store(at + groups * count, rest, mask=column < count)
        at = by_row + share * count + row
        tl.store(at, top, mask=row < count)
        tl.store(at + shares * count, total, mask=row < count)
        tl.store(at + 2 * shares * count, own, mask=row < count)
        tl.debug_barrier()  # the next block of rows reads what other threads of this program wrote


@triton.jit
def _weights(x_ptr, y_ptr, square_x, square_y, sem_x, sem_y, norm_x, norm_y, constants_ptr, given_ptr, factor_ptr, stats_ptr, kept_product, kept_cosine,
             alpha_ptr, beta_ptr, sums_ptr, begin, rows, columns, depth, semantic, s_row, s_column,
             LOSS: tl.constexpr, KEPT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """α and β of the rows from `begin` on; per program its share of the sums for a, b, lam and τ."""
    kind = x_ptr.dtype.element_ty
    row = begin + tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if KEPT:
        at = row[:, None] * columns + column[None, :]
        product = tl.load(kept_product + at, mask=inside, other=0.0)
        cosine = tl.load(kept_cosine + at, mask=inside, other=0.0)
    else:
        product = _product(x_ptr, y_ptr, row, column, rows, columns, depth, BK, PRECISION)
        cosine = _product(sem_x, sem_y, row, column, rows, columns, semantic, BK, PRECISION)
    distance = _distance(product, square_x, square_y, row, column, rows, columns)
    score, decay, q, apart, uncertain, far = _score(distance, cosine, norm_x, norm_y, constants_ptr, row, column, rows, columns)
    if LOSS:
        tau = tl.load(constants_ptr + 3).to(kind)
        top_x = tl.load(stats_ptr + row, mask=row < rows, other=0.0)
        sum_x = tl.load(stats_ptr + columns + row, mask=row < rows, other=1.0)
        top_y = tl.load(stats_ptr + 2 * columns + column, mask=column < columns, other=0.0)
        sum_y = tl.load(stats_ptr + 3 * columns + column, mask=column < columns, other=1.0)
        g = tl.exp2((score - top_x[:, None]) / tau * LOG2E) / sum_x[:, None]
        g += tl.exp2((score - top_y[None, :]) / tau * LOG2E) / sum_y[None, :]
        g = (g - tl.where(row[:, None] == column[None, :], 2.0, 0.0)) * (tl.load(factor_ptr) / tau)
    else:
        g = tl.load(given_ptr + row[:, None] * s_row + column[None, :] * s_column, mask=inside, other=0.0).to(kind)
    g = tl.where(inside, g, 0.0)
    through = -g * score / apart
    slope = through * tl.load(constants_ptr + 2).to(kind)
    at = (row - begin)[:, None] * columns + column[None, :]
    tl.store(alpha_ptr + at, slope * tl.load(constants_ptr).to(kind), mask=inside)
    tl.store(beta_ptr + at, g * decay + tl.where(far, through * q / apart, 0.0), mask=inside)
    at = sums_ptr + 4 * (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    tl.store(at, tl.sum(tl.sum(slope * distance, axis=1), axis=0))
    tl.store(at + 1, tl.sum(tl.sum(slope, axis=1), axis=0))
    tl.store(at + 2, tl.sum(tl.sum(through * uncertain, axis=1), axis=0))
    tl.store(at + 3, tl.sum(tl.sum(g * score, axis=1), axis=0))


@triton.jit
def _gather(weight_ptr, x_ptr, out_ptr, total_ptr, rows, inner, depth, s_row, s_inner,
            ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """out = weight · x, and total = Σ of each row of weights; added to what is there if ADD."""
    kind = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    feature = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    acc, total = tl.zeros((BM, BN), kind), tl.zeros((BM,), kind)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK).to(tl.int64)
        mask = (row < rows)[:, None] & (k < inner)[None, :]
        weight = tl.load(weight_ptr + row[:, None] * s_row + k[None, :] * s_inner, mask=mask, other=0.0).to(kind)
        x = tl.load(x_ptr + k[:, None] * depth + feature[None, :], mask=(k < inner)[:, None] & (feature < depth)[None, :], other=0.0)
        acc = dot(weight, x, acc, PRECISION)
        total += tl.sum(weight, axis=1)
    at = out_ptr + row[:, None] * depth + feature[None, :]
    mask = (row < rows)[:, None] & (feature < depth)[None, :]
    first = tl.program_id(1) == 0
    if ADD:
        acc += tl.load(at, mask=mask, other=0.0)
        total += tl.load(total_ptr + row, mask=first & (row < rows), other=0.0)
    tl.store(at, acc, mask=mask)
    tl.store(total_ptr + row, total, mask=first & (row < rows))


class _Side(NamedTuple):
    """One side's centred rows [μ, σ] and their squares, its unit semantic rows and their norms."""

    rows: Tensor
    square: Tensor
    semantic: Tensor
    norm: Tensor


def _blocks(name: str, dtype: torch.dtype, warps: int = 4) -> dict[str, int]:
    """64×64 tiles, 16 features a step; float64 halves the sides. Eight warps where a tile of scores has several terms at once."""
    side = 32 if dtype == torch.float64 else 64
    default = {"BM": side, "BN": side, "BK": 16, "num_warps": warps, "num_stages": 2}
    return config(
        name, default, [{**default, "BM": m, "BN": n, "num_warps": w} for m, n in ((64, 128), (128, 64), (128, 128)) for w in (4, 8)]
    )


def _sides(first, second) -> tuple[_Side, _Side]:
    """Both sides, given as (sem or None, mu, sigma), less their common mean: an offset of the batch costs no accuracy."""
    kind, width = accumulator(first[1].dtype), first[1].shape[1]
    count = max(1, len(first[1]) + len(second[1]))
    centre = [(a.sum(0, dtype=kind) + b.sum(0, dtype=kind)) / count for a, b in zip(first[1:], second[1:], strict=True)]
    sides = []
    for sem, *gaussian in (first, second):
        rows = centre[0].new_empty(len(gaussian[0]), 2 * width)
        for i in range(2):
            torch.sub(gaussian[i], centre[i], out=rows[:, i * width : (i + 1) * width])
        square = rows.new_empty(len(rows))
        meta = {key: value for key, value in _blocks("wasserstein.squares", kind).items() if key != "BN"}
        grid = (triton.cdiv(len(rows), meta["BM"]),)
        launch("wasserstein.triton.squares", _squares, grid, rows, square, *rows.shape, PRECISION=precision(kind), **meta)
        sides.append(_Side(rows, square, *(unit_rows(sem) if sem is not None else (rows, square))))
    return sides[0], sides[1]


def _interleaved(x: _Side, y: _Side) -> tuple[Tensor, ...]:
    """x and y rows, squares, semantic rows, norms: as the kernels take them."""
    return tuple(t for pair in zip(x, y, strict=True) for t in pair)


def _matrix(path: str, x: _Side, y: _Side, constants: Tensor | None, dtype: torch.dtype, keep: bool = False) -> tuple[Tensor, Tensor]:
    """The result, and both products of all pairs if they are kept."""
    kind, out = x.rows.dtype, x.rows.new_empty(len(x.rows), len(y.rows), dtype=dtype)
    kept = x.rows.new_empty((2, *out.shape) if keep else (0,))
    meta = _blocks(path, kind, 4 if constants is None else 8)
    launch(path, _pairs, (triton.cdiv(len(x.rows), meta["BM"]), triton.cdiv(len(y.rows), meta["BN"])), *_interleaved(x, y),
           out if constants is None else constants, out, *(kept if keep else (kept, kept)), *out.shape, x.rows.shape[1], x.semantic.shape[1],
           SEMANTIC=constants is not None, KEEP=keep, PRECISION=precision(kind), **meta)  # fmt: skip
    return out, kept


def wasserstein_fwd(mu_x: Tensor, sigma_x: Tensor, mu_y: Tensor, sigma_y: Tensor) -> Tensor:
    x, y = _sides((None, mu_x, sigma_x), (None, mu_y, sigma_y))
    return _matrix("wasserstein.triton", x, y, None, x.rows.dtype)[0]


def uncertainty_fwd(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, constants: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return _matrix("uncertainty.triton", *_sides((sem_x, mu_x, sigma_x), (sem_y, mu_y, sigma_y)), constants, mu_x.dtype, keep)


def uncertainty_infonce_fwd(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, constants: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, y = _sides((sem_x, mu_x, sigma_x), (sem_y, mu_y, sigma_y))
    count, tau = len(mu_x), constants[3].to(x.rows.dtype)
    meta = _blocks("uncertainty_info_nce", x.rows.dtype, 8)
    # Up to 64 groups of rows × enough shares of the columns for two programs on each multiprocessor of an H100.
    groups = max(1, min(64, triton.cdiv(count, meta["BM"])))
    span = meta["BN"] * max(1, triton.cdiv(triton.cdiv(count, meta["BN"]), max(1, 264 // groups)))
    shares = max(1, triton.cdiv(count, span))
    by_row, by_column = x.rows.new_empty(3, shares, count), x.rows.new_empty(2, groups, count)
    kept = x.rows.new_empty((2, count, count) if keep else (0,))
    launch("uncertainty_info_nce.triton", _loss, (groups if count else 0, shares), *_interleaved(x, y), constants, by_row, by_column, *(kept if keep else (kept, kept)),
           count, x.rows.shape[1], x.semantic.shape[1], groups, shares, span, KEEP=keep, PRECISION=precision(tau.dtype), **meta)  # fmt: skip
    stats = x.rows.new_empty(4, count)
    for i, (top, total) in enumerate((by_row[:2], by_column)):
        torch.amax(top, 0, out=stats[2 * i])
        torch.sum(total * ((top - stats[2 * i]) / tau).exp(), 0, out=stats[2 * i + 1])
    losses = stats[1::2].log().sum(0) + (stats[0] + stats[2] - 2 * by_row[2].sum(0)) / tau
    return losses.sum() / (2 * max(1, count)), stats, kept


def _gathered(path: str, weight: Tensor, x: Tensor, out: Tensor, total: Tensor, add: bool) -> None:
    meta = _blocks(path, out.dtype)
    launch(path, _gather, (triton.cdiv(len(out), meta["BM"]), triton.cdiv(out.shape[1], meta["BN"])), weight, x, out, total,
           len(out), len(x), out.shape[1], *weight.stride(), ADD=add, PRECISION=precision(out.dtype), **meta)  # fmt: skip


def _gaussian_gradients(side: _Side, gathered: Tensor, total: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """(dμ, dσ) = 2 (x Σα − Σ α y)"""
    both = gathered.neg_().addcmul_(side.rows, total[:, None]).mul_(2)
    return [half.to(dtype, copy=True, memory_format=torch.contiguous_format) for half in both.chunk(2, dim=1)]


def wasserstein_bwd(mu_x, sigma_x, mu_y, sigma_y, grad: Tensor) -> tuple[Tensor, ...]:
    sides = _sides((None, mu_x, sigma_x), (None, mu_y, sigma_y))
    results = []
    for own, other, weight in ((*sides, grad), (*sides[::-1], grad.T)):
        gathered, total = torch.empty_like(own.rows), torch.empty_like(own.square)
        _gathered("wasserstein.triton.backward", weight, other.rows, gathered, total, False)
        results += _gaussian_gradients(own, gathered, total, mu_x.dtype)
    return tuple(results)


def _gradients(path: str, tensors, constants: Tensor, given: Tensor | None, stats: Tensor | None, kept: Tensor | None, factor: Tensor):
    """The gradients of the six tensors, and the sums for a, b, lam and τ in float64."""
    x, y = _sides(tensors[:3], tensors[3:6])
    (rows, depth), columns, semantic = x.rows.shape, len(y.rows), x.semantic.shape[1]
    # A strip's weights take no more than a few copies of the inputs, and no less than what fills a GPU.
    strip = rows if kept is not None else max(256, min(1024, (depth + semantic) // 64 * 64))
    meta = _blocks(path, x.rows.dtype, 8)
    alpha, beta = (x.rows.new_empty(min(strip, rows), columns) for _ in range(2))
    out = [[torch.zeros_like(t) for t in (side.rows, side.square, side.semantic, side.norm)] for side in (x, y)]
    sums = constants.new_zeros(4)
    for begin in range(0, rows, strip or 1):
        own = slice(begin, min(begin + strip, rows))
        size = own.stop - begin
        grid = (triton.cdiv(size, meta["BM"]), triton.cdiv(columns, meta["BN"]))
        part = x.rows.new_empty(*grid, 4)
        launch(path, _weights, grid, *_interleaved(x, y), constants, x.rows if given is None else given, factor,
               factor if stats is None else stats, *((factor, factor) if kept is None else kept), alpha, beta, part, begin, own.stop, columns, depth,
               semantic, *((0, 0) if given is None else given.stride()), LOSS=given is None, KEPT=kept is not None,
               PRECISION=precision(x.rows.dtype), **meta)  # fmt: skip
        sums += part.sum((0, 1), dtype=torch.float64)
        for i, weight in ((0, alpha[:size]), (2, beta[:size])):
            _gathered(f"{path}.gather", weight, y[i], out[0][i][own], out[0][i + 1][own], False)
            _gathered(f"{path}.gather", weight.T, x[i][own], out[1][i], out[1][i + 1], True)
    grads = []
    for side, (gathered, total, mixed, _) in zip((x, y), out, strict=True):
        dsem = unit_rows_backward(side.semantic, side.norm, mixed, tensors[0].dtype)
        grads += [dsem, *_gaussian_gradients(side, gathered, total, tensors[0].dtype)]
    return grads, sums


def uncertainty_bwd(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, constants: Tensor, kept: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    tensors = (sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y)
    grads, sums = _gradients("uncertainty.triton.backward", tensors, constants, grad, None, kept if kept.numel() else None, constants)
    return *grads, sums[:3].clone()


def uncertainty_infonce_bwd(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, constants, stats, kept, grad) -> tuple[Tensor, ...]:
    tensors = (sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y)
    path = "uncertainty_info_nce.triton.backward"
    factor = grad.to(stats.dtype) / (2 * max(1, len(mu_x)))
    grads, sums = _gradients(path, tensors, constants, None, stats, kept if kept.numel() else None, factor)
    return *grads, torch.cat((sums[:3], -sums[3:] / constants[3]))
