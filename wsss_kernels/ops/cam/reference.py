"""Normalisation of class activation maps in plain PyTorch: the truth that every kernel is compared with.

Source: M4 §3.5.6 and M0 Eq. 10 use min–max normalised maps; released code divides by max − min + 1e-7 or by
max(max − min, 1e-7), the latter being used here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize_cam(cam: Tensor, *, eps: float = 1e-7) -> Tensor:
    """See `wsss_kernels.normalize_cam`. `max` and `min` along a dimension pass their gradient to the first extremum."""
    wide = (cam.float() if cam.dtype in (torch.float16, torch.bfloat16) else cam).relu()
    pixels = wide.flatten(-2)
    low, high = pixels.min(-1).values[..., None, None], pixels.max(-1).values[..., None, None]
    distance = high - low
    normalized = (wide - low) / torch.where(distance <= eps, eps, distance)
    return torch.where(distance == 0, 0.0, normalized).to(cam.dtype)


def fuse_cams(
    cams: Sequence[Tensor],
    weights: Sequence[float],
    size: Sequence[int],
    *,
    present: Tensor | None = None,
    mode: str = "normalize_then_sum",
) -> Tensor:
    """See `wsss_kernels.fuse_cams`."""
    dtype = cams[0].dtype
    wide = [cam.float() if cam.dtype in (torch.float16, torch.bfloat16) else cam for cam in cams]
    gate = torch.ones((), dtype=wide[0].dtype) if present is None else present.to(wide[0].dtype)[:, :, None, None]
    gate = gate.to(wide[0].device)

    def resized(cam: Tensor) -> Tensor:
        if cam.numel() == 0:
            return cam.new_zeros(*cam.shape[:2], *size) + cam.sum()
        return F.interpolate(cam, size=tuple(size), mode="bilinear", align_corners=True)

    def total(maps: Iterable[Tensor]) -> Tensor:
        first, *others = (weight * resized(cam) for cam, weight in zip(maps, weights, strict=True))
        return sum(others, start=first)

    if mode == "normalize_then_sum":
        return total(normalize_cam(cam) * gate for cam in wide).to(dtype)
    return (normalize_cam(total(cam.relu() for cam in wide)) * gate).to(dtype)
