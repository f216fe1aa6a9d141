"""Normalisation of class activation maps: the public function and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

NORMALIZE_OP = Operator("normalize_cam", backends=(Backend("cuda"), Backend("cpu")))

_normalize_fwd = NORMALIZE_OP.raw_op("normalize_cam_fwd(Tensor cam, float eps) -> Tensor", lambda cam, eps: cam.new_empty(cam.shape))
_normalize_bwd = NORMALIZE_OP.raw_op(
    "normalize_cam_bwd(Tensor grad, Tensor cam, float eps) -> Tensor", lambda grad, cam, eps: cam.new_empty(cam.shape)
)


class _NormalizeCam(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cam, backend, eps):
        ctx.save_for_backward(cam)
        ctx.backend, ctx.eps = backend, eps
        return _normalize_fwd[backend](cam, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (cam,) = ctx.saved_tensors
        return _normalize_bwd[ctx.backend](grad, cam, ctx.eps), None, None


def normalized(cam: Tensor, backend: str, eps: float = 1e-7) -> Tensor:
    """`normalize_cam` of checked float32 or float64 maps by a kernel."""
    return apply(_NormalizeCam, cam, backend, eps)


def normalize_cam(cam: Tensor, *, eps: float = 1e-7, backend: str | None = None) -> Tensor:
    """Rectifies class activation maps and stretches each to [0, 1]: (x − min) / max(max − min, eps) of x = relu(cam).

    Args:
        cam: `Tensor[…, h, w]`, any floating type, any range. A NaN makes its whole map NaN.
        eps: least distance of maximum and minimum, > 0. A constant map gives zeros.
        backend: `"cuda"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[…, h, w]` in the dtype of `cam` (under autocast in the autocast dtype), computed in float32 or better.

    Gradient: with respect to `cam`, also through minimum and maximum; of several pixels that share one of them the first
    (row by row) gets its gradient. It is 0 where `cam` ≤ 0, in a constant map, and through max − min at or below `eps`.

    Raises:
        TypeError: `cam` is not a floating-point tensor, `eps` is not a number.
        ValueError: fewer than two dimensions, an empty map, an `eps` that is not positive and finite.
    """
    _args.tensor("normalize_cam", "cam", cam, "…×h×w", spatial=2)
    eps = _args.number("normalize_cam", "eps", eps, positive=True)
    (cam,) = _args.align("normalize_cam", ("cam",), (cam,))
    chosen = NORMALIZE_OP.resolve((cam,), backend)
    if chosen == "reference":
        return reference.normalize_cam(cam, eps=eps)
    (wide,) = _args.widen(chosen, cam)
    return _args.rounded(normalized(wide, chosen, eps), cam.dtype)
