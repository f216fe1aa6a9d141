"""Sign-preserving pyramid pooling in plain PyTorch: the truth that every kernel is compared with. Source: M2 Eq. 5–9.

Where released code differs: it rectifies the feature before the pyramid, so that every negative term is 0; here, as printed,
the raw feature enters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pyramid(feature: Tensor, scale: int) -> Tensor:
    """`Tensor[B, C, h, w]` → the same size: mean over scale×scale bins, bilinear back (`align_corners=False`)."""
    return F.interpolate(F.adaptive_avg_pool2d(feature, scale), size=feature.shape[-2:], mode="bilinear", align_corners=False)


def gates(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The two gates σ(conv3×3([relu(a), relu(b)])), each `Tensor[B, 1, h, w]`."""
    first, second = F.conv2d(torch.cat([a.relu(), b.relu()], dim=1), weight, padding=1).sigmoid().split(1, dim=1)
    return first, second


def mpfp(feature: Tensor, weight_pos: Tensor, weight_neg: Tensor, *, scales: Sequence[int] = (2, 4, 8, 16)) -> tuple[Tensor, Tensor]:
    """See `wsss_kernels.mpfp`."""
    result = feature.dtype
    if result in (torch.float16, torch.bfloat16):
        feature, weight_pos, weight_neg = feature.float(), weight_pos.float(), weight_neg.float()
    if feature.shape[0] == 0:
        # empty batches are beyond some of PyTorch's poolings; the sum keeps the graph
        nothing = feature * (1 + weight_pos.sum() + weight_neg.sum())
        return nothing.mean(dim=(2, 3)).to(result), nothing.to(result)
    levels = [pyramid(feature, scale) for scale in scales]
    fused = levels[0]
    for level, pos, neg in zip(levels[1:], weight_pos, weight_neg, strict=True):
        pos_fused, pos_level = gates(fused, level, pos)
        neg_fused, neg_level = gates(-fused, -level, neg)
        fused = 0.5 * (fused.relu() * pos_fused + level.relu() * pos_level) - 0.5 * (
            (-fused).relu() * neg_fused + (-level).relu() * neg_level
        )
    logit = (fused.relu() * feature.relu() - (-fused).relu() * (-feature).relu()).mean(dim=(2, 3))
    return logit.to(result), fused.to(result)
