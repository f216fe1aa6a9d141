"""Box masks as CLIP-ES and WeCLIP compute them, components as SciPy finds them: one map after the other."""

import cv2
import numpy as np
import scipy.ndimage
import torch
from torch import Tensor


def _map_boxes(cam: np.ndarray, threshold: float, clip_border: bool) -> np.ndarray:
    height, width = cam.shape
    grey = (cam * 255).astype(np.uint8)
    _, binary = cv2.threshold(grey, int(threshold * np.max(grey)), 255, cv2.THRESH_BINARY)
    contours = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    mask = np.zeros((height, width), dtype=cam.dtype)
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        right, bottom = (min(x + w, width - 1), min(y + h, height - 1)) if clip_border else (x + w, y + h)
        mask[y:bottom, x:right] = 1
    return mask


def opencv_loop(cam: Tensor, threshold: float = 0.4, *, clip_border: bool = False) -> Tensor:
    """The released algorithm: contours of every map, a rectangle for each, in a Python loop."""
    maps = cam.reshape(-1, *cam.shape[-2:]).cpu().numpy()
    return torch.from_numpy(np.stack([_map_boxes(one, threshold, clip_border) for one in maps])).view(cam.shape).to(cam.device)


def scipy_components(mask: Tensor, *, connectivity: int = 8) -> Tensor:
    """`scipy.ndimage.label` per map."""
    maps = (mask != 0).reshape(-1, *mask.shape[-2:]).cpu().numpy()
    structure = scipy.ndimage.generate_binary_structure(2, connectivity // 4)
    return (
        torch.from_numpy(np.stack([scipy.ndimage.label(one, structure)[0] for one in maps])).view(mask.shape).to(mask.device, torch.int32)
    )


for _loop in (opencv_loop, scipy_components):
    _loop.compiles = False  # nothing of PyTorch in it that could be
