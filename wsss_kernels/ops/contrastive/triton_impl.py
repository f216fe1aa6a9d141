"""Triton kernels of the contrastive losses: tiles of pairs, recomputed in the backward; nothing N×N is stored.

The supervised loss, and `info_nce` of few features, are one pass: with unit rows x, y, logits s = x·yᵀ/τ and a label per row, an anchor's loss is
log Σ_j exp s_ij − mean over its positives of s_ij. The supervised loss has y = x and leaves the diagonal out; `info_nce` takes the
pass in both directions. The gradient of every logit is known from the two log-sum-exps of its row and its column,
T_ij = exp(s_ij − lse_i) + exp(s_ij − lse_j) − 2 [label_i = label_j] / positives_i, so that one pass of row owners gives Σ_j T_ij y_j.
A log-sum-exp is kept as its maximum and the rest: their sum, rounded, would cost the exponentials of sharp logits their last digits.

`info_nce` of more features is bound by its products, which a BLAS forms faster than `tl.dot` in float32. There a strip of rows at a time
is x·yᵀ/τ by `torch.mm`; one kernel reads it and gives both directions' statistics, another one turns it into T in place, and two more
products gather T·y and add Tᵀ·x. Products are written with `out=` or in place, which autocast leaves alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, config, dot, launch, power_of_2, precision, unit_rows, unit_rows_backward

FEW = 32
"""Up to so many features `info_nce` goes without strips: the exponentials take the time, and products need not be stored."""
STRIP_BYTES = 32 << 20


@triton.jit
def _logits(x_ptr, y_ptr, row, column, count, depth, tau, BK: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of x·yᵀ/τ. Rows and columns beyond `count` are 0."""
    k = tl.arange(0, BK)
    acc = tl.zeros((row.shape[0], column.shape[0]), x_ptr.dtype.element_ty)
    for start in range(0, depth, BK):
        inside = start + k < depth
        x = tl.load(x_ptr + row[:, None] * depth + start + k[None, :], mask=(row < count)[:, None] & inside[None, :], other=0.0)
        y = tl.load(y_ptr + column[None, :] * depth + start + k[:, None], mask=(column < count)[None, :] & inside[:, None], other=0.0)
        acc = dot(x, y, acc, PRECISION)
    return acc / tau  # not times 1/τ, whose rounding error the exponential would magnify


@triton.jit
def _pairs(label_ptr, row, column, count, ignore, SELF: tl.constexpr):
    """(the pair counts as a candidate, it is a positive). With SELF both sides are one set, without the pairs of an element with itself."""
    a = tl.load(label_ptr + row, mask=row < count, other=0)
    b = tl.load(label_ptr + column, mask=column < count, other=0)
    pair = (row < count)[:, None] & (column < count)[None, :]
    if SELF:
        pair = pair & (a != ignore)[:, None] & (b != ignore)[None, :] & (row[:, None] != column[None, :])
    return pair, pair & (a[:, None] == b[None, :])


