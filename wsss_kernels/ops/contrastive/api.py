"""Contrastive losses that never store the matrix of pairs: the public functions and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

SUPCON_OP = Operator("supervised_contrastive_loss", backends=(Backend("triton"), Backend("cpu")))
INFO_NCE_OP = Operator("info_nce", backends=(Backend("triton"), Backend("cpu")))

_TRITON = f"{__package__}.triton_impl"
_OPTIONS = "bool mean, int ignore_index"


def _losses(x: Tensor, statistics: int) -> tuple[Tensor, Tensor]:
    kind = _args.accumulator(x.dtype)
    return x.new_empty((), dtype=kind), x.new_empty((statistics, x.shape[0]), dtype=kind)


_supcon_fwd = SUPCON_OP.raw_op(
    f"supcon_fwd(Tensor z, Tensor label, Tensor temperature, {_OPTIONS}) -> (Tensor, Tensor)",
    lambda z, *_: _losses(z, 2),
    triton=_TRITON,
    triton_fake=lambda z, *_: _losses(z, 3),
)
_supcon_bwd = SUPCON_OP.raw_op(
    f"supcon_bwd(Tensor z, Tensor label, Tensor temperature, Tensor stats, Tensor grad, {_OPTIONS}) -> (Tensor, Tensor)",
    lambda z, label, temperature, *_: (z.new_empty(z.shape), temperature.new_empty(())),
    triton=_TRITON,
)
_infonce_fwd = INFO_NCE_OP.raw_op(
    "infonce_fwd(Tensor x, Tensor y, Tensor label, Tensor temperature, bool mean) -> (Tensor, Tensor)",
    lambda x, *_: _losses(x, 4),
    triton=_TRITON,
    triton_fake=lambda x, *_: _losses(x, 5),
)
_infonce_bwd = INFO_NCE_OP.raw_op(
    "infonce_bwd(Tensor x, Tensor y, Tensor label, Tensor temperature, Tensor stats, Tensor grad, bool mean) -> (Tensor, Tensor, Tensor)",
    lambda x, y, label, temperature, *_: (x.new_empty(x.shape), y.new_empty(y.shape), temperature.new_empty(())),
    triton=_TRITON,
)


class _SupCon(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, label, temperature, backend, mean, ignore_index):
        loss, stats = _supcon_fwd[backend](z, label, temperature, mean, ignore_index)
        ctx.save_for_backward(z, label, temperature, stats)
        ctx.backend, ctx.options = backend, (mean, ignore_index)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, label, temperature, stats = ctx.saved_tensors
        dz, dt = _supcon_bwd[ctx.backend](z, label, temperature, stats, grad, *ctx.options)
        return dz, None, dt, None, None, None


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, label, temperature, backend, mean):
        loss, stats = _infonce_fwd[backend](x, y, label, temperature, mean)
        ctx.save_for_backward(x, y, label, temperature, stats)
        ctx.backend, ctx.mean = backend, mean
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, label, temperature, stats = ctx.saved_tensors
        dx, dy, dt = _infonce_bwd[ctx.backend](x, y, label, temperature, stats, grad, ctx.mean)
        return dx, dy, None, dt, None, None


def _checked(op: str, name: str, x: Tensor, label: Tensor | None, reduction: str) -> None:
    _args.tensor(op, name, x, "N×d")
    if x.shape[1] == 0:
        raise ValueError(f"{op}: {name} must have at least one feature, got {_args.describe(x)}")
    if label is not None:
        _args.tensor(op, "label", label, "N", kind="label")
        _args.same(op, name, x.shape[0], "label", label.shape[0], "length")
    _args.choice(op, "reduction", reduction, ("mean", "sum"))


def supervised_contrastive_loss(
    z: Tensor,
    label: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
    ignore_index: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Supervised contrastive loss over all pairs of a set of embeddings (M3 Eq. 1), without storing a matrix of pairs.

    Anchor i adds `−1/|P(i)| Σ_{p∈P(i)} log( exp(cos(z_i, z_p)/τ) / Σ_{a≠i} exp(cos(z_i, z_a)/τ) )`, P(i) the other embeddings
    of its label. An anchor without positive adds 0.

    Args:
        z: `Tensor[N, d]`, any floating type; normalised inside (zero vectors stay zero, with zero gradient).
        label: `Tensor[N]`, int64, int32 or uint8.
        temperature: a positive number, or a 0-d tensor of the dtype of `z` (its value is not checked).
        reduction: `"sum"` over anchors as M3 prints it, or `"mean"` over the anchors that have a positive.
        ignore_index: embeddings of this label take no part.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        0-d tensor in the dtype of `z`, float32 for half-precision input. 0 if no anchor has a positive.

    Gradient: with respect to `z` and `temperature`. Memory beyond inputs and gradients is O(N·d), forward and backward.

    Raises:
        TypeError: not tensors, a label that is not an integer tensor, a temperature of another dtype or device.
        ValueError: wrong rank, lengths that differ, no feature, a temperature that is not positive.
    """
    op = "supervised_contrastive_loss"
    _checked(op, "z", z, label, reduction)
    ignore_index = _args.integer(op, "ignore_index", ignore_index, -(2**63))
    tau = _args.scalar(op, "temperature", temperature, z, positive=True)
    z, label = _args.align(op, ("z", "label"), (z, label))
    chosen = SUPCON_OP.resolve((z, label), backend)
    if chosen == "reference":
        return reference.supervised_contrastive_loss(z, label, temperature, reduction=reduction, ignore_index=ignore_index)
    (z,) = _args.widen(chosen, z)
    return apply(_SupCon, z, label.long(), tau, chosen, reduction == "mean", ignore_index)


