"""RINGS (called ProG): `{TRAIN,TEST}/{IMAGES,MANUAL GLANDS,MANUAL TUMOR}/NAME.png`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError
from .files import SUFFIXES, Item, read_mask

CLASSES = ("stroma", "gland")


def read(root: Path, part: str, target: str = "MANUAL GLANDS") -> list[Item]:
    """The images of `part` (`"train"` or `"test"`) with the masks of `target`.

    Raises:
        InputError: no such folder or images.
    """
    folder = _child(root, part)
    images, masks = _child(folder, "IMAGES"), _child(folder, target)
    found = [path for path in sorted(images.iterdir()) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise InputError(f"{images}: expected images, got none")
    named = {path.stem: path for path in masks.iterdir() if path.suffix.lower() in SUFFIXES}
    return [Item(path.stem, path, named.get(path.stem)) for path in found]


def _child(folder: Path, name: str) -> Path:
    """The sub-folder of that name, in any case of letters."""
    found = [p for p in folder.iterdir() if p.is_dir() and p.name.lower() == name.lower()] if folder.is_dir() else []
    if not found:
        raise InputError(f"{folder}: expected a folder {name} in it")
    return found[0]


def read_label(item: Item, size: tuple[int, int] | None = None) -> np.ndarray:
    """The mask `[H, W]` as 0 and 1.

    Raises:
        InputError: there is none, or it is damaged or of another size.
    """
    if item.mask is None:
        raise InputError(f"image {item.image}: it has no mask of the same name")
    return (read_mask(item.mask, size) > 0).astype(np.uint8)
