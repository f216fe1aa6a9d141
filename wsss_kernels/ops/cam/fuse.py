"""Fusion of class activation maps of several scales: the public function and its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference
from .api import normalized

MAX_CUDA_MAPS = 32


def _cuda_limit(*tensors: Tensor) -> str | None:
    maps = sum(t.dim() == 4 for t in tensors)
    return None if maps <= MAX_CUDA_MAPS else f"its kernels take at most {MAX_CUDA_MAPS} maps, got {maps}"


FUSE_OP = Operator("fuse_cams", backends=(Backend("cuda", can_use=_cuda_limit), Backend("cpu")))

_fwd = FUSE_OP.raw_op(
    "fuse_cams_fwd(Tensor[] maps, float[] weights, Tensor? present, int height, int width) -> Tensor",
    lambda maps, weights, present, height, width: maps[0].new_empty(*maps[0].shape[:2], height, width),
)
_bwd = FUSE_OP.raw_op(
    "fuse_cams_bwd(Tensor grad, float weight, Tensor? present, int height, int width) -> Tensor",
    lambda grad, weight, present, height, width: grad.new_empty(*grad.shape[:2], height, width),
)


class _ResizedSum(torch.autograd.Function):
    """Σ weight · present · resized map."""

    @staticmethod
    def forward(ctx, backend, weights, size, present, *maps):
        ctx.save_for_backward(present, *(maps if present is not None and present.requires_grad else ()))
        ctx.backend, ctx.weights, ctx.sizes = backend, weights, [m.shape[-2:] for m in maps]
        return _fwd[backend](list(maps), weights, present, *size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        raw, (present, *maps) = _bwd[ctx.backend], ctx.saved_tensors
        wanted = zip(ctx.needs_input_grad[4:], ctx.weights, ctx.sizes, strict=True)
        to_maps = [raw(grad, weight, present, *size) if need else None for need, weight, size in wanted]
        # without `present`, which may be 0
        parts = [(raw(grad, weight, None, *m.shape[-2:]) * m).sum((-2, -1)) for weight, m in zip(ctx.weights, maps, strict=False)]
        return None, None, None, sum(parts) if parts else None, *to_maps


def _checked(cams: Sequence[Tensor], weights: Sequence[float], size: Sequence[int], mode: str) -> tuple[list[float], list[int]]:
    op = "fuse_cams"
    if not isinstance(cams, (list, tuple)) or not cams:
        raise TypeError(f"{op}: cams must be a non-empty list of tensors, got {_args.describe(cams)[:80]}")
    for i, cam in enumerate(cams):
        _args.tensor(op, f"cams[{i}]", cam, "B×K×h×w", spatial=2)
        _args.same(op, "cams[0]", cams[0].shape[:2], f"cams[{i}]", cam.shape[:2], "batch size and number of classes")
    if not isinstance(weights, (list, tuple)) or len(weights) != len(cams):
        raise ValueError(f"{op}: weights must be a list of one number per map, got {_args.describe(weights)[:80]} for {len(cams)} maps")
    values = [_args.number(op, f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    if min(values) < 0:
        raise ValueError(f"{op}: weights must not be negative, got {values}")
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise TypeError(f"{op}: size must be a pair of ints, got {_args.describe(size)[:80]}")
    _args.choice(op, "mode", mode, ("normalize_then_sum", "sum_then_normalize"))
    return values, [_args.integer(op, "height and width of size", n, 1) for n in size]


def _checked_present(present: Tensor | None, cam: Tensor) -> None:
    if present is None:
        return
    _args.tensor("fuse_cams", "present", present, "B×K", kind="any")
    _args.same("fuse_cams", "cams[0]", cam.shape[:2], "present", present.shape, "batch size and number of classes")


def fuse_cams(
    cams: Sequence[Tensor],
    weights: Sequence[float],
    size: tuple[int, int],
    *,
    present: Tensor | None = None,
    mode: str = "normalize_then_sum",
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of class activation maps of several scales, at one size (M0 Eq. 10).

    `"normalize_then_sum"` (the released code): every map is rectified and stretched to [0, 1] as by `normalize_cam`, times
    `present`, resized, and added with its weight. `"sum_then_normalize"` (Eq. 10 as printed): every map is rectified,
    resized and added with its weight; the sum is stretched to [0, 1], times `present`.

    Args:
        cams: list of `Tensor[B, K, h_i, w_i]`, any floating type and range, one dtype and device.
        weights: one finite number ≥ 0 per map.
        size: (height, width) of the result; the maps are resized bilinearly with `align_corners=True`.
        present: `Tensor[B, K]`, which classes an image has: any dtype; a floating one must have the dtype of the maps.
        mode: `"normalize_then_sum"` or `"sum_then_normalize"`.
        backend: `"cuda"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[B, K, height, width]` in the dtype of the maps, computed in float32 or better.

    Gradient: with respect to the maps and a floating `present`; through minimum and maximum as in `normalize_cam`.

    Raises:
        TypeError: not a list of tensors, integer maps, mixed dtypes or devices, a size that is no pair of ints.
        ValueError: wrong rank, an empty map, batch or classes that differ, a negative weight, a size below 1.
    """
    values, shape = _checked(cams, weights, size, mode)
    _checked_present(present, cams[0])
    names = [f"cams[{i}]" for i in range(len(cams))]
    given = list(cams) if present is None else [*cams, present]
    tensors = _args.align("fuse_cams", [*names, "present"][: len(given)], given)
    chosen = FUSE_OP.resolve(tensors, backend)
    maps, dtype = tensors[: len(cams)], tensors[0].dtype
    gate = tensors[-1] if present is not None else None
    if chosen == "reference":
        return reference.fuse_cams(maps, values, shape, present=gate, mode=mode)
    wide = _args.widen(chosen, *maps)
    gate = None if gate is None else _args.rounded(gate, wide[0].dtype)
    if mode == "normalize_then_sum":
        result = apply(_ResizedSum, chosen, values, shape, gate, *[normalized(m, chosen) for m in wide])
    else:
        result = normalized(apply(_ResizedSum, chosen, values, shape, None, *[m.relu() for m in wide]), chosen)
        result = result if gate is None else result * gate[:, :, None, None]
    return _args.rounded(result, dtype)
