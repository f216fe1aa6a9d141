"""Triton kernels of the affinity loss: tiles of FᵀF on and above the diagonal, recomputed in the backward; nothing N×N is stored.

Labels and distances are compared where a pair is visited. Losses come from e^−|s|, so that neither 1 − A nor A rounds to 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, accumulator, config, dot, launch, power_of_2, precision
from ..affinity.triton_impl import gram
from ..sinkhorn.triton_impl import kind_of


@triton.jit
def _pairs(label_ptr, image, row, column, n, width, radius, ignore):
    """(the pair counts, its labels agree)."""
    a = tl.load(label_ptr + image * n + row, mask=row < n, other=0)
    b = tl.load(label_ptr + image * n + column, mask=column < n, other=0)
    pair = ((row < n) & (a != ignore))[:, None] & ((column < n) & (b != ignore))[None, :]
    if radius >= 0:
        y = tl.abs((row // width)[:, None] - (column // width)[None, :])
        x = tl.abs((row % width)[:, None] - (column % width)[None, :])
        pair = pair & (y <= radius) & (x <= radius)
    return pair, a[:, None] == b[None, :]


@triton.jit
def _near(first, second, BM: tl.constexpr, BN: tl.constexpr, width, radius):
    """Whether rows [first, first + BM) and columns [second, second + BN) may hold a pair within the radius."""
    apart = tl.maximum(second // width - (first + BM - 1) // width, first // width - (second + BN - 1) // width)
    return (apart <= radius) | (radius < 0)


@triton.jit
def _forward(sums_ptr, counts_ptr, feature, per_image, per_channel, per_token, label_ptr, channels, n, width, radius, ignore, blocks,
             BCE: tl.constexpr, kind: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Losses of positive and negative pairs of a tile, and how many there are; those off the diagonal count twice."""
    tile = tl.program_id(0) % (blocks * blocks)
    image = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    i, j = tile // blocks, tile % blocks
    positive, negative = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    positives, negatives = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    if (i <= j) & _near(i * BM, j * BM, BM, BM, width, radius):
        row, column = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)
        s = gram(feature + image * per_image, per_channel, per_token, channels, row, column, n, kind, PRECISION, BK)
        pair, same = _pairs(label_ptr, image, row, column, n, width, radius, ignore)
        times = tl.where(row[:, None] < column[None, :], 2, tl.where(row[:, None] == column[None, :], 1, 0))
        e = tl.exp2(-tl.abs(s) * LOG2E)
        right = tl.where(same, s, -s)  # positive where the pair is on its side of the threshold
        if BCE:
            u = 1.0 + e
            loss = tl.log(u) + (e - (u - 1.0)) / u + tl.where(right < 0, tl.abs(s), 0.0)
        else:
            loss = tl.where(right < 0, 1.0, e) / (1.0 + e)
        loss = tl.where(s == s, loss, s)
        value = tl.where(pair & (times > 0), loss * times, 0.0)
        many = tl.where(pair, times, 0)
        positive = tl.sum(tl.sum(tl.where(same, value, 0.0), axis=1).to(tl.float64), axis=0)
        negative = tl.sum(tl.sum(tl.where(same, 0.0, value), axis=1).to(tl.float64), axis=0)
        positives = tl.sum(tl.sum(tl.where(same, many, 0), axis=1), axis=0).to(tl.int64)
        negatives = tl.sum(tl.sum(tl.where(same, 0, many), axis=1), axis=0).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * 2
    tl.store(sums_ptr + place, positive)
    tl.store(sums_ptr + place + 1, negative)
    tl.store(counts_ptr + place, positives)
    tl.store(counts_ptr + place + 1, negatives)


@triton.jit
def _finish(loss_ptr, counts_out_ptr, sums_ptr, counts_ptr, BCE: tl.constexpr):
    positives, negatives = tl.load(counts_ptr).to(tl.float64), tl.load(counts_ptr + 1).to(tl.float64)
    if BCE:
        loss = (tl.load(sums_ptr) + tl.load(sums_ptr + 1)) / tl.maximum(positives + negatives, 1.0)
    else:
        loss = 0.5 * tl.load(sums_ptr) / (positives + 1.0) + 0.5 * tl.load(sums_ptr + 1) / (negatives + 1.0)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))
    tl.store(counts_out_ptr, positives)
    tl.store(counts_out_ptr + 1, negatives)


