"""k-means as it is written in eager PyTorch: distances by a matrix product, means by a product with the memberships.

`eager` takes one set of points after the other; `batched` is the best rewrite we know.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _one(x, k, init, num_iter, tol):
    centroid = x[torch.arange(k, device=x.device) * len(x) // k] if init is None else init
    for _ in range(num_iter):
        label = torch.cdist(x, centroid).argmin(dim=1)
        member = F.one_hot(label, k).to(x.dtype)
        size = member.sum(dim=0)[:, None]
        mean = torch.where(size > 0, member.T @ x / size.clamp_min(1), centroid)
        moved = float((mean - centroid).norm(dim=1).max())
        centroid = mean
        if moved <= tol:
            break
    return torch.cdist(x, centroid).argmin(dim=1), centroid


def eager(x, k, *, init=None, num_iter=20, tol=0.0):
    found = [_one(points, k, None if init is None else init[b], num_iter, tol) for b, points in enumerate(x)]
    return torch.stack([label for label, _ in found]), torch.stack([centroid for _, centroid in found])


def batched(x, k, *, init=None, num_iter=20, tol=0.0):
    """All sets of points in one product, without square roots and without memberships as integers."""
    centroid = x[:, torch.arange(k, device=x.device) * x.shape[1] // k] if init is None else init
    index = torch.arange(k, device=x.device)[:, None]

    def nearest(centroid):
        return ((centroid * centroid).sum(-1)[:, None] - 2 * torch.bmm(x, centroid.transpose(1, 2))).argmin(-1)

    active = torch.ones(len(x), 1, 1, dtype=torch.bool, device=x.device)
    for _ in range(num_iter):
        member = (nearest(centroid)[:, None] == index).to(x.dtype)
        size = member.sum(-1, keepdim=True)
        mean = torch.where((size > 0) & active, torch.bmm(member, x) / size.clamp_min(1), centroid)
        active = active & ((mean - centroid).norm(dim=-1).amax(-1)[:, None, None] > tol)
        centroid = mean
        if not active.any():
            break
    return nearest(centroid), centroid
