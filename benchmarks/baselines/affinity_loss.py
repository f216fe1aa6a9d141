"""The loss as AFA and M4 compute it: the matrix of affinities, and two masks of its size."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def eager(feature, label, *, kind="balanced", radius=None, ignore_index=255):
    rows, flat = feature.flatten(2), label.flatten(1)
    logits = rows.transpose(1, 2) @ rows
    target = (flat[:, :, None] == flat[:, None, :]).to(feature.dtype)
    used = (flat != ignore_index).to(feature.dtype)
    mask = used[:, :, None] * used[:, None, :]
    if radius is not None:
        cell = torch.arange(flat.shape[1], device=label.device)
        y, x = cell // label.shape[-1], cell % label.shape[-1]
        mask = mask * ((y[:, None] - y).abs() <= radius) * ((x[:, None] - x).abs() <= radius)
    if kind == "bce":
        return (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * mask).sum() / mask.sum().clamp_min(1)
    affinity, positive, negative = torch.sigmoid(logits), target * mask, (1 - target) * mask
    loss = (positive * (1 - affinity)).sum() / (positive.sum() + 1) + (negative * affinity).sum() / (negative.sum() + 1)
    return loss / 2
