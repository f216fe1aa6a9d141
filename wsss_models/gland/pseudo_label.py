"""Class activation maps of whole images from sliding crops at several scales, and the masks made of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from skimage.filters import gaussian, threshold_otsu
from torch import Tensor

from ..data import sliding
from .config import Data, Masks, Segment
from .data import CLASSES, normalizer, to_tensor
from .model import GlandClassifier


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def sliding_maps(
    image: Tensor, window: int, stride: int, run: Callable[[Tensor], Tensor], *, resize: int | None = None, batch: int = 16
) -> Tensor:
    """The mean over sliding crops of what `run` makes of each.

    Args:
        image: `Tensor[3, H, W]`.
        window, stride: in pixels of the image; a smaller image gives smaller crops.
        run: `Tensor[b, 3, s, s] -> Tensor[b, C, …]`, resized to the crop.
        resize: side of the crops that `run` sees, for a full window; smaller crops shrink in proportion.

    Returns:
        `Tensor[C, H, W]`.
    """
    size = tuple(image.shape[1:])
    places = sliding.windows(size, window, stride)
    inside = tuple(min(window, n) for n in size)
    seen = tuple(max(1, round(n * (resize or window) / window)) for n in inside)

    def maps():
        for start in range(0, len(places), batch):
            crops = torch.stack([image[:, rows, columns] for rows, columns in places[start : start + batch]])
            crops = crops if seen == inside else F.interpolate(crops, size=seen, mode="bilinear", antialias=True)
            yield from F.interpolate(run(crops).float(), size=inside, mode="bilinear")

    return sliding.overlap_add(size, places, maps())


def activation_maps(model: GlandClassifier, image: np.ndarray, data: Data, masks: Masks, device: torch.device) -> Tensor:
    """The maps of both classes summed over the scales of the image: `[H, W, 3]` uint8 → `Tensor[2, H, W]`."""
    pixels = normalizer(data)(to_tensor(image).to(device))
    total = torch.zeros(len(CLASSES), *image.shape[:2], device=device)
    for scale in masks.scales:
        size = tuple(max(1, round(n * scale)) for n in image.shape[:2])
        scaled = pixels if size == tuple(image.shape[:2]) else _resized(pixels, size)
        found = sliding_maps(
            scaled,
            data.side,
            masks.stride,
            lambda crops: model.activation(crops, weigh=masks.weigh),
            resize=data.resize,
            batch=masks.batch_size,
        )
        total += _resized(found, tuple(image.shape[:2]))
    return total


def pseudo_mask(maps: Tensor, present: Tensor, *, normalize: bool = False) -> Tensor:
    """The larger map's class at each pixel; classes that the image does not have are out.

    Args:
        maps: `Tensor[C, H, W]`.
        present: `Tensor[C]`, 0 or 1. If the image has no class at all, all are in.
        normalize: each map becomes relu(F) / max (Eq. 4) first.

    Returns:
        `Tensor[H, W]`, uint8. There is no threshold for a background: the classes cover everything.
    """
    if normalize:
        maps = maps.relu()
        maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    absent = (present == 0) & (present.sum() > 0)
    return maps.masked_fill(absent.to(maps.device)[:, None, None], -torch.inf).argmax(0).to(torch.uint8)


def segment_image(network: torch.nn.Module, image: np.ndarray, data: Data, config: Segment, device: torch.device) -> np.ndarray:
    """The network's label map: probabilities of sliding crops, averaged over scales and mirror images."""
    pixels, size = normalizer(data)(to_tensor(image).to(device)), tuple(image.shape[:2])
    total: Tensor | float = 0.0
    for scale in config.scales:
        scaled = pixels if scale == 1 else _resized(pixels, tuple(max(1, round(n * scale)) for n in size))
        for mirror in (False, True) if config.flip else (False,):
            seen = scaled.flip(2) if mirror else scaled
            found = sliding_maps(seen, config.crop, config.stride, lambda crops: network(crops).softmax(1), batch=4)
            total = total + _resized(found.flip(2) if mirror else found, size)
    return total.argmax(0).to(torch.uint8).cpu().numpy()


def otsu_mask(image: np.ndarray) -> np.ndarray:
    """The baseline without learning: 1 where the smoothed red channel is below its Otsu threshold (glands are darker in red)."""
    red = gaussian(image[..., 0].astype(np.float64), sigma=2)
    return (red <= threshold_otsu(red)).astype(np.uint8)
