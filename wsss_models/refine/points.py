"""Points as the weak label: `CLASS:X,Y`, files of them, and the class activation maps made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, UsageError
from .settings import Settings
from .tokens import TokenGrid, path_lengths

BACKGROUND = "background"
_POINT = re.compile(r"(?P<name>[^:]+):(?P<x>-?\d+(\.\d+)?),(?P<y>-?\d+(\.\d+)?)")


@dataclass(frozen=True)
class Point:
    """A class, and a place in pixels from the top left corner of the upright image."""

    name: str
    x: float
    y: float

    def __str__(self) -> str:
        return f"{self.name}:{self.x:g},{self.y:g}"


def parse_point(text: str) -> Point:
    """Reads `CLASS:X,Y`; CLASS is a name, or the pixel value of the mask; `background` (or 0) says where no object is."""
    match = _POINT.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--point: expected CLASS:X,Y in pixels, such as cat:120,85, got {text!r}")
    return _point(match["name"].strip(), float(match["x"]), float(match["y"]), "--point")


def _point(name: str, x: float, y: float, option: str) -> Point:
    name = BACKGROUND if name == "0" else name
    digits = name.lstrip("-")
    if digits.isascii() and digits.isdigit() and (len(digits) > 3 or not 1 <= int(name) <= 254):
        raise UsageError(f"{option}: expected a class name or an integer in 0…254 (255 is ignored), got {name}")
    if not name:
        raise UsageError(f"{option}: expected a class before the colon, got an empty name")
    return Point(name, x, y)


def read_points(path: Path) -> dict[str, list[Point]]:
    """Reads `{"IMAGE": {"CLASS": [[X, Y], …], …}, …}`; IMAGE is a file name, with or without its suffix."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--points {path}: cannot be read as JSON ({error})") from None
    expected = f'--points {path}: expected {{"IMAGE": {{"CLASS": [[X, Y], …]}}}}'
    if not isinstance(content, dict):
        raise UsageError(f"{expected}, got a {type(content).__name__}")
    found = {}
    for image, classes in content.items():
        if not isinstance(classes, dict) or not all(isinstance(places, list) for places in classes.values()):
            raise UsageError(f"{expected}, got {classes!r} for {image}")
        for place in (place for places in classes.values() for place in places):
            if not (
                isinstance(place, list)
                and len(place) == 2
                and all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 2**31 for v in place)
            ):
                raise UsageError(f"{expected}, got {place!r} as a point of {image}")
        found[image] = [_point(name, float(x), float(y), f"--points {path}") for name, places in classes.items() for x, y in places]
    return found


def check_inside(points: Sequence[Point], height: int, width: int) -> None:
    for point in points:
        if not (0 <= point.x < width and 0 <= point.y < height):
            raise InputError(
                f"point {point}: expected x in 0…{width - 1} and y in 0…{height - 1} (pixels from the top left), got {point.x:g},{point.y:g}"
            )


def point_cam(points: Sequence[Point], names: Sequence[str], grid: TokenGrid, height: int, width: int, settings: Settings) -> np.ndarray:
    """Class activation maps `[K, h, w]` in 0…1 for the classes `names`: a soft blob around each point, 1 at the point.

    The blob is exp(−½ (g / radius)²), g = path length that edges of the image make longer. Where the blobs of several
    classes overlap, each is multiplied by its share, so the points of the others count against a class.
    """
    rows, columns = grid.size
    cells = np.array([min(rows - 1, int(p.y * rows / height)) * columns + min(columns - 1, int(p.x * columns / width)) for p in points])
    blobs = np.exp(-0.5 * (path_lengths(grid, cells, settings.point_edge_weight) / settings.point_radius) ** 2)
    cam = np.stack([np.max([blob for blob, p in zip(blobs, points, strict=True) if p.name == name], axis=0) for name in names])
    share = cam / np.maximum(cam.sum(axis=0, keepdims=True), 1e-12)
    return (cam * share).astype(np.float32)
