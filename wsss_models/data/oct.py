"""What the readers of retinal OCT have in common: a B-scan and the files that belong to it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from .files import read_image, read_mask


@dataclass(frozen=True)
class BScan:
    """One B-scan of a data set.

    Args:
        name: unique, usable as a file name.
        image: its file; for a `.mat` volume with `index`, the slice in it.
        mask: the file of its annotation, if there is one.
        labels: presence of each lesion, if the data set states it.
        subject: what must not be divided between the parts.
        layers: `.npy` of layer probabilities, if there is one.
        healthy: image of the healthy counterpart, if there is one.
    """

    name: str
    image: Path
    mask: Path | None = None
    labels: tuple[float, ...] | None = None
    subject: str = ""
    layers: Path | None = None
    healthy: Path | None = None
    index: int | None = None


def grey(path: Path) -> np.ndarray:
    """`[H, W]` uint8; of a colour image the mean of its channels, which are equal in B-scans."""
    image = read_image(path)
    return image[..., 0] if (image == image[..., :1]).all() else np.rint(image.mean(2)).astype(np.uint8)


def annotation(path: Path, size: tuple[int, int], values: dict[int, int]) -> np.ndarray:
    """`[H, W]` uint8 of classes, from the grey values of an annotation.

    Args:
        values: grey value → class. Everything else is background.
    """
    mask = read_mask(path, size)
    table = np.zeros(256, np.uint8)
    for value, label in values.items():
        table[value] = label
    return table[mask]


@functools.lru_cache(maxsize=2)
def read_mat(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a MATLAB file (up to version 7; later ones are HDF5).

    Raises:
        InputError: no such file, a damaged one, or one of version 7.3.
    """
    from scipy.io import loadmat

    try:
        return {k: v for k, v in loadmat(path).items() if isinstance(v, np.ndarray)}
    except FileNotFoundError:
        raise InputError(f"volume {path}: there is no such file") from None
    except NotImplementedError:
        raise InputError(f"volume {path}: is of MATLAB 7.3; save it with -v7 (scipy reads no HDF5)") from None
    except Exception as error:  # whatever a damaged file provokes in the decoder
        raise InputError(f"volume {path}: cannot be read as a MATLAB file ({type(error).__name__}: {error})") from None


def beside(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    return next((p for s in suffixes if (p := folder / f"{stem}{s}").is_file()), None)
