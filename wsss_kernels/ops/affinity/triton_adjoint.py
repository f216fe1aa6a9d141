"""Gradients of affinities and of the refining map: products of matrices by the library, and kernels for what lies between them.

Rows of the matrices are taken in strips. A strip of the Gram matrices comes from `torch.bmm`; one kernel turns all of it in place into
weights, the gradient of the products and its transpose added, chained through the sigmoid, the cosine and the clamp; `torch.bmm`
multiplies the weights with the features. The gradient of an N×N matrix is read in tiles, from memory or from its low-rank factors, so
that nothing of N×N is stored here. What the normalisation takes away, the part along a unit vector, is subtracted at the end.

Products have `out=`, which keeps autocast from rounding their factors to half types.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import accumulator, launch, power_of_2
from ..sinkhorn.triton_impl import kind_of, stored, stored_tile
from .api import empty_gradients
from .triton_impl import candidate_tile, candidates, inverse_norms, options, sigmoid, unit_features

STRIP_BYTES = 2**24
"""What the layers' Gram matrices of a strip may take (A_f comes on top): strip and features stay in the second-level cache."""
LEAST_ROWS = 128
"""Of a strip: one tile of a library's product."""


@triton.jit
def _slope(slope_ptr, image, layer, layers, kind: tl.constexpr):
    """The gradient of the deviation of a layer."""
    if slope_ptr is None:
        value = tl.full((), 0.0, kind)
    else:
        value = tl.load(slope_ptr + image * layers + layer).to(kind)
    return value


@triton.jit
def _sign(a, b, SIGNED: tl.constexpr):
    """d |a − b| / da, or d (a − b) / da."""
    if SIGNED:
        value = tl.full(a.shape, 1.0, a.dtype)
    else:
        value = tl.where(a > b, 1.0, tl.where(a < b, -1.0, 0.0)).to(a.dtype)
    return value


@triton.jit
def _selected(gate, image, first, layers):
    count = 0.0
    for layer in range(first, layers):
        count += tl.load(gate + image * layers + layer).to(tl.float32)
    return count


