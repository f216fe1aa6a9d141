"""The losses as released code computes them: the whole matrix of pairs, masks of its size, a softmax over it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def eager(z, label, temperature=0.1, *, reduction="mean", ignore_index=-1):
    """Supervised contrastive loss as in the code of Khosla et al. that M3 builds on."""
    kept = label != ignore_index
    z, label = F.normalize(z[kept], dim=1), label[kept]
    logits = z @ z.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), dtype=z.dtype, device=z.device)
    positive = (label[:, None] == label).to(z.dtype) * others
    log_probability = logits - torch.log((torch.exp(logits) * others).sum(dim=1, keepdim=True))
    count = positive.sum(dim=1)
    anchor = -(positive * log_probability).sum(dim=1) / count.clamp_min(1)
    return anchor.sum() / (count > 0).sum().clamp_min(1) if reduction == "mean" else anchor.sum()


def info_nce_eager(x, y, temperature, *, label=None, reduction="mean"):
    """CLIP's loss, and with labels UniCL's: two cross-entropies of one matrix."""
    x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    logits = x @ y.T / temperature
    if label is None:
        target = torch.arange(len(x), device=x.device)
    else:
        target = (label[:, None] == label).to(x.dtype)
        target = target / target.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target, reduction=reduction) + F.cross_entropy(logits.T, target, reduction=reduction)) / 2
