"""Window and exchange attention: the public functions and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

Pair = tuple[int, int]


def _note(*, window_size=None, **_) -> str | None:
    return "window_size=None: every backend but the reference is PyTorch's scaled_dot_product_attention" if window_size is None else None


WINDOW_OP = Operator("window_attention", backends=(Backend("triton"), Backend("cpu")), note=_note)
EXCHANGE_OP = Operator("exchange_attention", backends=(Backend("triton"), Backend("cpu")), note=_note)

_TRITON = f"{__package__}.triton_impl"
_MAPS = "Tensor query_p, Tensor key_p, Tensor value_p, Tensor query_t, Tensor key_t, Tensor value_t"
_OPTIONS = "int heads, int[] window, int[] shift, float scale"


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


_fwd = WINDOW_OP.raw_op(
    f"window_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor bias, {_OPTIONS}) -> Tensor",
    lambda query, *rest: query.new_empty(query.shape),
    triton=_TRITON,
)
_bwd = WINDOW_OP.raw_op(
    f"window_attention_bwd(Tensor query, Tensor key, Tensor value, Tensor bias, Tensor grad, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda query, key, value, bias, *rest: _like(query, key, value, bias),
    triton=_TRITON,
)
_exchange_fwd = EXCHANGE_OP.raw_op(
    f"exchange_attention_fwd({_MAPS}, Tensor bias, {_OPTIONS}) -> (Tensor, Tensor)",
    lambda query, *rest: _like(query, query),
    triton=_TRITON,
)
_exchange_bwd = EXCHANGE_OP.raw_op(
    f"exchange_attention_bwd({_MAPS}, Tensor bias, Tensor grad_p, Tensor grad_t, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *args: _like(*args[:7]),
    triton=_TRITON,
)


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, backend, *options):
        table = query.new_empty(0) if bias is None else bias
        ctx.save_for_backward(query, key, value, table)
        ctx.backend, ctx.options, ctx.biased = backend, options, bias is not None
        return _fwd[backend](query, key, value, table, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *maps, table = _bwd[ctx.backend](*ctx.saved_tensors, grad, *ctx.options)
        return *maps, table if ctx.biased else None, None, *[None] * len(ctx.options)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *maps, bias, backend = args[:8]
        ctx.options = args[8:]
        table = maps[0].new_empty(0) if bias is None else bias
        ctx.save_for_backward(*maps, table)
        ctx.backend, ctx.biased = backend, bias is not None
        return _exchange_fwd[backend](*maps, table, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_p, grad_t):
        *maps, table = _exchange_bwd[ctx.backend](*ctx.saved_tensors, grad_p, grad_t, *ctx.options)
        return *maps, table if ctx.biased else None, None, *[None] * len(ctx.options)


def pair(op: str, name: str, value: object, minimum: int) -> Pair:
    if hasattr(value, "__index__"):
        return (_args.integer(op, name, value, minimum),) * 2
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{op}: {name} must be an int or a pair of ints, got {_args.describe(value)}")
    return _args.integer(op, name, value[0], minimum), _args.integer(op, name, value[1], minimum)


def _checked_options(op: str, channels: int, num_heads: int, window_size, shift, bias: Tensor | None, scale: float | None):
    """(window or None, shift, scale)"""
    heads = _args.integer(op, "num_heads", num_heads, 1)
    if channels == 0 or channels % heads:
        raise ValueError(f"{op}: num_heads must divide the number of channels, got {heads} heads and {channels} channels")
    scale = (channels // heads) ** -0.5 if scale is None else _args.number(op, "scale", scale)
    moved = pair(op, "shift", shift, 0)
    if window_size is None:
        if bias is not None or moved != (0, 0):
            raise ValueError(f"{op}: window_size=None (global attention) takes neither bias nor shift")
        return None, moved, scale
    window = pair(op, "window_size", window_size, 1)
    if moved[0] >= window[0] or moved[1] >= window[1]:
        raise ValueError(f"{op}: shift must be smaller than window_size, got {moved} and {window}")
    if bias is not None:
        _args.tensor(op, "bias", bias, "((2w−1)·(2w−1))×heads")
        wanted = ((2 * window[0] - 1) * (2 * window[1] - 1), heads)
        if tuple(bias.shape) != wanted:
            raise ValueError(f"{op}: bias must be of shape {wanted[0]}×{wanted[1]}, got {_args.describe(bias)}")
    return window, moved, scale


def _check_maps(op: str, names: Sequence[str], maps: Sequence[Tensor], windowed: bool) -> None:
    query, key, value = names
    for name, t in zip(names, maps, strict=True):
        _args.tensor(op, name, t, "B×H×W×C")
        if 0 in t.shape[1:3]:
            raise ValueError(f"{op}: {name} must be a map with at least one pixel, got {_args.describe(t)}: a spatial extent must not be 0")
    _args.same(op, key, maps[1].shape, value, maps[2].shape, "shape")
    if windowed:
        _args.same(op, query, maps[0].shape, key, maps[1].shape, "shape in windows")
    _args.same(op, query, (maps[0].shape[0], maps[0].shape[3]), key, (maps[1].shape[0], maps[1].shape[3]), "batch size and channels")


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    window_size: int | Pair | None = None,
    shift: int | Pair = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-head attention inside (shifted) windows, or over the whole map (M0 Eq. 3, M2 Eq. 2; Swin, ICCV 2021).

    The windows are read from the maps where they lie: no partitioned, shifted or padded copy is made.

    Args:
        query: `Tensor[B, H, W, C]`, any floating type; the heads are consecutive groups of channels.
        key, value: `Tensor[B, H, W, C]`, same dtype and device; smaller maps `[B, h, w, C]` with `window_size=None`.
        num_heads: divides C.
        window_size: an int or (height, width), which need not divide H and W (padding is masked); `None` attends globally.
        shift: cyclic shift as in Swin, an int or (vertical, horizontal), below the window. Pixels on either side of the
            wrap-around, which were not neighbours, do not attend to each other.
        bias: `Tensor[(2·height − 1)·(2·width − 1), num_heads]`, the relative-position table: the row for query minus key offset
            (dy, dx) is (dy + height − 1)·(2·width − 1) + dx + width − 1.
        scale: factor of the logits; `None` is 1/√(C / num_heads).
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose. Global attention is PyTorch's own on every backend but the
            reference.

    Returns:
        `Tensor[B, H, W, C]` in the dtype of `query`, accumulated in float32 or better.

    Gradient: with respect to `query`, `key`, `value` and `bias`. The weights are not stored.

    Raises:
        TypeError: not tensors, integer tensors, mixed dtypes or devices, sizes that are not ints.
        ValueError: wrong rank, an empty map, shapes that differ, heads that do not divide C, a shift not below the window,
            a bias of another size, bias or shift without a window.
    """
    op = "window_attention"
    _check_maps(op, ("query", "key", "value"), (query, key, value), window_size is not None)
    window, moved, scale = _checked_options(op, query.shape[3], num_heads, window_size, shift, bias, scale)
    given = (query, key, value) if bias is None else (query, key, value, bias)
    tensors = _args.align(op, ("query", "key", "value", "bias")[: len(given)], given)
    chosen = WINDOW_OP.resolve(tensors, backend)
    query, key, value = tensors[:3]
    bias = tensors[3] if len(tensors) > 3 else None
    if chosen == "reference":
        options = {"num_heads": num_heads, "window_size": window, "shift": moved, "bias": bias, "scale": scale}
        return reference.window_attention(query, key, value, **options)
    wide = _args.widen(chosen, *tensors)
    if window is None:
        return reference.scaled_dot_product(*wide[:3], num_heads=num_heads, scale=scale).to(query.dtype)
    table = wide[3] if bias is not None else None
    return _args.rounded(apply(_Window, *wide[:3], table, chosen, int(num_heads), list(window), list(moved), scale), query.dtype)


