"""DICOM series with PNG masks (CHAOS): `DICOM_anon/*.dcm` and `Ground/*.png` beside each other, paired in the order of their names."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .volumes import Case

_IMAGES, _MASKS = "DICOM_anon", "Ground"


def read(root: Path) -> list[Case]:
    """The series below `root`, each named by its patient's folder.

    Raises:
        InputError: no series, or another number of masks than of slices.
    """
    found = []
    for folder in sorted(p for p in [root / _IMAGES, *root.rglob(_IMAGES)] if p.is_dir()):
        images = tuple(sorted(p for p in folder.rglob("*.dcm") if p.is_file()))
        masks = tuple(sorted((folder.parent / _MASKS).glob("*.png")))
        if masks and len(masks) != len(images):
            raise InputError(f"{folder.parent}: expected one mask in {_MASKS} for each of {len(images)} slices, got {len(masks)}")
        place = folder.parent.relative_to(root).as_posix().replace("/", "_")
        case = Case(place if place != "." else root.resolve().name, images, masks, kind="dicom")
        if images and case not in found:
            found.append(case)
    if not found:
        raise InputError(f"{root}: expected folders {_IMAGES} with .dcm files, got none")
    return found
