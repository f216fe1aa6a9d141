"""Fused activation maps, and the sweep over the background's score λ in one pass (Eq. 10, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import wsss_kernels as wk

from ..engine.metrics import figures
from .config import Masks


def fused_maps(maps: Sequence[Tensor], label: Tensor, size: tuple[int, int], config: Masks) -> Tensor:
    """The lesions' maps in 0 … 1 at full size, zero for lesions that the image label excludes.

    Args:
        maps: `Tensor[1, K, h, w]` each: the activation map, then the similarity maps; the background is left out.
        label: `Tensor[K]`.

    Returns:
        `Tensor[K − 1, H, W]`.
    """
    lesions = [m[:, 1:].float().contiguous() for m in maps]
    weights = list(config.weights[: len(lesions)])
    present = label[None, 1:].to(lesions[0])
    fused = wk.fuse_cams(lesions, [w / sum(weights) for w in weights], size, present=present, mode=config.fuse)
    return fused[0]


def mask_at(fused: Tensor, threshold: float) -> Tensor:
    """argmax of the constant λ and the maps, `Tensor[H, W]` uint8; the background where they are equal."""
    value, label = fused.max(0)
    return torch.where(value > threshold, label + 1, 0).to(torch.uint8)


class Sweep:
    """Confusion matrices for every λ of a grid, from a histogram of each pixel's highest score.

    A pixel is background for every λ at or above its highest map, and that map's class below.

    Args:
        classes: K, with the background.
        step: of the grid 0, step, …, 1.
    """

    def __init__(self, classes: int, step: float):
        if not 0 < step <= 1:
            raise ValueError(f"Sweep: step must be in (0, 1], got {step}")
        self.classes, self.grid = classes, np.linspace(0, 1, round(1 / step) + 1)
        self.counts = np.zeros((classes, classes, len(self.grid) + 1), np.int64)

    def add(self, fused: np.ndarray, truth: np.ndarray, ignore: int = 255) -> None:
        """`[K − 1, H, W]` in 0 … 1 and `[H, W]`."""
        valid = truth != ignore
        value, label = fused.max(0)[valid], fused.argmax(0)[valid] + 1
        below = np.searchsorted(self.grid, value.astype(np.float64), side="left")  # how many λ are smaller
        place = (truth[valid].astype(np.int64) * self.classes + label) * (len(self.grid) + 1) + below
        self.counts += np.bincount(place, minlength=self.counts.size).reshape(self.counts.shape)

    def matrices(self) -> np.ndarray:
        """`[λ, K, K]`: rows are the truth."""
        found = np.zeros((len(self.grid), self.classes, self.classes), np.int64)
        total = self.counts.sum(axis=(1, 2))
        for i in range(len(self.grid)):
            lesion = self.counts[:, :, i + 1 :].sum(axis=2)
            found[i] = lesion
            found[i, :, 0] = total - lesion.sum(axis=1)
        return found

    def miou(self) -> np.ndarray:
        """`[λ]`."""
        return np.array([figures(matrix)["miou"] or 0.0 for matrix in self.matrices()])

    def best(self) -> tuple[float, float]:
        """(λ, mIoU); of equally good ones the smallest λ."""
        found = self.miou()
        return float(self.grid[found.argmax()]), float(found.max())
