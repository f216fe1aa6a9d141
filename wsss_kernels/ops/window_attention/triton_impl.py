"""Triton kernels of window and exchange attention: cyclic shift, Swin's regions, padding and relative bias are index arithmetic.

Windows of up to 64 tokens: one program per branch, image, window and head holds all weights in registers, forward and backward;
windows are disjoint, so every gradient has one owner. Larger windows: the statistics of each query first, then one kernel that
gathers `Σ weight · x` over blocks of 64 tokens, for the result (x = V), dQ (K), dK (Q) and dV (dO) alike.
The maps of one role are a pair, one per branch; kernels read them where they lie and never store a weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, accumulator, config, dot, launch, power_of_2, precision


@triton.jit
def _of(pair, branch):
    chosen = pair[0]
    if branch == 1:
        chosen = pair[1]
    return chosen


@triton.jit
def _place(z, images, size):
    """(branch, image, window) of window z of all."""
    windows = size[2] * size[3]
    return z // (images * windows), z // windows % images, z % windows


@triton.jit
def _tokens(window, slot, size, WY: tl.constexpr, WX: tl.constexpr):
    """(y, x, region) of a window's slots. Parts that the cyclic shift joined are regions of their own; the padding has region −1."""
    height, width, rows, columns, shift_y, shift_x = size
    y = window // columns * WY + slot // WX + shift_y
    x = window % columns * WX + slot % WX + shift_x
    below, right = y >= rows * WY, x >= columns * WX
    y, x = tl.where(below, y - rows * WY, y), tl.where(right, x - columns * WX, x)
    inside = (slot < WY * WX) & (y < height) & (x < width)
    return y, x, tl.where(inside, 2 * below.to(tl.int32) + right.to(tl.int32), -1)


@triton.jit
def _at(image, head, token, strides, depth):
    """Offsets of the tokens' first channel of a head."""
    return image * strides[0] + token[0] * strides[1] + token[1] * strides[2] + head * depth * strides[3]


@triton.jit
def _rows(pointer, at, token, stride, first, depth, BD: tl.constexpr):
    """Channels `first` on of a block of tokens, [tokens, BD]; 0 outside."""
    d = first + tl.arange(0, BD).to(tl.int64)
    return tl.load(pointer + at[:, None] + d[None, :] * stride, mask=(token[2] >= 0)[:, None] & (d < depth)[None, :], other=0.0)


