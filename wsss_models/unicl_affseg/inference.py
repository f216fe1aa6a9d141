"""Segmentation of whole images: by the decoder, over scales and flips; and their pseudo-labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .cam import grad_cam
from .config import UniclConfig
from .data import normalized
from .decoder import AffinityDecoder, selected
from .encoder import UniCL
from .pseudo_label import pseudo_labels

STRIDE = 32
"""Pixels for a cell of the encoder's last grid."""


def grid_size(height: int, width: int, longest: int, factor: float = 1.0) -> tuple[int, int]:
    """Height and width with the longest side near `longest`·`factor`, both multiples of 32."""
    ratio = longest * factor / max(height, width)
    return max(STRIDE, round(height * ratio / STRIDE) * STRIDE), max(STRIDE, round(width * ratio / STRIDE) * STRIDE)


def _views(image: Tensor, config: UniclConfig, factor: float) -> tuple[Tensor, bool]:
    """The image at one scale, `Tensor[1 or 2, 3, h, w]`, the second flipped."""
    scaled = interpolate(image[None], grid_size(*image.shape[1:], config.inference.size, factor), mode="bilinear", align_corners=False)
    return (torch.cat((scaled, scaled.flip(3))), True) if config.inference.flip else (scaled, False)


@torch.no_grad()
def segment(unicl: UniCL, decoder: AffinityDecoder, image: np.ndarray, config: UniclConfig, device: torch.device) -> np.ndarray:
    """`[H, W, 3]` uint8 → label `[H, W]` uint8: the mean of the logits over scales and flips, at the image's size."""
    pixels = normalized(image, config.data).to(device)
    total: Tensor | None = None
    for factor in config.inference.scales:
        views, flipped = _views(pixels, config, factor)
        logits, _ = decoder(selected(unicl.features(views).blocks, config.decoder.blocks))
        logits = logits[:1] + logits[1:].flip(3) if flipped else logits
        large = interpolate(logits.float(), pixels.shape[1:], mode="bilinear", align_corners=False)[0]
        total = large if total is None else total + large
    return total.argmax(dim=0).byte().cpu().numpy()


@torch.no_grad()
def pseudo_label(
    unicl: UniCL, text: Tensor, decoder: AffinityDecoder, image: np.ndarray, present: Tensor, config: UniclConfig, device: torch.device
) -> np.ndarray:
    """The refined CAMs' label `[H, W]` uint8 of one image, at its size. `present`: `Tensor[20]` bool."""
    pixels = normalized(image, config.data).to(device)
    view = interpolate(pixels[None], grid_size(*pixels.shape[1:], config.inference.size), mode="bilinear", align_corners=False)
    features = unicl.features(view)
    blocks = selected(features.blocks, config.decoder.blocks)
    fused = decoder(blocks)[1] if decoder.steps >= config.refine.warmup else None
    present = present[None].to(device)
    cams = grad_cam(unicl, features, text, present)
    return pseudo_labels(cams, fused, blocks, pixels[None], present, config.refine)[0].byte().cpu().numpy()
