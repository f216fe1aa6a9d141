"""The grounding decoder, the text-guided mask (Eq. 10) and the text-guided loss (Eq. 11)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wsss_kernels as wk
from wsss_kernels.distributed import gather_with_grad

from .config import Grounding
from .unet import pixel_loss


class GatedBlock(nn.Module):
    """Twice the size: the nearest neighbour, and a convolution of it behind a gate that is closed at the start."""

    def __init__(self, width: int):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(width, width, 3, padding=1), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x + self.gate.tanh() * self.conv(x.relu())


class GroundingDecoder(nn.Module):
    """Patch features → pixel features, and their likeness to sentences. 0.295 M for D = 128 and two blocks."""

    def __init__(self, width: int, config: Grounding, temperature: float = 0.07):
        super().__init__()
        self.blocks = nn.Sequential(*(GatedBlock(width) for _ in range(config.blocks)))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        start = (10.0, -2.5) if config.affine else (1.0, 0.0)
        self.scale, self.shift = (nn.Parameter(torch.tensor(v), requires_grad=config.affine) for v in start)

    def forward(self, patches: Tensor) -> Tensor:
        """`Tensor[N, L, D]` of a square grid → `Tensor[N, D, s, s]`."""
        side = math.isqrt(patches.shape[1])
        return self.blocks(patches.transpose(1, 2).unflatten(2, (side, side)))

    def logits(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Cosines of all pixels of N images with all of K sentences, scaled and shifted: `Tensor[N, K, s, s]`."""
        return wk.text_similarity(pixels, F.normalize(text, dim=1).to(pixels.dtype), self.scale.to(pixels.dtype)) + self.shift

    def own_logits(self, pixels: Tensor, text: Tensor) -> Tensor:
        """Of each image with its own sentence: `Tensor[N, s, s]`; its sigmoid is the text-guided mask."""
        return torch.cat([self.logits(p[None], t[None])[:, 0] for p, t in zip(pixels, text, strict=True)])


def text_guided_loss(decoder: GroundingDecoder, patches: Tensor, text: Tensor) -> Tensor:
    """Pixels pooled under each sentence's soft mask must be most like that sentence, among all pairs of the batch of all processes.

    Args:
        patches: `Tensor[B, L, D]`.
        text: `Tensor[B, D]`.
    """
    pixels, text = decoder(patches), gather_with_grad(text)
    mask = decoder.logits(pixels, text).sigmoid()
    unit = F.normalize(pixels, dim=1)
    pooled = torch.einsum("bkhw,bdhw->bkd", mask, unit) / mask.sum((2, 3))[..., None].clamp(min=1e-6)
    like = torch.einsum("bkd,kd->bk", F.normalize(pooled, dim=2), F.normalize(text, dim=1))
    logit = gather_with_grad(like) / decoder.log_temperature.exp().clamp(min=0.01)
    target = torch.arange(len(logit), device=logit.device)
    return (F.cross_entropy(logit, target) + F.cross_entropy(logit.T, target)) / 2


def mask_loss(decoder: GroundingDecoder, patches: Tensor, text: Tensor, mask: Tensor, labelled: Tensor) -> Tensor:
    """Binary cross-entropy of the text-guided masks of the labelled images; 0 if there are none.

    Args:
        patches: `Tensor[B, L, D]`.
        text: `Tensor[B, D]`.
        mask: `Tensor[B, S, S]`, 0 and 1; read where labelled.
        labelled: `Tensor[B]` bool.
    """
    if not labelled.any():
        return patches.new_zeros(())
    logit = decoder.own_logits(decoder(patches[labelled]), text[labelled])
    logit = F.interpolate(logit[:, None], mask.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    return pixel_loss(logit.float(), mask[labelled], "bce")
