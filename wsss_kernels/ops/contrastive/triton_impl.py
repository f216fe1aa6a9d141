"""Triton kernels of the contrastive losses: tiles of pairs, recomputed in the backward; nothing N×N is stored.

Both losses are one pass: with unit rows x, y, logits s = x·yᵀ/τ and a label per row, an anchor's loss is
log Σ_j exp s_ij − mean over its positives of s_ij. The supervised loss has y = x and leaves the diagonal out; `info_nce` takes the
pass in both directions. The gradient of every logit is known from the two log-sum-exps of its row and its column,
T_ij = exp(s_ij − lse_i) + exp(s_ij − lse_j) − 2 [label_i = label_j] / positives_i, so that one pass of row owners gives Σ_j T_ij y_j.
A log-sum-exp is kept as its maximum and the rest: their sum, rounded, would cost the exponentials of sharp logits their last digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, config, dot, launch, power_of_2, precision, unit_rows, unit_rows_backward


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


def infonce_fwd(x: Tensor, y: Tensor, label: Tensor, temperature: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    (unit_x, _), (unit_y, _), label = unit_rows(x), unit_rows(y), label.contiguous()
    of_x, loss_x = _pass("info_nce.triton", unit_x, unit_y, label, temperature, 0, False)
    of_y, loss_y = _pass("info_nce.triton", unit_y, unit_x, label, temperature, 0, False)
    total = (loss_x.sum() + loss_y.sum()) / 2
    return total / max(len(x), 1) if mean else total, torch.cat((of_x[:2], of_y))


def infonce_bwd(x, y, label, temperature, stats, grad, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    (unit_x, norm_x), (unit_y, norm_y), label = unit_rows(x), unit_rows(y), label.contiguous()
    top_x, rest_x, top_y, rest_y, positives = stats
    factor = grad.to(unit_x.dtype) / (2 * max(len(x), 1) if mean else 2)
    path = "info_nce.triton.backward"
    out_x, slope = _gradient(path, unit_x, unit_y, label, temperature, (top_x, rest_x, top_y, rest_y, positives), factor, 0, False)
    out_y, _ = _gradient(path, unit_y, unit_x, label, temperature, (top_y, rest_y, top_x, rest_x, positives), factor, 0, False)
    dx, dy = unit_rows_backward(unit_x, norm_x, out_x, x.dtype), unit_rows_backward(unit_y, norm_y, out_y, y.dtype)
    return dx, dy, slope.sum().to(temperature.dtype)
