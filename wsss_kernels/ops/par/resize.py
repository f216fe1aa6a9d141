"""Bilinear resizing with a gradient that has the same bits on every repeat; PyTorch adds up that of a GPU in any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._dispatch import apply
from ..._once import once_differentiable
from . import reference


def _weights(given: int, wanted: int, device: torch.device) -> Tensor:
    """float64[wanted, given]: a row per result, its two neighbours' shares, corners on corners."""
    step = (given - 1) / (wanted - 1) if wanted > 1 else 0.0
    place = torch.arange(wanted, dtype=torch.float64, device=device) * step
    return (1 - (place[:, None] - torch.arange(given, device=device)).abs()).clamp_min(0)


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, size):
        ctx.given = x.shape[-2:]
        return torch.ops.aten.upsample_bilinear2d(x, size, True)  # F.interpolate would ask for the deterministic switch

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        down, across = (_weights(n, m, grad.device) for n, m in zip(ctx.given, grad.shape[-2:], strict=True))
        return (down.mT @ grad.double() @ across).to(grad.dtype), None  # float64: TF32 may be allowed for other products


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return reference.resized(x, size, lambda x, size: apply(_Bilinear, x, size))
