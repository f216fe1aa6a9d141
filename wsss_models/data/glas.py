"""GlaS (Warwick-QU): a flat folder of `train_1.bmp` and `train_1_anno.bmp`, `testA_1.bmp`, `testB_1.bmp`; any image format."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from ..errors import InputError
from .files import SUFFIXES, Item, read_mask

CLASSES = ("stroma", "gland")
_NAME = re.compile(r"(train|testA|testB)_(\d+)$")


def read(root: Path, part: str) -> list[Item]:
    """The images of `part`: `"train"`, `"testA"`, `"testB"`, or `"test"` for both, in the order of their numbers.

    Raises:
        InputError: no such images.
    """
    parts = ("testA", "testB") if part == "test" else (part,)
    found = []
    for path in root.iterdir():
        match = _NAME.match(path.stem)
        if match and match[1] in parts and path.suffix.lower() in SUFFIXES:
            mask = path.with_name(f"{path.stem}_anno{path.suffix}")
            found.append(((match[1], int(match[2])), Item(path.stem, path, mask if mask.is_file() else None)))
    if not found:
        raise InputError(f"{root}: expected images named {parts[0]}_NUMBER.bmp (or .png, …), got none")
    return [item for _, item in sorted(found, key=lambda pair: pair[0])]


def read_label(item: Item, size: tuple[int, int] | None = None) -> np.ndarray:
    """The annotation `[H, W]` of gland instances as 0 and 1.

    Raises:
        InputError: there is none, or it is damaged or of another size.
    """
    if item.mask is None:
        raise InputError(f"image {item.image}: it has no annotation {item.image.stem}_anno{item.image.suffix}")
    return (read_mask(item.mask, size) > 0).astype(np.uint8)


def read_grades(root: Path) -> dict[str, str]:
    """`Grade.csv`: image → grade (benign, malignant, …), by the columns whose titles begin with `name` and `grade (GlaS)`.

    Raises:
        InputError: no such file or columns.
    """
    path = root / "Grade.csv"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [{(k or "").strip().lower(): (v or "").strip() for k, v in row.items() if k} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    columns = [next((k for k in (rows[0] if rows else {}) if k.startswith(start)), None) for start in ("name", "grade (glas)")]
    if None in columns:
        raise InputError(f"{path}: expected the columns name and grade (GlaS), got {', '.join(rows[0]) if rows else 'no rows'}")
    return {row[columns[0]]: row[columns[1]] for row in rows}
