"""EBHI-Seg: `EBHI-SEG/<class>/{image,label}/NAME.png`, 224×224; the class folders are found, not presumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError
from .files import SUFFIXES, Item, read_mask

CLASSES = ("stroma", "gland")


def read(root: Path) -> list[Item]:
    """All images, named `<class>/NAME`, class by class.

    Raises:
        InputError: no class folder with `image` and `label`.
    """
    folder = root / "EBHI-SEG" if (root / "EBHI-SEG").is_dir() else root
    items = []
    for home in sorted(p for p in folder.iterdir() if (p / "image").is_dir() and (p / "label").is_dir()):
        named = {p.stem: p for p in (home / "label").iterdir() if p.suffix.lower() in SUFFIXES}
        images = sorted(p for p in (home / "image").iterdir() if p.suffix.lower() in SUFFIXES)
        items += [Item(f"{home.name}/{p.stem}", p, named.get(p.stem)) for p in images]
    if not items:
        raise InputError(f"{folder}: expected folders with image and label in them, one per class, got none")
    return items


def read_label(item: Item, size: tuple[int, int] | None = None) -> np.ndarray:
    """The mask `[H, W]` (grey, object above 127) as 0 and 1.

    Raises:
        InputError: there is none, or it is damaged or of another size.
    """
    if item.mask is None:
        raise InputError(f"image {item.image}: it has no label of the same name")
    return (read_mask(item.mask, size) > 127).astype(np.uint8)
