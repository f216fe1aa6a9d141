"""The two losses: of the image labels, and of the pseudo-masks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

import wsss_kernels as wk


def classification_loss(logit: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy of logits `Tensor[B, C]` against labels `Tensor[B, C]` of 0 and 1, averaged over both."""
    return F.binary_cross_entropy_with_logits(logit.float(), label)


def segmentation_loss(main: Tensor, auxiliary: Tensor, label: Tensor, *, weight: float, purified: bool) -> dict[str, Tensor]:
    """Main + weight · auxiliary, each the loss of purified labels (Eq. 10–11) or the plain cross-entropy; 255 is ignored.

    Args:
        main, auxiliary: logits `Tensor[B, C, H, W]`.
        label: `Tensor[B, H, W]`, int64.
    """

    def one(logit: Tensor) -> Tensor:
        if purified:
            return wk.purified_label_loss(logit.float(), label)
        total = F.cross_entropy(logit.float(), label, ignore_index=255, reduction="sum")
        return total / (label != 255).sum().clamp(min=1)

    first, second = one(main), one(auxiliary)
    return {"loss": first + weight * second, "main": first, "auxiliary": second}
