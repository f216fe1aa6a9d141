"""Min–max normalisation of class activation maps as eager PyTorch code writes it."""

import torch.nn.functional as F
from torch import Tensor


def eager(cam: Tensor, *, eps: float = 1e-7) -> Tensor:
    cam = cam.relu()
    low, high = cam.amin((-2, -1), keepdim=True), cam.amax((-2, -1), keepdim=True)
    return (cam - low) / (high - low).clamp_min(eps)


def eager_fuse(cams, weights, size, *, present=None, mode="normalize_then_sum"):
    total = 0
    for cam, weight in zip(cams, weights, strict=True):
        if mode == "normalize_then_sum":
            cam = eager(cam) if present is None else eager(cam) * present[:, :, None, None]
            total = total + weight * F.interpolate(cam, size=size, mode="bilinear", align_corners=True)
        else:
            total = total + weight * F.interpolate(cam.relu(), size=size, mode="bilinear", align_corners=True)
    if mode == "sum_then_normalize":
        total = eager(total) if present is None else eager(total) * present[:, :, None, None]
    return total
