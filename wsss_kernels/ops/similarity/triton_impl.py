"""Triton kernels of the similarity maps: tiles of texts × pixels, read where the map lies, scaled or searched in registers.

With u = v/|v| and S = scale · t·u, the gradients from g are, a_p = Σ_k g_kp t_k:
dv_p = scale/|v_p| · (a_p − u_p (a_p·u_p)), dt_k = scale · Σ_p g_kp u_p, dscale = Σ_p a_p·u_p.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import accumulator, config, dot, launch, multiply_adds, power_of_2


@triton.jit
def _inverse_length(square, pixels, inside, channels, s_channel, NORMALIZE: tl.constexpr, BC: tl.constexpr):
    """1/|v| of pixels from |v|², 0 for vectors below the smallest normal number. Where squares have left the range, vectors are read
    again and divided by their largest entry first."""
    if not NORMALIZE:
        return tl.where(square == square, 1.0, 1.0).to(square.dtype)
    kind: tl.constexpr = square.dtype
    low: tl.constexpr = 1e-280 if kind == tl.float64 else 1e-24
    high: tl.constexpr = 1e300 if kind == tl.float64 else 1e34
    least: tl.constexpr = 2.2250738585072014e-308 if kind == tl.float64 else 1.1754943508222875e-38
    inverse = tl.where(square == 0, 0.0, 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square)))
    lost = inside & ((square < low) | (square > high))
    if tl.max(lost.to(tl.int32), axis=0) > 0:
        largest, scaled = tl.zeros_like(square), tl.zeros_like(square)
        for start in range(0, channels, BC):
            c = start + tl.arange(0, BC)
            mask = (c < channels)[:, None] & inside[None, :]
            v = tl.load(pixels[None, :] + c.to(tl.int64)[:, None] * s_channel, mask=mask, other=0.0).to(kind)
            largest = tl.maximum(largest, tl.max(tl.abs(v), axis=0))
        safe = tl.where(largest < least, 1.0, largest)
        for start in range(0, channels, BC):
            c = start + tl.arange(0, BC)
            mask = (c < channels)[:, None] & inside[None, :]
            v = tl.load(pixels[None, :] + c.to(tl.int64)[:, None] * s_channel, mask=mask, other=0.0).to(kind) / safe[None, :]
            scaled += tl.sum(v * v, axis=0)
        again = tl.where(largest < least, 0.0, 1.0 / tl.sqrt(tl.where(largest < least, 1.0, scaled)) / safe)
        inverse = tl.where(lost, again, inverse)
    return inverse


@triton.jit
def _tile(pixels, inside, text_ptr, row, classes, channels, s_channel, kind: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):
    """text·v of a block of texts and pixels, and |v|² of the pixels."""
    channel = tl.arange(0, BC)
    acc = tl.zeros((row.shape[0], pixels.shape[0]), kind)
    square = tl.zeros((pixels.shape[0],), kind)
    for start in range(0, channels, BC):
        c = start + channel
        v = tl.load(pixels[None, :] + c.to(tl.int64)[:, None] * s_channel, mask=(c < channels)[:, None] & inside[None, :], other=0.0)
        t = tl.load(text_ptr + row[:, None] * channels + c[None, :], mask=(row < classes)[:, None] & (c < channels)[None, :], other=0.0)
        acc += dot(t, v, tl.zeros_like(acc), PRECISION)  # short sums: one of all channels would round too often
        square += tl.sum(v.to(kind) * v.to(kind), axis=0)
    return acc, square


@triton.jit
def _block(visual_ptr, blocks, s_image, s_pixel, BP: tl.constexpr):
    """(image, pixel numbers, addresses of their first channel) of this program's block of pixels."""
    image = tl.program_id(0).to(tl.int64) // blocks
    pixel = tl.program_id(0).to(tl.int64) % blocks * BP + tl.arange(0, BP)
    return image, pixel, visual_ptr + image * s_image + pixel * s_pixel


