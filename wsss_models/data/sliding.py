"""Windows that slide over an image, and their overlap-add."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, and one that ends at the border. A shorter side has one, at 0."""
    if window < 1 or stride < 1:
        raise ValueError(f"starts: window and stride must be at least 1, got {window} and {stride}")
    last = max(length - window, 0)
    found = list(range(0, last + 1, stride))
    return found if found[-1] == last else [*found, last]


def windows(size: tuple[int, int], window: int, stride: int) -> list[tuple[slice, slice]]:
    """(rows, columns) of every window of an image of `size` (height, width). They cover it; at a short side they are smaller."""
    height, width = size
    return [
        (slice(y, min(y + window, height)), slice(x, min(x + window, width)))
        for y in starts(height, window, stride)
        for x in starts(width, window, stride)
    ]


def overlap_add(size: tuple[int, int], places: Sequence[tuple[slice, slice]], values: Iterable[Tensor]) -> Tensor:
    """The mean over the windows that cover each pixel.

    Args:
        size: (height, width).
        places: of the windows, as from `windows`.
        values: `Tensor[C, h, w]` for each place, of its size.

    Returns:
        `Tensor[C, height, width]`. A pixel that no window covers is 0.
    """
    total: Tensor | None = None
    for (rows, columns), value in zip(places, values, strict=True):
        if total is None:
            total, count = value.new_zeros(value.shape[0], *size), value.new_zeros(size)
        total[:, rows, columns] += value
        count[rows, columns] += 1
    if total is None:
        raise ValueError("overlap_add: expected at least one window, got none")
    return total / count.clamp_(min=1)
