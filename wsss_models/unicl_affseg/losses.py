"""The loss (Eq. 3.19–3.22): cross-entropy with background and foreground in balance, and the affinity loss of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

import wsss_kernels as wk

from .config import Train
from .encoder import wide

IGNORE = 255


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values; 0 where there are none."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp_min(1)


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """½ mean over background pixels + ½ mean over foreground pixels of the cross-entropy; 255 is ignored.

    Args:
        logits: `Tensor[B, 21, h, w]`, resized bilinearly to the label.
        label: `Tensor[B, H, W]` int64.
    """
    large = interpolate(wide(logits), label.shape[-2:], mode="bilinear", align_corners=False)
    pixel = cross_entropy(large, label, ignore_index=IGNORE, reduction="none")
    return (_mean(pixel, label == 0) + _mean(pixel, (label != 0) & (label != IGNORE))) / 2


def total_loss(logits: Tensor, fused: Tensor, label: Tensor, config: Train) -> dict[str, Tensor]:
    """L = L_seg + λ L_aff, by name."""
    segmentation = segmentation_loss(logits, label)
    grid = interpolate(label[:, None].float(), fused.shape[-2:], mode="nearest")[:, 0].long()
    affinity = wk.affinity_loss(wide(fused), grid, kind=config.affinity_kind, radius=config.radius, ignore_index=IGNORE)
    return {"loss": segmentation + config.affinity_weight * affinity, "segmentation": segmentation, "affinity": affinity}
