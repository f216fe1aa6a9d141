"""Pixel-adaptive refinement in plain PyTorch: the truth that every kernel is compared with.

Sources: M4 Eq. 3.17 and §3.5.7 (UniCL-AffSeg), AFA (CVPR 2022) for `variant="par"`, PAMR (CVPR 2020) for `variant="pamr"`.

Where released code differs: AFA and PAMR resize the mask to the image (`resize="mask"`), WeCLIP resizes the image to the
mask (`resize="image"`). The weights of `"par"` sum to 1 + w3, not to 1, in all releases and here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""(dy, dx) of the 8 neighbours, row-major without the centre."""


def shifted(x: Tensor, dy: int, dx: int) -> Tensor:
    """The map whose value at (y, x) is that at (y + dy, x + dx), coordinates clamped to the map."""
    rows = (torch.arange(x.shape[-2], device=x.device) + dy).clamp(0, x.shape[-2] - 1)
    columns = (torch.arange(x.shape[-1], device=x.device) + dx).clamp(0, x.shape[-1] - 1)
    return x.index_select(-2, rows).index_select(-1, columns)


def neighbours(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """`Tensor[B, Q, H, W]` → `Tensor[B, Q, P, H, W]`, P = 8·len(dilations)."""
    return torch.stack([shifted(x, dy * d, dx * d) for d in dilations for dy, dx in DIRECTIONS], dim=2)


def par_weights(image: Tensor, dilations: Sequence[int], w1: float, w2: float, w3: float) -> Tensor:
    """`Tensor[B, 1, P, H, W]`, summing to 1 + w3 over P."""
    values = neighbours(image, dilations)
    deviation = values.std(dim=2, keepdim=True)  # unbiased, over the P neighbours
    colour = -(((values - image[:, :, None]).abs() / (deviation + 1e-8) / w1) ** 2).mean(dim=1, keepdim=True)
    distance = torch.tensor(
        [d * (math.sqrt(2.0) if dy and dx else 1.0) for d in dilations for dy, dx in DIRECTIONS], dtype=torch.float64, device=image.device
    )
    position = -((distance / (distance.std() + 1e-8) / w2) ** 2)
    return colour.softmax(dim=2) + w3 * position.softmax(dim=0).to(image.dtype).view(-1, 1, 1)


def pamr_weights(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """`Tensor[B, 1, P, H, W]`, summing to 1 over P."""
    values = neighbours(image, dilations)
    centre = image[:, :, None]
    window = torch.cat([values, centre.expand(-1, -1, len(dilations), -1, -1)], dim=2)
    deviation = window.std(dim=2, keepdim=True)  # unbiased, over the 9 positions of every dilation
    return (-(values - centre).abs() / (1e-8 + 0.1 * deviation)).mean(dim=1, keepdim=True).softmax(dim=2)


def _bilinear(x: Tensor, size: list[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def resized(x: Tensor, size: Sequence[int], bilinear: Callable[[Tensor, list[int]], Tensor] = _bilinear) -> Tensor:
    """Bilinear, `align_corners=True`; the same tensor where the size already is right."""
    if x.shape[-2:] == torch.Size(size):
        return x
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:2], *size)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return bilinear(wide, list(size)).to(x.dtype)


def par(
    image: Tensor,
    mask: Tensor,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    num_iter: int = 10,
    *,
    variant: str = "par",
    resize: str | None = "mask",
    w1: float = 0.3,
    w2: float = 0.3,
    w3: float = 0.01,
    exact: bool = True,
) -> Tensor:
    """See `wsss_kernels.par`. `exact` makes no difference here."""
    result = image.dtype
    if result in (torch.float16, torch.bfloat16):
        image, mask = image.float(), mask.float()
    if resize == "mask":
        mask = resized(mask, image.shape[-2:])
    elif resize == "image":
        image = resized(image, mask.shape[-2:])
    weights = par_weights(image, dilations, w1, w2, w3) if variant == "par" else pamr_weights(image, dilations)
    for _ in range(num_iter):
        mask = (weights * neighbours(mask, dilations)).sum(dim=2)
    return mask.to(result)