@triton.jit
def _backward(out_ptr, feature, per_image, per_channel, per_token, label_ptr, counts_ptr, channels, n, width, radius, ignore,
              blocks, BCE: tl.constexpr, kind: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
              PRECISION: tl.constexpr, PRODUCT: tl.constexpr):  # fmt: skip
    """The gradient of BM cells and BD channels. An inner product belongs to both of its cells, and a pair counts in both orders."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BM
    row = first + tl.arange(0, BM)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    positives, negatives = tl.load(counts_ptr), tl.load(counts_ptr + 1)
    if BCE:
        weight_positive = (2.0 / tl.maximum(positives + negatives, 1.0)).to(kind)
        weight_negative = weight_positive
    else:
        weight_positive, weight_negative = (1.0 / (positives + 1.0)).to(kind), (1.0 / (negatives + 1.0)).to(kind)
    start = feature + image * per_image
    acc = tl.zeros((BM, BD), kind)
    for begin in range(0, n, BN):
        if _near(first, begin, BM, BN, width, radius):
            column = begin + tl.arange(0, BN)
            s = gram(start, per_channel, per_token, channels, row, column, n, kind, PRECISION, BK)
            pair, same = _pairs(label_ptr, image, row, column, n, width, radius, ignore)
            e = tl.exp2(-tl.abs(s) * LOG2E)
            if BCE:
                slope = tl.where(tl.where(same, s, -s) < 0, 1.0, e) / (1.0 + e)
            else:
                slope = e / ((1.0 + e) * (1.0 + e))
            slope = tl.where(s == s, slope, s)
            w = tl.where(pair, slope * tl.where(same, -weight_positive, weight_negative), 0.0)
            inside = (column < n)[:, None] & (channel < channels)[None, :]
            at = column.to(tl.int64)[:, None] * per_token + channel.to(tl.int64)[None, :] * per_channel
            acc = dot(w, tl.load(start + at, mask=inside, other=0.0).to(kind), acc, PRODUCT)
    at = (image * channels + channel)[None, :] * n + row[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(row < n)[:, None] & (channel < channels)[None, :])


def _blocks(name: str, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """64×64 tiles: 4096 cells make 2080 of them on and above the diagonal. float64 halves the sides for its registers."""
    side = 32 if dtype == torch.float64 else 64
    default = {"BM": side, "BK": 64 if dtype.itemsize == 2 else 16, "num_warps": 4, "num_stages": 2}
    other = [{**default, "BM": bm, "num_warps": w, "num_stages": s} for bm, w, s in ((64, 4, 3), (64, 8, 3), (128, 8, 3))]
    if name == "affinity_loss.backward":
        # Tiles are made once per 128 channels: wider sums need more registers than a thread has.
        wide = {"BN": 32, "BD": power_of_2(channels, most=64 if dtype == torch.float64 else 128), "num_warps": 4 if side == 32 else 8}
        default, other = {**default, **wide}, [{**default, **wide, "BN": 64}, {**default, **wide, "BD": power_of_2(channels, most=256)}]
    return config(f"{name}/d{power_of_2(channels)}", default, other)


def affinity_loss_fwd(
    feature: Tensor, label: Tensor, kind: str, radius: int, ignore_index: int, differentiate: bool
) -> tuple[Tensor, Tensor]:
    path, flat = "affinity_loss.triton", feature.flatten(2)
    batch, channels, n = flat.shape
    meta = _blocks("affinity_loss", channels, feature.dtype)
    blocks = triton.cdiv(n, meta["BM"])
    sums = feature.new_empty(batch * blocks**2, 2, dtype=torch.float64)
    many = torch.empty_like(sums, dtype=torch.int64)
    launch(path, _forward, (batch * blocks**2,), sums, many, flat, *flat.stride(), label.contiguous(), channels, n, feature.shape[3],
           radius, ignore_index, blocks, BCE=kind == "bce", kind=kind_of(feature.dtype), PRECISION=precision(feature.dtype),
           **meta)  # fmt: skip
    loss, counts = feature.new_empty((), dtype=accumulator(feature.dtype)), feature.new_empty(2, dtype=torch.float64)
    launch(path, _finish, (1,), loss, counts, sums.sum(0), many.sum(0), BCE=kind == "bce", num_warps=1)
    return loss, _gradient(feature, label, counts, kind, radius, ignore_index) if differentiate else loss.new_empty(0)


def _gradient(feature: Tensor, label: Tensor, counts: Tensor, kind: str, radius: int, ignore_index: int) -> Tensor:
    """The loss's gradient with respect to `feature`, not rounded to a half type: a loss scale multiplies it yet."""
    flat, dtype = feature.flatten(2), feature.dtype
    out = feature.new_empty(feature.shape, dtype=accumulator(dtype))
    batch, channels, n = flat.shape
    meta = _blocks("affinity_loss.backward", channels, dtype)
    blocks = triton.cdiv(n, meta["BM"])
    # Weights and half-precision features are multiplied in TF32, where the features are exact.
    product = "tf32" if dtype.itemsize == 2 else precision(dtype)
    launch("affinity_loss.triton.backward", _backward, (batch * blocks, triton.cdiv(channels, meta["BD"])), out, flat, *flat.stride(),
           label.contiguous(), counts, channels, n, feature.shape[3], radius, ignore_index, blocks, BCE=kind == "bce",
           kind=kind_of(dtype), PRECISION=precision(dtype), PRODUCT=product, **meta)  # fmt: skip
    return out
