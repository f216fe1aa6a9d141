"""PASCAL VOC 2012: `JPEGImages`, `SegmentationClass[Aug]`, `Annotations`, `ImageSets`, with lists of ids or of SBD path pairs."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from ..errors import InputError
from ..refine.classes import VOC
from .files import Item, find_one, inside, read_lines, read_table

CLASSES = ("background", *VOC)


def home(root: Path) -> Path:
    """The folder that holds `JPEGImages`: `root` itself, or `VOC2012` or `VOCdevkit/VOC2012` in it.

    Raises:
        InputError: none of them.
    """
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise InputError(f"{root}: expected JPEGImages in it, in VOC2012 or in VOCdevkit/VOC2012")


def read(root: Path, listed: str, *, masks: str = "SegmentationClassAug", labels: str | None = None) -> list[Item]:
    """The images of a list, with masks where they are there, and the labels of the 20 classes.

    Args:
        root: see `home`.
        listed: name in `ImageSets/Segmentation` without ending, or a path inside the data folder. A line is an id, or the
            paths of image and mask (SBD's lists).
        masks: folder of the masks of ids.
        labels: `.npy` dictionary id → 20 numbers, inside the data folder. Without: `Annotations/ID.xml` where it is there.

    Raises:
        InputError: a file that is missing or damaged, a path that leads out of the data folder, an id without label.
    """
    folder = home(root)
    name = Path(listed).name.removesuffix(".txt")
    path = inside(folder, listed) if listed.endswith(".txt") else folder / "ImageSets" / "Segmentation" / f"{name}.txt"
    table = read_table(inside(folder, labels)) if labels is not None else None
    items = []
    for line in read_lines(path):
        first, *rest = line.split()
        image = inside(folder, first) if "/" in first else find_one(folder / "JPEGImages", first)
        mask = inside(folder, rest[0]) if rest else inside(folder, f"{masks}/{image.stem}.png")
        items.append(Item(image.stem, image, mask if mask.is_file() else None, _labels(folder, image.stem, table)))
    return items


def _labels(folder: Path, name: str, table: dict | None) -> tuple[float, ...] | None:
    if table is not None:
        if name not in table or table[name].shape != (len(VOC),):
            got = "nothing" if name not in table else f"an array of shape {table[name].shape}"
            raise InputError(f"labels: expected {len(VOC)} numbers for {name}, got {got}")
        return tuple(map(float, table[name]))
    path = folder / "Annotations" / f"{name}.xml"
    return read_xml(path) if path.is_file() else None


def read_xml(path: Path) -> tuple[float, ...]:
    """Which of the 20 classes an annotation names, as 0 and 1. Objects marked as difficult count.

    Raises:
        InputError: not XML, entities (which could read other files or fill the memory), an unknown class.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise InputError(f"annotation {path}: expected plain XML, got one that declares entities")
        found = {(node.text or "").strip() for node in ElementTree.fromstring(text).findall("./object/name")}
    except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
        raise InputError(f"annotation {path}: cannot be read ({error})") from None
    unknown = found - set(VOC)
    if unknown:
        raise InputError(f"annotation {path}: expected classes of Pascal VOC, got {', '.join(sorted(unknown))}")
    return tuple(float(name in found) for name in VOC)
