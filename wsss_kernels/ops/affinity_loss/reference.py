"""Affinity loss in plain PyTorch: the truth that every kernel is compared with.

Source: M4 Eq. 3.20–3.21 (UniCL-AffSeg), from AFA (CVPR 2022): `"balanced"` averages positive and negative pairs apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairs(label: Tensor, radius: int | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(positive, negative), each `Tensor[B, N, N]` of bool, N = h·w."""
    height, width = label.shape[-2:]
    flat = label.long().flatten(1)  # a number that uint8 cannot hold would wrap around in the comparison
    used = flat != ignore_index
    near = used[:, :, None] & used[:, None, :]
    if radius is not None:
        cell = torch.arange(height * width, device=label.device)
        y, x = cell // width, cell % width
        near = near & ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    same = flat[:, :, None] == flat[:, None, :]
    return near & same, near & ~same


def affinity_loss(feature: Tensor, label: Tensor, *, kind: str = "balanced", radius: int | None = None, ignore_index: int = 255) -> Tensor:
    """See `wsss_kernels.affinity_loss`."""
    if feature.dtype in (torch.float16, torch.bfloat16):
        feature = feature.float()
    rows = feature.flatten(2)
    logits = rows.transpose(1, 2) @ rows
    positive, negative = pairs(label, radius, ignore_index)
    if kind == "bce":
        loss = torch.where(positive, -F.logsigmoid(logits), 0).sum() + torch.where(negative, -F.logsigmoid(-logits), 0).sum()
        return loss / (positive.sum() + negative.sum()).clamp_min(1)
    loss_positive = torch.where(positive, torch.sigmoid(-logits), 0).sum() / (positive.sum() + 1)
    loss_negative = torch.where(negative, torch.sigmoid(logits), 0).sum() / (negative.sum() + 1)
    return (loss_positive + loss_negative) / 2
