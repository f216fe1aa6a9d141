"""Sign-preserving pyramid pooling as eager PyTorch code writes it."""

import torch
import torch.nn.functional as F


def _gates(a, b, weight):
    return F.conv2d(torch.cat([a, b], dim=1), weight, padding=1).sigmoid()


def eager(feature, weight_pos, weight_neg, *, scales=(2, 4, 8, 16)):
    size = feature.shape[-2:]
    levels = [F.interpolate(F.adaptive_avg_pool2d(feature, s), size=size, mode="bilinear", align_corners=False) for s in scales]
    fused = levels[0]
    for level, weight_p, weight_n in zip(levels[1:], weight_pos, weight_neg, strict=True):
        a, b, na, nb = fused.relu(), level.relu(), (-fused).relu(), (-level).relu()
        pos, neg = _gates(a, b, weight_p), _gates(na, nb, weight_n)
        fused = (a * pos[:, :1] + b * pos[:, 1:]) / 2 - (na * neg[:, :1] + nb * neg[:, 1:]) / 2
    logit = (fused.relu() * feature.relu() - (-fused).relu() * (-feature).relu()).mean(dim=(2, 3))
    return logit, fused
