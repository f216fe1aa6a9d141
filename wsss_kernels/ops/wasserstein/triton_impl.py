"""Triton kernels of the Wasserstein distance, similarity and loss: strips of rows of pairs from two matrix products, no N×N beside results.

With x, y the centred rows [μ, σ] and ŝ the unit semantic rows, a strip of pairs is x·yᵀ (D_2W) and ŝx·ŝyᵀ (cos and D_s) by `torch.mm`,
whose float32 products no `tl.dot` comes near; one kernel reads both and does the rest. Products are written with `out=` or in place,
which autocast leaves alone. The loss works on score = ŝim − 1 = −(1 − cos)·exp(−q), q = lam·D_u/D_s, which is small where float32 is precise.

Backward: one kernel writes α = ∂/∂D_2W and β = ∂/∂cos over the strip's products (beside them where they were kept), products gather
α·y, αᵀ·x, β·ŝy, βᵀ·ŝx, and dx = 2 (x Σα − α·y) with the gradient of the unit rows is a last kernel. With g = ∂/∂score, t = −g·score/D_s:
α = t·lam·a, β = g·exp(−q) + t·q/D_s, da = Σ t·lam·D_2W, db = Σ t·lam, dlam = Σ t·D_u, dτ = −Σ g·score/τ (the g of a row add up to 0).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, config, launch, precision
from .triton_rows import both_sides, gradients

STRIP_BYTES = 16 << 20


@triton.jit
def _distance(product, square_x, square_y, row, column, rows, columns):
    x = tl.load(square_x + row, mask=row < rows, other=0.0)
    y = tl.load(square_y + column, mask=column < columns, other=0.0)
    distance = x[:, None] + y[None, :] - 2 * product
    return tl.where(distance < 0, 0.0, distance), x[:, None] + y[None, :]


@triton.jit
def _score(product, cosine, square_ptr, norm_ptr, constants_ptr, row, column, rows, columns):
    """(score, exp(−q), q, D_s, D_2W, D_u, whether D_s is above its clamp) of a tile. Squares and norms of y follow those of x."""
    kind = cosine.dtype
    distance, _both = _distance(product, square_ptr, square_ptr + rows, row, column, rows, columns)
    a, b, lam = tl.load(constants_ptr).to(kind), tl.load(constants_ptr + 1).to(kind), tl.load(constants_ptr + 2).to(kind)
    x = (tl.load(norm_ptr + row, mask=row < rows, other=1.0) > 0).to(kind)
    y = (tl.load(norm_ptr + rows + column, mask=column < columns, other=1.0) > 0).to(kind)
    square = x[:, None] + y[None, :] - 2 * cosine
    far = square > 1e-12
    apart = tl.sqrt(tl.where(far, square, 1e-12))
    uncertain = a * distance + b
    q = lam * uncertain / apart
    # A GPU's exp2 is right to 2^-22.5 only, which a sharp temperature magnifies: near 1 a series is exact to the last digit.
    series = 1.0 - q * (1.0 - q * (0.5 - q * (1.0 / 6.0 - q / 24.0)))
    decay = tl.where(tl.abs(q) < (1e-3 if kind == tl.float64 else 0.03), series, tl.exp2(-q * LOG2E))
    return (cosine - 1) * decay, decay, q, apart, distance, uncertain, far


@triton.jit
def _distances(
    pairs_ptr, rows_ptr, square_ptr, rows, columns, depth, NEAR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Distances over the products. Those below NEAR·(|x|² + |y|²), where rounding decides, are summed as Σ(x − y)², exactly 0 for equal rows."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    local = tl.arange(0, BN)
    column = tl.program_id(1).to(tl.int64) * BN + local
    at = pairs_ptr + row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    product = tl.load(at, mask=inside, other=0.0)
    distance, both = _distance(product, square_ptr, square_ptr + rows, row, column, rows, columns)
    left = (inside & (distance < NEAR * both)).to(tl.int32)
    while tl.max(tl.max(left, axis=1), axis=0) > 0:  # most tiles have no such pair; a turn takes one column of every row
        chosen = tl.max(tl.where(left > 0, local[None, :] + 1, 0), axis=1)
        partner = rows + tl.program_id(1).to(tl.int64) * BN + chosen - 1
        total = tl.zeros((BM,), distance.dtype)
        for start in range(0, depth, BK):
            k = start + tl.arange(0, BK)
            mask = (chosen > 0)[:, None] & (k < depth)[None, :]
            x = tl.load(rows_ptr + row[:, None] * depth + k[None, :], mask=mask, other=0.0)
            y = tl.load(rows_ptr + partner[:, None] * depth + k[None, :], mask=mask, other=0.0)
            total += tl.sum((x - y) * (x - y), axis=1)
        hit = local[None, :] == chosen[:, None] - 1
        distance = tl.where(hit, total[:, None], distance)
        left = tl.where(hit, 0, left)
    tl.store(at, distance, mask=inside)


@triton.jit
def _similarity(
    product_ptr, cosine_ptr, out_ptr, square_ptr, norm_ptr, constants_ptr, begin, end, rows, columns, BM: tl.constexpr, BN: tl.constexpr
):
    """The similarity of the rows from `begin` to `end`, whose products are given."""
    local = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row = begin + local
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    inside, at = (row < end)[:, None] & (column < columns)[None, :], local[:, None] * columns + column[None, :]
    product, cosine = tl.load(product_ptr + at, mask=inside, other=0.0), tl.load(cosine_ptr + at, mask=inside, other=0.0)
    score, _decay, _q, _apart, _d2, _du, _far = _score(product, cosine, square_ptr, norm_ptr, constants_ptr, row, column, rows, columns)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], (score + 1).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _loss(product_ptr, cosine_ptr, square_ptr, norm_ptr, constants_ptr, by_row, by_column, own_ptr, begin, end, count, groups, shares, span,
          BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Maxima and sums of exponentials of a block of the strip's rows against a share of the columns, by row and by column.

    by_row: (maximum, sum) × share × row; by_column: (maximum, sum) × block × column, carried from strip to strip.
    """
    kind = product_ptr.dtype.element_ty
    group, share = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tau = tl.load(constants_ptr + 3).to(kind)
    local = group * BM + tl.arange(0, BM)
    row = begin + local
    top, total, own = tl.full((BM,), float("-inf"), kind), tl.zeros((BM,), kind), tl.zeros((BM,), kind)
    for start in range(share * span, tl.minimum(share * span + span, count), BN):
        column = start + tl.arange(0, BN).to(tl.int64)
        inside, at = (row < end)[:, None] & (column < count)[None, :], local[:, None] * count + column[None, :]
        product, cosine = tl.load(product_ptr + at, mask=inside, other=0.0), tl.load(cosine_ptr + at, mask=inside, other=0.0)
        score, _decay, _q, _apart, _d2, _du, _far = _score(product, cosine, square_ptr, norm_ptr, constants_ptr, row, column, count, count)
        own += tl.sum(tl.where(row[:, None] == column[None, :], score, 0.0), axis=1)
        of_row = tl.where((column < count)[None, :], score, float("-inf"))
        above = tl.maximum(top, tl.max(of_row, axis=1))
        total = total * tl.exp2((top - above) / tau * LOG2E) + tl.sum(tl.exp2((of_row - above[:, None]) / tau * LOG2E), axis=1)
        top = above
        of_column = tl.where((row < end)[:, None], score, float("-inf"))
        at = by_column + group * count + column
        later = (column < count) & (begin > 0)
        before = tl.load(at, mask=later, other=float("-inf"))
        above = tl.maximum(before, tl.max(of_column, axis=0))
        rest = tl.load(at + groups * count, mask=later, other=0.0) * tl.exp2((before - above) / tau * LOG2E)
        rest += tl.sum(tl.exp2((of_column - above[None, :]) / tau * LOG2E), axis=0)
        tl.store(at, above, mask=column < count)
        tl.store(at + groups * count, rest, mask=column < count)
    at = by_row + share * count + row
    tl.store(at, top, mask=row < end)
    tl.store(at + shares * count, total, mask=row < end)
    tl.store(own_ptr + row, own, mask=(row < end) & (row >= share * span) & (row < share * span + span))


