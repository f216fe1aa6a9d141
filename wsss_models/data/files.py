"""Reading of images, masks, lists and label tables, with errors that name the file; nothing that is read can run code."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ..errors import InputError
from ..refine.arrays import load_npy
from ..refine.images import SUFFIXES, read_image

__all__ = ["SUFFIXES", "Item", "find_one", "inside", "read_image", "read_lines", "read_mask", "read_table", "split"]
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Args:
        name: unique, usable as a file name (it may have sub-folders).
        image: its file.
        mask: the file of its true mask, if there is one.
        labels: the image-level label, one value per class, if the data set states it.
    """

    name: str
    image: Path
    mask: Path | None = None
    labels: tuple[float, ...] | None = None


def inside(root: Path, name: str) -> Path:
    """`root / name`, provided that this lies in `root`. A link out of it is followed only if it is a folder right below `root`.

    Raises:
        InputError: it does not.
    """
    if "\0" in name:
        raise InputError(f"{name!r}: expected a path")
    relative = name.lstrip("/")  # lists of VOC kind write /JPEGImages/… and mean the data folder
    path = root / relative
    homes = [root.resolve(), (root / Path(relative).parts[0]).resolve() if len(Path(relative).parts) > 1 else root.resolve()]
    if ".." in Path(relative).parts or not any(path.resolve().is_relative_to(home) for home in homes):
        raise InputError(f"{name!r}: expected a path inside the data folder {root}")
    return path


def find_one(root: Path, stem: str, suffixes: Sequence[str] = SUFFIXES) -> Path:
    """The file `root/stem` with one of the suffixes.

    Raises:
        InputError: there is none, or `stem` leads out of `root`.
    """
    for suffix in suffixes:
        path = inside(root, stem + suffix)
        if path.is_file():
            return path
    raise InputError(f"{root / stem}: there is no such file with one of the endings {', '.join(suffixes)}")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        InputError: no such file, or not a text.
    """
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"list {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list {path}: cannot be read as text ({error})") from None


def read_mask(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """A label map `[H, W]` uint8 as it is stored: an indexed PNG keeps its indices, a colour image of equal channels its grey.

    Args:
        size: (height, width) that it must have.

    Raises:
        InputError: no such file, not an image, colours, deep levels, or another size.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("P", "L", "1", "RGB", "RGBA", "LA"):
                raise InputError(f"mask {path}: expected 8 bits per pixel, got an image of mode {image.mode}")
            if image.mode in ("RGBA", "LA"):
                image = image.convert(image.mode[:-1])
            mask = np.array(image.convert("L") if image.mode == "1" else image)
    except FileNotFoundError:
        raise InputError(f"mask {path}: there is no such file") from None
    except InputError:
        raise
    except Exception as error:  # whatever a broken file provokes in the decoders
        raise InputError(f"mask {path}: cannot be read ({type(error).__name__}: {error})") from None
    if mask.ndim == 3:
        if (mask != mask[..., :1]).any():
            raise InputError(f"mask {path}: expected one number per pixel, got colours")
        mask = np.ascontiguousarray(mask[..., 0])
    if size is not None and mask.shape != tuple(size):
        raise InputError(f"mask {path}: expected {size[1]}×{size[0]} pixels as its image has, got {mask.shape[1]}×{mask.shape[0]}")
    return mask


def read_table(path: Path) -> dict[str, np.ndarray]:
    """A dictionary name → numbers that `np.save` pickled, such as `cls_labels_onehot.npy`.

    Only dictionaries, texts, numbers and arrays of numbers are admitted; anything else in the pickle is refused, not run.

    Raises:
        InputError: no such file, damaged, or other content.
    """
    try:
        found: Any = load_npy(path)
    except FileNotFoundError:
        raise InputError(f"labels {path}: there is no such file") from None
    except Exception as error:  # whatever a damaged or hostile file provokes in the reader
        raise InputError(f"labels {path}: cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(found, dict):
        raise InputError(f"labels {path}: expected a dictionary name → numbers, got {type(found).__name__}")
    table = {}
    for name, value in found.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        plain = all(isinstance(v, (numbers.Number, np.generic)) or (isinstance(v, np.ndarray) and v.dtype.kind in "biuf") for v in values)
        if not isinstance(name, (str, int)) or not plain:
            raise InputError(f"labels {path}: expected numbers under {str(name)[:60]!r}, got {type(value).__name__}")
        table[str(name)] = np.asarray(value, np.float32)
    return table


def split(items: Sequence[T], sizes: Sequence[int], seed: int) -> list[list[T]]:
    """Random parts of the given sizes, each in the order of `items`; what is left over is dropped.

    Raises:
        InputError: fewer items than asked for.
    """
    if sum(sizes) > len(items):
        raise InputError(f"split: expected at least {sum(sizes)} images, got {len(items)}")
    order, parts, start = np.random.default_rng(seed).permutation(len(items)), [], 0
    for size in sizes:
        parts.append([items[i] for i in sorted(order[start : start + size])])
        start += size
    return parts