@triton.jit
def _put(pointer, value, image, head, token, first, depth, strides, BD: tl.constexpr):
    d = first + tl.arange(0, BD).to(tl.int64)
    mask = (token[2] >= 0)[:, None] & (d < depth)[None, :]
    at = _at(image, head, token, strides, depth)[:, None] + d[None, :] * strides[3]
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _products(a_ptr, b_ptr, a_token, b_token, image, head, depth, a_strides, b_strides, kind: tl.constexpr, BD: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """a·bᵀ over the channels of a head."""
    acc = tl.zeros((a_token[2].shape[0], b_token[2].shape[0]), kind)
    a_at, b_at = _at(image, head, a_token, a_strides, depth), _at(image, head, b_token, b_strides, depth)
    for first in range(0, depth, BD):
        a = _rows(a_ptr, a_at, a_token, a_strides[3], first, depth, BD)
        b = _rows(b_ptr, b_at, b_token, b_strides[3], first, depth, BD)
        acc = dot(a, tl.trans(b), acc, PRECISION)
    return acc


@triton.jit
def _logits(q_ptr, k_ptr, bias_ptr, q_token, k_token, q_slot, k_slot, image, head, heads, depth, strides, scale, kind: tl.constexpr,
            WY: tl.constexpr, WX: tl.constexpr, BIASED: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Logits of queries × keys, −∞ between regions and in the padding."""
    acc = _products(q_ptr, k_ptr, q_token, k_token, image, head, depth, strides[0], strides[1], kind, BD, PRECISION)
    acc *= scale
    seen = (q_token[2][:, None] == k_token[2][None, :]) & (k_token[2] >= 0)[None, :]
    if BIASED:
        q_row = q_slot // WX * (2 * WX - 1) + q_slot % WX + (WY - 1) * (2 * WX - 1) + WX - 1
        row = q_row[:, None] - (k_slot // WX * (2 * WX - 1) + k_slot % WX)[None, :]
        acc += tl.load(bias_ptr + row * heads + head, mask=seen, other=0.0).to(kind)
    return tl.where(seen, acc, float("-inf"))


@triton.jit
def _softmax(logits):
    """Rows without a key (padding) give zeros."""
    top = tl.max(logits, axis=1)
    weight = tl.exp2((logits - tl.where(top == float("-inf"), 0.0, top)[:, None]) * LOG2E)
    total = tl.sum(weight, axis=1)
    return weight / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit
def _small_forward(queries, keys, values, outs, bias_ptr, size, strides, images, heads, depth, tall, rest, kind: tl.constexpr, BIASED: tl.constexpr,
                   WY: tl.constexpr, WX: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    scale = tl.cast(tall, kind) + tl.cast(rest, kind)  # a float argument has 24 bits only
    branch, image, window = _place(tl.program_id(0).to(tl.int64), images, size)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, BL)
    token = _tokens(window, slot, size, WY, WX)
    logits = _logits(_of(queries, branch), _of(keys, branch), bias_ptr, token, token, slot, slot, image, head, heads, depth, strides,
                     scale, kind, WY, WX, BIASED, BD, PRECISION)  # fmt: skip
    weight = _softmax(logits)
    value_ptr, out_ptr = _of(values, branch), _of(outs, branch)
    at = _at(image, head, token, strides[2], depth)
    for first in range(0, depth, BD):
        v = _rows(value_ptr, at, token, strides[2][3], first, depth, BD)
        out = dot(weight.to(v.dtype), v, tl.zeros((BL, BD), kind), PRECISION)
        _put(out_ptr, out, image, head, token, first, depth, strides[3], BD)


@triton.jit
def _small_backward(queries, keys, values, grads, d_queries, d_keys, d_values, bias_ptr, part_ptr, size, strides, images, heads, depth, tall, rest,
                    total, parts, kind: tl.constexpr, BIASED: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr, BL: tl.constexpr,
                    BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """All gradients of every parts-th window; the sum of its logits' gradients is this part's share of the bias gradient."""
    scale = tl.cast(tall, kind) + tl.cast(rest, kind)  # a float argument has 24 bits only
    part, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, BL)
    shared = tl.zeros((BL, BL), kind)
    for z in range(part, total, parts):
        branch, image, window = _place(z, images, size)
        token = _tokens(window, slot, size, WY, WX)
        query_ptr, key_ptr, grad_ptr = _of(queries, branch), _of(keys, branch), _of(grads, branch)
        logits = _logits(query_ptr, key_ptr, bias_ptr, token, token, slot, slot, image, head, heads, depth, strides,
                         scale, kind, WY, WX, BIASED, BD, PRECISION)  # fmt: skip
        weight = _softmax(logits)
        inner = _products(grad_ptr, _of(values, branch), token, token, image, head, depth, strides[3], strides[2], kind, BD, PRECISION)
        slope = weight * (inner - tl.sum(weight * inner, axis=1)[:, None])
        if BIASED:
            shared += slope
        slope *= scale
        for first in range(0, depth, BD):
            k = _rows(key_ptr, _at(image, head, token, strides[1], depth), token, strides[1][3], first, depth, BD)
            narrow = slope.to(k.dtype)
            out = dot(narrow, k, tl.zeros((BL, BD), kind), PRECISION)
            _put(_of(d_queries, branch), out, image, head, token, first, depth, strides[3], BD)
            q = _rows(query_ptr, _at(image, head, token, strides[0], depth), token, strides[0][3], first, depth, BD)
            out = dot(tl.trans(narrow), q, tl.zeros((BL, BD), kind), PRECISION)
            _put(_of(d_keys, branch), out, image, head, token, first, depth, strides[3], BD)
            g = _rows(grad_ptr, _at(image, head, token, strides[3], depth), token, strides[3][3], first, depth, BD)
            out = dot(tl.trans(weight.to(g.dtype)), g, tl.zeros((BL, BD), kind), PRECISION)
            _put(_of(d_values, branch), out, image, head, token, first, depth, strides[3], BD)
    if BIASED:
        slots: tl.constexpr = WY * WX
        at = ((part * heads + head) * slots + slot[:, None]) * slots + slot[None, :]
        tl.store(part_ptr + at, shared, mask=(slot < slots)[:, None] & (slot < slots)[None, :])


@triton.jit
def _statistics(queries, keys, values, grads, bias_ptr, stats_ptr, size, strides, images, heads, depth, tall, rest, blocks, count,
                kind: tl.constexpr, GRADIENT: tl.constexpr, BIASED: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr, BL: tl.constexpr,
                BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Per query of a large window: largest logit, sum of exponentials, and with GRADIENT Σ weight · ∂weight."""
    scale = tl.cast(tall, kind) + tl.cast(rest, kind)  # a float argument has 24 bits only
    z, head = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(1).to(tl.int64)
    branch, image, window = _place(z, images, size)
    q_slot = tl.program_id(0) % blocks * BL + tl.arange(0, BL)
    q_token = _tokens(window, q_slot, size, WY, WX)
    top, total, along = tl.full((BL,), float("-inf"), kind), tl.zeros((BL,), kind), tl.zeros((BL,), kind)
    for start in range(0, WY * WX, BL):
        k_slot = start + tl.arange(0, BL)
        k_token = _tokens(window, k_slot, size, WY, WX)
        logits = _logits(_of(queries, branch), _of(keys, branch), bias_ptr, q_token, k_token, q_slot, k_slot, image, head, heads,
                         depth, strides, scale, kind, WY, WX, BIASED, BD, PRECISION)  # fmt: skip
        above = tl.maximum(top, tl.max(logits, axis=1))
        anchor = tl.where(above == float("-inf"), 0.0, above)
        shrink, weight = tl.exp2((top - anchor) * LOG2E), tl.exp2((logits - anchor[:, None]) * LOG2E)
        total = total * shrink + tl.sum(weight, axis=1)
        if GRADIENT:
            inner = _products(_of(grads, branch), _of(values, branch), q_token, k_token, image, head, depth, strides[3], strides[2],
                              kind, BD, PRECISION)  # fmt: skip
            along = along * shrink + tl.sum(weight * inner, axis=1)
        top = above
    total = tl.where(total == 0, 1.0, total)
    at = stats_ptr + (z * heads + head) * blocks * BL + q_slot
    tl.store(at, tl.where(top == float("-inf"), 0.0, top))
    tl.store(at + count, total)
    tl.store(at + 2 * count, along / total)


@triton.jit
def _weights(query_ptr, key_ptr, value_ptr, grad_ptr, bias_ptr, stats_ptr, z, image, window, head, q_slot, k_slot, size, strides, heads,
             depth, scale, blocks, count, kind: tl.constexpr, GRADIENT: tl.constexpr, BIASED: tl.constexpr, WY: tl.constexpr,
             WX: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of weights, or with GRADIENT of the logits' gradients, queries × keys, from the statistics."""
    q_token, k_token = _tokens(window, q_slot, size, WY, WX), _tokens(window, k_slot, size, WY, WX)
    logits = _logits(query_ptr, key_ptr, bias_ptr, q_token, k_token, q_slot, k_slot, image, head, heads, depth, strides, scale, kind,
                     WY, WX, BIASED, BD, PRECISION)  # fmt: skip
    at = stats_ptr + (z * heads + head) * blocks * BL + q_slot
    weight = tl.exp2((logits - tl.load(at)[:, None]) * LOG2E) / tl.load(at + count)[:, None]
    if GRADIENT:
        inner = _products(grad_ptr, value_ptr, q_token, k_token, image, head, depth, strides[3], strides[2], kind, BD, PRECISION)
        weight *= inner - tl.load(at + 2 * count)[:, None]
    return weight


@triton.jit
def _gather(queries, keys, values, grads, xs, outs, bias_ptr, stats_ptr, size, strides, x_strides, images, heads, depth, tall, rest, blocks, count,
            kind: tl.constexpr, OWN_KEY: tl.constexpr, GRADIENT: tl.constexpr, BIASED: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr,
            BL: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Σ weight · x over the other tokens of a large window, for a block of its queries (OWN_KEY: keys) and of channels."""
    scale = tl.cast(tall, kind) + tl.cast(rest, kind)  # a float argument has 24 bits only
    z, head = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(1).to(tl.int64)
    branch, image, window = _place(z, images, size)
    slot = tl.program_id(0) % blocks * BL + tl.arange(0, BL)
    token, first = _tokens(window, slot, size, WY, WX), tl.program_id(2) * BD
    acc = tl.zeros((BL, BD), kind)
    for start in range(0, WY * WX, BL):
        other = start + tl.arange(0, BL)
        other_token = _tokens(window, other, size, WY, WX)
        weight = _weights(_of(queries, branch), _of(keys, branch), _of(values, branch), _of(grads, branch), bias_ptr, stats_ptr, z,
                          image, window, head, other if OWN_KEY else slot, slot if OWN_KEY else other, size, strides, heads, depth,
                          scale, blocks, count, kind, GRADIENT, BIASED, WY, WX, BL, BD, PRECISION)  # fmt: skip
        if OWN_KEY:
            weight = tl.trans(weight)
        x = _rows(_of(xs, branch), _at(image, head, other_token, x_strides, depth), other_token, x_strides[3], first, depth, BD)
        acc = dot(weight.to(x.dtype), x, acc, PRECISION)
    if GRADIENT:
        acc *= scale
    _put(_of(outs, branch), acc, image, head, token, first, depth, strides[3], BD)


@triton.jit
def _bias_tile(queries, keys, values, grads, bias_ptr, stats_ptr, part_ptr, size, strides, images, heads, depth, tall, rest, blocks, count, total, parts,
               kind: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """A tile of the logits' gradients, summed over every parts-th large window."""
    scale = tl.cast(tall, kind) + tl.cast(rest, kind)  # a float argument has 24 bits only
    part, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q_slot = tl.program_id(2) // blocks * BL + tl.arange(0, BL)
    k_slot = tl.program_id(2) % blocks * BL + tl.arange(0, BL)
    shared = tl.zeros((BL, BL), kind)
    for z in range(part, total, parts):
        branch, image, window = _place(z, images, size)
        shared += _weights(_of(queries, branch), _of(keys, branch), _of(values, branch), _of(grads, branch), bias_ptr, stats_ptr, z,
                           image, window, head, q_slot, k_slot, size, strides, heads, depth, scale, blocks, count, kind, True, True,
                           WY, WX, BL, BD, PRECISION)  # fmt: skip
    slots: tl.constexpr = WY * WX
    at = ((part * heads + head) * slots + q_slot[:, None]) * slots + k_slot[None, :]
    tl.store(part_ptr + at, shared, mask=(q_slot < slots)[:, None] & (k_slot < slots)[None, :])


@triton.jit
def _table(pair_ptr, out_ptr, heads, WY: tl.constexpr, WX: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr):
    """Rows of the bias table, one per offset: the sum over the pairs of slots that are so far apart."""
    row, head = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1).to(tl.int64)
    slots: tl.constexpr = WY * WX
    down, right = row // (2 * WX - 1) - (WY - 1), row % (2 * WX - 1) - (WX - 1)
    acc = tl.zeros((BR,), pair_ptr.dtype.element_ty)
    for start in range(0, slots, BL):
        q = start + tl.arange(0, BL)
        y, x = (q // WX)[None, :] - down[:, None], (q % WX)[None, :] - right[:, None]
        mask = (q < slots)[None, :] & (y >= 0) & (y < WY) & (x >= 0) & (x < WX)
        acc += tl.sum(tl.load(pair_ptr + (head * slots + q)[None, :] * slots + y * WX + x, mask=mask, other=0.0), axis=1)
    tl.store(out_ptr + row * heads + head, acc.to(out_ptr.dtype.element_ty), mask=row < (2 * WY - 1) * (2 * WX - 1))


Maps = tuple[Tensor, ...]


class _Call:
    """What the kernels of a call share: geometry, strides by role, block sizes."""

    def __init__(self, queries: Maps, keys: Maps, values: Maps, bias: Tensor, heads: int, window, shift, scale: float, backward: bool):
        like = queries[0]
        images, height, width, channels = like.shape
        rows, columns = triton.cdiv(height, window[0]), triton.cdiv(width, window[1])
        self.roles = tuple(_alike(maps) for maps in (queries, keys, values))
        self.bias, self.heads, self.depth, self.images = bias.contiguous(), heads, channels // heads, images
        self.total, self.kind = len(queries) * images * rows * columns, accumulator(like.dtype)
        slots = window[0] * window[1]
        self.slots, self.small = slots, slots <= 64
        wide = like.dtype == torch.float64
        side = power_of_2(slots, most=64 if self.small or like.element_size() == 2 else 32)
        self.blocks = triton.cdiv(slots, side)
        # A thread holds four tiles of weights in the backward pass, and the factors of a product of a wide type besides. For float32
        # the fastest of 2 to 16 warps on an H200.
        each = side * side // (1024 if self.small else 512)
        warps = max(1, each * (2 if like.element_size() > 2 else 1)) * (
            2 if backward and (like.dtype != torch.float32 or self.depth > 32) else 1
        )
        default: dict[str, Any] = {"BL": side, "BD": power_of_2(self.depth, most=32 if wide else 64), "num_warps": warps}
        key = f"window_attention{'.backward' if backward else ''}/l{side}d{self.depth}b{like.element_size()}"
        tall = torch.tensor(scale, dtype=torch.float32).item()  # on the host
        self.size = (height, width, rows, columns, *shift)
        self.common = (images, heads, self.depth, tall, scale - tall)
        self.strides = (*(maps[0].stride() for maps in self.roles), (height * width * channels, width * channels, channels, 1))
        meta: dict[str, Any] = config(key, default, [{**default, "num_warps": warps} for warps in (2, 4, 8, 16)])
        self.meta = dict(meta, kind=tl.float64 if wide else tl.float32, WY=window[0], WX=window[1], PRECISION=precision(like.dtype))

    def forward(self, path: str) -> Maps:
        outs = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in self.roles[0])
        biased = self.bias.numel() > 0
        if self.small:
            launch(path, _small_forward, (self.total, self.heads), *map(_pair, (*self.roles, outs)), self.bias, self.size, self.strides,
                   *self.common, BIASED=biased, **self.meta)  # fmt: skip
            return outs
        stats, blocks = self._statistics(path, None)
        self._gather(path, self.roles[2], outs, self.strides[2], stats, blocks, None, False, False)
        return outs

    def _statistics(self, path: str, grads: Maps | None):
        count = self.total * self.heads * self.blocks * self.meta["BL"]
        stats = self.roles[0][0].new_empty(3, count, dtype=self.kind)
        launch(f"{path}.statistics", _statistics, (self.total * self.blocks, self.heads), *map(_pair, (*self.roles, grads or self.roles[0])),
               self.bias, stats, self.size, self.strides, *self.common, self.blocks, count, GRADIENT=grads is not None,
               BIASED=self.bias.numel() > 0, **self.meta)  # fmt: skip
        return stats, (self.blocks, count)

    def _gather(self, path: str, xs: Maps, outs: Maps, x_strides, stats: Tensor, blocks, grads: Maps | None, own_key: bool, gradient: bool):
        grid = (self.total * self.blocks, self.heads, triton.cdiv(self.depth, self.meta["BD"]))
        launch(f"{path}.large", _gather, grid, *map(_pair, (*self.roles, grads or self.roles[0], xs, outs)), self.bias, stats, self.size,
               self.strides, x_strides, *self.common, *blocks, OWN_KEY=own_key, GRADIENT=gradient, BIASED=self.bias.numel() > 0, **self.meta)  # fmt: skip

    def backward(self, path: str, grads: Maps) -> tuple[Maps, Maps, Maps, Tensor]:
        grads = tuple(g.contiguous() for g in grads)
        outs = tuple(tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in maps) for maps in self.roles)
        biased = self.bias.numel() > 0
        # Enough programs for two on each multiprocessor of an H100, at least 64 parts; their bias gradients are added in order.
        parts = max(1, min(self.total, max(64, 264 // self.heads) if biased else self.total))
        part = grads[0].new_zeros((parts if biased else 0, self.heads, self.slots, self.slots), dtype=self.kind)
        maps = tuple(map(_pair, (*self.roles, grads)))
        if self.small:
            launch(path, _small_backward, (min(parts, self.total), self.heads), *maps, *map(_pair, outs), self.bias, part, self.size,
                   self.strides, *self.common, self.total, parts, BIASED=biased, **self.meta)  # fmt: skip
        else:
            stats, blocks = self._statistics(path, grads)
            for i, (x, own_key) in enumerate(((1, False), (0, True), (3, True))):
                xs = grads if x == 3 else self.roles[x]
                self._gather(path, xs, outs[i], self.strides[x], stats, blocks, grads, own_key, x != 3)
            if biased:
                grid = (min(parts, self.total), self.heads, self.blocks**2)
                launch(f"{path}.bias", _bias_tile, grid, *maps, self.bias, stats, part, self.size, self.strides, *self.common, *blocks,
                       self.total, parts, **self.meta)  # fmt: skip
        table = torch.empty_like(self.bias)
        if biased:
            window = {key: self.meta[key] for key in ("WY", "WX", "BL")}
            rows = (triton.cdiv(len(table), 16), self.heads)
            launch(f"{path}.table", _table, rows, part.sum(0), table, self.heads, BR=16, num_warps=4, **window)
        return outs[0], outs[1], outs[2], table


def _alike(maps: Maps) -> Maps:
    """The maps of a role, copied only if the branches lie differently in memory."""
    return maps if len({t.stride() for t in maps}) == 1 else tuple(t.contiguous() for t in maps)


def _pair(maps: Maps) -> Maps:
    return maps if len(maps) == 2 else (*maps, *maps)


def window_attention_fwd(query, key, value, bias, heads: int, window, shift, scale: float) -> Tensor:
    call = _Call((query,), (key,), (value,), bias, heads, window, shift, scale, False)
    return call.forward("window_attention.triton")[0]


def window_attention_bwd(query, key, value, bias, grad, heads: int, window, shift, scale: float) -> tuple[Tensor, ...]:
    call = _Call((query,), (key,), (value,), bias, heads, window, shift, scale, True)
    *maps, table = call.backward("window_attention.triton.backward", (grad,))
    return *(of_role[0] for of_role in maps), table


def exchange_attention_fwd(query_p, key_p, value_p, query_t, key_t, value_t, bias, heads: int, window, shift, scale: float) -> Maps:
    call = _Call((query_t, query_p), (key_p, key_t), (value_p, value_t), bias, heads, window, shift, scale, False)
    return call.forward("window_attention.triton")


def exchange_attention_bwd(query_p, key_p, value_p, query_t, key_t, value_t, bias, grad_p, grad_t, heads: int, window, shift, scale: float):
    call = _Call((query_t, query_p), (key_p, key_t), (value_p, value_t), bias, heads, window, shift, scale, True)
    queries, keys, values, table = call.backward("window_attention.triton.backward", (grad_p, grad_t))
    return queries[1], keys[0], values[0], queries[0], keys[1], values[1], table
