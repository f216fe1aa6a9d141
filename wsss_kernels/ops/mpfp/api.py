"""Sign-preserving pyramid pooling: the public function, its gradient, and the module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

MAX_CUDA_SCALES = 64


def _cuda_limit(feature: Tensor, weight_pos: Tensor, *_: Tensor) -> str | None:
    scales = weight_pos.shape[0] + 1
    return None if scales <= MAX_CUDA_SCALES else f"its kernels take at most {MAX_CUDA_SCALES} scales, got {scales}"


MPFP_OP = Operator("mpfp", backends=(Backend("cuda", can_use=_cuda_limit), Backend("cpu")))

_fwd = MPFP_OP.raw_op(
    "mpfp_fwd(Tensor feature, Tensor weight_pos, Tensor weight_neg, int[] scales) -> (Tensor, Tensor)",
    lambda feature, weight_pos, weight_neg, scales: (feature.new_empty(feature.shape[:2]), feature.new_empty(feature.shape)),
)
_bwd = MPFP_OP.raw_op(
    "mpfp_bwd(Tensor feature, Tensor weight_pos, Tensor weight_neg, Tensor grad_logit, Tensor grad_fused, int[] scales) -> "
    "(Tensor, Tensor, Tensor)",
    lambda feature, weight_pos, weight_neg, *rest: tuple(t.new_empty(t.shape) for t in (feature, weight_pos, weight_neg)),
)


class _Mpfp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feature, weight_pos, weight_neg, backend, scales):
        ctx.save_for_backward(feature, weight_pos, weight_neg)
        ctx.backend, ctx.scales = backend, scales
        return _fwd[backend](feature, weight_pos, weight_neg, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logit, grad_fused):
        return *_bwd[ctx.backend](*ctx.saved_tensors, grad_logit, grad_fused, ctx.scales), None, None


def checked_scales(op: str, scales: Sequence[int]) -> list[int]:
    if isinstance(scales, (int, str)) or not hasattr(scales, "__iter__"):
        raise TypeError(f"{op}: scales must be a sequence of ints, got {_args.describe(scales)}")
    values = [_args.integer(op, "every scale", scale, 1) for scale in scales]
    if not values:
        raise ValueError(f"{op}: scales must hold at least one scale, got an empty sequence")
    return values


def _checked(feature: Tensor, weight_pos: Tensor, weight_neg: Tensor, scales: Sequence[int]) -> list[int]:
    _args.tensor("mpfp", "feature", feature, "B×C×h×w", spatial=2)
    if feature.shape[1] == 0:
        raise ValueError(f"mpfp: feature must have at least one channel, got {_args.describe(feature)}")
    values = checked_scales("mpfp", scales)
    wanted = (len(values) - 1, 2, 2 * feature.shape[1], 3, 3)
    for name, weight in (("weight_pos", weight_pos), ("weight_neg", weight_neg)):
        _args.tensor("mpfp", name, weight, "(len(scales)−1)×2×2C×3×3")
        if tuple(weight.shape) != wanted:
            raise ValueError(f"mpfp: {name} must be of shape {'×'.join(map(str, wanted))}, got {_args.describe(weight)}")
    return values


def mpfp(
    feature: Tensor, weight_pos: Tensor, weight_neg: Tensor, *, scales: Sequence[int] = (2, 4, 8, 16), backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Multi-scale pooling that keeps the sign of its input: image logits from a map, and the fused pyramid (M2 Eq. 5–9).

    P_τ is the mean over τ×τ bins, interpolated back to h×w. From coarse to fine, a being what is fused so far and b the
    next level, `a ← ½(relu(a)·Pos¹ + relu(b)·Pos²) − ½(relu(−a)·Neg¹ + relu(−b)·Neg²)` with the gates
    `Pos = σ(conv3×3([relu(a), relu(b)]))`, `Neg = σ(conv3×3([relu(−a), relu(−b)]))`. The logit is the mean over the pixels
    of `relu(a)·relu(F) − relu(−a)·relu(−F)`.

    Args:
        feature: `Tensor[B, C, h, w]`, any floating type, any range, C ≥ 1.
        weight_pos, weight_neg: `Tensor[len(scales) − 1, 2, 2C, 3, 3]`, same dtype and device: per fusion the convolution
            without bias, zero padding 1, inputs a before b.
        scales: τ from coarse to fine, each ≥ 1; they may exceed h and w.
        backend: `"cuda"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        The logit, `Tensor[B, C]`, and the fused map, `Tensor[B, C, h, w]`, in the dtype of `feature`; float32 under
        autocast.

    Gradient: with respect to `feature`, `weight_pos` and `weight_neg`; 0 through every relu at 0.

    Raises:
        TypeError: not tensors, integer tensors, mixed dtypes or devices, scales that are not ints.
        ValueError: wrong rank or shape, no channel, an empty map, a scale below 1, no scale.
    """
    values = _checked(feature, weight_pos, weight_neg, scales)
    names = ("feature", "weight_pos", "weight_neg")
    feature, weight_pos, weight_neg = _args.align("mpfp", names, (feature, weight_pos, weight_neg), autocast="fp32")
    chosen = MPFP_OP.resolve((feature, weight_pos, weight_neg), backend)
    if chosen == "reference":
        return reference.mpfp(feature, weight_pos, weight_neg, scales=values)
    logit, fused = apply(_Mpfp, *_args.widen(chosen, feature, weight_pos, weight_neg), chosen, values)
    return _args.rounded(logit, feature.dtype), _args.rounded(fused, feature.dtype)


class MPFP(nn.Module):
    """The operator with its convolutions, initialised as PyTorch initialises a convolution.

    Args:
        num_classes: C.
        scales: as in `wsss_kernels.mpfp`.
    """

    def __init__(self, num_classes: int, scales: Sequence[int] = (2, 4, 8, 16)):
        super().__init__()
        _args.integer("MPFP", "num_classes", num_classes, 1)
        self.num_classes, self.scales = num_classes, tuple(checked_scales("MPFP", scales))
        self.weight_pos = nn.Parameter(torch.empty(len(self.scales) - 1, 2, 2 * num_classes, 3, 3))
        self.weight_neg = nn.Parameter(torch.empty_like(self.weight_pos))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (*self.weight_pos, *self.weight_neg):
            nn.init.kaiming_uniform_(weight, a=5**0.5)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """`Tensor[B, C, h, w]` → logit `Tensor[B, C]`, fused map `Tensor[B, C, h, w]`."""
        return mpfp(feature, self.weight_pos, self.weight_neg, scales=self.scales)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, scales={self.scales}"
