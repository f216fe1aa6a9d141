"""Triton kernels of affinities and the refining map: tiles of Gram matrices, and what follows them while they are in registers.

Features are read where they are, any strides and half types included; a cosine is an inner product times two reciprocal norms. Tiles
that are symmetric are made on and above the diagonal, and elements below it are copies of those above, so that G_ij and G_ji have
equal bits, stored or recomputed. The gate is chosen on the device; `triton_adjoint.py` has the gradients.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, accumulator, config, dot, launch, multiply_adds, power_of_2
from ..sinkhorn.triton_impl import kind_of, stored, stored_tile


@triton.jit
def gram(feature, per_channel, per_token, channels, row, column, n, kind: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr,
         inverse=None):  # fmt: skip
    """A tile of FᵀF of features [channels][n], half types multiplied as such and added in float32; 0 outside.

    With `inverse` each token's features are multiplied by its number before, which keeps products of long and short vectors in range.
    """
    if inverse is not None:
        by_row = tl.load(inverse + row, mask=row < n, other=0.0)
        by_column = tl.load(inverse + column, mask=column < n, other=0.0)
    k = tl.arange(0, BK)
    acc = tl.zeros((row.shape[0], column.shape[0]), kind)
    left = feature + row.to(tl.int64)[:, None] * per_token
    right = feature + column.to(tl.int64)[None, :] * per_token
    for start in range(0, channels, BK):
        channel = (start + k).to(tl.int64) * per_channel
        inside = start + k < channels
        x = tl.load(left + channel[None, :], mask=(row < n)[:, None] & inside[None, :], other=0.0)
        y = tl.load(right + channel[:, None], mask=(column < n)[None, :] & inside[:, None], other=0.0)
        if inverse is not None:
            x, y = x * by_row[:, None], y * by_column[None, :]
        acc = dot(x, y, acc, PRECISION)
    return acc


@triton.jit
def candidate_tile(source, image, layer, row, column, n, TURNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr):
    """A_l, at least the minimum: cosines of features, or a map from memory.

    OPTIONS here and below: (maps, decoder is stored, minimum or None, scale of the decoder's products, precision, channels per step).
    """
    if OPTIONS[0]:
        matrix, per_image, per_layer, per_row, per_column = source[:5]
        a = stored_tile((matrix + layer * per_layer, per_image, per_row, per_column), image, row, column, n, TURNED, kind, OPTIONS)
    else:
        feature, per_image, per_layer, per_channel, per_token, channels, inverse, layers = source
        start = feature + image * per_image + layer * per_layer
        place = inverse + (image * layers + layer) * n
        PRECISION: tl.constexpr = OPTIONS[4]  # Triton 3.6 loses what a string is that is handed on from a tuple
        if feature.dtype.element_ty.primitive_bitwidth == 16:
            a = gram(start, per_channel, per_token, channels, row, column, n, kind, PRECISION, OPTIONS[5])
            a = a * (tl.load(place + row, mask=row < n, other=0.0)[:, None] * tl.load(place + column, mask=column < n, other=0.0)[None, :])
        else:
            a = gram(start, per_channel, per_token, channels, row, column, n, kind, PRECISION, OPTIONS[5], place)
    if OPTIONS[2] is not None:
        a = tl.where(a <= OPTIONS[2], OPTIONS[2], a)
    return a


@triton.jit
def sigmoid(product, OPTIONS: tl.constexpr):
    """σ(scale · product)."""
    return 1.0 / (1.0 + tl.exp2(product * (-OPTIONS[3] * LOG2E)))


@triton.jit
def decoder_tile(source, image, row, column, n, kind: tl.constexpr, OPTIONS: tl.constexpr):
    """A_f = σ(scale · FᵀF): made from features, or from memory."""
    if OPTIONS[1]:
        a = stored_tile(source, image, row, column, n, False, kind, OPTIONS)
    else:
        feature, per_image, per_channel, per_token, channels = source
        PRECISION: tl.constexpr = OPTIONS[4]
        g = gram(feature + image * per_image, per_channel, per_token, channels, row, column, n, kind, PRECISION, OPTIONS[5])
        a = sigmoid(g, OPTIONS)
    return a


@triton.jit
def mirrored(tile, row, column):
    """A symmetric tile that was made at (min(row, column), max(row, column)), at (row, column). Square tiles."""
    return tl.where(row[:, None] <= column[None, :], tile, tl.trans(tile))


@triton.jit
def mean_tile(source, gate, first, layers, image, row, column, n, TURNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr):
    """The mean of the selected A_l."""
    total = tl.zeros((row.shape[0], column.shape[0]), kind)
    count = 0.0
    for layer in range(first, layers):
        chosen = tl.load(gate + image * layers + layer)
        if chosen:
            total += candidate_tile(source, image, layer, row, column, n, TURNED, kind, OPTIONS)
            count += 1.0
    return total / count


@triton.jit
def refined_tile(source, image, row, column, n, TURNED: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr):
    """R of rows i and columns j, with TURNED of columns j and rows i; the interface of `stored_tile`, for square tiles."""
    gate, first, layers = source[:3]
    encoder, decoder = source[3:11], source[11:]
    low, high = tl.minimum(row, column), tl.maximum(row, column)
    if OPTIONS[0]:
        r = mean_tile(encoder, gate, first, layers, image, row, column, n, TURNED, kind, OPTIONS)
        if len(decoder) > 0:
            r = mirrored(decoder_tile(decoder, image, low, high, n, kind, OPTIONS), row, column) * r
    else:
        r = mean_tile(encoder, gate, first, layers, image, low, high, n, False, kind, OPTIONS)
        if len(decoder) > 0:
            r = decoder_tile(decoder, image, low, high, n, kind, OPTIONS) * r
        r = mirrored(r, row, column)
    return tl.where((row < n)[:, None] & (column < n)[None, :], r, 0.0)


@triton.jit
def _store_symmetric(out_ptr, tile, image, row, column, n):
    """The elements on and above the diagonal, and their mirror images."""
    inside = (row < n)[:, None] & (column < n)[None, :] & (row[:, None] <= column[None, :])
    tile = tile.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (image * n + row)[:, None] * n + column[None, :], tile, mask=inside)
    tl.store(out_ptr + (image * n + column)[None, :] * n + row[:, None], tile, mask=inside)


@triton.jit
def _place(blocks, BM: tl.constexpr):
    """(image, row block, column block) of a program that has one tile of one of several matrices."""
    tile = tl.program_id(0) % (blocks * blocks)
    return (tl.program_id(0) // (blocks * blocks)).to(tl.int64), tile // blocks, tile % blocks


@triton.jit
def _square_kernel(out_ptr, source, n, blocks, COSINE: tl.constexpr, kind: tl.constexpr, OPTIONS: tl.constexpr, BM: tl.constexpr):
    image, i, j = _place(blocks, BM)
    row, column = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)
    if i <= j:
        if COSINE:
            a = candidate_tile(source, image, 0, row, column, n, False, kind, OPTIONS)
        else:
            a = decoder_tile(source, image, row, column, n, kind, OPTIONS)
        _store_symmetric(out_ptr, a, image, row, column, n)


@triton.jit
def _mirror_kernel(out_ptr, n, blocks, COSINE: tl.constexpr, OPTIONS: tl.constexpr, BM: tl.constexpr):
    """Affinities in place of their products: those on and above the diagonal are read, so that no program reads what another writes."""
    image, i, j = _place(blocks, BM)
    row, column = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)
    if i <= j:
        inside = (row[:, None] <= column[None, :]) & (column < n)[None, :]
        a = tl.load(out_ptr + (image * n + row)[:, None] * n + column[None, :], mask=inside, other=0.0)
        if not COSINE:
            a = sigmoid(a, OPTIONS)
        if OPTIONS[2] is not None:
            a = tl.where(a <= OPTIONS[2], OPTIONS[2], a)
        _store_symmetric(out_ptr, a, image, row, column, n)


@triton.jit
def _deviation_kernel(partial_ptr, decoder, encoder, first, layers, n, blocks, SIGNED: tl.constexpr, kind: tl.constexpr,
                      OPTIONS: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """partial[image][layer][tile] = Σ |A_f − A_l| of a tile; what is below the diagonal counts with what is above, but for maps."""
    image, i, j = _place(blocks, BM)
    layer = first + tl.program_id(1)
    row, column = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)
    total = tl.full((), 0.0, tl.float64)
    if OPTIONS[0] or i <= j:
        if OPTIONS[1] or not OPTIONS[0]:
            a = decoder_tile(decoder, image, row, column, n, kind, OPTIONS)
        else:
            low, high = tl.minimum(row, column), tl.maximum(row, column)
            a = mirrored(decoder_tile(decoder, image, low, high, n, kind, OPTIONS), row, column)
        d = a - candidate_tile(encoder, image, layer, row, column, n, False, kind, OPTIONS)
        if not SIGNED:
            d = tl.abs(d)
        if not OPTIONS[0]:
            d = tl.where(row[:, None] < column[None, :], 2.0 * d, tl.where(row[:, None] == column[None, :], d, 0.0))
        d = tl.where((row < n)[:, None] & (column < n)[None, :], d, 0.0)
        total = tl.sum(tl.sum(d, axis=1).to(tl.float64), axis=0)
    tl.store(partial_ptr + ((image * (layers - first) + layer - first) * blocks + i) * blocks + j, total)


@triton.jit
def _select_kernel(deviation_ptr, gate_ptr, sum_ptr, first, layers, WIDTH: tl.constexpr):
    """Gate and deviation of one image from the sums of its candidates: at most the mean, and the smallest whatever rounding does."""
    image = tl.program_id(0).to(tl.int64)
    layer = tl.arange(0, WIDTH)
    candidate = (layer >= first) & (layer < layers)
    place = image * (layers - first) + layer - first
    value = tl.load(sum_ptr + place, mask=candidate, other=0.0).to(deviation_ptr.dtype.element_ty).to(tl.float64)
    mean = tl.zeros((WIDTH,), tl.float64) + tl.sum(value, axis=0) / (layers - first)
    least = tl.min(tl.where(candidate, value, float("inf")), axis=0)
    gate = candidate & (mean == mean) & ((value <= mean) | (value == least))
    value = tl.where(candidate, value, float("nan")).to(deviation_ptr.dtype.element_ty)
    tl.store(deviation_ptr + image * layers + layer, value, mask=layer < layers)
    tl.store(gate_ptr + image * layers + layer, gate.to(gate_ptr.dtype.element_ty), mask=layer < layers)


@triton.jit
def _refined_kernel(out_ptr, decoder, encoder, gate, first, layers, n, blocks, kind: tl.constexpr, OPTIONS: tl.constexpr,
                    BM: tl.constexpr):  # fmt: skip
    """R, in place of A_f if there is a decoder."""
    image, i, j = _place(blocks, BM)
    row, column = i * BM + tl.arange(0, BM), j * BM + tl.arange(0, BM)
    if OPTIONS[0] or i <= j:
        r = mean_tile(encoder, gate, first, layers, image, row, column, n, False, kind, OPTIONS)
        if decoder is not None:
            r = decoder_tile(decoder, image, row, column, n, kind, OPTIONS) * r
        if OPTIONS[0]:
            inside = (row < n)[:, None] & (column < n)[None, :]
            tl.store(out_ptr + (image * n + row)[:, None] * n + column[None, :], r, mask=inside)
        else:
            _store_symmetric(out_ptr, r, image, row, column, n)


@triton.jit
def _inverse_norm_kernel(x_ptr, out_ptr, per_image, per_layer, per_channel, per_token, first, layers, channels, n, blocks,
                         BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """1/‖column‖, 0 for zero columns, of the layers from `first` on. Squares are those of columns divided by their largest entry."""
    which = tl.program_id(0) // blocks
    image, layer = (which // (layers - first)).to(tl.int64), first + which % (layers - first)
    token, k = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM), tl.arange(0, BK)
    start = x_ptr + image * per_image + layer.to(tl.int64) * per_layer + token.to(tl.int64)[None, :] * per_token
    largest, square = tl.zeros((BM,), tl.float64), tl.zeros((BM,), tl.float64)
    for begin in range(0, channels, BK):
        inside = (begin + k < channels)[:, None] & (token < n)[None, :]
        x = tl.load(start + (begin + k).to(tl.int64)[:, None] * per_channel, mask=inside, other=0.0).to(out_ptr.dtype.element_ty)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=0).to(tl.float64))
    zero = largest == 0
    largest = tl.where(zero, 1.0, largest)
    for begin in range(0, channels, BK):
        inside = (begin + k < channels)[:, None] & (token < n)[None, :]
        x = tl.load(start + (begin + k).to(tl.int64)[:, None] * per_channel, mask=inside, other=0.0).to(out_ptr.dtype.element_ty)
        x = x.to(tl.float64) / largest[None, :]
        square += tl.sum(x * x, axis=0)
    inverse = tl.where(zero, 0.0, 1.0 / (largest * tl.sqrt(tl.where(zero, 1.0, square))))
    tl.store(out_ptr + (image * layers + layer) * n + token, inverse.to(out_ptr.dtype.element_ty), mask=token < n)


def inverse_norms(features: Tensor, first: int = 0) -> Tensor:
    """Of B×L×C×N features, B×L×N."""
    batch, layers, channels, n = features.shape
    out = features.new_empty(batch, layers, n, dtype=accumulator(features.dtype))
    blocks = triton.cdiv(n, 64)
    launch("affinity.inverse_norms", _inverse_norm_kernel, (batch * (layers - first) * blocks,), features, out, *features.stride(), first,
           layers, channels, n, blocks, BM=64, BK=32, num_warps=4)  # fmt: skip
    return out


def unit_features(features: Tensor, inverse: Tensor) -> Tensor:
    """B×L×C×N features times the reciprocal norms B×L×N, contiguous."""
    return torch.mul(features, inverse.unsqueeze(-2), out=features.new_empty(features.shape, dtype=inverse.dtype))


def tile_blocks(name: str, dtype: torch.dtype, channels: int) -> dict[str, int]:
    """64×64 tiles: 784 tokens make 91 of them on and above the diagonal. float64 halves the sides for its registers; float32 has two
    tiles in the registers of 8 warps, since those of 4 spill.
    """
    side = 32 if dtype == torch.float64 else 64
    default = {"BM": side, "num_warps": 8 if dtype == torch.float32 else 4, "num_stages": 2}
    other = [{**default, "BM": bm, "num_warps": w, "num_stages": s} for bm, w, s in ((64, 4, 3), (64, 8, 3), (128, 8, 2), (128, 8, 3))]
    return config(f"{name}/d{power_of_2(channels)}", default, other)


def options(encoder: Tensor, maps: bool, stored_decoder: bool, minimum: float | None, scale: float = 1.0) -> tuple:
    """The OPTIONS of `candidate_tile`. Factors of multiply-adds lie in registers for a whole step: 16 channels keep them from spilling."""
    step = 16 if encoder.element_size() >= 4 else 64
    return maps, stored_decoder, minimum, scale, multiply_adds(encoder.dtype), step


def candidates(encoder: Tensor, maps: bool, inverse: Tensor | None) -> tuple:
    """The source of `candidate_tile`."""
    return (encoder, *encoder.stride(), 0, 0, 0) if maps else (encoder, *encoder.stride(), encoder.shape[2], inverse, encoder.shape[1])


def decoded(feature: Tensor) -> tuple:
    """The source of `decoder_tile`, from B×d×N features."""
    return (feature, *feature.stride(), feature.shape[1])


def refined(decoder: Tensor | None, encoder: tuple, gate: Tensor, first: int, layers: int) -> tuple:
    """The source of `refined_tile`. Flat and without None: Triton 3.6 takes neither tuples in tuples that hold ones, nor None."""
    return gate, first, layers, *encoder, *(() if decoder is None else decoded(decoder))


def square(path: str, feature: Tensor, cosine: bool, scale: float, minimum: float | None, out: Tensor) -> Tensor:
    """Cosines, or σ(scale · FᵀF), of B×C×N features. Half types have a kernel of their own, which adds their products in float32."""
    batch, channels, n = feature.shape
    layer, kind, option = feature[:, None], kind_of(feature.dtype), options(feature, False, False, minimum, scale)
    inverse = inverse_norms(layer) if cosine else None
    if feature.dtype.itemsize > 2:
        x = feature if inverse is None else unit_features(layer, inverse)[:, 0]
        torch.bmm(x.mT, x, out=out)  # with `out=`, autocast does not round the factors
        blocks = triton.cdiv(n, 32)
        launch(path, _mirror_kernel, (batch * blocks**2,), out, n, blocks, COSINE=cosine, OPTIONS=option, BM=32, num_warps=4)
        return out
    source, meta = candidates(layer, False, inverse) if cosine else decoded(feature), tile_blocks("affinity", feature.dtype, channels)
    blocks = triton.cdiv(n, meta["BM"])
    launch(path, _square_kernel, (batch * blocks**2,), out, source, n, blocks, COSINE=cosine, kind=kind, OPTIONS=option, **meta)
    return out


def deviation_sums(path: str, decoder: tuple, encoder: Tensor, source: tuple, first: int, signed: bool, option: tuple) -> Tensor:
    """Σ |A_f − A_l| of the candidates, float64[B, L − first]."""
    batch, layers, channels, n = encoder.shape
    meta = tile_blocks("deviation", encoder.dtype, channels)
    blocks = triton.cdiv(n, meta["BM"])
    partial = encoder.new_empty(batch, layers - first, blocks**2, dtype=torch.float64)
    launch(path, _deviation_kernel, (batch * blocks**2, layers - first), partial, decoder, source, first, layers, n, blocks, SIGNED=signed,
           kind=kind_of(encoder.dtype), OPTIONS=option, **meta)  # fmt: skip
    return partial.sum(-1)


def select(
    path: str, decoder: tuple | None, encoder: Tensor, source: tuple, first: int, signed: bool, option: tuple
) -> tuple[Tensor, Tensor]:
    """(gate, deviation) of all layers."""
    batch, layers = encoder.shape[:2]
    deviation = encoder.new_full((batch, layers), float("nan"), dtype=accumulator(encoder.dtype))
    gate = torch.zeros_like(deviation, dtype=torch.bool)
    if decoder is None:
        gate[:, first:] = True
    else:
        sums = deviation_sums(path, decoder, encoder, source, first, signed, option)
        launch(path, _select_kernel, (batch,), deviation, gate, sums, first, layers, WIDTH=power_of_2(layers), num_warps=1)
    return gate, deviation


def _stack(t: Tensor) -> Tensor:
    """`…×C×N` as `B×C×N`."""
    return t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:])


def affinity_fwd(feature: Tensor, cosine: bool, scale: float, clamp_min: float | None) -> Tensor:
    out = feature.new_empty(*feature.shape[:-2], feature.shape[-1], feature.shape[-1])
    square("affinity.triton", _stack(feature), cosine, scale, clamp_min, _stack(out))
    return out


def affinity_deviation_fwd(decoder: Tensor, encoder: Tensor, signed: bool) -> Tensor:
    option, kind = options(encoder, True, True, None), accumulator(encoder.dtype)
    source = candidates(encoder, True, None)
    return deviation_sums("affinity_deviation.triton", stored(decoder), encoder, source, 0, signed, option).to(kind)


def refining_map_fwd(
    decoder: Tensor | None, encoder: Tensor, maps: bool, first_layer: int, signed: bool, clamp_min: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A_f once into the result's memory, the deviations from it, then R in its place: no A_l is stored."""
    path, (batch, layers, channels, n) = "refining_map.triton", encoder.shape
    matrix = encoder.new_empty(batch, n, n, dtype=accumulator(encoder.dtype))
    source = candidates(encoder, maps, None if maps else inverse_norms(encoder, first_layer))
    given, option = None if decoder is None else stored(matrix), options(encoder, maps, True, clamp_min)
    if decoder is not None:
        square(path, decoder, False, 1.0, None, matrix)
    gate, deviation = select(path, given, encoder, source, first_layer, signed, option)
    meta = tile_blocks("refining_map", encoder.dtype, channels)
    blocks = triton.cdiv(n, meta["BM"])
    launch(path, _refined_kernel, (batch * blocks**2,), matrix, given, source, gate, first_layer, layers, n, blocks,
           kind=kind_of(encoder.dtype), OPTIONS=option, **meta)  # fmt: skip
    return matrix, gate, deviation


def affinity_bwd(grad: Tensor, affinity: Tensor, feature: Tensor, cosine: bool, scale: float, clamp_min: float | None) -> Tensor:
    from . import triton_adjoint

    return triton_adjoint.square(_stack(grad), _stack(affinity), _stack(feature), cosine, scale, clamp_min).reshape(feature.shape)


def affinity_deviation_bwd(grad: Tensor, decoder: Tensor, encoder: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    from . import triton_adjoint

    return triton_adjoint.deviation(grad, decoder, encoder, signed)


def refining_map_bwd(grad_matrix, grad_deviation, decoder, encoder, gate, maps, first, signed, clamp_min, need_decoder, need_encoder):
    from . import triton_adjoint

    given = (grad_matrix, *grad_matrix.stride())
    return triton_adjoint.refining(
        "refining_map.triton.backward", given, stored_tile, grad_deviation, decoder, encoder, gate, maps, first, signed, clamp_min,
        need_decoder, need_encoder,
    )  # fmt: skip