def info_nce(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    label: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Symmetric InfoNCE between two sets of embeddings (M1 Eq. 6–8; with `label` M4 Eq. 3.2–3.3), no matrix of pairs stored.

    `½ Σ_i −1/|P(i)| Σ_{k∈P(i)} log softmax_k(cos(x_i, y_k)/τ)` plus the same with x and y exchanged; P(i) = {i}, or all k of
    the label of i. M4 (3.1) as printed is twice `reduction="sum"`.

    Args:
        x, y: `Tensor[N, d]`, one floating type; normalised inside (zero vectors stay zero, with zero gradient).
        temperature: a positive number, or a 0-d tensor of the dtype of `x` (its value is not checked).
        label: `Tensor[N]`, int64, int32 or uint8, of the pairs (x_i, y_i); `None`: every pair has its own.
        reduction: `"mean"` or `"sum"` over the N anchors of a direction.
        backend: `"triton"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        0-d tensor in the dtype of `x`, float32 for half-precision input. 0 if N = 0.

    Gradient: with respect to `x`, `y` and `temperature`. Memory beyond inputs and gradients is O(N·d), forward and backward.

    Raises:
        TypeError: not tensors, mixed dtypes or devices, a label that is not an integer tensor.
        ValueError: wrong rank, shapes that differ, no feature, a temperature that is not positive.
    """
    _checked("info_nce", "x", x, label, reduction)
    _args.tensor("info_nce", "y", y, "N×d")
    _args.same("info_nce", "x", x.shape, "y", y.shape, "shape")
    tau = _args.scalar("info_nce", "temperature", temperature, x, positive=True)
    aligned = _args.align("info_nce", ["x", "y"] if label is None else ["x", "y", "label"], [x, y] if label is None else [x, y, label])
    x, y = aligned[:2]
    chosen = INFO_NCE_OP.resolve(aligned, backend)
    if chosen == "reference":
        return reference.info_nce(x, y, temperature, label=label, reduction=reduction)
    x, y = _args.widen(chosen, x, y)
    groups = torch.arange(x.shape[0], device=x.device) if label is None else label.long()
    return apply(_InfoNCE, x, y, groups, tau, chosen, reduction == "mean")
