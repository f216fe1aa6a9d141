"""Triton kernels of the affinity loss: strips of rows of FᵀF, made by PyTorch, that become losses and gradient weights in one pass.

How many pairs there are follows from the labels alone and is counted first, so that the pass that reads a strip's products for the loss
can put the gradient's weights in their place: no product is made twice. A BLAS forms products in float32 faster than `tl.dot` does; they
are written with `out=`, which autocast leaves alone. Losses come from e^−|s|, so that neither 1 − A nor A rounds to 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, accumulator, config, launch
from ..contrastive.triton_impl import divided

STRIP_BYTES = 32 << 20


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
def _count(counts_ptr, label_ptr, n, width, radius, ignore, blocks, BM: tl.constexpr, BN: tl.constexpr):
    """How many positive and negative pairs BM cells have."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BM
    row = first + tl.arange(0, BM)
    begin, end = first * 0, first * 0 + n
    if radius >= 0:  # lines of cells out of reach hold no pair
        begin = tl.maximum(first // width - radius, 0) * width
        end = tl.minimum(((first + BM - 1) // width + radius + 1).to(tl.int64) * width, n).to(tl.int32)
    positives, negatives = tl.zeros((BM,), tl.int32), tl.zeros((BM,), tl.int32)
    for start in range(begin, end, BN):
        pair, same = _pairs(label_ptr, image, row, start + tl.arange(0, BN), n, width, radius, ignore)
        positives += tl.sum((pair & same).to(tl.int32), axis=1)
        negatives += tl.sum((pair & ~same).to(tl.int32), axis=1)
    at = counts_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(at, tl.sum(positives.to(tl.int64), axis=0))
    tl.store(at + 1, tl.sum(negatives.to(tl.int64), axis=0))


@triton.jit
def _pass(s_ptr, sums_ptr, label_ptr, counts_ptr, first, begin, rows, left, right, n, width, radius, ignore,
          BCE: tl.constexpr, WEIGHTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Losses of the positive and negative pairs of a tile; with WEIGHTS the tile becomes the weights of the gradient.

    The strip holds the rows from `begin` on and the columns from `left` to `right` of the images from `first` on.
    """
    kind = s_ptr.dtype.element_ty
    image, local = tl.program_id(2).to(tl.int64), tl.program_id(1) * BM + tl.arange(0, BM)
    column = left + tl.program_id(0) * BN + tl.arange(0, BN)
    pair, same = _pairs(label_ptr, first + image, begin + local, column, n, width, radius, ignore)
    at = s_ptr + image * rows * (right - left) + local[:, None] * (right - left) + (column - left)[None, :]
    inside = (local < rows)[:, None] & (column < right)[None, :]
    s = tl.load(at, mask=inside, other=0.0)
    pair = pair & inside
    e = tl.exp2(-tl.abs(s) * LOG2E)
    u = 1.0 + e
    wrong = tl.where(same, s, -s) < 0  # on the other side of the threshold
    share = divided(tl.where(wrong, 1.0, e).to(kind), u)
    if BCE:
        loss = tl.log(u) + divided(e - (u - 1.0), u) + tl.where(wrong, tl.abs(s), 0.0)
    else:
        loss = share
    loss = tl.where(pair, tl.where(s == s, loss, s), 0.0)
    place = sums_ptr + 2 * ((image * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0))
    tl.store(place, tl.sum(tl.sum(tl.where(same, loss, 0.0), axis=1).to(tl.float64), axis=0))
    tl.store(place + 1, tl.sum(tl.sum(tl.where(same, 0.0, loss), axis=1).to(tl.float64), axis=0))
    if WEIGHTS:  # twice the derivative: a product belongs to both of its cells
        positives, negatives = tl.load(counts_ptr).to(tl.float64), tl.load(counts_ptr + 1).to(tl.float64)
        if BCE:
            of_positive = (2.0 / tl.maximum(positives + negatives, 1.0)).to(kind)
            of_negative = of_positive
            slope = share
        else:
            of_positive, of_negative = (1.0 / (positives + 1.0)).to(kind), (1.0 / (negatives + 1.0)).to(kind)
            slope = divided(e, u * u)
        slope = tl.where(s == s, slope, s)
        tl.store(at, tl.where(pair, slope * tl.where(same, -of_positive, of_negative), 0.0), mask=inside)


@triton.jit
def _finish(loss_ptr, sums_ptr, counts_ptr, BCE: tl.constexpr):
    positives, negatives = tl.load(counts_ptr).to(tl.float64), tl.load(counts_ptr + 1).to(tl.float64)
    if BCE:
        loss = (tl.load(sums_ptr) + tl.load(sums_ptr + 1)) / tl.maximum(positives + negatives, 1.0)
    else:
        loss = 0.5 * tl.load(sums_ptr) / (positives + 1.0) + 0.5 * tl.load(sums_ptr + 1) / (negatives + 1.0)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


def _strips(batch: int, n: int, width: int, radius: int, size: int) -> list[tuple[slice, slice, slice]]:
    """(images, rows, columns) of every strip: as many whole images as 32 MiB of products of `size` bytes hold (an H100's L2 holds 50), or
    the rows of one image, at least 128 and in multiples of every block. Columns are those that rows reach within the radius."""
    images = min(max(1, STRIP_BYTES // (n * n * size)), 65535)
    rows = max(128, STRIP_BYTES // (n * size) // 128 * 128)
    result = []
    for first in range(0, batch, images):
        for begin in range(0, n, rows):
            end, left, right = min(begin + rows, n), 0, n
            if radius >= 0:
                left = max(0, begin // width - radius) * width
                right = min(n, ((end - 1) // width + radius + 1) * width)
            result.append((slice(first, min(first + images, batch)), slice(begin, end), slice(left, right)))
    return result


def _products(flat: Tensor, strips: list[tuple[slice, slice, slice]]) -> Iterator[tuple[int, tuple[slice, slice, slice], Tensor]]:
    """(its number, the strip, its products), one strip after the other in the same memory."""
    shapes = [[part.stop - part.start for part in strip] for strip in strips]
    memory = flat.new_empty(max((a * b * c for a, b, c in shapes), default=0))
    for i, (strip, shape) in enumerate(zip(strips, shapes, strict=True)):
        images, rows, columns = strip
        products = memory[: shape[0] * shape[1] * shape[2]].view(shape)
        torch.bmm(flat[images, :, rows].transpose(1, 2), flat[images, :, columns], out=products)
        yield i, strip, products


def _blocks(name: str, dtype: torch.dtype) -> dict[str, int]:
    """8 pairs a thread: each has several terms at once, and with 16 a multiprocessor holds a single program."""
    default = {"BM": 32, "BN": 64, "num_warps": 8}
    return config(name, default, [{"BM": m, "BN": n, "num_warps": w} for m, n, w in ((16, 128, 4), (32, 64, 4), (32, 128, 8), (64, 64, 8))])


def affinity_loss_fwd(
    feature: Tensor, label: Tensor, kind: str, radius: int, ignore_index: int, differentiate: bool
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient with respect to `feature`, not rounded to a half type: a loss scale multiplies it yet."""
    # In one layout, whatever the caller's: a BLAS rounds transposed products otherwise.
    flat, label = feature.flatten(2).contiguous().to(accumulator(feature.dtype)), label.contiguous()
    path = "affinity_loss.triton"
    (batch, _, n), (height, width) = flat.shape, feature.shape[2:]
    radius = min(radius, max(height, width))  # a wider one is no limit, and might not fit into 32 bits
    options = (n, width, radius, ignore_index)
    blocks = triton.cdiv(n, 16)
    many = label.new_empty(batch * blocks, 2)
    launch(f"{path}.count", _count, (batch * blocks,), many, label, *options, blocks, BM=16, BN=256, num_warps=4)
    counts = many.sum(0)
    meta = _blocks(path, flat.dtype)
    strips = _strips(batch, n, width, radius, flat.element_size())
    grids = [(triton.cdiv(c.stop - c.start, meta["BN"]), triton.cdiv(r.stop - r.start, meta["BM"]), i.stop - i.start) for i, r, c in strips]
    sums = flat.new_zeros(len(strips), max((a * b * c for a, b, c in grids), default=0), 2, dtype=torch.float64)
    gradient = flat.new_empty(feature.shape if differentiate else (0,))
    for i, (images, rows, columns), products in _products(flat, strips):
        launch(path, _pass, grids[i], products, sums[i], label, counts, images.start, rows.start, rows.stop - rows.start, columns.start,
               columns.stop, *options, BCE=kind == "bce", WEIGHTS=differentiate, **meta)  # fmt: skip
        if differentiate:
            torch.bmm(flat[images, :, columns], products.transpose(1, 2), out=gradient.flatten(2)[images, :, rows])
    loss = flat.new_empty(())
    launch(path, _finish, (1,), loss, sums.sum((0, 1)), counts, BCE=kind == "bce", num_warps=1)
    return loss, gradient
