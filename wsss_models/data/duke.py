"""Duke's diabetic macular edema B-scans (Chiu 2015): `Subject_NN.mat`, PNGs with `manualFluid`, or lists of the released code."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from ..errors import InputError
from .files import SUFFIXES, inside
from .oct import BScan, annotation, beside, grey, read_mat

CLASSES = ("background", "fluid")
_SUBJECT = re.compile(r"(Subject_\d+)")


def read(root: Path) -> dict[str, list[BScan]]:
    """The B-scans by part. `all` where the data set has no parts; `train` and `validation` where it has lists.

    Layouts: `Subject_NN.mat` (the annotated slices); `images/*.png` with `manualFluid/*.png`; `images`, `labels`, `mask` (layer
    probabilities `.npy`), `gan_healthy` with `train.csv` and `valid.csv` (columns path, label).

    Raises:
        InputError: none of them is there.
    """
    volumes = sorted(root.glob("Subject_*.mat"))
    if volumes:
        return {"all": [scan for path in volumes for scan in _volume(path)]}
    if (root / "train.csv").is_file():
        parts = {part: _listed(root, f"{name}.csv") for part, name in (("train", "train"), ("validation", "valid"))}
        return {part: scans for part, scans in parts.items() if scans}
    scans = [
        BScan(p.stem, p, beside(root / "manualFluid", p.stem, SUFFIXES), None, _subject(p.stem), *_structural(root, p.stem))
        for p in sorted((root / "images").glob("*"))
        if p.suffix.lower() in SUFFIXES
    ]
    if not scans:
        raise InputError(f"{root}: expected Subject_NN.mat, or images/*.png (with train.csv or manualFluid/), got neither")
    return {"all": scans}


def _subject(stem: str) -> str:
    match = _SUBJECT.match(stem)
    return match[1] if match else stem


def _structural(root: Path, stem: str) -> tuple[Path | None, Path | None]:
    layers = next((p for name in ("mask", "layer_masks") if (p := root / name / f"{stem}.npy").is_file()), None)
    return layers, beside(root / "gan_healthy", stem, SUFFIXES)


def _volume(path: Path) -> list[BScan]:
    arrays = read_mat(path)
    if not {"images", "manualFluid1"} <= set(arrays) or arrays["images"].ndim != 3:
        raise InputError(f"volume {path}: expected the arrays images (H×W×slices) and manualFluid1, got {', '.join(sorted(arrays))}")
    annotated = np.flatnonzero(~np.isnan(arrays["manualFluid1"].astype(np.float64)).all(axis=(0, 1)))
    return [BScan(f"{path.stem}_{z:02d}", path, path, None, path.stem, index=int(z)) for z in annotated]


def _listed(root: Path, name: str) -> list[BScan]:
    path = root / name
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"list {path}: cannot be read ({error})") from None
    found = []
    for row in rows:
        if not row.get("path") or row.get("label") not in ("0", "1"):
            raise InputError(f"list {path}: expected the columns path and label (0 or 1), got {dict(row)}")
        image = inside(root, row["path"]) if (root / row["path"]).is_file() else inside(root, f"images/{Path(row['path']).name}")
        stem = image.stem
        mask = beside(root / "labels", stem, SUFFIXES)
        found.append(BScan(stem, image, mask, (float(row["label"]),), _subject(stem), *_structural(root, stem)))
    return found


def read_scan(scan: BScan) -> np.ndarray:
    """`[H, W]` uint8."""
    if scan.index is None:
        return grey(scan.image)
    return np.clip(read_mat(scan.image)["images"][..., scan.index], 0, 255).astype(np.uint8)


def read_label(scan: BScan, size: tuple[int, int]) -> np.ndarray:
    """`[H, W]` uint8: 1 where there is fluid.

    Raises:
        InputError: there is no annotation, or it is damaged or of another size.
    """
    if scan.mask is None:
        raise InputError(f"image {scan.image}: it has no annotation")
    if scan.index is not None:
        return (np.nan_to_num(read_mat(scan.mask)["manualFluid1"][..., scan.index].astype(np.float64)) > 0).astype(np.uint8)
    # labels/ of the released code marks fluid with 255; manualFluid/ numbers the regions downwards from there.
    values = [255] if scan.mask.parent.name == "labels" else range(1, 256)
    return annotation(scan.mask, size, dict.fromkeys(values, 1))