@triton.jit
def _forward(x_ptr, y_ptr, label_ptr, tau_ptr, top_ptr, rest_ptr, positives_ptr, loss_ptr, count, depth, ignore,
             SELF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    kind = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    tau = tl.load(tau_ptr).to(kind)
    top = tl.full((BM,), float("-inf"), kind)
    total = tl.zeros((BM,), kind)
    near = tl.zeros((BM,), kind)
    positives = tl.zeros((BM,), tl.int32)
    for start in range(0, count, BN):
        column = start + tl.arange(0, BN).to(tl.int64)
        s = _logits(x_ptr, y_ptr, row, column, count, depth, tau, BK, PRECISION)
        pair, positive = _pairs(label_ptr, row, column, count, ignore, SELF)
        near += tl.sum(tl.where(positive, s, 0.0), axis=1)
        positives += tl.sum(positive.to(tl.int32), axis=1)
        s = tl.where(pair, s, float("-inf"))
        above = tl.maximum(top, tl.max(s, axis=1))
        anchor = tl.where(above == float("-inf"), 0.0, above)  # no candidate yet: −inf − (−inf) has no value
        total = total * tl.exp2((top - anchor) * LOG2E) + tl.sum(tl.exp2((s - anchor[:, None]) * LOG2E), axis=1)
        top = above
    has = positives > 0
    top = tl.where(has, top, 0.0)
    rest = tl.where(has, tl.log(tl.where(has, total, 1.0)), float("inf"))
    loss = tl.where(has, top - near / tl.maximum(positives, 1).to(kind) + rest, 0.0)
    tl.store(top_ptr + row, top, mask=row < count)
    tl.store(rest_ptr + row, rest, mask=row < count)
    tl.store(positives_ptr + row, positives.to(kind), mask=row < count)
    tl.store(loss_ptr + row, loss, mask=row < count)


@triton.jit
def _backward(x_ptr, y_ptr, label_ptr, tau_ptr, top_x_ptr, rest_x_ptr, top_y_ptr, rest_y_ptr, positives_ptr, factor_ptr, out_ptr, slope_ptr, count, depth, ignore,
              SELF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """out = factor/τ · Σ_j T_ij y_j for a share of the features, and slope = −factor/τ · Σ_j T_ij s_ij once."""
    kind = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    feature = tl.program_id(1) * BD + tl.arange(0, BD)
    tau = tl.load(tau_ptr).to(kind)
    factor = tl.load(factor_ptr).to(kind) / tau
    top = tl.load(top_x_ptr + row, mask=row < count, other=0.0)
    rest = tl.load(rest_x_ptr + row, mask=row < count, other=float("inf"))
    positives = tl.load(positives_ptr + row, mask=row < count, other=0.0)
    near = tl.where(positives > 0, 2.0 / tl.where(positives > 0, positives, 1.0), 0.0)
    acc = tl.zeros((BM, BD), kind)
    slope = tl.zeros((BM,), kind)
    for start in range(0, count, BN):
        column = start + tl.arange(0, BN).to(tl.int64)
        s = _logits(x_ptr, y_ptr, row, column, count, depth, tau, BK, PRECISION)
        pair, positive = _pairs(label_ptr, row, column, count, ignore, SELF)
        top_y = tl.load(top_y_ptr + column, mask=column < count, other=0.0)
        rest_y = tl.load(rest_y_ptr + column, mask=column < count, other=float("inf"))
        t = tl.exp2((s - top[:, None] - rest[:, None]) * LOG2E) + tl.exp2((s - top_y[None, :] - rest_y[None, :]) * LOG2E)
        t -= tl.where(positive, near[:, None], 0.0)
        t = tl.where(pair, t, 0.0)
        slope += tl.sum(t * s, axis=1)
        inside = (column < count)[:, None] & (feature < depth)[None, :]
        y = tl.load(y_ptr + column[:, None] * depth + feature[None, :], mask=inside, other=0.0)
        acc = dot(t, y, acc, PRECISION)
    mine = (row < count)[:, None] & (feature < depth)[None, :]
    tl.store(out_ptr + row[:, None] * depth + feature[None, :], acc * factor, mask=mine)
    if tl.program_id(1) == 0:
        tl.store(slope_ptr + row, -slope * factor, mask=row < count)


@triton.jit
def divided(a, b):
    """a/b correctly rounded. Triton's own division of float32 is not."""
    return tl.div_rn(a, b) if a.dtype == tl.float32 else a / b


@triton.jit
def _strip_forward(s_ptr, label_ptr, parts_ptr, begin, count, groups, shares, span, BM: tl.constexpr, BN: tl.constexpr):
    """Statistics of BM rows of a strip, which begins at row `begin`, against a share of the columns, by row and by column.

    parts: (maximum, sum of exponentials, sum over positives, number of positives) × share × row, then (maximum, sum of exponentials,
    sum over positives) × group × column. The columns' part goes on from strip to strip: launches follow one another in order.
    """
    kind = s_ptr.dtype.element_ty
    share, group = tl.program_id(0), tl.program_id(1)
    local = group * BM + tl.arange(0, BM)  # 32 bits suffice: a strip has fewer than 2^31 products
    row = begin + local
    of_share, of_group = tl.cast(shares, tl.int64) * count, tl.cast(groups, tl.int64) * count
    top, total, near = tl.full((BM,), float("-inf"), kind), tl.zeros((BM,), kind), tl.zeros((BM,), kind)
    positives = tl.zeros((BM,), tl.int32)
    for start in range(share * span, tl.minimum(share * span + span, count), BN):
        column = start + tl.arange(0, BN)
        pair, positive = _pairs(label_ptr, row, column, count, 0, False)
        s = tl.load(s_ptr + local[:, None] * count + column[None, :], mask=pair, other=float("-inf"))
        close = tl.where(positive, s, 0.0)
        near += tl.sum(close, axis=1)
        positives += tl.sum(positive.to(tl.int32), axis=1)
        above = tl.maximum(top, tl.max(s, axis=1))  # −inf only in rows beyond `count`, which are not stored
        total = total * tl.exp2((top - above) * LOG2E) + tl.sum(tl.exp2((s - above[:, None]) * LOG2E), axis=1)
        top = above
        at = parts_ptr + (4 * shares + group).to(tl.int64) * count + column
        later = (column < count) & (begin > 0)
        before = tl.load(at, mask=later, other=float("-inf"))
        above = tl.maximum(before, tl.max(s, axis=0))
        rest = tl.load(at + of_group, mask=later, other=0.0) * tl.exp2((before - above) * LOG2E)
        rest += tl.sum(tl.exp2((s - above[None, :]) * LOG2E), axis=0)
        beside = tl.load(at + 2 * of_group, mask=later, other=0.0) + tl.sum(close, axis=0)
        tl.store(at, above, mask=column < count)
        tl.store(at + of_group, rest, mask=column < count)
        tl.store(at + 2 * of_group, beside, mask=column < count)
    at = parts_ptr + share.to(tl.int64) * count + row
    tl.store(at, top, mask=row < count)
    tl.store(at + of_share, total, mask=row < count)
    tl.store(at + 2 * of_share, near, mask=row < count)
    tl.store(at + 3 * of_share, positives.to(kind), mask=row < count)


@triton.jit
def _strip_finish(parts_ptr, stats_ptr, loss_ptr, count, groups, shares, BN: tl.constexpr, BP: tl.constexpr):
    """Merges the parts of the rows (program 0 of the second axis) or the columns (1): statistics, and the loss of every anchor.

    stats: (maximum, 1/sum of exponentials) of the rows, of the columns, 2/positives.
    """
    kind = parts_ptr.dtype.element_ty
    side = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = anchor < count
    many = tl.where(side == 0, shares, groups)
    first = parts_ptr + side * 4 * shares * count + anchor[None, :]
    top, total, near = tl.full((BN,), float("-inf"), kind), tl.zeros((BN,), kind), tl.zeros((BN,), kind)
    for start in range(0, many, BP):
        part = (start + tl.arange(0, BP).to(tl.int64))[:, None]
        mask = (part < many) & inside[None, :]
        maximum = tl.load(first + part * count, mask=mask, other=float("-inf"))
        above = tl.maximum(top, tl.max(maximum, axis=0))
        sums = tl.load(first + (many + part) * count, mask=mask, other=0.0)
        total = total * tl.exp2((top - above) * LOG2E) + tl.sum(sums * tl.exp2((maximum - above[None, :]) * LOG2E), axis=0)
        near += tl.sum(tl.load(first + (2 * many + part) * count, mask=mask, other=0.0), axis=0)
        top = above
    positives = tl.zeros((BN,), kind)  # a column has as many as the row of its pair
    for start in range(0, shares, BP):
        part = (start + tl.arange(0, BP).to(tl.int64))[:, None]
        at = parts_ptr + (3 * shares + part) * count + anchor[None, :]
        positives += tl.sum(tl.load(at, mask=(part < shares) & inside[None, :], other=0.0), axis=0)
    positives = tl.where(inside, positives, 1.0)
    total = tl.where(inside, total, 1.0)
    at = stats_ptr + 2 * side * count + anchor
    tl.store(at, top, mask=inside)
    tl.store(at + count, divided(tl.full((BN,), 1.0, kind), total), mask=inside)
    tl.store(stats_ptr + 4 * count + anchor, divided(tl.full((BN,), 2.0, kind), positives), mask=inside & (side == 0))
    tl.store(loss_ptr + side * count + anchor, top - divided(near, positives) + tl.log(total), mask=inside)


@triton.jit
def _strip_backward(s_ptr, label_ptr, stats_ptr, factor_ptr, slope_ptr, begin, count, BM: tl.constexpr, BN: tl.constexpr):
    """A strip's logits become factor·T in place; per program Σ factor·T·s."""
    block = tl.program_id(1)
    local = block * BM + tl.arange(0, BM)
    row, column = begin + local, tl.program_id(0) * BN + tl.arange(0, BN)
    pair, positive = _pairs(label_ptr, row, column, count, 0, False)
    at = s_ptr + local[:, None] * count + column[None, :]
    s = tl.load(at, mask=pair, other=0.0)
    top = tl.load(stats_ptr + row, mask=row < count, other=0.0)
    inverse = tl.load(stats_ptr + count + row, mask=row < count, other=0.0)
    t = tl.exp2((s - top[:, None]) * LOG2E) * inverse[:, None]
    top = tl.load(stats_ptr + 2 * count + column, mask=column < count, other=0.0)
    inverse = tl.load(stats_ptr + 3 * count + column, mask=column < count, other=0.0)
    t += tl.exp2((s - top[None, :]) * LOG2E) * inverse[None, :]
    near = tl.load(stats_ptr + 4 * count + row, mask=row < count, other=0.0)
    t = (t - tl.where(positive, near[:, None], 0.0)) * tl.load(factor_ptr)
    tl.store(at, t, mask=pair)
    slope = tl.sum(tl.sum(tl.where(pair, t * s, 0.0), axis=1), axis=0)
    tl.store(slope_ptr + (begin // BM + block) * tl.num_programs(0) + tl.program_id(0), slope)


def _blocks(name: str, depth: int, dtype: torch.dtype) -> dict[str, int]:
    """64×64 tiles fill the 132 multiprocessors of an H100 from N = 8192 on; with 8 warps a thread's 16 pairs stay in its registers."""
    side = 32 if dtype == torch.float64 else 64
    default = {"BM": side, "BN": side, "BK": power_of_2(depth, most=32), "num_warps": 8, "num_stages": 2}
    other = [{**default, "BM": bm, "BN": bn} for bm, bn in ((32, 64), (64, 32), (64, 128), (128, 64))]
    return config(f"{name}/d{power_of_2(depth)}", default, other)


def _pass(path: str, x: Tensor, y: Tensor, label: Tensor, tau: Tensor, ignore: int, lone: bool) -> tuple[Tensor, Tensor]:
    """(statistics: maximum, rest of the log-sum-exp, number of positives; loss) of every anchor of x."""
    count, depth = x.shape
    statistics, loss = x.new_empty(3, count), x.new_empty(count)
    blocks = _blocks(path, depth, x.dtype)
    launch(path, _forward, (triton.cdiv(count, blocks["BM"]),), x, y, label, tau, *statistics, loss, count, depth, ignore,
           SELF=lone, PRECISION=precision(x.dtype), **blocks)  # fmt: skip
    return statistics, loss


def _gradient(path: str, x, y, label, tau, statistics, factor, ignore: int, lone: bool) -> tuple[Tensor, Tensor]:
    """(the gradient with respect to the unit rows of x, that with respect to τ by rows of x)."""
    count, depth = x.shape
    out, slope = torch.empty_like(x), x.new_empty(count)
    blocks = _blocks(path, depth, x.dtype)
    width = power_of_2(depth, most=64 if x.dtype == torch.float64 else 128)
    grid = (triton.cdiv(count, blocks["BM"]), triton.cdiv(depth, width))
    launch(path, _backward, grid, x, y, label, tau, *statistics, factor, out, slope, count, depth, ignore,
           SELF=lone, BD=width, PRECISION=precision(x.dtype), **blocks)  # fmt: skip
    return out, slope


def supcon_fwd(z: Tensor, label: Tensor, temperature: Tensor, mean: bool, ignore_index: int) -> tuple[Tensor, Tensor]:
    unit, _ = unit_rows(z)
    statistics, loss = _pass("supcon.triton", unit, unit, label.contiguous(), temperature, ignore_index, True)
    total = loss.sum()
    return total / (statistics[2] > 0).sum().clamp_min(1) if mean else total, statistics


def supcon_bwd(z, label, temperature, stats, grad, mean: bool, ignore_index: int) -> tuple[Tensor, Tensor]:
    unit, norm = unit_rows(z)
    top, rest, positives = stats
    factor = grad.to(unit.dtype) / (positives > 0).sum().clamp_min(1) if mean else grad.to(unit.dtype)
    arguments = (label.contiguous(), temperature, (top, rest, top, rest, positives), factor, ignore_index, True)
    out, slope = _gradient("supcon.triton.backward", unit, unit, *arguments)
    return unit_rows_backward(unit, norm, out, z.dtype), (slope.sum() / 2).to(temperature.dtype)


def _strip_rows(count: int, size: int) -> int:
    """How many rows of products of `size` bytes a strip holds: 32 MiB (an H100's L2 holds 50), in multiples of every row block, so that
    16384 rows make 32 strips, whose launches take less time than their products."""
    return min(count, max(128, STRIP_BYTES // (max(count, 1) * size) // 128 * 128))


def _strip_blocks(name: str, dtype: torch.dtype) -> dict[str, int]:
    """16 pairs a thread: with more, the compiler takes so many registers that a multiprocessor holds a single program.

    The forward pass has wide tiles, since a thread adds up what it has of a row before it asks its neighbours.
    """
    forward = {"BM": 16, "BN": 128 if dtype == torch.float64 else 256, "num_warps": 8}
    default = forward if name == "info_nce.triton.strip" else {"BM": 32, "BN": 128, "num_warps": 8}
    return config(
        name, default, [{"BM": m, "BN": n, "num_warps": w} for m, n, w in ((16, 128, 4), (32, 128, 4), (32, 128, 8), (32, 256, 8))]
    )


def _strips(count: int, rows: int) -> Iterator[slice]:
    return (slice(begin, min(begin + rows, count)) for begin in range(0, count, max(rows, 1)))


def _strip_pass(x: Tensor, y: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """(statistics, loss of every anchor) of x·yᵀ, where x is divided by τ already; see `_strip_finish`."""
    count, path = len(x), "info_nce.triton.strip"
    rows = _strip_rows(count, x.element_size())
    meta = _strip_blocks(path, x.dtype)
    # As many shares of the columns as make four programs on each multiprocessor of an H100, and no more than 64.
    groups, blocks = triton.cdiv(rows, meta["BM"]), triton.cdiv(count, meta["BN"])
    span = triton.cdiv(blocks, min(64, triton.cdiv(528, max(groups, 1))))
    shares = triton.cdiv(blocks, max(span, 1))
    products, parts = x.new_empty(rows, count), x.new_empty(4 * shares + 3 * groups, count)
    for own in _strips(count, rows):
        s = torch.mm(x[own], y.T, out=products[: own.stop - own.start])
        launch(path, _strip_forward, (shares, triton.cdiv(len(s), meta["BM"])), s, label, parts, own.start, count, groups, shares,
               span * meta["BN"], **meta)  # fmt: skip
    stats, loss = x.new_empty(5, count), x.new_empty(2, count)
    launch(
        path,
        _strip_finish,
        (triton.cdiv(count, 64), 2 if count else 0),
        parts,
        stats,
        loss,
        count,
        groups,
        shares,
        BN=64,
        BP=16,
        num_warps=4,
    )
    return stats, loss


def _strip_gradient(x: Tensor, y: Tensor, label: Tensor, tau: Tensor, stats: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with respect to the unit rows x and y and to τ."""
    count, path = len(x), "info_nce.triton.strip.backward"
    rows = _strip_rows(count, x.element_size())
    meta = _strip_blocks(path, x.dtype)
    blocks = triton.cdiv(count, meta["BN"])
    scaled, factor = x / tau, factor / tau
    products, slope = x.new_empty(rows, count), x.new_empty(triton.cdiv(count, meta["BM"]), blocks)
    out_x, out_y = torch.empty_like(x), torch.empty_like(y)
    for own in _strips(count, rows):
        s = torch.mm(scaled[own], y.T, out=products[: own.stop - own.start])
        launch(path, _strip_backward, (blocks, triton.cdiv(len(s), meta["BM"])), s, label, stats, factor, slope, own.start, count, **meta)
        torch.mm(s, y, out=out_x[own])
        out_y.addmm_(s.T, x[own], beta=1 if own.start else 0)
    return out_x, out_y, -slope.sum()


def _unit_pair(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Unit rows and norms of both sides. Copying the inputs side by side takes less time than a second launch."""
    unit, norm = unit_rows(torch.cat((x, y)))
    return (unit[: len(x)], norm[: len(x)]), (unit[len(x) :], norm[len(x) :])


def infonce_fwd(x: Tensor, y: Tensor, label: Tensor, temperature: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    ((unit_x, _), (unit_y, _)), label = _unit_pair(x, y), label.contiguous()
    anchors = 2 * max(len(x), 1) if mean else 2
    if x.shape[1] > FEW:
        # The divided features round no worse than the divided products, and there are fewer of them.
        stats, loss = _strip_pass(unit_x.div_(temperature.to(unit_x.dtype)), unit_y, label)
        return loss.sum() / anchors, stats
    of_x, loss_x = _pass("info_nce.triton", unit_x, unit_y, label, temperature, 0, False)
    of_y, loss_y = _pass("info_nce.triton", unit_y, unit_x, label, temperature, 0, False)
    return (loss_x.sum() + loss_y.sum()) / anchors, torch.cat((of_x[:2], of_y))


def infonce_bwd(x, y, label, temperature, stats, grad, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    ((unit_x, norm_x), (unit_y, norm_y)), label = _unit_pair(x, y), label.contiguous()
    factor = grad.to(unit_x.dtype) / (2 * max(len(x), 1) if mean else 2)
    if x.shape[1] > FEW:
        out_x, out_y, slope = _strip_gradient(unit_x, unit_y, label, temperature.to(unit_x.dtype), stats, factor)
    else:
        top_x, rest_x, top_y, rest_y, positives = stats
        path = "info_nce.triton.backward"
        out_x, slope = _gradient(path, unit_x, unit_y, label, temperature, (top_x, rest_x, top_y, rest_y, positives), factor, 0, False)
        out_y, _ = _gradient(path, unit_y, unit_x, label, temperature, (top_y, rest_y, top_x, rest_x, positives), factor, 0, False)
        slope = slope.sum()
    dx, dy = unit_rows_backward(unit_x, norm_x, out_x, x.dtype), unit_rows_backward(unit_y, norm_y, out_y, y.dtype)
    return dx, dy, slope.to(temperature.dtype)
