"""Criss-cross attention in plain PyTorch: the truth that every kernel is compared with. Source: M2 Eq. 1; CCNet, ICCV 2019.

Where released code differs: CCNet counts a pixel's own position once, as here (the column's diagonal is masked); the gland
repository does not mask it and normalises over the rows of the map; Eq. 1 has no gamma, both modules have.
"""

from __future__ import annotations

import torch
from torch import Tensor


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """See `wsss_kernels.criss_cross_attention`."""
    result = query.dtype
    if result in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    height, width = query.shape[-2:]
    row = torch.einsum("bcyx,bcyi->byxi", query, key)
    column = torch.einsum("bcyx,bcjx->byxj", query, key)
    own = torch.eye(height, dtype=torch.bool, device=query.device)[:, None]
    weight = torch.cat([row, column.masked_fill(own, -torch.inf)], dim=-1).softmax(-1)
    along_row = torch.einsum("byxi,bcyi->bcyx", weight[..., :width], value)
    return (along_row + torch.einsum("byxj,bcjx->bcyx", weight[..., width:], value)).to(result)
