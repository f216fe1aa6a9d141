"""Wasserstein distance, uncertainty-aware similarity and its InfoNCE in plain PyTorch: the truth that kernels are compared with.

Source: M1 Eq. 1–8 (DuSSS). The released code squares D_s, divides D_u by the temperature and adds another constant, which makes
every similarity 1, and stacks four N×N×d tensors; the paper's equations are kept here, on centred data (D_2W does not change).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contrastive.reference import unit, wide


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """`Tensor[N, K]`, `Tensor[M, K]` → `Tensor[N, M]`: |x|² + |y|² − 2 x·y after the common mean has been subtracted."""
    if len(x) + len(y):
        centre = torch.cat([x, y]).mean(dim=0).detach()
        x, y = x - centre, y - centre
    return (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T).clamp_min(0)


def wasserstein2(mu_x: Tensor, sigma_x: Tensor, mu_y: Tensor, sigma_y: Tensor) -> Tensor:
    """See `wsss_kernels.wasserstein2`."""
    mu_x, sigma_x, mu_y, sigma_y = map(wide, (mu_x, sigma_x, mu_y, sigma_y))
    return squared_distances(torch.cat([mu_x, sigma_x], dim=1), torch.cat([mu_y, sigma_y], dim=1))


def _similarity(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, a, b, lam) -> Tensor:
    uncertainty = a * wasserstein2(mu_x, sigma_x, mu_y, sigma_y) + b
    x, y = unit(wide(sem_x)), unit(wide(sem_y))
    cosine = x @ y.T
    square = (x.square().sum(dim=1) > 0.5).to(x.dtype)[:, None] + (y.square().sum(dim=1) > 0.5).to(x.dtype) - 2 * cosine
    far = square > 1e-12
    distance = torch.where(far, torch.where(far, square, 1).sqrt(), 1e-6)
    return 1 - (1 - cosine) * torch.exp(-lam * uncertainty / distance)


def uncertainty_similarity(
    sem_x: Tensor,
    mu_x: Tensor,
    sigma_x: Tensor,
    sem_y: Tensor,
    mu_y: Tensor,
    sigma_y: Tensor,
    *,
    a: float | Tensor = 1 / 200,
    b: float | Tensor = 4.0,
    lam: float | Tensor = 0.2,
) -> Tensor:
    """See `wsss_kernels.uncertainty_similarity`."""
    return _similarity(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, a, b, lam).to(sem_x.dtype)


def uncertainty_info_nce(
    sem_x: Tensor,
    mu_x: Tensor,
    sigma_x: Tensor,
    sem_y: Tensor,
    mu_y: Tensor,
    sigma_y: Tensor,
    temperature: float | Tensor,
    *,
    a: float | Tensor = 1 / 200,
    b: float | Tensor = 4.0,
    lam: float | Tensor = 0.2,
) -> Tensor:
    """See `wsss_kernels.uncertainty_info_nce`."""
    logits = _similarity(sem_x, mu_x, sigma_x, sem_y, mu_y, sigma_y, a, b, lam) / temperature
    if len(logits) == 0:
        return logits.sum()
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
