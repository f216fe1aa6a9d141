"""Affinity loss between the cells of a feature map: the public function and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

AFFINITY_LOSS_OP = Operator("affinity_loss", backends=(Backend("triton"), Backend("cpu")))

_TRITON = f"{__package__}.triton_impl"
_fwd = AFFINITY_LOSS_OP.raw_op(
    "affinity_loss_fwd(Tensor feature, Tensor label, str kind, int radius, int ignore_index, bool differentiate) -> (Tensor, Tensor)",
    lambda feature, *options: (
        feature.new_empty((), dtype=_args.accumulator(feature.dtype)),
        feature.new_empty(feature.shape if options[-1] else (0,), dtype=_args.accumulator(feature.dtype)),
    ),
    triton=_TRITON,
)


class _AffinityLoss(torch.autograd.Function):
    """The forward pass makes the gradient too, from the same tiles: a pass of its own would make them again."""

    @staticmethod
    def forward(ctx, feature, label, backend, *options):
        loss, gradient = _fwd[backend](feature, label, *options)
        ctx.save_for_backward(gradient, feature)  # the feature for a refusal of second derivatives
        ctx.options = len(options)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None, *[None] * ctx.options


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

    Gradient: with respect to `feature`, computed with the loss. Memory beyond inputs and gradients is O(B·N·d), N = h·w, forward and backward.

    Raises:
        TypeError: not tensors, an integer feature, a label that is not an integer tensor.
        ValueError: wrong rank, sizes that differ, an empty map, no feature, a negative radius, an unknown kind.
    """
    op = "affinity_loss"
    _args.tensor(op, "feature", feature, "B×d×h×w", spatial=2)
    _args.tensor(op, "label", label, "B×h×w", kind="label", spatial=2)
    sizes = (feature.shape[0], *feature.shape[2:])
    _args.same(op, "feature", tuple(sizes), "label", label.shape, "batch, height and width")
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
    differentiate = torch.is_grad_enabled() and feature.requires_grad
    return apply(_AffinityLoss, feature, label.long(), chosen, kind, reach, ignore_index, differentiate)