@triton.jit
def _merged(part_ptr, parts, row, count, tau, BP: tl.constexpr):
    """(maximum, sum of exponentials) of each row over its parts."""
    top = tl.full((row.shape[0],), float("-inf"), part_ptr.dtype.element_ty)
    total = tl.zeros((row.shape[0],), part_ptr.dtype.element_ty)
    for start in range(0, parts, BP):
        part = start + tl.arange(0, BP).to(tl.int64)
        mask = (part < parts)[:, None] & (row < count)[None, :]
        at = part_ptr + part[:, None] * count + row[None, :]
        here = tl.load(at, mask=mask, other=float("-inf"))
        here = tl.where((row < count)[None, :], here, 0.0)
        above = tl.maximum(top, tl.max(here, axis=0))
        rest = tl.load(at + parts * count, mask=mask, other=0.0) * tl.exp2((here - above[None, :]) / tau * LOG2E)
        total = total * tl.exp2((top - above) / tau * LOG2E) + tl.sum(rest, axis=0)
        top = above
    return top, total


@triton.jit
def _merge(by_row, by_column, own_ptr, constants_ptr, stats_ptr, loss_ptr, shares, groups, count, BM: tl.constexpr, BP: tl.constexpr):
    """Statistics of rows and columns, and each row's share of the loss."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    tau = tl.load(constants_ptr + 3).to(by_row.dtype.element_ty)
    top_x, sum_x = _merged(by_row, shares, row, count, tau, BP)
    top_y, sum_y = _merged(by_column, groups, row, count, tau, BP)
    own = tl.load(own_ptr + row, mask=row < count, other=0.0)
    real = row < count
    loss = tl.log(tl.where(real, sum_x, 1.0)) + tl.log(tl.where(real, sum_y, 1.0)) + (top_x - own + (top_y - own)) / tau
    at = stats_ptr + row
    tl.store(at, top_x, mask=real)
    tl.store(at + count, sum_x, mask=real)
    tl.store(at + 2 * count, top_y, mask=real)
    tl.store(at + 3 * count, sum_y, mask=real)
    tl.store(loss_ptr + row, loss / (2 * count), mask=real)


@triton.jit
def _weights(product_ptr, cosine_ptr, alpha_ptr, beta_ptr, square_ptr, norm_ptr, constants_ptr, given_ptr, stats_ptr, sums_ptr,
             begin, end, rows, columns, s_row, s_column, LOSS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """α and β of the rows from `begin` to `end`; per program its share of the sums for a, b, lam and τ, carried from strip to strip."""
    kind = product_ptr.dtype.element_ty
    local = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    row = begin + local
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    inside, at = (row < end)[:, None] & (column < columns)[None, :], local[:, None] * columns + column[None, :]
    product, cosine = tl.load(product_ptr + at, mask=inside, other=0.0), tl.load(cosine_ptr + at, mask=inside, other=0.0)
    score, decay, q, apart, distance, uncertain, far = _score(
        product, cosine, square_ptr, norm_ptr, constants_ptr, row, column, rows, columns
    )
    if LOSS:
        tau = tl.load(constants_ptr + 3).to(kind)
        top_x = tl.load(stats_ptr + row, mask=row < rows, other=0.0)
        sum_x = tl.load(stats_ptr + columns + row, mask=row < rows, other=1.0)
        top_y = tl.load(stats_ptr + 2 * columns + column, mask=column < columns, other=0.0)
        sum_y = tl.load(stats_ptr + 3 * columns + column, mask=column < columns, other=1.0)
        g = tl.exp2((score - top_x[:, None]) / tau * LOG2E) / sum_x[:, None]
        g += tl.exp2((score - top_y[None, :]) / tau * LOG2E) / sum_y[None, :]
        g = (g - tl.where(row[:, None] == column[None, :], 2.0, 0.0)) * (tl.load(given_ptr).to(kind) / (2 * columns) / tau)
    else:
        g = tl.load(given_ptr + row[:, None] * s_row + column[None, :] * s_column, mask=inside, other=0.0).to(kind)
    g = tl.where(inside, g, 0.0)
    through = -g * score / apart
    slope = through * tl.load(constants_ptr + 2).to(kind)
    # Each store needs both loads, so that α and β may lie where the products do.
    tl.store(alpha_ptr + at, slope * tl.load(constants_ptr).to(kind), mask=inside)
    tl.store(beta_ptr + at, g * decay + tl.where(far, through * q / apart, 0.0), mask=inside)
    at, later = sums_ptr + (3 + LOSS) * (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)), begin > 0
    tl.store(at, tl.load(at, mask=later, other=0.0) + tl.sum(tl.sum(slope * distance, axis=1), axis=0))
    tl.store(at + 1, tl.load(at + 1, mask=later, other=0.0) + tl.sum(tl.sum(slope, axis=1), axis=0))
    tl.store(at + 2, tl.load(at + 2, mask=later, other=0.0) + tl.sum(tl.sum(through * uncertain, axis=1), axis=0))
    if LOSS:
        tl.store(at + 3, tl.load(at + 3, mask=later, other=0.0) - tl.sum(tl.sum(g * score, axis=1), axis=0) / tau)


def _tiles(name: str, dtype: torch.dtype) -> dict[str, int]:
    """Eight pairs a thread (float64: four): a dozen terms of a pair are live at once, and more of them would spill."""
    default = {"BM": 32, "BN": 32 if dtype == torch.float64 else 64, "num_warps": 8}
    return config(f"{name}.tiles", default, [{"BM": m, "BN": n, "num_warps": w} for m, n, w in ((32, 32, 4), (64, 64, 8), (32, 128, 8))])


def _strip(rows: int, columns: int, size: int) -> int:
    """Rows of a strip, whose two products take about 16 MiB together: they stay in a GPU's L2 cache, and little of N×N is stored.

    A multiple of 128, so that blocks of rows do not cross strips, unless it is all rows.
    """
    return max(1, min(rows, max(128, STRIP_BYTES // (2 * size * max(1, columns)) // 128 * 128)))


def _slices(rows: int, strip: int) -> list[slice]:
    """The strips; a single empty one of no rows, whose products are the zeros that the other side's gradients then are."""
    return [slice(begin, min(begin + strip, rows)) for begin in range(0, max(1, rows), strip)]


