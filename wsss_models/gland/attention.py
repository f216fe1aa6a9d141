"""Consistency correlation attention (Eq. 1–3): criss-cross, position, criss-cross."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wsss_kernels as wk


class PositionAttention(nn.Module):
    """B_j = Σ_k softmax_k(H_j · M_k) N_k, added to the input with a weight γ that starts at 0 (Eq. 2).

    The denominator of Eq. 2 is printed as a sum over j; the weights are normalised over the summed index k here.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 4, 1)
        self.key_conv = nn.Conv2d(channels, channels // 4, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """`Tensor[B, C, H, W]` → the same shape."""
        query, key, value = (conv(x).flatten(2).mT for conv in (self.query_conv, self.key_conv, self.value_conv))
        return self.gamma * F.scaled_dot_product_attention(query, key, value, scale=1.0).mT.reshape(x.shape) + x


def attention(kind: str, channels: int) -> nn.Module:
    """`"cca"`, or the ablations `"criss_cross_1"`, `"criss_cross_2"`, `"none"`. All are the identity at the start."""
    if kind == "none":
        return nn.Identity()
    first = wk.CrissCrossAttention(channels)
    if kind == "criss_cross_1":
        return first
    second = wk.CrissCrossAttention(channels)
    return nn.Sequential(first, second) if kind == "criss_cross_2" else nn.Sequential(first, PositionAttention(channels), second)
