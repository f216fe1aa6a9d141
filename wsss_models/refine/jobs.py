"""From the command line to one job for each image."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from . import outputs
from .classes import ClassTable, read_classes
from .images import SUFFIXES
from .points import Point, parse_point, read_points


@dataclass(frozen=True)
class Job:
    """One image with what is known about it. Files are looked up here and read later, image by image."""

    image: Path
    cam: Path | None
    points: tuple[Point, ...]
    features: Path | None

    @property
    def stem(self) -> str:
        return self.image.stem


def plan(args: argparse.Namespace, folder: Path) -> tuple[list[Job], ClassTable]:
    """The jobs of a call of `wsss refine`, and its classes.

    Raises:
        UsageError: what was asked for cannot be meant.
    """
    images = _images(args.images)
    _check_outputs(images, folder)
    table = ClassTable(read_classes(args.classes))
    if sum((args.cam is not None, bool(args.point), args.points is not None)) != 1:
        given = [name for name, value in (("--cam", args.cam), ("--point", args.point), ("--points", args.points)) if value]
        raise UsageError(f"expected one of --cam, --point (with one image) and --points, got {' and '.join(given) or 'none'}")
    if args.point and len(images) > 1:
        raise UsageError(f"--point: expected one image, got {len(images)} (use --points FILE.json)")
    cams = _files("--cam", args.cam, images)
    features = _files("--features", args.features, images)
    listed = read_points(args.points) if args.points is not None else {}
    jobs = []
    for image in images:
        points = [parse_point(text) for text in args.point or ()] or listed.get(image.name) or listed.get(image.stem) or []
        jobs.append(Job(image, cams[image], tuple(points), features[image]))
    named = [p.name for job in jobs for p in job.points]
    everywhere = [p.name for points in listed.values() for p in points]  # so that the images at hand do not change the numbers
    table.add(everywhere or named, "--points" if listed else "--point")
    return jobs, table


def _images(given: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UsageError(f"IMAGE {path}: the folder holds no image ({', '.join(SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    return found


def _check_outputs(images: Sequence[Path], folder: Path) -> None:
    owner: dict[str, Path] = {}
    for image in images:
        for path in outputs.paths(folder, image.stem, pictures=True).values():
            if path.name in owner:
                raise UsageError(
                    f"two images would both write {path}: {owner[path.name]} and {image}; rename one, or use two calls with two --out folders"
                )
            owner[path.name] = image
    sources = {image.resolve(): image for image in images}
    for name in owner:
        if (folder / name).resolve() in sources:
            raise UsageError(
                f"--out {folder}: {name} would overwrite the image {sources[(folder / name).resolve()]}; choose another folder"
            )


def _files(option: str, given: Path | None, images: Sequence[Path]) -> dict[Path, Path | None]:
    """The file for each image: the one that was given, or the one with its stem in the folder that was given."""
    if given is None:
        return dict.fromkeys(images)
    if not given.is_dir():
        if not given.exists():
            raise UsageError(f"{option} {given}: there is no such file or folder")
        if len(images) > 1:
            raise UsageError(f"{option} {given}: expected a folder with a file for each of {len(images)} images, got one file")
        return {images[0]: given}
    found: dict[Path, Path | None] = {}
    for image in images:
        candidates = [given / f"{image.stem}{suffix}" for suffix in (".npz", ".npy")]
        found[image] = next((path for path in candidates if path.is_file()), candidates[-1])
    return found