@triton.jit
def _maps(visual_ptr, text_ptr, scale_ptr, out_ptr, blocks, classes, channels, pixels, s_image, s_channel, s_pixel,
          NORMALIZE: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    kind: tl.constexpr = tl.float64 if visual_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, pixel, address = _block(visual_ptr, blocks, s_image, s_pixel, BP)
    row = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    product, square = _tile(address, pixel < pixels, text_ptr, row, classes, channels, s_channel, kind, BC, PRECISION)
    inverse = _inverse_length(square, address, pixel < pixels, channels, s_channel, NORMALIZE, BC)
    value = product * inverse[None, :] * tl.load(scale_ptr).to(kind)
    at = (image * classes + row)[:, None] * pixels + pixel[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=(row < classes)[:, None] & (pixel < pixels)[None, :])


@triton.jit
def _maxima(visual_ptr, text_ptr, scale_ptr, value_ptr, index_ptr, blocks, classes, channels, pixels, s_image, s_channel, s_pixel,
            NORMALIZE: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The largest value of each text in a block of pixels, and the first pixel that has it. NaN is the largest."""
    kind: tl.constexpr = tl.float64 if visual_ptr.dtype.element_ty == tl.float64 else tl.float32
    _image, pixel, address = _block(visual_ptr, blocks, s_image, s_pixel, BP)
    row = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    inside = (pixel < pixels)[None, :] & (row < classes)[:, None]
    product, square = _tile(address, pixel < pixels, text_ptr, row, classes, channels, s_channel, kind, BC, PRECISION)
    inverse = _inverse_length(square, address, pixel < pixels, channels, s_channel, NORMALIZE, BC)
    value = product * inverse[None, :] * tl.load(scale_ptr).to(kind)
    nan = inside & (value != value)
    lost = tl.max(nan.to(tl.int32), axis=1) > 0
    top = tl.max(tl.where(inside & (value == value), value, float("-inf")), axis=1)
    hit = tl.where(lost[:, None], nan, inside & (value == top[:, None]))
    first = tl.min(tl.where(hit, pixel[None, :], pixels), axis=1)
    at = (tl.program_id(0).to(tl.int64)) * classes + row
    tl.store(value_ptr + at, tl.where(lost, float("nan"), top), mask=row < classes)
    tl.store(index_ptr + at, first, mask=row < classes)


@triton.jit
def _mixed_texts(grad_ptr, text_ptr, pixel, c, image, classes, channels, pixels, kind: tl.constexpr,
                 BT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """a = Σ_k g_kp t_k for a block of channels × pixels."""
    acc = tl.zeros((c.shape[0], pixel.shape[0]), kind)
    for start in range(0, classes, BT):
        row = start + tl.arange(0, BT).to(tl.int64)
        known = row < classes
        t = tl.load(text_ptr + row[None, :] * channels + c[:, None], mask=known[None, :] & (c < channels)[:, None], other=0.0)
        at = (image * classes + row)[:, None] * pixels + pixel[None, :]
        acc = dot(t, tl.load(grad_ptr + at, mask=known[:, None] & (pixel < pixels)[None, :], other=0.0), acc, PRECISION)
    return acc


@triton.jit
def _map_gradient(visual_ptr, text_ptr, scale_ptr, grad_ptr, out_ptr, inverse_ptr, slope_ptr, blocks, classes, channels, pixels,
                  s_image, s_channel, s_pixel,
                  NORMALIZE: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dv; besides 1/|v| per pixel, and this block's share of dscale."""
    kind: tl.constexpr = tl.float64 if visual_ptr.dtype.element_ty == tl.float64 else tl.float32
    image, pixel, address = _block(visual_ptr, blocks, s_image, s_pixel, BP)
    inside = pixel < pixels
    square, along = tl.zeros((BP,), kind), tl.zeros((BP,), kind)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)
        mask = (c < channels)[:, None] & inside[None, :]
        v = tl.load(address[None, :] + c.to(tl.int64)[:, None] * s_channel, mask=mask, other=0.0).to(kind)
        mixed = _mixed_texts(grad_ptr, text_ptr, pixel, c, image, classes, channels, pixels, kind, BT, PRECISION)
        square += tl.sum(v * v, axis=0)
        along += tl.sum(mixed * v, axis=0)
    inverse = _inverse_length(square, address, inside, channels, s_channel, NORMALIZE, BC)
    along = along * inverse
    tl.store(inverse_ptr + image * pixels + pixel, inverse, mask=inside)
    tl.store(slope_ptr + tl.program_id(0), tl.sum(tl.where(inside, along, 0.0).to(tl.float64), axis=0))
    scale = tl.load(scale_ptr).to(kind)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC)
        mask = (c < channels)[:, None] & inside[None, :]
        mixed = _mixed_texts(grad_ptr, text_ptr, pixel, c, image, classes, channels, pixels, kind, BT, PRECISION)
        if NORMALIZE:
            v = tl.load(address[None, :] + c.to(tl.int64)[:, None] * s_channel, mask=mask, other=0.0).to(kind)
            mixed = (mixed - v * inverse[None, :] * along[None, :]) * inverse[None, :]
        at = (image * channels + c)[:, None] * pixels + pixel[None, :]
        tl.store(out_ptr + at, (mixed * scale).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _text_gradient(visual_ptr, inverse_ptr, grad_ptr, out_ptr, blocks, images, classes, channels, pixels, shares, parts, s_image, s_channel, s_pixel,
                   BT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Σ_p g_kp u_p over one part of the blocks of pixels."""
    kind: tl.constexpr = inverse_ptr.dtype.element_ty
    part = tl.program_id(0).to(tl.int64) // shares
    c = tl.program_id(0) % shares * BC + tl.arange(0, BC)
    row = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    acc = tl.zeros((BT, BC), kind)
    total = images * blocks
    for block in range(part, total, parts):
        image = block // blocks
        pixel = block % blocks * BP + tl.arange(0, BP)
        inside = pixel < pixels
        at = (image * classes + row)[:, None] * pixels + pixel[None, :]
        g = tl.load(grad_ptr + at, mask=(row < classes)[:, None] & inside[None, :], other=0.0).to(kind)
        at = image * s_image + pixel[:, None] * s_pixel + c.to(tl.int64)[None, :] * s_channel
        v = tl.load(visual_ptr + at, mask=inside[:, None] & (c < channels)[None, :], other=0.0).to(kind)
        inverse = tl.load(inverse_ptr + image * pixels + pixel, mask=inside, other=0.0)
        acc += dot(g, v * inverse[:, None], tl.zeros_like(acc), PRECISION)
    at = (part * classes + row)[:, None] * channels + c[None, :]
    tl.store(out_ptr + at, acc, mask=(row < classes)[:, None] & (c < channels)[None, :])


@triton.jit
def _pool_gradient(visual_ptr, text_ptr, scale_ptr, index_ptr, grad_ptr, out_ptr, vector_ptr, slope_ptr, classes, channels, pixels,
                   s_image, s_channel, s_pixel, NORMALIZE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """One image and text: g·scale·u of its pixel for dt, and dv of the pixel if no earlier text has the same."""
    kind: tl.constexpr = vector_ptr.dtype.element_ty
    k, image = tl.program_id(0).to(tl.int64) % classes, tl.program_id(0).to(tl.int64) // classes
    own = tl.load(index_ptr + image * classes + k)
    pixel = visual_ptr + image * s_image + own * s_pixel
    g, scale = tl.load(grad_ptr + image * classes + k).to(kind), tl.load(scale_ptr).to(kind)
    square, along = tl.zeros((BC,), kind), tl.zeros((BC,), kind)
    for start in range(0, channels, BC):
        c = start + tl.arange(0, BC).to(tl.int64)
        v = tl.load(pixel + c * s_channel, mask=c < channels, other=0.0).to(kind)
        square += v * v
        along += v * tl.load(text_ptr + k * channels + c, mask=c < channels, other=0.0).to(kind)
    one = tl.zeros((1,), tl.int64)
    length = _inverse_length(one.to(kind) + tl.sum(square, axis=0), pixel + one, one == 0, channels, s_channel, NORMALIZE, BC)
    inverse = tl.sum(length, axis=0)
    tl.store(slope_ptr + image * classes + k, g * inverse * tl.sum(along, axis=0))
    earlier = tl.zeros((BT,), tl.int32)
    for start in range(0, k, BT):
        row = start + tl.arange(0, BT).to(tl.int64)
        earlier += (tl.load(index_ptr + image * classes + row, mask=row < k, other=-1) == own).to(tl.int32)
    first = tl.sum(earlier, axis=0) == 0
    total = tl.zeros((BC,), kind)  # along the vector, of all texts that meet here
    for sweep in tl.static_range(2):
        for start in range(0, channels, BC):
            c = start + tl.arange(0, BC).to(tl.int64)
            v = tl.load(pixel + c * s_channel, mask=c < channels, other=0.0).to(kind)
            mixed = tl.zeros((BC,), kind)
            for block in range(0, classes, BT):
                row = block + tl.arange(0, BT).to(tl.int64)
                at = image * classes + row
                same = first & (row >= k) & (tl.load(index_ptr + at, mask=row < classes, other=-1) == own)
                weight = tl.load(grad_ptr + at, mask=same, other=0.0).to(kind)
                t = tl.load(text_ptr + row[:, None] * channels + c[None, :], mask=same[:, None] & (c < channels)[None, :], other=0.0)
                mixed += tl.sum(weight[:, None] * t.to(kind), axis=0)
            if sweep == 0:
                total += mixed * v
                tl.store(vector_ptr + (image * classes + k) * channels + c, v * (g * scale * inverse), mask=c < channels)
            else:
                if NORMALIZE:
                    mixed = (mixed - v * inverse * (inverse * tl.sum(total, axis=0))) * inverse
                at = (image * channels + c) * pixels + own
                tl.store(out_ptr + at, (mixed * scale).to(out_ptr.dtype.element_ty), mask=first & (c < channels))


def _blocks(name: str, classes: int, channels: int, dtype: torch.dtype) -> dict[str, int]:
    """64 texts at most, 64 pixels (a line of 256 bytes of every channel), 32 channels a step; float64 halves the pixels."""
    rows, pixels = power_of_2(classes, most=64), 32 if dtype == torch.float64 else 64
    default = {"BT": rows, "BP": pixels, "BC": 32, "num_warps": 4, "num_stages": 2}
    other = [{**default, "BP": p, "num_warps": w} for p in (64, 128) for w in (2, 4, 8)]
    return config(f"{name}/t{rows}c{power_of_2(channels)}b{dtype.itemsize}", default, other)


def _flat(visual: Tensor) -> tuple[Tensor, tuple[int, int, int], int]:
    """(the map, its strides by image, channel and pixel, its pixels). Only maps whose rows do not follow one another are copied."""
    if visual.shape[2] > 1 and visual.shape[3] > 1 and visual.stride(2) != visual.shape[3] * visual.stride(3):
        visual = visual.contiguous()
    step = visual.stride(3) if visual.shape[3] > 1 else visual.stride(2)
    return visual, (visual.stride(0), visual.stride(1), step), visual.shape[2] * visual.shape[3]


def text_similarity_fwd(visual: Tensor, text: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    (batch, channels, height, width), classes = visual.shape, len(text)
    out = visual.new_empty(batch, classes, height, width)
    visual, strides, pixels = _flat(visual)
    meta = _blocks("text_similarity", classes, channels, visual.dtype)
    blocks = triton.cdiv(pixels, meta["BP"])
    launch("text_similarity.triton", _maps, (batch * blocks, triton.cdiv(classes, meta["BT"])), visual, text.contiguous(), scale, out,
           blocks, classes, channels, pixels, *strides, NORMALIZE=normalize, PRECISION=multiply_adds(visual.dtype), **meta)  # fmt: skip
    return out


def text_similarity_bwd(visual, text, scale, grad, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, channels, *_), classes, kind = visual.shape, len(text), accumulator(visual.dtype)
    out = visual.new_empty(visual.shape)
    visual, strides, pixels = _flat(visual)
    text, grad = text.contiguous(), grad.contiguous()
    meta = _blocks("text_similarity.backward", classes, channels, visual.dtype)
    blocks = triton.cdiv(pixels, meta["BP"])
    inverse, slope = visual.new_empty(batch, pixels, dtype=kind), visual.new_empty(batch * blocks, dtype=torch.float64)
    exact = multiply_adds(visual.dtype)
    launch("text_similarity.triton.backward", _map_gradient, (batch * blocks,), visual, text, scale, grad, out, inverse, slope,
           blocks, classes, channels, pixels, *strides, NORMALIZE=normalize, PRECISION=exact, **meta)  # fmt: skip
    # About two programs for each multiprocessor of an H100; their parts are added in order.
    shares, rows = triton.cdiv(channels, meta["BC"]), triton.cdiv(classes, meta["BT"])
    parts = max(1, min(batch * blocks, 264 // max(1, shares * rows)))
    part = visual.new_empty(parts, classes, channels, dtype=kind)
    launch("text_similarity.triton.text", _text_gradient, (parts * shares, rows), visual, inverse, grad, part, blocks, batch, classes,
           channels, pixels, shares, parts, *strides, PRECISION=multiply_adds(kind), **meta)  # fmt: skip
    return out, (part.sum(0) * scale.to(kind)).to(text.dtype), slope.sum().to(scale.dtype)


def text_similarity_pool_fwd(visual: Tensor, text: Tensor, scale: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    (batch, channels, *_), classes = visual.shape, len(text)
    visual, strides, pixels = _flat(visual)
    meta = _blocks("text_similarity_pool", classes, channels, visual.dtype)
    blocks = triton.cdiv(pixels, meta["BP"])
    value = visual.new_empty(batch, blocks, classes, dtype=accumulator(visual.dtype))
    index = visual.new_empty(value.shape, dtype=torch.int64)
    launch("text_similarity_pool.triton", _maxima, (batch * blocks, triton.cdiv(classes, meta["BT"])), visual, text.contiguous(), scale,
           value, index, blocks, classes, channels, pixels, *strides,
           NORMALIZE=normalize, PRECISION=multiply_adds(visual.dtype), **meta)  # fmt: skip
    top, block = value.max(dim=1)  # the first of equal blocks
    return top.to(visual.dtype), index.gather(1, block[:, None])[:, 0]


def text_similarity_pool_bwd(visual, text, scale, index, grad, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    (batch, channels, *_), classes, kind = visual.shape, len(text), accumulator(visual.dtype)
    out = torch.zeros(visual.shape, dtype=visual.dtype, device=visual.device)
    visual, strides, pixels = _flat(visual)
    vector, slope = visual.new_empty(batch, classes, channels, dtype=kind), visual.new_empty(batch, classes, dtype=kind)
    launch("text_similarity_pool.triton.backward", _pool_gradient, (batch * classes,), visual, text.contiguous(), scale,
           index.contiguous(), grad.contiguous(), out, vector, slope, classes, channels, pixels, *strides, NORMALIZE=normalize,
           BT=power_of_2(classes, most=32), BC=power_of_2(channels, most=128), num_warps=4)  # fmt: skip
    return out, vector.sum(0).to(text.dtype), slope.sum().to(scale.dtype)
