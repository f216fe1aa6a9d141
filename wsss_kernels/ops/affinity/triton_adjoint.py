"""Gradients of affinities and of the refining map in Triton: weights of pairs in strips of rows, and products by PyTorch.

The gradient of an N×N matrix is read in tiles, from memory or from its low-rank factors, and chained through the sigmoid, the cosine
and the clamp into a strip of 32 MiB; a BLAS multiplies the strip with the features. Gathered by the tiles' owners instead, with the
matrices made again for every 128 channels, the refining map's backward took five times as long as eager on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import accumulator, launch
from ..sinkhorn.triton_impl import kind_of, stored, stored_tile
from .api import empty_gradients
from .triton_impl import candidate_tile, candidates, decoded, decoder_tile, inverse_norms, options


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
def _strip(blocks, across, begin, BM: tl.constexpr, BN: tl.constexpr):
    """(image, rows, columns) of a program that has one tile of a strip of rows."""
    tile = tl.program_id(0) % (blocks * across)
    image = (tl.program_id(0) // (blocks * across)).to(tl.int64)
    return image, begin + (tile // across) * BM + tl.arange(0, BM), (tile % across) * BN + tl.arange(0, BN)


@triton.jit
def _store_strip(out_ptr, w, image, row, column, begin, end, n):
    at = (image * (end - begin) + row - begin)[:, None] * n + column[None, :]
    tl.store(out_ptr + at, w, mask=(row < end)[:, None] & (column < n)[None, :])


@triton.jit
def _encoder_weights(out_ptr, layer, begin, end, source, decoder, gradient, slope_ptr, gate, first, layers, n, blocks, across,
                     GTILE: tl.constexpr, SIGNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr):  # fmt: skip
    """The gradient of a layer's cosines, which are `source`, of both roles of a token: rows `begin` up to `end`."""
    image, row, column = _strip(blocks, across, begin, BM, BN)
    w = tl.zeros((BM, BN), kind)
    chosen = tl.load(gate + image * layers + layer) != 0
    slope = _slope(slope_ptr, image, layer, layers, kind)
    if chosen | (slope != 0):
        share = tl.where(chosen, 1.0 / _selected(gate, image, first, layers).to(kind), 0.0)
        w = GTILE(gradient, image, row, column, n, False, kind, OPTIONS) + GTILE(gradient, image, row, column, n, True, kind, OPTIONS)
        w = tl.where(chosen, w * share, 0.0)
        a = candidate_tile(source, image, layer, row, column, n, False, kind, OPTIONS)
        if decoder is not None:
            f = decoder_tile(decoder, image, row, column, n, kind, OPTIONS)
            w = w * f - 2.0 * slope * _sign(f, a, SIGNED)
        if OPTIONS[2] is not None:
            w = tl.where(a > OPTIONS[2], w, 0.0)
    _store_strip(out_ptr, w, image, row, column, begin, end, n)


@triton.jit
def _decoder_weights(out_ptr, begin, end, decoder, encoder, gradient, slope_ptr, gate, first, layers, n, blocks, across,
                     GTILE: tl.constexpr, SIGNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr):  # fmt: skip
    """The gradient of the products of the decoder's features, of both roles of a token: rows `begin` up to `end`."""
    image, row, column = _strip(blocks, across, begin, BM, BN)
    a = decoder_tile(decoder, image, row, column, n, kind, OPTIONS)
    w = GTILE(gradient, image, row, column, n, False, kind, OPTIONS)
    turned = GTILE(gradient, image, row, column, n, True, kind, OPTIONS)
    if encoder is None:
        w += turned
    else:
        total, other, signs = tl.zeros((BM, BN), kind), tl.zeros((BM, BN), kind), tl.zeros((BM, BN), kind)
        for layer in range(first, layers):
            chosen = tl.load(gate + image * layers + layer) != 0
            slope = _slope(slope_ptr, image, layer, layers, kind)
            if chosen | (slope != 0):
                b = candidate_tile(encoder, image, layer, row, column, n, False, kind, OPTIONS)
                total += tl.where(chosen, b, 0.0)
                signs += slope * _sign(a, b, SIGNED)
                if OPTIONS[0]:
                    b = candidate_tile(encoder, image, layer, row, column, n, True, kind, OPTIONS)
                other += tl.where(chosen, b, 0.0)
                signs += slope * _sign(a, b, SIGNED)
        w = (w * total + turned * other) / _selected(gate, image, first, layers).to(kind) + signs
    w *= OPTIONS[3] * a * (1.0 - a)
    _store_strip(out_ptr, w, image, row, column, begin, end, n)


