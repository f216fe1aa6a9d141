"""Triton kernels of criss-cross attention: columns, then rows, each a line of positions; the weights are made again and never stored.

The softmax over the cross is two softmaxes over lines, merged by their maxima and sums; the own position belongs to the row. One
kernel gathers `Σ weight · x` over a line, for the result (x = value), dQ (key), dK (query) and dV (the result's gradient) alike: the
column's pass writes, the row's adds, and the order of the launches makes the sum the same every time. With P the weights and
D = Σ P (dO·V) of each pixel, the gradient of a logit is P (dO·V − D).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import LOG2E, accumulator, config, dot, launch, power_of_2, precision


@triton.jit
def _start(pointer, image, line, position, strides):
    """Addresses of the first channel of positions of a line; strides by image, channel, line, position."""
    return pointer + image * strides[0] + line * strides[2] + position.to(tl.int64) * strides[3]


@triton.jit
def _rows(address, position, length, first, channels, stride, BD: tl.constexpr):
    """Channels `first` on of positions, [positions, BD]; 0 outside."""
    c = first + tl.arange(0, BD).to(tl.int64)
    return tl.load(address[:, None] + c[None, :] * stride, mask=(position < length)[:, None] & (c < channels)[None, :], other=0.0)


@triton.jit
def _products(a, b, a_position, b_position, length, channels, a_stride, b_stride, kind: tl.constexpr, BC: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    acc = tl.zeros((a_position.shape[0], b_position.shape[0]), kind)
    for first in range(0, channels, BC):
        left = _rows(a, a_position, length, first, channels, a_stride, BC)
        acc = dot(left, tl.trans(_rows(b, b_position, length, first, channels, b_stride, BC)), acc, PRECISION)
    return acc


@triton.jit
def _logits(q, k, q_position, k_position, length, keys, strides, kind: tl.constexpr, COLUMN: tl.constexpr):
    """Logits of queries × keys of a line, −∞ where there is no key. Exact to the last digit, which nothing scales before the softmax."""
    acc = _products(q, k, q_position, k_position, length, keys, strides[0][1], strides[1][1], kind, 16, "ieee")
    seen = (q_position < length)[:, None] & (k_position < length)[None, :]
    if COLUMN:
        seen = seen & (q_position[:, None] != k_position[None, :])
    return tl.where(seen, acc, float("-inf"))


@triton.jit
def _line(lines, blocks, BM: tl.constexpr):
    """(image, line, positions) of a program; neighbouring lines run together, since neighbouring columns share cache lines."""
    program = tl.program_id(0).to(tl.int64)
    return program // (lines * blocks), program % lines, (program // lines % blocks * BM + tl.arange(0, BM)).to(tl.int32)


@triton.jit
def _statistics(query, key, before, after, lines, length, blocks, keys, strides, pixels, s_line, s_position,
                kind: tl.constexpr, COLUMN: tl.constexpr, MERGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Largest logit and sum of exponentials of a column; of a row, merged with its pixels' columns, with the inverse of the sum."""
    image, line, position = _line(lines, blocks, BM)
    q = _start(query, image, line, position, strides[0])
    top, total = tl.full((BM,), float("-inf"), kind), tl.zeros((BM,), kind)
    for start in range(0, length, BN):
        other = start + tl.arange(0, BN)
        k = _start(key, image, line, other, strides[1])
        logits = _logits(q, k, position, other, length, keys, strides, kind, COLUMN)
        above = tl.maximum(top, tl.max(logits, axis=1))
        anchor = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2((top - anchor) * LOG2E) + tl.sum(tl.exp2((logits - anchor[:, None]) * LOG2E), axis=1)
        top = above
    at, inside = image * 2 * pixels + line * s_line + position * s_position, position < length
    if MERGE:
        column, rest = tl.load(before + at, mask=inside, other=0.0), tl.load(before + at + pixels, mask=inside, other=0.0)
        above = tl.maximum(top, column)
        total = total * tl.exp2((top - above) * LOG2E) + rest * tl.exp2((column - above) * LOG2E)
        top = above
    if not COLUMN:
        total = 1.0 / tl.where(total == 0, 1.0, total)
    tl.store(after + at, top, mask=inside)
    tl.store(after + at + pixels, total, mask=inside)