def exchange_attention(
    primary: tuple[Tensor, Tensor, Tensor],
    structural: tuple[Tensor, Tensor, Tensor],
    *,
    num_heads: int,
    window_size: int | Pair | None = None,
    shift: int | Pair = 0,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-attention in both directions at once: each branch is attended to with the other branch's query (M0 Eq. 3).

    Args:
        primary, structural: the branch's own query, key and value, each `Tensor[B, H, W, C]` as in `window_attention`, all
            of one dtype and device.
        num_heads, window_size, shift, bias, scale: as in `window_attention`, shared by both directions.
        backend: as in `window_attention`.

    Returns:
        Z_P = attend(query of structural, key and value of primary), and Z_T, its mirror: `Tensor[B, H, W, C]` each.

    Gradient: with respect to all tensors.

    Raises:
        TypeError: as `window_attention`; a branch that is no triple.
        ValueError: as `window_attention`; branches of different shapes.
    """
    op = "exchange_attention"
    for name, branch in (("primary", primary), ("structural", structural)):
        if not isinstance(branch, (tuple, list)) or len(branch) != 3:
            raise TypeError(f"{op}: {name} must be a triple (query, key, value), got {_args.describe(branch)[:80]}")
    names = [f"{part} of {branch}" for branch in ("primary", "structural") for part in ("query", "key", "value")]
    maps = [*primary, *structural]
    windowed = window_size is not None
    _check_maps(op, (names[3], *names[1:3]), (maps[3], *maps[1:3]), windowed)
    _check_maps(op, (names[0], *names[4:]), (maps[0], *maps[4:]), windowed)
    _args.same(op, names[0], maps[0].shape, names[3], maps[3].shape, "shape")
    window, moved, scale = _checked_options(op, maps[0].shape[3], num_heads, window_size, shift, bias, scale)
    if bias is not None:
        names, maps = [*names, "bias"], [*maps, bias]
    maps = _args.align(op, names, maps)
    dtype, chosen = maps[0].dtype, EXCHANGE_OP.resolve(maps, backend)
    if chosen == "reference":
        options = {"num_heads": num_heads, "window_size": window, "shift": moved, "bias": maps[6] if bias is not None else None}
        return reference.exchange_attention((maps[0], maps[1], maps[2]), (maps[3], maps[4], maps[5]), **options, scale=scale)
    wide = _args.widen(chosen, *maps)
    if window is None:
        pairs = ((wide[3], *wide[1:3]), (wide[0], *wide[4:6]))
        results = tuple(reference.scaled_dot_product(*pair, num_heads=num_heads, scale=scale) for pair in pairs)
    else:
        table = wide[6] if bias is not None else None
        results = apply(_Exchange, *wide[:6], table, chosen, int(num_heads), list(window), list(moved), scale)
    return _args.rounded(results[0], dtype), _args.rounded(results[1], dtype)
