"""The trained part: a token MLP per block, fusion, three transformer layers, a classifier of the grid's cells (§3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .config import Decoder


class QuickGELU(nn.Module):
    """x·σ(1.702 x), the activation of CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Layer(nn.Module):
    """Pre-norm self-attention and MLP on tokens `Tensor[B, N, d]`; no position embedding."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class AffinityDecoder(nn.Module):
    """Eq. 3.6, 3.7: from the features of the encoder's blocks to logits on their grid.

    Args:
        channels: of each block's features.
        classes: with background.

    The buffer `steps` counts optimiser steps: the refinement depends on it, and it belongs to the weights.
    """

    def __init__(self, config: Decoder, channels: Sequence[int], classes: int):
        super().__init__()
        width = config.width
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(c, width), nn.ReLU(), nn.Linear(width, width)) for c in channels)
        self.fuse = nn.Conv2d(width * len(channels), width, 1)
        self.dropout = nn.Dropout2d(config.dropout)
        self.layers = nn.Sequential(*(Layer(width, config.heads) for _ in range(config.layers)))
        self.classify = nn.Conv2d(width, classes, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`features`: `Tensor[B, C_l, h, w]` of each block → (logits `[B, classes, h, w]`, F_u `[B, d, h, w]`)."""
        grid = features[0].shape[-2:]
        tokens = [mlp(f.flatten(2).transpose(1, 2)) for mlp, f in zip(self.mlps, features, strict=True)]
        fused = self.fuse(torch.cat(tokens, dim=2).transpose(1, 2).unflatten(2, grid))
        decoded = self.layers(self.dropout(fused).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, grid)
        return self.classify(decoded), fused


def selected(blocks: Sequence[Sequence[Tensor]], which: str) -> list[Tensor]:
    """The features that the decoder and the affinities use: those of stage 3, or all, resized to its grid."""
    if which == "stage3":
        return list(blocks[2])
    grid = blocks[2][0].shape[-2:]
    return [f if f.shape[-2:] == grid else interpolate(f, grid, mode="bilinear", align_corners=False) for s in blocks for f in s]
