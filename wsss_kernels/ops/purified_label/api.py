"""The loss of purified labels: the public function and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _args
from ..._dispatch import Backend, Operator, apply
from ..._once import once_differentiable
from . import reference

PURIFIED_OP = Operator("purified_label_loss", backends=(Backend("cuda"), Backend("cpu")))


def _fake_fwd(logit, label, ignore_index):
    wide = torch.promote_types(logit.dtype, torch.float32)
    return logit.new_empty((), dtype=wide), logit.new_empty(label.shape, dtype=wide)


_fwd = PURIFIED_OP.raw_op("purified_label_fwd(Tensor logit, Tensor label, int ignore_index) -> (Tensor, Tensor)", _fake_fwd)
_bwd = PURIFIED_OP.raw_op(
    "purified_label_bwd(Tensor logit, Tensor label, Tensor weight, Tensor grad, int ignore_index) -> Tensor",
    lambda logit, *rest: logit.new_empty(logit.shape),
)


class _PurifiedLabel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logit, label, backend, ignore_index):
        loss, weight = _fwd[backend](logit, label, ignore_index)
        ctx.save_for_backward(logit, label, weight)
        ctx.backend, ctx.ignore_index = backend, ignore_index
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _bwd[ctx.backend](*ctx.saved_tensors, grad, ctx.ignore_index), None, None, None


def purified_label_loss(logit: Tensor, label: Tensor, *, ignore_index: int = 255, backend: str | None = None) -> Tensor:
    """Cross-entropy whose pixels count by how easy and how confident they are, for noisy pseudo-labels (M2 Eq. 10–11).

    Per image the mean over the valid pixels of `l · w_loss · w_conf`: l is the cross-entropy, w_loss the softmax of −l over
    the image's valid pixels divided by its mean, w_conf the largest minus the smallest class probability. An image whose
    valid pixels have one class has both weights 1; one without valid pixels contributes 0. Then the mean over all images.

    Args:
        logit: `Tensor[B, C, H, W]`, any floating type, C ≥ 1 (computed in float32, under autocast too).
        label: `Tensor[B, H, W]`, int64, int32 or uint8: classes 0 … C − 1, or `ignore_index`.
        ignore_index: label of the pixels that do not count.
        backend: `"cuda"`, `"cpu"`, `"reference"`, or `None` to choose.

    Returns:
        `Tensor[]`, float32 (float64 for float64 input).

    Gradient: with respect to `logit`, through l; the weights are constants.

    Raises:
        TypeError: not tensors, integer logits, floating labels, different devices.
        ValueError: wrong rank, an empty map, no class, sizes that differ, an ignore_index of 2³¹ or more.
        RuntimeError: on the CPU, a label that is neither a class nor `ignore_index` (not checked before the kernel starts).
            The CUDA kernels, which must not make the host wait, answer with a loss of NaN instead.
    """
    op = "purified_label_loss"
    _args.tensor(op, "logit", logit, "B×C×H×W", spatial=2)
    _args.tensor(op, "label", label, "B×H×W", kind="label", spatial=2)
    if logit.shape[1] == 0:
        raise ValueError(f"{op}: logit must have at least one class, got {_args.describe(logit)}")
    _args.same(op, "logit", (logit.shape[0], *logit.shape[2:]), "label", label.shape, "batch size, height and width")
    ignore_index = _args.integer(op, "ignore_index", ignore_index, -(2**63))
    logit, label = _args.align(op, ("logit", "label"), (logit, label), autocast="fp32")
    chosen = PURIFIED_OP.resolve((logit, label), backend)
    if chosen == "reference":
        return reference.purified_label_loss(logit, label, ignore_index=ignore_index)
    (logit,) = _args.widen(chosen, logit)
    return apply(_PurifiedLabel, logit, label.long(), chosen, ignore_index)
