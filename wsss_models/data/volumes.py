"""Volumes of medical images as axial slices: NIfTI cases by modality, DICOM series with PNG masks, and exported 2D slices."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import InputError
from .files import read_image, read_mask

_NIFTI = (".nii.gz", ".nii")
GREY = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Case:
    """One patient's volume, or one slice of an export.

    Args:
        name: unique, usable as a file name.
        images: a file for each modality, or for a DICOM series the files of its slices.
        masks: the mask file, or for a DICOM series one for each slice; empty if there is no mask.
        kind: what the files are.
        part: the part of the data set that its folder names, if it does.
    """

    name: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...] = ()
    kind: Literal["nifti", "dicom", "export"] = "nifti"
    part: str | None = None
    classes: tuple[int, ...] | None = None
    """Mask values that count as object; all but 0 if `None`."""


def stem(path: Path) -> str:
    return next((path.name[: -len(s)] for s in _NIFTI if path.name.endswith(s)), path.stem)


def tokens(path: Path) -> set[str]:
    """The words of a file name, in lower case: `BraTS2021_00000_t1ce.nii.gz` → brats2021, 00000, t1ce."""
    return set(re.split(r"[^a-z0-9]+", stem(path).lower()))


def nifti_files(root: Path) -> list[Path]:
    """All NIfTI files below `root`, in order.

    Raises:
        InputError: no such folder.
    """
    if not root.is_dir():
        raise InputError(f"{root}: expected a folder of NIfTI files")
    return sorted(p for p in root.rglob("*") if p.name.endswith(_NIFTI) and p.is_file())


def read_nifti(path: Path) -> np.ndarray:
    """A volume `[Z, H, W]` float32, axial slices first; a 2D file is one slice.

    Raises:
        InputError: no such file, a damaged one, another rank, NaN or infinity.
    """
    import nibabel

    try:
        array = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)
    except FileNotFoundError:
        raise InputError(f"volume {path}: there is no such file") from None
    except Exception as error:  # whatever a damaged file provokes in the decoders
        raise InputError(f"volume {path}: cannot be read as NIfTI ({type(error).__name__}: {error})") from None
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise InputError(f"volume {path}: expected two or three dimensions, got {'×'.join(map(str, array.shape))}")
    if not np.isfinite(array).all():
        raise InputError(f"volume {path}: expected finite values, got NaN or infinity")
    return np.moveaxis(array if array.ndim == 3 else array[..., None], 2, 0)


def read_dicom(path: Path) -> np.ndarray:
    """A slice `[H, W]` float32 in the units of the scanner (Hounsfield units for CT).

    Raises:
        InputError: no such file, a damaged one, or one without a single plane of pixels.
    """
    import pydicom

    try:
        found = pydicom.dcmread(path)
        pixels = found.pixel_array.astype(np.float32)
    except FileNotFoundError:
        raise InputError(f"slice {path}: there is no such file") from None
    except Exception as error:  # whatever a damaged file provokes in the decoders
        raise InputError(f"slice {path}: cannot be read as DICOM ({type(error).__name__}: {error})") from None
    if pixels.ndim != 2:
        raise InputError(f"slice {path}: expected one plane of pixels, got {'×'.join(map(str, pixels.shape))}")
    return pixels * float(getattr(found, "RescaleSlope", 1)) + float(getattr(found, "RescaleIntercept", 0))


def read_case(case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """Images `[Z, C, H, W]` float32 as stored, and the object mask `[Z, H, W]` bool if there is one.

    Raises:
        InputError: a file that cannot be read, or files of different sizes.
    """
    if case.kind == "nifti":
        planes = [read_nifti(path) for path in case.images]
        mask = read_nifti(case.masks[0]) if case.masks else None
    elif case.kind == "dicom":
        planes = [_stacked([read_dicom(path) for path in case.images], case)]
        mask = _stacked([read_mask(path) for path in case.masks], case) if case.masks else None
    else:
        planes = [read_image(path)[None, ..., 0].astype(np.float32) for path in case.images]
        # Exports hold value / 4 as grey, 64 for the smallest value, and JPEG blurs it.
        mask = (read_mask(case.masks[0]) > 31)[None] if case.masks else None
    images = _stacked(planes, case).swapaxes(0, 1)
    if mask is None:
        return images, None
    if mask.shape != (images.shape[0], *images.shape[2:]):
        raise InputError(f"case {case.name}: the mask is {_size(mask)} and the images are {_size(planes[0])}")
    wanted = np.rint(mask).astype(np.int64)
    return images, np.isin(wanted, case.classes) if case.classes is not None else wanted > 0


def _size(volume: np.ndarray) -> str:
    return "×".join(map(str, volume.shape))


def _stacked(arrays: Sequence[np.ndarray], case: Case) -> np.ndarray:
    sizes = {a.shape for a in arrays}
    if len(sizes) != 1:
        raise InputError(f"case {case.name}: expected images of one size, got {' and '.join(_size(a) for a in arrays[:8])}")
    return np.stack(arrays)
