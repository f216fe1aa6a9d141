"""Pooled metrics against a direct count, and the identities of the specification."""

import numpy as np
import pytest

from wsss_models.engine import Confusion, metrics


def test_against_a_direct_count():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 3, (7, 5)), rng.integers(0, 3, (7, 5))) for _ in range(4)]
    pairs[0][0][0, :3] = 255
    confusion = Confusion(["a", "b", "c"])
    for truth, found in pairs:
        confusion.add(truth, found)
    truth, found = (np.concatenate([p[i].ravel() for p in pairs]) for i in (0, 1))
    found, truth = found[truth != 255], truth[truth != 255]
    result = confusion.metrics()
    for k, name in enumerate("abc"):
        both, either = ((truth == k) & (found == k)).sum(), ((truth == k) | (found == k)).sum()
        assert result["iou"][name] == both / either
        assert result["dice"][name] == 2 * both / ((truth == k).sum() + (found == k).sum())
    assert result["miou"] == pytest.approx(np.mean(list(result["iou"].values())))
    assert result["pixel_accuracy"] == (truth == found).mean()
    assert result["mean_accuracy"] == pytest.approx(np.mean([(found[truth == k] == k).mean() for k in range(3)]))


def test_absent_classes_are_left_out():
    confusion = Confusion(["a", "b"])
    confusion.add(np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))
    assert confusion.metrics()["iou"] == {"a": 1.0, "b": None} and confusion.metrics()["miou"] == 1.0
    assert Confusion(["a"]).metrics()["miou"] is None


def test_published_rows():
    """M0: mIoU is the mean of the classes, background included. M2: the reported F1 is 2m / (1 + m)."""
    assert round((98.60 + 41.35 + 43.50) / 3, 2) == 61.15
    matrix = np.array([[8769, 0], [1231, 0]])
    assert metrics.figures(matrix)["pixel_accuracy"] == pytest.approx(0.8769)
    for miou, f1 in ((0.8769, 0.9344), (0.8044, 0.8916)):
        assert 2 * miou / (1 + miou) == pytest.approx(f1, abs=1e-4)


def test_mistakes():
    confusion = Confusion(["a", "b"])
    with pytest.raises(ValueError, match="shape"):
        confusion.add(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="0…1 in the prediction, got 0…7"):
        confusion.add(np.zeros((1, 2), int), np.array([[0, 7]]))
