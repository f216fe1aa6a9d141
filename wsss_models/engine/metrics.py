"""Segmentation metrics from one confusion matrix over all pixels of all images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata


class Confusion:
    """Rows are the truth, columns the prediction.

    Args:
        classes: names; class k is pixel value k.
        ignore: pixel value of the truth that does not count.
    """

    def __init__(self, classes: Sequence[str], ignore: int = 255):
        self.classes, self.ignore = list(classes), ignore
        self.matrix = np.zeros((len(classes), len(classes)), np.int64)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """Adds one image of integer maps of one shape; returns its own matrix.

        Raises:
            ValueError: shapes that differ, a value that is no class.
        """
        if truth.shape != prediction.shape:
            raise ValueError(f"expected a prediction of the truth's shape {truth.shape}, got {prediction.shape}")
        count, valid = len(self.classes), truth != self.ignore
        truth, prediction = truth[valid].astype(np.int64), prediction[valid].astype(np.int64)
        for what, values in (("truth", truth), ("prediction", prediction)):
            if values.size and not 0 <= values.min() <= values.max() < count:
                raise ValueError(f"expected values 0…{count - 1} in the {what}, got {values.min()}…{values.max()}")
        found = np.bincount(truth * count + prediction, minlength=count * count).reshape(count, count)
        self.matrix += found
        return found

    def metrics(self) -> dict[str, Any]:
        """`figures` of everything that was added, with the classes' names."""
        found = figures(self.matrix)
        per_class = ("iou", "dice", "accuracy_per_class")
        return {name: dict(zip(self.classes, value, strict=True)) if name in per_class else value for name, value in found.items()}


def figures(matrix: np.ndarray) -> dict[str, Any]:
    """Metrics of a confusion matrix `[C, C]`. A class in neither truth nor prediction is `None` and left out of the means.

    `f1` is the mean of the classes' F1 (which equals Dice on pooled counts), `f1_of_miou` the 2m / (1 + m) that some papers
    report as F1.
    """
    truth, prediction, hit = matrix.sum(1), matrix.sum(0), np.diag(matrix)

    def ratio(a: np.ndarray, b: np.ndarray) -> list[float | None]:
        return [float(x / y) if y else None for x, y in zip(a, b, strict=True)]

    def mean(values: Sequence[float | None]) -> float | None:
        there = [v for v in values if v is not None]
        return sum(there) / len(there) if there else None

    iou, dice, accuracy = ratio(hit, truth + prediction - hit), ratio(2 * hit, truth + prediction), ratio(hit, truth)
    miou = mean(iou)
    return {
        "miou": miou,
        "pixel_accuracy": float(hit.sum() / matrix.sum()) if matrix.sum() else None,
        "mean_accuracy": mean(accuracy),
        "mean_dice": mean(dice),
        "f1": mean(dice),
        "f1_of_miou": 2 * miou / (1 + miou) if miou is not None else None,
        "iou": iou,
        "dice": dice,
        "accuracy_per_class": accuracy,
    }


def dice_and_iou(mask: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Of one image's foreground; 1 where both are empty."""
    mask, truth = mask.astype(bool), truth.astype(bool)
    both, sizes = int((mask & truth).sum()), int(mask.sum()) + int(truth.sum())
    return (2 * both / sizes, both / (sizes - both)) if sizes else (1.0, 1.0)


def auc(score: np.ndarray, label: np.ndarray) -> float | None:
    """The probability that a positive scores above a negative (ties count half); `None` without one of them."""
    rank = rankdata(score)
    positive = label.astype(bool)
    n, m = int(positive.sum()), int((~positive).sum())
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else None
