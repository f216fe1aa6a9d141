"""Affinity loss between the cells of a feature map: the public function and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import _args
from ..._dispatch import Backend, Operator
from . import reference

AFFINITY_LOSS_OP = Operator("affinity_loss", backends=(Backend("triton"), Backend("cpu")))

_TRITON = f"{__package__}.triton_impl"
_OPTIONS = "str kind, int radius, int ignore_index"
_fwd = AFFINITY_LOSS_OP.raw_op(
    f"affinity_loss_fwd(Tensor feature, Tensor label, {_OPTIONS}) -> (Tensor, Tensor)",
    lambda feature, *_: (feature.new_empty((), dtype=_args.accumulator(feature.dtype)), feature.new_empty((2,), dtype=torch.float64)),
    triton=_TRITON,
)
_bwd = AFFINITY_LOSS_OP.raw_op(
    f"affinity_loss_bwd(Tensor feature, Tensor label, Tensor counts, Tensor grad, {_OPTIONS}) -> Tensor",
    lambda feature, *_: feature.new_empty(feature.shape),
    triton=_TRITON,
)


class _AffinityLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feature, label, backend, *options):
        loss, counts = _fwd[backend](feature, label, *options)
        ctx.save_for_backward(feature, label, counts)
        ctx.backend, ctx.options = backend, options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _bwd[ctx.backend](*ctx.saved_tensors, grad, *ctx.options), None, None, *[None] * len(ctx.options)


def affinity_loss(
    feature: Tensor,
    label: Tensor,
    *,
    kind: str = "balanced",
    radius: int | None = None,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:
    """Pulls cells of one label together and pushes others apart: loss on A = σ(FᵀF), which is never stored (M4 Eq. 3.20–3.21).

    A pair of cells is positive if the labels agree, void if one is `ignore_index` or the cells are farther apart than
    `radius` (Chebyshev). Ordered pairs of one image, a cell with itself included; sums and counts over the whole batch.

    Args:
        feature: `Tensor[B, d, h, w]`, any floating type (computed in float32 under autocast).
        label: `Tensor[B, h, w]`, int64, int32 or uint8.
        kind: `"balanced"`: `½ Σ_pos(1 − A)/(n_pos + 1) + ½ Σ_neg A/(n_neg + 1)`; `"bce"`: mean binary cross-entropy.
        radius: largest distance of a pair in cells, or `None`.
        ignore_index: cells of this label take no part.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        0-d tensor in the dtype of `feature`, float32 for half-precision input. 0 if there is no pair.

    Gradient: with respect to `feature`. Memory beyond inputs and gradients is O(B·N·d), N = h·w, forward and backward.

    Raises:
        TypeError: not tensors, an integer feature, a label that is not an integer tensor.
        ValueError: wrong rank, sizes that differ, an empty map, no feature, a negative radius, an unknown kind.
    """
    op = "affinity_loss"
    _args.tensor(op, "feature", feature, "B×d×h×w", spatial=2)
    _args.tensor(op, "label", label, "B×h×w", kind="label", spatial=2)
    sizes = (feature.shape[0], *feature.shape[2:])
    _args.same(op, "feature", tuple(sizes), "label", tuple(label.shape), "batch, height and width")
    if feature.shape[1] == 0:
        raise ValueError(f"{op}: feature must have at least one channel, got {_args.describe(feature)}")
    _args.choice(op, "kind", kind, ("balanced", "bce"))
    reach = -1 if radius is None else _args.integer(op, "radius", radius, 0)
    ignore_index = _args.integer(op, "ignore_index", ignore_index, -(2**63))
    feature, label = _args.align(op, ("feature", "label"), (feature, label), autocast="fp32")
    chosen = AFFINITY_LOSS_OP.resolve((feature, label), backend)
    if chosen == "reference":
        return reference.affinity_loss(feature, label, kind=kind, radius=radius, ignore_index=ignore_index)
    (feature,) = _args.widen(chosen, feature)
    return _AffinityLoss.apply(feature, label.long(), chosen, kind, reach, ignore_index)
