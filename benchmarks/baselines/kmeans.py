"""k-means as it is written in eager PyTorch: distances by a matrix product, means by a product with the memberships."""

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
