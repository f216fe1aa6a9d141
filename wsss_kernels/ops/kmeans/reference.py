"""Lloyd's algorithm in plain PyTorch, deterministic: the truth that every kernel is compared with. Source: M3 §3 (CLDF)."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spaced(x: Tensor, k: int) -> Tensor:
    """`Tensor[B, N, d]` → rows ⌊i·N/k⌋, `Tensor[B, k, d]`."""
    return x.index_select(1, torch.arange(k, device=x.device) * x.shape[1] // k)


def nearest(x: Tensor, centroid: Tensor) -> Tensor:
    """`Tensor[B, N]` of int64; the lowest index of equally near centroids."""
    return (x[:, :, None] - centroid[:, None]).square().sum(dim=-1).argmin(dim=-1)


def kmeans(x: Tensor, k: int, *, init: Tensor | None = None, num_iter: int = 20, tol: float = 0.0) -> tuple[Tensor, Tensor]:
    """See `wsss_kernels.kmeans`."""
    dtype = x.dtype
    centroid = evenly_spaced(x, k) if init is None else init
    if dtype in (torch.float16, torch.bfloat16):
        x, centroid = x.float(), centroid.float()
    moving = torch.ones(len(x), 1, 1, dtype=torch.bool, device=x.device)
    for _ in range(num_iter):
        member = torch.nn.functional.one_hot(nearest(x, centroid), k).to(x.dtype)
        size = member.sum(dim=1)[..., None]
        mean = torch.where(size > 0, member.transpose(1, 2) @ x / size.clamp_min(1), centroid)
        way = (mean - centroid).norm(dim=-1).amax(dim=-1)[:, None, None]
        centroid = torch.where(moving, mean, centroid)
        moving = moving & (way > tol)
    return nearest(x, centroid), centroid.to(dtype)
