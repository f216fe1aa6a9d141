"""The loss of purified labels in plain PyTorch: the truth that every kernel is compared with. Source: M2 Eq. 10–11.

Where released code differs: it divides by the range of the weights instead of their mean and uses the largest probability
instead of the range of the probabilities; and its ignored pixels, having loss 0, take most of the softmax's mass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def purified_label_loss(logit: Tensor, label: Tensor, *, ignore_index: int = 255) -> Tensor:
    """See `wsss_kernels.purified_label_loss`."""
    if logit.dtype in (torch.float16, torch.bfloat16):
        logit = logit.float()
    label = label.long()
    if logit.shape[0] == 0:
        return logit.sum()
    valid = (label != ignore_index).flatten(1)
    log_probability = logit.log_softmax(dim=1)
    loss = F.nll_loss(log_probability, label, ignore_index=ignore_index, reduction="none").flatten(1)
    probability = log_probability.detach().exp()
    confidence = (probability.amax(1) - probability.amin(1)).flatten(1)
    count = valid.sum(dim=1, keepdim=True)
    hard = loss.detach().masked_fill(~valid, torch.inf)
    # an image without valid pixels has no softmax; its row of zeros does not matter
    soft = torch.where(count > 0, (-hard).masked_fill(count == 0, 0.0), 0.0).softmax(dim=1) * count
    flat = label.flatten(1)
    smallest = flat.masked_fill(~valid, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
    largest = flat.masked_fill(~valid, -1).amax(1, keepdim=True)
    weight = torch.where(smallest == largest, 1.0, soft * confidence)
    weight = torch.where(valid, weight, 0.0)
    return ((loss * weight).sum(dim=1) / count.clamp_min(1).squeeze(1)).mean()
