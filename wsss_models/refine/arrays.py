"""Reads class activation maps and feature maps from `.npy` and `.npz` files, without ever running code from them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError
from .pipeline import CAM_TOLERANCE

_CAM_KEYS = ("cam", "cams", "attn_highres", "high_res", "highres", "strided_cam")
_HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class CamFile:
    """Maps `[K, h, w]` in 0…1, float32, and what the file says of their classes: names, pixel values, or nothing."""

    cam: np.ndarray
    classes: tuple[str, ...] | tuple[int, ...] | None


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, and only NumPy arrays are read from pickles")


def _header_has_objects(file: BinaryIO) -> bool:
    """Reads the header of a `.npy` file; the data follows."""
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    return read(file)[2].hasobject


def load_npy(path: Path) -> Any:
    """The array of a `.npy` file, or the object (a dictionary, as a rule) that `np.save` pickled into it."""
    with open(path, "rb") as file:
        if _header_has_objects(file):
            found = _ArraysOnly(file).load()
            return found.item() if isinstance(found, np.ndarray) and found.shape == () else found
    return np.load(path, allow_pickle=False)


def _load(path: Path, what: str) -> dict[str, Any]:
    """The arrays of a file by name; a plain `.npy` array has the name ""."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if path.suffix != ".npy":
            raise InputError(f"{what} {path}: expected a .npy or .npz file")
        found = load_npy(path)
    except FileNotFoundError:
        raise InputError(f"{what} {path}: there is no such file") from None
    except InputError:
        raise
    except Exception as error:  # whatever a broken or hostile file provokes in the readers
        raise InputError(f"{what} {path}: cannot be read ({type(error).__name__}: {error})") from None
    if isinstance(found, np.ndarray):
        return {"": found}
    if not isinstance(found, dict):
        raise InputError(f"{what} {path}: expected an array or a dictionary of arrays, got a {type(found).__name__}")
    return {str(name): np.asarray(value) for name, value in found.items()}


def _named(arrays: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first of these names that is there; whatever its name, the only array of a file."""
    return next((key for key in keys if key in arrays), next(iter(arrays)) if len(arrays) == 1 else None)


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} of shape {'×'.join(map(str, array.shape)) or '()'}"


def _floating(array: np.ndarray, what: str, path: Path, expected: str, ranks: Sequence[int]) -> np.ndarray:
    if array.dtype.kind != "f" or array.ndim not in ranks or 0 in array.shape:
        raise InputError(f"{what} {path}: expected {expected}, got {_shape(array)}")
    return array.astype(np.float32)


def read_cam(path: Path, option: str = "--cam") -> CamFile:
    """Reads `Tensor[K, h, w]` (or `[h, w]` for one class) in 0…1.

    `.npy`: the array, or a dictionary as IRNet and CLIP-ES save it (`keys`: foreground classes counted from 0, and
    `attn_highres`, `high_res` or `cam`). `.npz`: `cam` and, if wanted, `classes` (names, or the pixel values of the mask).

    Raises:
        InputError: unreadable, another rank or dtype, NaN, values outside 0…1, classes that do not fit the maps.
    """
    arrays = _load(path, option)
    name = _named(arrays, ("", *_CAM_KEYS))
    if name is None:
        raise InputError(
            f"{option} {path}: expected an array named {' or '.join(_CAM_KEYS[:1] + _CAM_KEYS[2:4])}, got {', '.join(arrays) or 'none'}"
        )
    cam = _floating(arrays[name], option, path, "floating-point maps of shape K×h×w with values in 0…1", (2, 3))
    cam = cam[None] if cam.ndim == 2 else cam
    if np.isnan(cam).any():
        raise InputError(f"{option} {path}: expected values in 0…1, got {int(np.isnan(cam).sum())} NaN among {cam.size}")
    low, high = float(cam.min()), float(cam.max())
    if low < -CAM_TOLERANCE or high > 1 + CAM_TOLERANCE:
        raise InputError(
            f"{option} {path}: expected values in 0…1, got {low:.4g} … {high:.4g} (wsss_kernels.normalize_cam maps them there)"
        )
    return CamFile(cam.clip(0, 1), _classes(arrays, len(cam), path, option))


def _classes(arrays: dict[str, np.ndarray], count: int, path: Path, option: str) -> tuple[str, ...] | tuple[int, ...] | None:
    name = next((key for key in ("classes", "keys") if key in arrays), None)
    if name is None:
        return None
    found = np.atleast_1d(arrays[name])
    if found.ndim != 1 or found.dtype.kind not in "iuU" or len(found) != count:
        raise InputError(f"{option} {path}: expected {count} names or integers in {name}, one for each map, got {_shape(arrays[name])}")
    if found.dtype.kind == "U":
        values: tuple = tuple(str(v) for v in found)
    else:
        values = tuple(int(v) + (name == "keys") for v in found)
        if min(values) < 1 or max(values) > 254:
            raise InputError(
                f"{option} {path}: expected classes in 1…254 (0 is background, 255 ignored), got {min(values)} … {max(values)}"
            )
    if len(set(values)) != len(values):
        raise InputError(f"{option} {path}: expected different classes, got {', '.join(map(str, values))}")
    return values


def read_features(path: Path, option: str = "--features") -> np.ndarray:
    """Reads `Tensor[C, h, w]`, or `[L, C, h, w]` for several layers; returned as `[L, C, h, w]`, float32.

    Raises:
        InputError: unreadable, another rank or dtype, NaN or infinity.
    """
    arrays = _load(path, option)
    name = _named(arrays, ("", "features"))
    if name is None:
        raise InputError(f"{option} {path}: expected one array, or one named features, got {', '.join(arrays) or 'none'}")
    features = _floating(arrays[name], option, path, "floating-point maps of shape C×h×w or L×C×h×w", (3, 4))
    if not np.isfinite(features).all():
        raise InputError(f"{option} {path}: expected finite values, got NaN or infinity")
    return features if features.ndim == 4 else features[None]
