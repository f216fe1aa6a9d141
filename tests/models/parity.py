"""Fused against reference kernels inside a model that is being trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import wsss_kernels as wk
from wsss_kernels.testing import assert_matches_truth, map_tensors


def _step(model: nn.Module, loss: Callable[[nn.Module, object], Tensor], batch, dtype: torch.dtype, backend: str | None):
    """The loss, and all gradients as one vector."""
    model = copy.deepcopy(model).to(dtype)
    batch = map_tensors(batch, lambda t: t.to(dtype) if t.is_floating_point() else t)
    with wk.use_backend(backend):
        value = loss(model, batch)
        value.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return value.detach(), torch.cat(gradients)


def assert_steps_agree(model: nn.Module, loss: Callable[[nn.Module, object], Tensor], batches, *, lr: float = 0.05, momentum: float = 0.9):
    """Each step from the same weights: loss and gradients of the fused kernels obey the tolerance rule, in float64 and float32.

    The weights go on with the fused kernels in float64. The model must have no dropout.
    """
    model = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    for number, batch in enumerate(batches):
        single = copy.deepcopy(model).float()
        start = copy.deepcopy(single).double()  # what float32 can hold, so that all start from the same
        truth = _step(start, loss, batch, torch.float64, "reference")
        fused = _step(start, loss, batch, torch.float64, None)
        low = [_step(single, loss, batch, torch.float32, backend) for backend in ("reference", None)]
        for i, what in enumerate(("loss", "gradient")):
            rules = {"gradient": i == 1, "what": f"{what} of step {number}"}
            assert_matches_truth(fused[i], truth[i], None, torch.float64, **rules)
            assert_matches_truth(low[1][i], truth[i], low[0][i], torch.float32, **rules)
        optimizer.zero_grad()
        wide = map_tensors(batch, lambda t: t.double() if t.is_floating_point() else t)
        loss(model, wide).backward()
        optimizer.step()
