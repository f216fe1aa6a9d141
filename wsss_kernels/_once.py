"""First derivatives only: a second one raises, wherever it is asked for.

PyTorch's `torch.autograd.function.once_differentiable` does not keep that promise: its error hangs on the incoming gradient alone,
so that the gradient with respect to an input, of a loss that is summed as it is, looks like a constant, and a penalty on it is
without effect.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Refusal(torch.autograd.Function):
    """The first `count` tensors as they are; whoever differentiates them with respect to what they were made from is told."""

    @staticmethod
    def forward(ctx, name: str, count: int, *tensors: Tensor):
        ctx.name = name
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"wsss_kernels: second derivatives are not implemented: {ctx.name} is once_differentiable")


class _Saved:
    """The context of a backward pass with its tensors taken out once, as a checkpoint allows."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(backward: Callable) -> Callable:
    """For `autograd.Function.backward`. The inputs on which its gradients depend must be among the saved tensors."""
    name = backward.__qualname__.rpartition(".")[0].lstrip("_")

    @functools.wraps(backward)
    def once(ctx, *grads):
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        if torch.compiler.is_compiling():  # compiled code has a check of its own
            with torch.no_grad():
                return backward(ctx, *grads)
        ctx = _Saved(ctx)
        with torch.no_grad():
            results = backward(ctx, *grads)
        sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        if not sources:
            return results
        results = list(results) if isinstance(results, tuple) else [results]
        places = [i for i, t in enumerate(results) if t is not None]
        refusing = _Refusal.apply(name, len(places), *[results[i] for i in places], *sources)
        for i, t in zip(places, refusing, strict=True):
            results[i] = t
        return tuple(results)

    return once
