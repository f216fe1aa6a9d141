"""Similarity of text vectors with a map in plain PyTorch: the truth that every kernel is compared with. Source: M0 Eq. 6.

Where released code differs: it normalises the visual vectors of each pixel and not the text vectors, as here by default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contrastive.reference import tamed


def text_similarity(visual: Tensor, text: Tensor, scale: float | Tensor = 1.0, *, normalize_visual: bool = True) -> Tensor:
    """See `wsss_kernels.text_similarity`."""
    result = visual.dtype
    if result in (torch.float16, torch.bfloat16):
        visual, text = visual.float(), text.float()
        scale = scale.float() if isinstance(scale, Tensor) else scale
    if normalize_visual:
        visual = tamed(visual, dim=1)
        square = visual.square().sum(dim=1, keepdim=True)
        empty = square == 0
        visual = torch.where(empty, 0.0, visual * torch.where(empty, 1.0, square).rsqrt())
    return (scale * torch.einsum("kc,bchw->bkhw", text, visual)).to(result)


def text_similarity_pool(visual: Tensor, text: Tensor, scale: float | Tensor = 1.0, *, normalize_visual: bool = True) -> Tensor:
    """See `wsss_kernels.text_similarity_pool`. `max` along a dimension passes its gradient to the first maximum."""
    result = visual.dtype
    if result in (torch.float16, torch.bfloat16):
        visual, text = visual.float(), text.float()
        scale = scale.float() if isinstance(scale, Tensor) else scale
    similarity = text_similarity(visual, text, scale, normalize_visual=normalize_visual)
    return similarity.flatten(2).max(dim=2).values.to(result)
