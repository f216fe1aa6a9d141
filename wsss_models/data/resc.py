"""RESC (AI Challenger, retinal edema): the layout of the released code, and the original folders of volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError
from .files import SUFFIXES, read_table
from .oct import BScan, annotation, beside, grey

CLASSES = ("background", "subretinal fluid", "pigment epithelial detachment")
VALUES = {191: 1, 128: 2}
"""Grey values of the annotation. 255 is retinal edema, which counts as background."""
_PARTS = {"train": "train", "valid": "validation", "validation": "validation"}


def read(root: Path) -> dict[str, list[BScan]]:
    """The B-scans by part (`train`, `validation`).

    Layouts: `{train,valid}/original_images/CASE_SLICE.bmp` with `label_images`, `gan_healthy` and `layer_masks` beside it, and
    `resc_cls_labels.npy` above; or `CASE.img/1.bmp` with `CASE_labelMark/1.bmp` anywhere below folders whose names hold train or
    valid.

    Raises:
        InputError: neither is there.
    """
    table = read_table(root / "resc_cls_labels.npy") if (root / "resc_cls_labels.npy").is_file() else {}
    found = {part: _part(root / folder, table) for folder, part in _PARTS.items() if (root / folder / "original_images").is_dir()}
    found = found or _volumes(root)
    if not any(found.values()):
        raise InputError(f"{root}: expected train/original_images/*.bmp, or folders CASE.img with 1.bmp, 2.bmp, …, got neither")
    return found


def _part(folder: Path, table: dict[str, np.ndarray]) -> list[BScan]:
    scans = []
    for path in sorted(p for p in (folder / "original_images").iterdir() if p.suffix.lower() in SUFFIXES):
        labels = next((table[key] for key in (path.name, path.stem) if key in table), None)
        if labels is not None and labels.shape != (2,):
            raise InputError(f"resc_cls_labels.npy: expected two numbers for {path.name}, got shape {labels.shape}")
        layers = folder / "layer_masks" / f"{path.stem}.npy"
        scans.append(
            BScan(
                path.stem,
                path,
                beside(folder / "label_images", path.stem, SUFFIXES),
                tuple(float(x) for x in labels) if labels is not None else None,
                path.stem.rpartition("_")[0] or path.stem,
                layers if layers.is_file() else None,
                beside(folder / "gan_healthy", path.stem, SUFFIXES),
            )
        )
    return scans


def _volumes(root: Path) -> dict[str, list[BScan]]:
    found: dict[str, list[BScan]] = {"train": [], "validation": []}
    marks = {p.name.removesuffix("_labelMark"): p for p in sorted(root.rglob("*_labelMark")) if p.is_dir()}
    for folder in sorted(p for p in root.rglob("*.img") if p.is_dir()):
        case = folder.name.removesuffix(".img")
        mark = marks.get(folder.name) or marks.get(case)
        part = "validation" if any("valid" in p.lower() for p in folder.relative_to(root).parts[:-1]) else "train"
        slices = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.stem.isdigit()]
        for path in sorted(slices, key=lambda p: int(p.stem)):
            mask = beside(mark, path.stem, SUFFIXES) if mark is not None else None
            found[part].append(BScan(f"{case}_{int(path.stem):03d}", path, mask, None, case))
    return found


def read_scan(scan: BScan) -> np.ndarray:
    """`[H, W]` uint8."""
    return grey(scan.image)


def read_label(scan: BScan, size: tuple[int, int]) -> np.ndarray:
    """`[H, W]` uint8: 1 subretinal fluid, 2 pigment epithelial detachment.

    Raises:
        InputError: there is no annotation, or it is damaged or of another size.
    """
    if scan.mask is None:
        raise InputError(f"image {scan.image}: it has no annotation")
    return annotation(scan.mask, size, VALUES)