@triton.jit
def _strip(blocks, rows, columns, BM: tl.constexpr):
    """(image of the strip, row of the strip, column) of a program's tile."""
    tile = tl.program_id(0) % (blocks * columns)
    image = (tl.program_id(0) // (blocks * columns)).to(tl.int64)
    return image, (tile // columns) * BM + tl.arange(0, BM), (tile % columns) * BM + tl.arange(0, BM)


@triton.jit
def _both(gradient, image, row, column, n, GTILE: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr):
    """A tile of the gradient of a matrix and of its transpose."""
    direct = GTILE(gradient, image, row, column, n, False, kind, OPTIONS)
    return direct, GTILE(gradient, image, row, column, n, True, kind, OPTIONS)


@triton.jit
def _square_weights_kernel(weights_ptr, affinity, gradient, start, begin, rows, n, blocks, columns, COSINE: tl.constexpr,
                           kind: tl.constexpr, OPTIONS: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """weights = (G + Gᵀ) · dA/d(product), from a stored A, or in place of the products that A is made of."""
    local, at, column = _strip(blocks, rows, columns, BM)
    row, image = begin + at, start + local
    place = weights_ptr + (local * rows + at)[:, None] * n + column[None, :]
    inside = (at < rows)[:, None] & (column < n)[None, :]
    if affinity is not None:
        a = stored_tile(affinity, image, row, column, n, False, kind, OPTIONS)
    else:
        a = tl.load(place, mask=inside, other=0.0)
        if not COSINE:
            a = sigmoid(a, OPTIONS)
    direct, turned = _both(gradient, image, row, column, n, stored_tile, kind, OPTIONS)
    w = direct + turned
    if not COSINE:
        w *= OPTIONS[3] * a * (1.0 - a)
    if OPTIONS[2] is not None:
        w = tl.where(a > OPTIONS[2], w, 0.0)
    tl.store(place, w, mask=inside)


@triton.jit
def _weights_kernel(encoder_ptr, decoder_ptr, maps, gradient, slope_ptr, gate, first, layers, start, begin, rows, n, blocks, columns,
                    GTILE: tl.constexpr, SIGNED: tl.constexpr, TO_ENCODER: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr,
                    BM: tl.constexpr):  # fmt: skip
    """Weights in place of products: of the layers' cosines, if TO_ENCODER, and of FᵀF of the decoder, if there is one.

    The layers' affinities are those products, or maps from memory, which are not symmetric and whose gradient is not needed here.
    """
    local, at, column = _strip(blocks, rows, columns, BM)
    row, image = begin + at, start + local
    inside = (at < rows)[:, None] & (column < n)[None, :]
    direct, turned = _both(gradient, image, row, column, n, GTILE, kind, OPTIONS)
    if decoder_ptr is not None:
        place = decoder_ptr + (local * rows + at)[:, None] * n + column[None, :]
        f = sigmoid(tl.load(place, mask=inside, other=0.0), OPTIONS)
        total, other, signs = tl.zeros((BM, BM), kind), tl.zeros((BM, BM), kind), tl.zeros((BM, BM), kind)
    share = 1.0 / _selected(gate, image, first, layers).to(kind)
    for layer in range(first, layers):
        chosen = tl.load(gate + image * layers + layer) != 0
        slope = _slope(slope_ptr, image, layer, layers, kind)
        if OPTIONS[0]:
            if chosen | (slope != 0):
                a = candidate_tile(maps, image, layer, row, column, n, False, kind, OPTIONS)
                b = candidate_tile(maps, image, layer, row, column, n, True, kind, OPTIONS)
                total += tl.where(chosen, a, 0.0)
                other += tl.where(chosen, b, 0.0)
                signs += slope * (_sign(f, a, SIGNED) + _sign(f, b, SIGNED))
        else:
            product = encoder_ptr + ((local * (layers - first) + layer - first) * rows + at)[:, None] * n + column[None, :]
            a = tl.load(product, mask=inside, other=0.0)
            if OPTIONS[2] is not None:
                a = tl.where(a <= OPTIONS[2], OPTIONS[2], a)
            w = (direct + turned) * share
            if decoder_ptr is not None:
                sign = 2.0 * slope * _sign(f, a, SIGNED)
                total += tl.where(chosen, a, 0.0)
                signs += sign
                w = tl.where(chosen, w * f, 0.0) - sign
            else:
                w = tl.where(chosen, w, 0.0)
            if TO_ENCODER:
                if OPTIONS[2] is not None:
                    w = tl.where(a > OPTIONS[2], w, 0.0)
                tl.store(product, w, mask=inside)
    if decoder_ptr is not None:
        if OPTIONS[0]:
            w = (direct * total + turned * other) * share + signs
        else:
            w = (direct + turned) * total * share + signs
        tl.store(place, w * (OPTIONS[3] * f * (1.0 - f)), mask=inside)


@triton.jit
def _project_kernel(out_ptr, grad_ptr, unit_ptr, inverse_ptr, gate, slope_ptr, first, layers, channels, n, blocks, BM: tl.constexpr,
                    BK: tl.constexpr):  # fmt: skip
    """From the gradient g of unit features u that of the features, (g − u uᵀg) / ‖x‖; it may take the place of g.

    Layers that are no candidates, or that nothing depends on, get 0, whatever their features are.
    """
    which = tl.program_id(0) // blocks
    image, layer = (which // layers).to(tl.int64), which % layers
    kind = unit_ptr.dtype.element_ty
    token, k = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM), tl.arange(0, BK)
    used = layer >= first
    if gate is not None:
        chosen = tl.load(gate + image * layers + layer) != 0
        used = used & (chosen | (_slope(slope_ptr, image, layer, layers, kind) != 0))
    here = (image * layers + layer) * channels * n + token[None, :]
    unit = (image * (layers - first) + layer - first) * channels * n + token[None, :]
    if used:
        along = tl.zeros((BM,), kind)
        for begin in range(0, channels, BK):
            inside = (begin + k < channels)[:, None] & (token < n)[None, :]
            at = (begin + k)[:, None].to(tl.int64) * n
            u = tl.load(unit_ptr + unit + at, mask=inside, other=0.0)
            along += tl.sum(u * tl.load(grad_ptr + here + at, mask=inside, other=0.0), axis=0)
        inverse = tl.load(inverse_ptr + (image * layers + layer) * n + token, mask=token < n, other=0.0)
        for begin in range(0, channels, BK):
            inside = (begin + k < channels)[:, None] & (token < n)[None, :]
            at = (begin + k)[:, None].to(tl.int64) * n
            u = tl.load(unit_ptr + unit + at, mask=inside, other=0.0)
            x = (tl.load(grad_ptr + here + at, mask=inside, other=0.0) - u * along[None, :]) * inverse[None, :]
            tl.store(out_ptr + here + at, x.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        for begin in range(0, channels, BK):
            inside = (begin + k < channels)[:, None] & (token < n)[None, :]
            at = (begin + k)[:, None].to(tl.int64) * n
            tl.store(out_ptr + here + at, tl.zeros((BK, BM), out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _maps_kernel(out_ptr, decoder_out_ptr, products_ptr, decoder, encoder, gradient, slope_ptr, gate, first, layers, start, begin, rows, n,
                 blocks, columns, GTILE: tl.constexpr, SIGNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr,
                 BM: tl.constexpr):  # fmt: skip
    """The gradient of a tile of every map, and with `decoder_out_ptr` that of the deviations with respect to a given A_f.

    A_f is stored (`decoder`), or the sigmoid of a strip of products.
    """
    local, at, column = _strip(blocks, rows, columns, BM)
    row, image = begin + at, start + local
    inside = (at < rows)[:, None] & (column < n)[None, :]
    g, f, signs = tl.zeros((BM, BM), kind), tl.zeros((BM, BM), kind), tl.zeros((BM, BM), kind)
    if gradient is not None:
        g = GTILE(gradient, image, row, column, n, False, kind, OPTIONS) / _selected(gate, image, first, layers).to(kind)
    if decoder is not None:
        f = stored_tile(decoder, image, row, column, n, False, kind, OPTIONS)
    if products_ptr is not None:
        f = sigmoid(tl.load(products_ptr + (local * rows + at)[:, None] * n + column[None, :], mask=inside, other=0.0), OPTIONS)
        g *= f
    for layer in range(0, layers):
        w = tl.zeros((BM, BM), kind)
        if layer >= first:
            slope = _slope(slope_ptr, image, layer, layers, kind)
            a = candidate_tile(encoder, image, layer, row, column, n, False, kind, OPTIONS)
            if gradient is not None:
                w += tl.where(tl.load(gate + image * layers + layer) != 0, g, 0.0)
            if slope_ptr is not None:
                s = slope * _sign(f, a, SIGNED)
                w -= s
                signs += s
            if OPTIONS[2] is not None:
                w = tl.where(a > OPTIONS[2], w, 0.0)
        place = ((image * layers + layer) * n + row)[:, None] * n + column[None, :]
        tl.store(out_ptr + place, w.to(out_ptr.dtype.element_ty), mask=inside)
    if decoder_out_ptr is not None:
        place = (image * n + row)[:, None] * n + column[None, :]
        tl.store(decoder_out_ptr + place, signs.to(decoder_out_ptr.dtype.element_ty), mask=inside)


class Strip(NamedTuple):
    """Rows `begin` to `begin + rows` of the matrices of some images."""

    start: int
    images: int
    begin: int
    rows: int

    def products(self, features: Tensor) -> Tensor:
        """These rows of FᵀF of B×layers×C×N features."""
        x = features[self.start : self.start + self.images].flatten(0, 1)
        out = x.new_empty(len(x), self.rows, x.shape[-1])
        return torch.bmm(x[:, :, self.begin : self.begin + self.rows].mT, x, out=out)

    def multiply(self, features: Tensor, weights: Tensor, out: Tensor) -> None:
        """The tokens of these rows of `out`, like `features`: F Wᵀ."""
        x = features[self.start : self.start + self.images]
        own = out[self.start : self.start + self.images, ..., self.begin : self.begin + self.rows]
        if self.images == 1 or out.is_contiguous():
            torch.bmm(x.flatten(0, 1), weights.mT, out=own.flatten(0, 1))
            return
        for image, weight, to in zip(x, weights.view(*x.shape[:2], *weights.shape[1:]), own, strict=True):  # later layers of several images
            torch.bmm(image, weight.mT, out=to)


def strips(batch: int, n: int, layers: int, dtype: torch.dtype) -> Iterator[Strip]:
    """Several images at once if their matrices fit into STRIP_BYTES, else rows of one image, at least LEAST_ROWS and of even shares."""
    row = max(layers, 1) * n * dtype.itemsize
    most = max(LEAST_ROWS, STRIP_BYTES // row)
    rows = min(n, -(-triton.cdiv(n, triton.cdiv(n, most)) // 32) * 32)
    images = max(1, STRIP_BYTES // (row * n)) if rows == n else 1
    for start in range(0, batch, images):
        for begin in range(0, n, rows):
            yield Strip(start, min(images, batch - start), begin, min(rows, n - begin))


def _tiles(strip: Strip, n: int) -> tuple[int, int, dict[str, int]]:
    """Blocks of rows and of columns, and their sides: eight elements a thread, since some eight tiles are live at once."""
    return triton.cdiv(strip.rows, 32), triton.cdiv(n, 32), {"BM": 32, "num_warps": 4}


def _wide(features: Tensor) -> Tensor:
    return features.to(accumulator(features.dtype)).contiguous()


def _project(path, out, grad, unit, inverse, gate, slope, first) -> None:
    batch, layers, channels, n = out.shape
    blocks = triton.cdiv(n, 16)
    launch(path, _project_kernel, (batch * layers * blocks,), out, grad, unit, inverse, gate, slope, first, layers, channels, n, blocks,
           BM=16, BK=power_of_2(channels, most=256), num_warps=8)  # fmt: skip


def _of_maps(path, strip, out, decoder_out, products, decoder, encoder, gradient, tile, slope, gate, first, signed, option) -> None:
    layers, n = out.shape[1:3]
    blocks, columns, meta = _tiles(strip, n)
    launch(path, _maps_kernel, (strip.images * blocks * columns,), out, decoder_out, products, decoder, candidates(encoder, True, None),
           gradient, slope, gate, first, layers, strip.start, strip.begin, strip.rows, n, blocks, columns, GTILE=tile, SIGNED=signed,
           kind=kind_of(encoder.dtype), OPTIONS=option, **meta)  # fmt: skip


def square(grad: Tensor, affinity: Tensor, feature: Tensor, cosine: bool, scale: float, minimum: float | None) -> Tensor:
    """Of `affinity_fwd`: from the affinities where they are unrounded, else from recomputed ones."""
    path, out, n = "affinity.triton.backward", feature.new_empty(feature.shape), feature.shape[-1]
    kept, layer = feature.dtype.itemsize > 2, feature[:, None]
    inverse = inverse_norms(layer) if cosine else None
    x = _wide(layer) if inverse is None else unit_features(layer, inverse)
    to_x = out[:, None] if kept else x.new_empty(x.shape)
    for strip in strips(len(x), n, 1, x.dtype):
        weights = x.new_empty(strip.images, strip.rows, n) if kept else strip.products(x)
        blocks, columns, meta = _tiles(strip, n)
        launch(path, _square_weights_kernel, (strip.images * blocks * columns,), weights, stored(affinity) if kept else None, stored(grad),
               strip.start, strip.begin, strip.rows, n, blocks, columns, COSINE=cosine, kind=kind_of(x.dtype),
               OPTIONS=options(feature, False, False, minimum, scale), **meta)  # fmt: skip
        strip.multiply(x, weights, to_x)
        del weights  # before the next strip's
    if cosine:
        _project(path, out[:, None], to_x, x, inverse, None, None, 0)
    elif not kept:
        out.copy_(to_x[:, 0])
    return out


def deviation(grad: Tensor, decoder: Tensor, encoder: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    to_decoder, to_encoder = decoder.new_empty(decoder.shape), encoder.new_empty(encoder.shape)
    whole = Strip(0, len(encoder), 0, encoder.shape[-1])
    _of_maps("affinity_deviation.triton.backward", whole, to_encoder, to_decoder, None, stored(decoder), encoder, None, stored_tile,
             grad.contiguous(), None, 0, signed, options(encoder, True, True, None))  # fmt: skip
    return to_decoder, to_encoder


def _weigh(path, strip, cosines, products, encoder, gradient, tile, slope, gate, first, signed, to_encoder: bool, option) -> None:
    layers, n = encoder.shape[1], encoder.shape[-1]
    kind = accumulator(encoder.dtype)
    blocks, columns, meta = _tiles(strip, n)
    launch(path, _weights_kernel, (strip.images * blocks * columns,), cosines, products, candidates(encoder, True, None), gradient, slope,
           gate, first, layers, strip.start, strip.begin, strip.rows, n, blocks, columns, GTILE=tile, SIGNED=signed, TO_ENCODER=to_encoder,
           kind=kind_of(kind), OPTIONS=option, **meta)  # fmt: skip


def refining(path, gradient, tile, grad_deviation, decoder, encoder, gate, maps, first, signed, clamp_min, need_decoder, need_encoder):
    """Of the refining map, whose gradient `tile` reads from `gradient`; grad_deviation may be None. As `refining_map_bwd` returns them."""
    to_decoder, to_encoder = empty_gradients(decoder, encoder, need_decoder, need_encoder)
    of_decoder, of_encoder = to_decoder.numel() > 0, to_encoder.numel() > 0
    if not of_decoder and not of_encoder:
        return to_decoder, to_encoder
    batch, layers, _, n = encoder.shape
    gate, kind = gate.contiguous(), accumulator(encoder.dtype)
    slope = None if decoder is None or grad_deviation is None else grad_deviation.to(kind).contiguous()
    given, option = (encoder, gradient, tile, slope, gate, first, signed), options(encoder, maps, False, clamp_min)
    x = None if decoder is None else _wide(decoder[:, None])
    inverse = None if maps else inverse_norms(encoder, first)
    unit = None if maps else unit_features(encoder[:, first:], inverse[:, first:])
    whole = maps and decoder is None  # no product at all
    for strip in [Strip(0, batch, 0, n)] if whole else strips(batch, n, 1 if maps else layers - first, kind):
        cosines = None if maps else strip.products(unit)
        products = None if decoder is None else strip.products(x)
        if maps and of_encoder:
            _of_maps(path, strip, to_encoder, None, products, None, *given, option)
        if of_decoder or not maps:
            _weigh(path, strip, cosines, products, *given, of_encoder and not maps, option)
        if of_encoder and not maps:
            strip.multiply(unit, cosines, to_encoder[:, first:])
        if of_decoder:
            strip.multiply(x, products, to_decoder[:, None])
        del cosines, products  # before the next strip's
    if of_encoder and not maps:
        _project(path, to_encoder, to_encoder, unit, inverse, gate, slope, first)
    return to_decoder, to_encoder
