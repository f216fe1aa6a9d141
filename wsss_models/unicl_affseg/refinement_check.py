"""What the refinement gains by itself: CAMs made from true masks by a fixed recipe, labels from them before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d
from torchvision.transforms.functional import gaussian_blur

import wsss_kernels as wk

from ..engine import Confusion, Context
from .data import CLASSES, Crops
from .decoder import selected
from .encoder import UniCL
from .losses import IGNORE
from .pseudo_label import pseudo_labels

SHRINK, SIGMA, CELL = 12, 8.0, 16
"""Pixels by which a class shrinks, deviation of the blur in pixels, pixels for a cell of the CAM."""


def degraded_cams(mask: Tensor) -> tuple[Tensor, Tensor]:
    """CAMs as a classifier might give them, from a mask `Tensor[H, W]`: each class shrunk, blurred, on a coarse grid.

    Returns:
        (`Tensor[20, H/16, W/16]` in [0, 1], `Tensor[20]` bool: the classes that the mask shows).
    """
    shown = torch.stack([mask == k for k in range(1, len(CLASSES))])
    solid = shown[:, None].float()
    shrunk = 1 - max_pool2d(1 - solid, 2 * SHRINK + 1, 1, SHRINK)
    kept = torch.where(shrunk.amax(dim=(2, 3), keepdim=True) > 0, shrunk, solid)  # what vanishes is not shrunk
    blurred = gaussian_blur(kept, [2 * int(3 * SIGMA) + 1] * 2, [SIGMA] * 2)
    return wk.normalize_cam(avg_pool2d(blurred, CELL)[:, 0]), shown.flatten(1).any(dim=1)


@dataclass
class RefinementCheck:
    """A job: mIoU of the labels from degraded CAMs before and after random walk and PAR, without the decoder's affinity."""

    data: Crops
    unicl: UniCL

    @torch.no_grad()
    def run(self, context: Context) -> dict[str, Any]:
        before, after = Confusion(CLASSES, IGNORE), Confusion(CLASSES, IGNORE)
        config, device = context.config, context.device
        for image, mask, _ in self.data:
            cams, present = degraded_cams(mask)
            image, cams, present = image[None].to(device), cams[None].to(device), present[None].to(device)
            large = interpolate(cams, mask.shape, mode="bilinear", align_corners=False)[0]
            plain = torch.cat((1 - large.amax(dim=0, keepdim=True), large)).argmax(dim=0)
            features = selected(self.unicl.features(image).blocks, config.decoder.blocks)
            refined = pseudo_labels(cams, None, features, image, present, config.refine)[0]
            before.add(mask.numpy(), plain.cpu().numpy())
            after.add(mask.numpy(), refined.cpu().numpy())
        first, second = before.metrics()["miou"], after.metrics()["miou"]
        return {"miou_cams": first, "miou_refined": second, "gain": second - first}
