"""Contrastive losses in plain PyTorch: the truth that every kernel is compared with.

Sources: M3 Eq. 1 (CLDF) for the supervised loss; M4 Eq. 3.1–3.5 (UniCL) and M1 Eq. 6–8 for `info_nce`. M3 prints the sum over
anchors, M4 (3.1) the sum of both directions: `reduction="sum"` here is half of the latter.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def tamed(x: Tensor, dim: int = -1) -> Tensor:
    """Vectors divided by the power of two next to their largest entry, which loses nothing: their squares stay in the range."""
    if x.shape[dim] == 0 or x.numel() == 0:
        return x
    exponent = torch.frexp(x.detach().abs().amax(dim, keepdim=True)).exponent.to(x.dtype)
    half = (exponent / 2).floor()  # in two steps: the power itself may be out of the range
    return x * torch.exp2(-half) * torch.exp2(half - exponent)


def unit(x: Tensor) -> Tensor:
    """Rows divided by their norms; zero rows stay zero, with zero gradient, and NaN is not hidden."""
    x = tamed(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0, x / torch.where(norm == 0, 1, norm))


def supervised_contrastive_loss(
    z: Tensor, label: Tensor, temperature: float | Tensor = 0.1, *, reduction: str = "mean", ignore_index: int = -1
) -> Tensor:
    """See `wsss_kernels.supervised_contrastive_loss`."""
    z, label = unit(wide(z)), label.long()  # a number that uint8 cannot hold would wrap around in the comparison
    logits = z @ z.T / temperature
    others = (label != ignore_index) & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (label[:, None] == label) & others & (label != ignore_index)[:, None]
    count = positive.sum(dim=1)
    lone = ~others.any(dim=1, keepdim=True)
    logits = logits.masked_fill(~(others | lone), -torch.inf)
    log_probability = logits.log_softmax(dim=1) if len(z) else logits
    anchor = -torch.where(positive, log_probability, 0).sum(dim=1) / count.clamp_min(1)
    return anchor.sum() / (count > 0).sum().clamp_min(1) if reduction == "mean" else anchor.sum()


def info_nce(x: Tensor, y: Tensor, temperature: float | Tensor, *, label: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """See `wsss_kernels.info_nce`."""
    x, y = unit(wide(x)), unit(wide(y))
    logits = x @ y.T / temperature
    if len(x) == 0:
        return logits.sum()
    label = torch.arange(len(x), device=x.device) if label is None else label
    positive = (label[:, None] == label).to(x.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    loss = -((target * logits.log_softmax(dim=1)).sum() + (target * logits.log_softmax(dim=0)).sum()) / 2
    return loss / len(x) if reduction == "mean" else loss
