"""Normalisation of class activation maps in plain PyTorch: the truth that every kernel is compared with.

Source: M4 §3.5.6 and M0 Eq. 10 use min–max normalised maps; released code divides by max − min + 1e-7 or by
max(max − min, 1e-7), the latter being used here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalize_cam(cam: Tensor, *, eps: float = 1e-7) -> Tensor:
    """See `wsss_kernels.normalize_cam`. `max` and `min` along a dimension pass their gradient to the first extremum."""
    wide = (cam.float() if cam.dtype in (torch.float16, torch.bfloat16) else cam).relu()
    pixels = wide.flatten(-2)
    low, high = pixels.min(-1).values[..., None, None], pixels.max(-1).values[..., None, None]
    distance = high - low
    normalized = (wide - low) / torch.where(distance <= eps, eps, distance)
    return torch.where(distance == 0, 0.0, normalized).to(cam.dtype)
