"""MoNuSeg as published: `.tif` images and Aperio's `.xml` outlines of nuclei, in folders of any names. It has no sentences."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from skimage.draw import polygon2mask

from ..errors import InputError
from .files import SUFFIXES
from .lvit import Pair

_TEST = ("test", "testing")
_LARGEST = 1 << 27


def read(root: Path) -> dict[str, list[Pair]]:
    """The images that have an `.xml` of their name: `test` below folders whose name holds "test", the others are `train`.

    Raises:
        InputError: there are none.
    """
    outlines = {p.stem: p for p in sorted(root.rglob("*.xml"))}
    found: dict[str, list[Pair]] = {}
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.stem in outlines):
        part = "test" if any(word in p.lower() for p in path.relative_to(root).parts[:-1] for word in _TEST) else "train"
        found.setdefault(part, []).append(Pair(path.stem, path, outlines[path.stem]))
    if "train" not in found:
        raise InputError(f"{root}: expected images with an .xml of the same name, got none")
    return found


def read_outlines(path: Path) -> list[np.ndarray]:
    """The outlines `[n, 2]` (x, y) of `Annotation/Regions/Region/Vertices/Vertex`.

    Raises:
        InputError: no such file, not such an XML, or one with entities of its own, which could expand without end.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= _LARGEST else b""
        if not content or b"<!ENTITY" in content or b"<!DOCTYPE" in content:
            raise InputError(f"outlines {path}: expected a plain XML file of at most {_LARGEST >> 20} MiB")
        tree = ElementTree.fromstring(content)
        regions = [[(float(v.attrib["X"]), float(v.attrib["Y"])) for v in region.iter("Vertex")] for region in tree.iter("Region")]
    except FileNotFoundError:
        raise InputError(f"outlines {path}: there is no such file") from None
    except (OSError, ElementTree.ParseError, KeyError, ValueError) as error:
        raise InputError(f"outlines {path}: cannot be read as Aperio XML ({type(error).__name__}: {error})") from None
    return [np.array(region) for region in regions if len(region) >= 3]


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """`[H, W]` uint8: 1 inside any outline."""
    mask = np.zeros(size, bool)
    for outline in read_outlines(path):
        low = np.clip(np.floor(outline.min(0)).astype(int), 0, None)
        high = np.minimum(np.ceil(outline.max(0)).astype(int) + 1, (size[1], size[0]))
        if (high > low).all():
            part = polygon2mask((high[1] - low[1], high[0] - low[0]), (outline - low)[:, ::-1])
            mask[low[1] : high[1], low[0] : high[0]] |= part
    return mask.astype(np.uint8)
