"""QaTa-COV19-v2 as published: `{Train Set,Test Set}/Images/*.png` and `Ground-truths/mask_*.png`. It has no sentences."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .lvit import Pair, pairs_of


def read(root: Path) -> dict[str, list[Pair]]:
    """The pairs of `train` and `test`.

    Raises:
        InputError: there is no training part.
    """
    folders = {"train": root / "Train Set", "test": root / "Test Set"}
    found = {part: pairs_of(folder / "Images", folder / "Ground-truths", {}) for part, folder in folders.items() if folder.is_dir()}
    if "train" not in found:
        raise InputError(f"{root}: expected 'Train Set' with Images and Ground-truths, got none")
    return found