@triton.jit
def _maps_kernel(out_ptr, decoder_out_ptr, decoder, encoder, gradient, slope_ptr, gate, first, layers, n, blocks, GTILE: tl.constexpr,
                 SIGNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """The gradient of a tile of every map, and with `decoder_out_ptr` that of the deviations with respect to a given A_f."""
    tile = tl.program_id(0) % (blocks * blocks)
    image = (tl.program_id(0) // (blocks * blocks)).to(tl.int64)
    row, column = (tile // blocks) * BM + tl.arange(0, BM), (tile % blocks) * BM + tl.arange(0, BM)
    inside = (row < n)[:, None] & (column < n)[None, :]
    g, f, signs = tl.zeros((BM, BM), kind), tl.zeros((BM, BM), kind), tl.zeros((BM, BM), kind)
    if gradient is not None:
        g = GTILE(gradient, image, row, column, n, False, kind, OPTIONS) / _selected(gate, image, first, layers).to(kind)
    if decoder is not None:
        f = decoder_tile(decoder, image, row, column, n, kind, OPTIONS)
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
        at = ((image * layers + layer) * n + row)[:, None] * n + column[None, :]
        tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=inside)
    if decoder_out_ptr is not None:
        at = (image * n + row)[:, None] * n + column[None, :]
        tl.store(decoder_out_ptr + at, signs.to(decoder_out_ptr.dtype.element_ty), mask=inside)


STRIP_BYTES = 32 << 20


def strip_rows(batch: int, n: int, size: int) -> int:
    """Rows whose weights take 32 MiB, which a second-level cache holds; all rows of most images."""
    return min(n, max(128, STRIP_BYTES // max(1, size * n * batch)))


def _strips(path: str, kernel, batch: int, n: int, like: Tensor, *arguments, **options) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their weights B×rows×N) one after the other. `arguments` are what the kernel takes between a strip's end and n."""
    wide = like.dtype == torch.float64
    # The decoder's kernel has tiles of several matrices in its registers at once.
    side = {"BM": 32, "BN": 32, "num_warps": 4} if wide else {"BM": 32 if kernel is _decoder_weights else 64, "BN": 64, "num_warps": 8}
    rows, across = strip_rows(batch, n, 8 if wide else 4), triton.cdiv(n, side["BN"])
    buffer = like.new_empty(batch * rows * n, dtype=accumulator(like.dtype))
    for begin in range(0, n, max(rows, 1)):
        end = min(n, begin + rows)
        blocks = triton.cdiv(end - begin, side["BM"])
        weights = buffer[: batch * (end - begin) * n].view(batch, end - begin, n)
        before, after = arguments
        launch(path, kernel, (batch * blocks * across,), weights, *before, begin, end, *after, n, blocks, across,
               kind=kind_of(like.dtype), **options, **side)  # fmt: skip
        yield slice(begin, end), weights


def _of_encoder(path, out, features, source, decoder, gradient, tile, slope, gate, first, signed, option) -> None:
    """With unit features Y and weights W the gradient is (Y Wᵀ − Y (Y · Y Wᵀ)) / |x|. A layer that nothing selects has none."""
    batch, layers, _, n = out.shape
    feature, inverse = features[0], features[6]
    out[:, :first] = 0
    for layer in range(first, layers):
        unit = (feature[:, layer].to(inverse.dtype) * inverse[:, layer, None]).contiguous()
        used = gate[:, layer] if slope is None else gate[:, layer] | (slope[:, layer] != 0)
        arguments = (layer,), (source, decoder, gradient, slope, gate, first, layers)
        for own, weights in _strips(path, _encoder_weights, batch, n, feature, *arguments, GTILE=tile, SIGNED=signed, OPTIONS=option):
            mixed = torch.bmm(unit, weights.mT, out=torch.empty_like(unit[:, :, own], memory_format=torch.contiguous_format))
            along = (unit[:, :, own] * mixed).sum(1, keepdim=True)
            mixed = (mixed - unit[:, :, own] * along) * inverse[:, layer, None, own]
            out[:, layer, :, own] = torch.where(used[:, None, None], mixed, 0)


def _of_decoder(path, out, feature, decoder, encoder, gradient, tile, slope, gate, first, layers, signed, option) -> None:
    batch, _, n = out.shape
    wide = feature.to(accumulator(feature.dtype)).contiguous()
    arguments = (), (decoder, encoder, gradient, slope, gate, first, layers)
    for own, weights in _strips(path, _decoder_weights, batch, n, feature, *arguments, GTILE=tile, SIGNED=signed, OPTIONS=option):
        out[:, :, own] = torch.bmm(wide, weights.mT, out=torch.empty_like(wide[:, :, own], memory_format=torch.contiguous_format))


def _of_maps(path, out, decoder_out, decoder, encoder, source, gradient, tile, slope, gate, first, signed, option) -> None:
    batch, layers, n, _ = out.shape
    blocks = triton.cdiv(n, 32)
    launch(path, _maps_kernel, (batch * blocks**2,), out, decoder_out, decoder, source, gradient, slope, gate, first, layers, n, blocks,
           GTILE=tile, SIGNED=signed, kind=kind_of(encoder.dtype), OPTIONS=option, BM=32, num_warps=4)  # fmt: skip


def square(grad: Tensor, affinity: Tensor, feature: Tensor, cosine: bool, scale: float, minimum: float | None) -> Tensor:
    """Of `affinity_fwd`: from the affinities where they are unrounded, else from recomputed ones."""
    path, out, kept = "affinity.triton.backward", feature.new_empty(feature.shape), feature.dtype.itemsize > 2
    gradient = stored(grad)
    if cosine:
        layer = feature[:, None]
        features = candidates(layer, False, inverse_norms(layer))
        source = candidates(affinity[:, None], True, None) if kept else features
        gate = torch.ones(feature.shape[0], 1, dtype=torch.bool, device=feature.device)
        option = options(feature, kept, False, minimum)
        _of_encoder(path, out[:, None], features, source, None, gradient, stored_tile, None, gate, 0, False, option)
    else:
        decoder = stored(affinity) if kept else decoded(feature)
        option = options(feature, False, kept, None, scale)
        _of_decoder(path, out, feature, decoder, None, gradient, stored_tile, None, None, 0, 0, False, option)
    return out


def deviation(grad: Tensor, decoder: Tensor, encoder: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    to_decoder, to_encoder = decoder.new_empty(decoder.shape), encoder.new_empty(encoder.shape)
    option, source = options(encoder, True, True, None), candidates(encoder, True, None)
    _of_maps("affinity_deviation.triton.backward", to_encoder, to_decoder, stored(decoder), encoder, source, None, stored_tile,
             grad.contiguous(), None, 0, signed, option)  # fmt: skip
    return to_decoder, to_encoder


def refining(path, gradient, tile, grad_deviation, decoder, encoder, gate, maps, first, signed, clamp_min, need_decoder, need_encoder):
    """Of the refining map, whose gradient `tile` reads from `gradient`; grad_deviation may be None. As `refining_map_bwd` returns them."""
    to_decoder, to_encoder = empty_gradients(decoder, encoder, need_decoder, need_encoder)
    source = candidates(encoder, maps, None if maps else inverse_norms(encoder, first))
    option, gate = options(encoder, maps, False, clamp_min), gate.contiguous()
    given = None if decoder is None else decoded(decoder)
    slope = None if decoder is None or grad_deviation is None else grad_deviation.to(accumulator(encoder.dtype)).contiguous()
    if to_decoder.numel():
        _of_decoder(path, to_decoder, decoder, given, source, gradient, tile, slope, gate, first, encoder.shape[1], signed, option)
    if to_encoder.numel() and maps:
        _of_maps(path, to_encoder, None, given, encoder, source, gradient, tile, slope, gate, first, signed, option)
    elif to_encoder.numel():
        _of_encoder(path, to_encoder, source, source, given, gradient, tile, slope, gate, first, signed, option)
    return to_decoder, to_encoder
