"""Gradients of affinities and of the refining map in Triton: one owner of 64 tokens, tiles of the matrices recomputed on the way.

The gradient of an N×N matrix is read in tiles, from memory or from its low-rank factors, chained through the sigmoid, the cosine and
the clamp, and multiplied with the features at once. What the normalisation takes away, the part along a unit vector u_i, is
Σ_j W_ij cos_ij, so that a program needs no other channels than its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import accumulator, config, dot, launch, power_of_2, precision
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
def _encoder_kernel(out_ptr, features, source, decoder, gradient, slope_ptr, gate, first, n, blocks, GTILE: tl.constexpr,
                    SIGNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """The gradient of BM tokens and BD channels of one layer's features, whose cosines are `source`."""
    feature, per_image, per_layer, per_channel, per_token, channels, inverse_ptr, layers = features
    image = (tl.program_id(0) // (blocks * layers)).to(tl.int64)
    layer = tl.program_id(0) // blocks % layers
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    start = feature + image * per_image + layer.to(tl.int64) * per_layer + channel.to(tl.int64)[None, :] * per_channel
    norms = inverse_ptr + (image * layers + layer) * n
    used = (row < n)[:, None] & (channel < channels)[None, :]
    acc = tl.zeros((BM, BD), kind)
    chosen = (tl.load(gate + image * layers + layer) != 0) & (layer >= first)
    slope = _slope(slope_ptr, image, layer, layers, kind)
    if (chosen | (slope != 0)) & (layer >= first):
        share = tl.where(chosen, 1.0 / _selected(gate, image, first, layers).to(kind), 0.0)
        along = tl.zeros((BM,), kind)
        for begin in range(0, n, BN):
            column = begin + tl.arange(0, BN)
            a = candidate_tile(source, image, layer, row, column, n, False, kind, OPTIONS)
            w = GTILE(gradient, image, row, column, n, False, kind, OPTIONS) + GTILE(gradient, image, row, column, n, True, kind, OPTIONS)
            w = tl.where(chosen, w * share, 0.0)
            if decoder is not None:
                f = decoder_tile(decoder, image, row, column, n, kind, OPTIONS)
                w = w * f - 2.0 * slope * _sign(f, a, SIGNED)
            if OPTIONS[2] is not None:
                w = tl.where(a > OPTIONS[2], w, 0.0)
            along += tl.sum(w * a, axis=1)
            norm = tl.load(norms + column, mask=column < n, other=0.0)
            inside = (column < n)[:, None] & (channel < channels)[None, :]
            y = tl.load(start + column.to(tl.int64)[:, None] * per_token, mask=inside, other=0.0).to(kind)
            acc = dot(w, y * norm[:, None], acc, PRECISION)
        norm = tl.load(norms + row, mask=row < n, other=0.0)
        x = tl.load(start + row.to(tl.int64)[:, None] * per_token, mask=used, other=0.0).to(kind)
        acc = (acc - (x * norm[:, None]) * along[:, None]) * norm[:, None]
    at = ((image * layers + layer) * channels + channel)[None, :] * n + row[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def _decoder_kernel(out_ptr, features, decoder, encoder, gradient, slope_ptr, gate, first, layers, n, blocks, GTILE: tl.constexpr,
                    SIGNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
                    BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """The gradient of BM tokens and BD channels of the features of A_f; without an encoder, of A_f alone."""
    feature, per_image, per_channel, per_token, channels = features
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros((BM, BD), kind)
    for begin in range(0, n, BN):
        column = begin + tl.arange(0, BN)
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
        inside = (column < n)[:, None] & (channel < channels)[None, :]
        at = image * per_image + column.to(tl.int64)[:, None] * per_token + channel.to(tl.int64)[None, :] * per_channel
        acc = dot(w, tl.load(feature + at, mask=inside, other=0.0).to(kind), acc, PRECISION)
    at = (image * channels + channel)[None, :] * n + row[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(row < n)[:, None] & (channel < channels)[None, :])


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


def _owner_blocks(name: str, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """64 tokens against 32 at a time: the tiles of a matrix are made once per 128 channels. float64 halves both for its registers."""
    side, most = (32, 64) if dtype == torch.float64 else (64, 128)
    default = {"BM": side, "BN": 32, "BD": power_of_2(channels, most=most), "num_warps": 8 if side == 64 else 4, "num_stages": 2}
    other = [{**default, "BN": bn, "BD": power_of_2(channels, most=bd)} for bn, bd in ((64, 128), (32, 256), (64, 256))]
    return config(f"{name}/d{power_of_2(channels)}", default, other)


def _product(dtype: torch.dtype) -> str:
    """How weights (float32) and features are multiplied: half types are exact in TF32, and the result is rounded to less."""
    return "tf32" if dtype.itemsize == 2 else precision(dtype)


def _of_encoder(path, out, features, source, decoder, gradient, tile, slope, gate, first, signed, option, dtype) -> None:
    batch, layers, channels, n = out.shape
    meta = _owner_blocks("encoder_adjoint", channels, dtype)
    blocks = triton.cdiv(n, meta["BM"])
    launch(path, _encoder_kernel, (batch * layers * blocks, triton.cdiv(channels, meta["BD"])), out, features, source, decoder, gradient,
           slope, gate, first, n, blocks, GTILE=tile, SIGNED=signed, kind=kind_of(dtype), OPTIONS=option, PRECISION=_product(dtype),
           **meta)  # fmt: skip


def _of_decoder(path, out, feature, decoder, encoder, gradient, tile, slope, gate, first, layers, signed, option) -> None:
    batch, channels, n = out.shape
    meta = _owner_blocks("decoder_adjoint", channels, feature.dtype)
    blocks = triton.cdiv(n, meta["BM"])
    launch(path, _decoder_kernel, (batch * blocks, triton.cdiv(channels, meta["BD"])), out, decoded(feature), decoder, encoder, gradient,
           slope, gate, first, layers, n, blocks, GTILE=tile, SIGNED=signed, kind=kind_of(feature.dtype), OPTIONS=option,
           PRECISION=_product(feature.dtype), **meta)  # fmt: skip


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
        gate = torch.ones(feature.shape[0], dtype=torch.bool, device=feature.device)
        option = options(feature, kept, False, minimum)
        _of_encoder(path, out[:, None], features, source, None, gradient, stored_tile, None, gate, 0, False, option, feature.dtype)
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
        _of_encoder(path, to_encoder, source, source, given, gradient, tile, slope, gate, first, signed, option, encoder.dtype)
    return to_decoder, to_encoder
