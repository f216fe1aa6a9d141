"""Similarity of text vectors with a map, and its maximum, as eager PyTorch code writes them."""

import torch
import torch.nn.functional as F


def eager(visual, text, scale=1.0, *, normalize_visual=True):
    flat = visual.flatten(2)
    if normalize_visual:
        flat = F.normalize(flat, dim=1)
    return scale * torch.matmul(text, flat).view(visual.shape[0], text.shape[0], *visual.shape[2:])


def eager_pool(visual, text, scale=1.0, *, normalize_visual=True):
    return F.adaptive_max_pool2d(eager(visual, text, scale, normalize_visual=normalize_visual), 1).flatten(1)
