"""Similarity of text vectors with the pixels of a map: the public functions and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

SIMILARITY_OP = Operator("text_similarity", backends=(Backend("triton"), Backend("cpu")))
POOL_OP = Operator("text_similarity_pool", backends=(Backend("triton"), Backend("cpu")))

_TRITON = f"{__package__}.triton_impl"


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in tensors)


def _pooled(visual: Tensor, text: Tensor, *rest) -> tuple[Tensor, Tensor]:
    size = (visual.shape[0], text.shape[0])
    return visual.new_empty(size), visual.new_empty(size, dtype=torch.int64)


_fwd = SIMILARITY_OP.raw_op(
    "text_similarity_fwd(Tensor visual, Tensor text, Tensor scale, bool normalize) -> Tensor",
    lambda visual, text, *rest: visual.new_empty(visual.shape[0], text.shape[0], *visual.shape[2:]),
    triton=_TRITON,
)
_bwd = SIMILARITY_OP.raw_op(
    "text_similarity_bwd(Tensor visual, Tensor text, Tensor scale, Tensor grad, bool normalize) -> (Tensor, Tensor, Tensor)",
    lambda visual, text, scale, *rest: _like(visual, text, scale),
    triton=_TRITON,
)
_pool_fwd = POOL_OP.raw_op(
    "text_similarity_pool_fwd(Tensor visual, Tensor text, Tensor scale, bool normalize) -> (Tensor, Tensor)", _pooled, triton=_TRITON
)
_pool_bwd = POOL_OP.raw_op(
    "text_similarity_pool_bwd(Tensor visual, Tensor text, Tensor scale, Tensor index, Tensor grad, bool normalize) -> "
    "(Tensor, Tensor, Tensor)",
    lambda visual, text, scale, *rest: _like(visual, text, scale),
    triton=_TRITON,
)


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, visual, text, scale, backend, normalize):
        ctx.save_for_backward(visual, text, scale)
        ctx.backend, ctx.normalize = backend, normalize
        return _fwd[backend](visual, text, scale, normalize)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_bwd[ctx.backend](*ctx.saved_tensors, grad, ctx.normalize), None, None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, visual, text, scale, backend, normalize):
        result, index = _pool_fwd[backend](visual, text, scale, normalize)
        ctx.save_for_backward(visual, text, scale, index)
        ctx.backend, ctx.normalize = backend, normalize
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_pool_bwd[ctx.backend](*ctx.saved_tensors, grad, ctx.normalize), None, None


def _run(op: Operator, function, plain, visual, text, scale, normalize: bool, backend: str | None) -> Tensor:
    _args.tensor(op.name, "visual", visual, "B×C×h×w", spatial=2)
    _args.tensor(op.name, "text", text, "K×C")
    _args.same(op.name, "visual", visual.shape[1], "text", text.shape[1], "number of channels")
    _args.flag(op.name, "normalize_visual", normalize)
    learned = isinstance(scale, Tensor)
    if learned:
        if scale.dim() != 0 or not scale.is_floating_point():
            error = ValueError if scale.is_floating_point() else TypeError
            raise error(f"{op.name}: scale must be a number or a floating-point tensor without dimensions, got {_args.describe(scale)}")
    else:
        scale = _args.number(op.name, "scale", scale)
    given = (visual, text, scale) if learned else (visual, text)
    tensors = _args.align(op.name, ("visual", "text", "scale")[: len(given)], given)
    chosen = op.resolve(tensors, backend)
    if chosen == "reference":
        return plain(*tensors[:2], tensors[2] if learned else scale, normalize_visual=normalize)
    wide = _args.widen(chosen, *tensors)
    factor = wide[2] if learned else _args.held(scale, wide[0].device, _args.accumulator(wide[0].dtype))
    return _args.rounded(apply(function, *wide[:2], factor, chosen, normalize), tensors[0].dtype)


def text_similarity(
    visual: Tensor, text: Tensor, scale: float | Tensor = 1.0, *, normalize_visual: bool = True, backend: str | None = None
) -> Tensor:
    """Similarity of every pixel's vector with every text vector: `scale · text_k · v_p / |v_p|` (M0 Eq. 6).

    Args:
        visual: `Tensor[B, C, h, w]`, any floating type.
        text: `Tensor[K, C]`, same dtype and device; taken as it is (normalise it before for a cosine).
        scale: a finite number, or a `Tensor[]` without dimensions, which then has a gradient.
        normalize_visual: divide each pixel's vector by its length; zero vectors give 0.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[B, K, h, w]` in the dtype of `visual`, accumulated in float32 or better.

    Gradient: with respect to `visual`, `text` and `scale`; 0 for a zero vector under normalisation.

    Raises:
        TypeError: not tensors, integer tensors, mixed dtypes or devices, a scale that is no number.
        ValueError: wrong rank, an empty map, channels that differ, a scale that is not finite.
    """
    return _run(SIMILARITY_OP, _Similarity, reference.text_similarity, visual, text, scale, normalize_visual, backend)


def text_similarity_pool(
    visual: Tensor, text: Tensor, scale: float | Tensor = 1.0, *, normalize_visual: bool = True, backend: str | None = None
) -> Tensor:
    """The largest value of each map of `text_similarity`, without the maps: a classifier by global maximum pooling (M0 §4).

    Args:
        visual: `Tensor[B, C, h, w]`, any floating type.
        text: `Tensor[K, C]`, same dtype and device.
        scale: as in `text_similarity`; a negative one makes the least similar pixel the maximum.
        normalize_visual: as in `text_similarity`.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[B, K]` in the dtype of `visual`, accumulated in float32 or better.

    Gradient: with respect to `visual`, `text` and `scale`, through the first pixel (row by row) that has the maximum.

    Raises:
        TypeError, ValueError: as `text_similarity`.
    """
    return _run(POOL_OP, _Pool, reference.text_similarity_pool, visual, text, scale, normalize_visual, backend)