def wasserstein_fwd(mu_x: Tensor, sigma_x: Tensor, mu_y: Tensor, sigma_y: Tensor) -> Tensor:
    path = "wasserstein.triton"
    sides = both_sides(path, None, mu_x, sigma_x, None, mu_y, sigma_y)
    kind, (rows, columns) = sides.rows.dtype, sides.shape
    out = sides.rows.new_empty(rows, columns)
    sides.products(slice(0, rows), out)
    # What the rounding of any library's product stays below: float64, single TF32 products, float32.
    near = 1e-10 if kind == torch.float64 else 4e-3 if precision(kind) == "tf32" else 1e-4
    meta = _tiles(path, kind)
    launch(path, _distances, (triton.cdiv(rows, meta["BM"]), triton.cdiv(columns, meta["BN"])), out, sides.rows, sides.square,
           rows, columns, sides.rows.shape[1], NEAR=near, BK=32, **meta)  # fmt: skip
    return out


def uncertainty_fwd(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, constants: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    path = "uncertainty.triton"
    sides = both_sides(path, sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y)
    kind, (rows, columns) = sides.rows.dtype, sides.shape
    strip = rows if keep else _strip(rows, columns, kind.itemsize)
    out, pairs = mu_x.new_empty(rows, columns), sides.rows.new_empty(2, strip, columns)
    meta = _tiles(path, kind)
    for own in _slices(rows, max(1, strip)):
        product, cosine = pairs[:, : own.stop - own.start]
        sides.products(own, product, cosine)
        launch(path, _similarity, (triton.cdiv(len(product), meta["BM"]), triton.cdiv(columns, meta["BN"])), product, cosine, out, sides.square,
               sides.norm, constants, own.start, own.stop, rows, columns, **meta)  # fmt: skip
    return out, pairs if keep else pairs.new_empty(0)


def uncertainty_infonce_fwd(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, constants: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    path, count = "uncertainty_info_nce.triton", len(mu_x)
    sides = both_sides(path, sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y)
    new, kind = sides.rows.new_empty, sides.rows.dtype
    strip = count if keep else _strip(count, count, kind.itemsize)
    meta, pairs = _tiles(path, kind), new(2, strip, count)
    # A strip's blocks of rows × enough shares of the columns for two programs on each multiprocessor of an H100.
    groups = triton.cdiv(strip, meta["BM"])
    span = meta["BN"] * max(1, triton.cdiv(triton.cdiv(count, meta["BN"]), max(1, 264 // max(1, groups))))
    shares = triton.cdiv(count, span)
    by_row, by_column, own_score = new(2, shares, count), new(2, groups, count), new(2, count)
    for own in _slices(count, max(1, strip)):
        product, cosine = pairs[:, : own.stop - own.start]
        sides.products(own, product, cosine)
        launch(path, _loss, (triton.cdiv(len(product), meta["BM"]), shares), product, cosine, sides.square, sides.norm, constants, by_row, by_column,
               own_score, own.start, own.stop, count, groups, shares, span, **meta)  # fmt: skip
    stats, losses = new(4, count), own_score[1]
    launch(f"{path}.merge", _merge, (triton.cdiv(count, 32),), by_row, by_column, own_score, constants, stats, losses, shares, groups, count,
           BM=32, BP=16, num_warps=4)  # fmt: skip
    return losses.sum(), stats, pairs if keep else new(0)


def wasserstein_bwd(mu_x, sigma_x, mu_y, sigma_y, grad: Tensor) -> tuple[Tensor, ...]:
    path = "wasserstein.triton"
    sides = both_sides(path, None, mu_x, sigma_x, None, mu_y, sigma_y)
    rows, first, grad = sides.rows, sides.first, grad.to(sides.rows.dtype)
    gathered, total = torch.empty_like(rows), torch.empty_like(sides.square)
    for weight, own, other in ((grad, slice(0, first), slice(first, None)), (grad.T, slice(first, None), slice(0, first))):
        torch.mm(weight, rows[other], out=gathered[own])
        torch.sum(weight, 1, out=total[own])
    return gradients(f"{path}.backward", sides, gathered, total, None, (mu_x, sigma_x, mu_y, sigma_y))


def _backward(path: str, tensors, constants: Tensor, given: Tensor, stats: Tensor | None, kept: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the six tensors, and the sums for a, b, lam (and τ, with `stats`) in float64."""
    sides = both_sides(path, *tensors)
    kind, first, (rows, columns) = sides.rows.dtype, sides.first, sides.shape
    strip = rows if kept.numel() else _strip(rows, columns, kind.itemsize)
    meta, weights = _tiles(f"{path}.backward", kind), sides.rows.new_empty(2, strip, columns)
    gathered, total, mixed = torch.empty_like(sides.rows), torch.empty_like(sides.square), torch.empty_like(sides.unit)
    part = sides.rows.new_empty(triton.cdiv(min(rows, strip), meta["BM"]), triton.cdiv(columns, meta["BN"]), 3 if stats is None else 4)
    for own in _slices(rows, max(1, strip)):
        alpha, beta = weights[:, : own.stop - own.start]
        product, cosine = kept if kept.numel() else (alpha, beta)
        if not kept.numel():
            sides.products(own, product, cosine)
        launch(f"{path}.backward", _weights, (triton.cdiv(len(alpha), meta["BM"]), part.shape[1]), product, cosine, alpha, beta, sides.square, sides.norm, constants, given,
               constants if stats is None else stats, part, own.start, own.stop, rows, columns, *(given.stride() if stats is None else (0, 0)),
               LOSS=stats is not None, **meta)  # fmt: skip
        again = int(own.start > 0)  # the first strip overwrites the other side's sums, the next ones add to them
        for weight, x, out in ((alpha, sides.rows, gathered), (beta, sides.unit, mixed)):
            torch.mm(weight, x[first:], out=out[own])
            out[first:].addmm_(weight.T, x[own], beta=again)
        torch.sum(alpha, 1, out=total[own])
        if again:
            total[first:].add_(alpha.sum(0))
        else:
            torch.sum(alpha, 0, out=total[first:])
    return *gradients(f"{path}.backward.gradients", sides, gathered, total, mixed, tensors), part.sum((0, 1), dtype=torch.float64)


def uncertainty_bwd(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, constants: Tensor, kept: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return _backward("uncertainty.triton", (sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y), constants, grad, None, kept)


def uncertainty_infonce_bwd(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, constants, stats, kept, grad) -> tuple[Tensor, ...]:
    return _backward("uncertainty_info_nce.triton", (sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y), constants, grad, stats, kept)
