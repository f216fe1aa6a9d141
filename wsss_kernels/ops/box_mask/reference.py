"""Box masks and connected components in plain PyTorch: the truth that every kernel is compared with.

Sources: M4 §3.5.6 (UniCL-AffSeg); CLIP-ES (CVPR 2023), whose contours have the bounding boxes of the 8-connected components.

Where released code differs: it cuts the ends of a box to w − 1 and h − 1 and uses them as exclusive ends, so that the
last row and column are never covered (`clip_border=True`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = {4: ((0, 1), (1, 0), (1, 1), (1, 2), (2, 1)), 8: tuple((y, x) for y in range(3) for x in range(3))}
"""Offsets into a map that is padded by one, the pixel itself included."""


def grey_levels(cam: Tensor) -> Tensor:
    """trunc(255·cam) clamped to 0…255, NaN → 0; the product in float32, float64 for float64."""
    product = 255 * (cam.float() if cam.dtype in (torch.float16, torch.bfloat16) else cam)
    return torch.where(product.isnan(), 0.0, product).clamp(0, 255).trunc()


def connected_components(mask: Tensor, *, connectivity: int = 8) -> Tensor:
    """See `wsss_kernels.connected_components`.

    Every pixel takes the smallest pixel number among its neighbours and then that pixel's own label, until nothing
    changes: then every label is the number of the component's first pixel.
    """
    height, width = mask.shape[-2:]
    foreground = (mask != 0).reshape(-1, height, width)
    pixels = torch.arange(height * width, device=mask.device).view(height, width)
    nowhere = height * width
    label = torch.where(foreground, pixels, nowhere)
    while True:
        padded = F.pad(label, (1, 1, 1, 1), value=nowhere)
        least = torch.stack([padded[:, y : y + height, x : x + width] for y, x in NEIGHBOURS[connectivity]]).amin(0)
        of_label = F.pad(label.flatten(1), (0, 1), value=nowhere)
        least = torch.where(foreground, of_label.gather(1, torch.where(foreground, least, nowhere).flatten(1)).view_as(label), nowhere)
        if torch.equal(least, label):
            break
        label = least
    number = (label == pixels).flatten(1).cumsum(1)
    numbered = F.pad(number, (0, 1)).gather(1, label.flatten(1)).view_as(label)
    return torch.where(foreground, numbered, 0).view(mask.shape).to(torch.int32)


def bounding_boxes(label: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Tensor[M, h, w]` of labels → first row, last row, first column, last column, each `Tensor[M, n + 1]`.

    Column 0 is the background's; a label that does not occur has first > last.
    """
    maps, height, width = label.shape
    most = ((height + 1) // 2) * ((width + 1) // 2)  # 8-connected components that a map can hold
    index = label.long().flatten(1)
    rows = torch.arange(height, device=label.device).view(-1, 1).expand(height, width).flatten().expand(maps, -1)
    columns = torch.arange(width, device=label.device).expand(height, width).flatten().expand(maps, -1)

    def extreme(values: Tensor, start: int, reduce: str) -> Tensor:
        return values.new_full((maps, most + 1), start).scatter_reduce(1, index, values, reduce)

    return extreme(rows, height, "amin"), extreme(rows, -1, "amax"), extreme(columns, width, "amin"), extreme(columns, -1, "amax")


def covered(top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """`Tensor[M, n]` of inclusive box ends → `Tensor[M, h, w]`, true inside any box: the integral of the boxes' corners."""
    present = ((top <= bottom) & (left <= right)).long()
    corners = present.new_zeros(len(top), (height + 1) * (width + 1))
    for row, column, sign in ((top, left, 1), (top, right + 1, -1), (bottom + 1, left, -1), (bottom + 1, right + 1, 1)):
        corners = corners.scatter_add(1, row * (width + 1) + column, sign * present)
    return corners.view(-1, height + 1, width + 1).cumsum(1).cumsum(2)[:, :height, :width] > 0


def box_mask(cam: Tensor, threshold: float = 0.4, *, clip_border: bool = False) -> Tensor:
    """See `wsss_kernels.box_mask`."""
    level = grey_levels(cam).flatten(0, -3) if cam.dim() > 2 else grey_levels(cam)[None]
    background = (threshold * level.amax((-2, -1), keepdim=True).double()).trunc()
    label = connected_components(level.double() > background)
    top, bottom, left, right = (box[:, 1:] for box in bounding_boxes(label))
    if clip_border:
        bottom, right = bottom.clamp(max=cam.shape[-2] - 2), right.clamp(max=cam.shape[-1] - 2)
    return covered(top, bottom, left, right, *cam.shape[-2:]).view(cam.shape).to(cam.dtype)