@triton.jit
def _weights(q, k, v, g, stats, inner, q_position, k_position, length, keys, values, strides, pixels, s_position, kind: tl.constexpr,
             GRADIENT: tl.constexpr, COLUMN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A tile of weights, or with GRADIENT of the logits' gradients, queries × keys. stats and inner point to the line."""
    logits = _logits(q, k, q_position, k_position, length, keys, strides, kind, COLUMN)
    at, inside = q_position * s_position, q_position < length
    top, inverse = tl.load(stats + at, mask=inside, other=0.0), tl.load(stats + pixels + at, mask=inside, other=0.0)
    weight = tl.exp2((logits - top[:, None]) * LOG2E) * inverse[:, None]
    if GRADIENT:
        product = _products(g, v, q_position, k_position, length, values, strides[3][1], strides[2][1], kind, BC, PRECISION)
        weight *= product - tl.load(inner + at, mask=inside, other=0.0)[:, None]
    return weight


@triton.jit
def _inner(query, key, value, grad, stats, out, lines, length, blocks, keys, values, strides, pixels, s_line, s_position,
           kind: tl.constexpr, COLUMN: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """D = Σ weight · (dO·V) over a line. From the tiles that the gradients use, not as dO·O from a rounded result: where one weight is
    nearly 1, dO·V − D is a small difference."""
    image, line, position = _line(lines, blocks, BM)
    stats_line = stats + image * 2 * pixels + line * s_line
    q, g = _start(query, image, line, position, strides[0]), _start(grad, image, line, position, strides[3])
    acc = tl.zeros((BM,), kind)
    for start in range(0, length, BN):
        other = start + tl.arange(0, BN)
        k, v = _start(key, image, line, other, strides[1]), _start(value, image, line, other, strides[2])
        weight = _weights(q, k, v, g, stats_line, stats_line, position, other, length, keys, values, strides, pixels, s_position, kind,
                          False, COLUMN, BC, PRECISION)  # fmt: skip
        acc += tl.sum(weight * _products(g, v, position, other, length, values, strides[3][1], strides[2][1], kind, BC, PRECISION), axis=1)
    at, inside = out + image * pixels + line * s_line + position * s_position, position < length
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(at, acc, mask=inside)


@triton.jit
def _own_by_other(query, key, value, grad, stats, inner, image, line, position, other, length, keys, values, strides, pixels, s_position,
                  kind: tl.constexpr, OWN_KEY: tl.constexpr, GRADIENT: tl.constexpr, COLUMN: tl.constexpr, BC: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """The tile of `_weights` with the positions that the program owns first."""
    q_position, k_position = position, other
    if OWN_KEY:
        q_position, k_position = other, position
    q, k = _start(query, image, line, q_position, strides[0]), _start(key, image, line, k_position, strides[1])
    v, g = _start(value, image, line, k_position, strides[2]), _start(grad, image, line, q_position, strides[3])
    weight = _weights(q, k, v, g, stats, inner, q_position, k_position, length, keys, values, strides, pixels, s_position, kind,
                      GRADIENT, COLUMN, BC, PRECISION)  # fmt: skip
    if OWN_KEY:
        weight = tl.trans(weight)
    return weight


@triton.jit
def _gather(query, key, value, grad, x, before, out, stats, inner, lines, length, blocks, keys, values, channels, span, strides, pixels,
            s_line, s_position, kind: tl.constexpr, OWN_KEY: tl.constexpr, GRADIENT: tl.constexpr, COLUMN: tl.constexpr,
            ADD: tl.constexpr, ONE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Σ weight · x over a line for a block of its positions and `span` channels of x; with ONE all others lie in one block."""
    image, line, position = _line(lines, blocks, BM)
    stats_line, inner_line = stats + image * 2 * pixels + line * s_line, inner + image * pixels + line * s_line
    own = image * strides[5][0] + line * strides[5][2] + position.to(tl.int64) * strides[5][3]
    begin = tl.program_id(1) * span
    if ONE:
        kept = _own_by_other(query, key, value, grad, stats_line, inner_line, image, line, position, tl.arange(0, BN), length, keys, values,
                             strides, pixels, s_position, kind, OWN_KEY, GRADIENT, COLUMN, BC, PRECISION)  # fmt: skip
    for first in range(begin, tl.minimum(begin + span, channels), BD):
        acc = tl.zeros((BM, BD), kind)
        for start in range(0, length, BN):
            other = start + tl.arange(0, BN)
            if ONE:
                weight = kept
            else:
                weight = _own_by_other(query, key, value, grad, stats_line, inner_line, image, line, position, other, length, keys, values,
                                       strides, pixels, s_position, kind, OWN_KEY, GRADIENT, COLUMN, BC, PRECISION)  # fmt: skip
            rows = _rows(_start(x, image, line, other, strides[4]), other, length, first, channels, strides[4][1], BD)
            acc = dot(weight.to(rows.dtype), rows, acc, PRECISION)
        c = first + tl.arange(0, BD).to(tl.int64)
        at, mask = own[:, None] + c[None, :] * strides[5][1], (position < length)[:, None] & (c < channels)[None, :]
        if ADD:
            acc += tl.load(before + at, mask=mask, other=0.0)
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


class _Maps:
    """Query, key and value of a call, and how their lines are cut into blocks."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor):
        self.query, self.key, self.value = (_channels_last(t) for t in (query, key, value))
        self.batch, self.keys, self.height, self.width = query.shape
        self.kind = accumulator(query.dtype)
        self.pixels = self.height * self.width
        self.exact = {"kind": tl.float64 if self.kind == torch.float64 else tl.float32, "PRECISION": precision(query.dtype)}

    def lines(self) -> Iterator[tuple[bool, int, int, tuple[int, int]]]:
        """(column, lines, length, strides of a plane by line and position). A map of one row has no columns to look at."""
        if self.height > 1:
            yield True, self.width, self.height, (1, self.width)
        yield False, self.height, self.width, (self.width, 1)

    def blocks(self, length: int) -> dict[str, int]:
        """64 own positions against a line of up to 128, whose weights then stay in registers; wider types halve both."""
        half = 2 if self.query.element_size() > 2 else 1
        default = {"BM": power_of_2(length, most=64 // half), "BN": power_of_2(length, most=128 // half)}
        warps = max(1 if default["BM"] == 16 else 4, default["BM"] * default["BN"] // 1024)
        if self.query.element_size() == 4:  # eight took twice the time of fewer on an H200
            warps = max(1, default["BM"] * default["BN"] // 512)
        default |= {"BC": 16 if self.kind == torch.float64 else 32, "num_warps": warps}
        other = [{**default, "num_warps": w} for w in (2, 4, 8)] + [{**default, "BM": 64, "BN": 128, "num_warps": w} for w in (4, 8)]
        return config(f"criss_cross/l{power_of_2(length)}b{self.query.element_size()}", default, other)

    def statistics(self) -> Tensor:
        last: Tensor | None = None
        for column, lines, length, plane in self.lines():
            meta = self.blocks(length)
            blocks = triton.cdiv(length, meta["BM"])
            new = self.query.new_empty((self.batch, 2, self.height, self.width), dtype=self.kind)
            strides = _strides(column, self.query, self.key)
            launch("criss_cross.triton.statistics", _statistics, (self.batch * lines * blocks,), self.query, self.key,
                   new if last is None else last, new, lines, length, blocks, self.keys, strides, self.pixels, *plane,
                   COLUMN=column, MERGE=last is not None, kind=self.exact["kind"],
                   **{key: meta[key] for key in ("BM", "BN", "num_warps")})  # fmt: skip
            last = new
        assert last is not None  # there are two lines
        return last

    def inner(self, stats: Tensor, grad: Tensor) -> Tensor:
        """D per pixel: columns write, rows add."""
        out = self.query.new_empty((self.batch, self.height, self.width), dtype=self.kind)
        added = False
        for column, lines, length, plane in self.lines():
            meta = self.blocks(length)
            blocks = triton.cdiv(length, meta["BM"])
            maps = (self.query, self.key, self.value, grad)
            launch("criss_cross.triton.inner", _inner, (self.batch * lines * blocks,), *maps, stats, out, lines, length, blocks, self.keys,
                   self.value.shape[1], _strides(column, *maps), self.pixels, *plane, COLUMN=column, ADD=added, **meta, **self.exact)  # fmt: skip
            added = True
        return out

    def gather(self, path: str, x: Tensor, stats: Tensor, grad: Tensor | None, inner: Tensor | None, like: Tensor, own_key=False,
               gradient=False) -> Tensor:  # fmt: skip
        """Columns into a buffer of the accumulator's type, then rows; into the result itself where it has that type."""
        out, channels = torch.empty_like(like, memory_format=torch.channels_last), x.shape[1]
        before = out if out.dtype == self.kind else torch.empty_like(out, dtype=self.kind)
        added = False
        for column, lines, length, plane in self.lines():
            meta = self.blocks(length)
            blocks, width = triton.cdiv(length, meta["BM"]), power_of_2(channels, most=32 if self.kind == torch.float64 else 64)
            # The weights of a tile serve as many channels as leave two programs for each multiprocessor of an H100.
            shares = max(1, min(triton.cdiv(channels, width), 264 // max(1, self.batch * lines * blocks)))
            span = width * triton.cdiv(triton.cdiv(channels, width), shares)
            maps = (self.query, self.key, self.value, self.value if grad is None else grad, x)
            one = length <= meta["BN"]
            launch(path if one else f"{path}.long", _gather, (self.batch * lines * blocks, triton.cdiv(channels, max(1, span))), *maps, before,
                   before if column else out, stats, stats if inner is None else inner, lines, length, blocks, self.keys,
                   self.value.shape[1], channels, span, _strides(column, *maps, out), self.pixels, *plane, OWN_KEY=own_key,
                   GRADIENT=gradient, COLUMN=column, ADD=added, ONE=one, BD=width, **meta, **self.exact)  # fmt: skip
            added = True
        return torch.empty_like(like).copy_(out) if like.stride() != out.stride() else out


def _channels_last(x: Tensor) -> Tensor:
    """Rows and columns are read alike where the channels of a pixel lie together: else a column takes a cache line per element."""
    return x.contiguous(memory_format=torch.channels_last)


def _strides(column: bool, *maps: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of each map by image, channel, line and position."""
    return tuple((*t.stride()[:2], *(t.stride()[:1:-1] if column else t.stride()[2:])) for t in maps)


def criss_cross_fwd(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    maps = _Maps(query, key, value)
    stats = maps.statistics()
    return maps.gather("criss_cross.triton", maps.value, stats, None, None, value), stats


def criss_cross_bwd(query, key, value, result, statistics, grad) -> tuple[Tensor, Tensor, Tensor]:
    maps, path = _Maps(query, key, value), "criss_cross.triton.backward"
    statistics, grad = statistics.contiguous(), _channels_last(grad)
    inner = maps.inner(statistics, grad)
    return (
        maps.gather(path, maps.key, statistics, grad, inner, query, gradient=True),
        maps.gather(path, maps.query, statistics, grad, inner, key, own_key=True, gradient=True),
        maps.gather(path, grad, statistics, grad, inner, value, own_key=True),
    )
