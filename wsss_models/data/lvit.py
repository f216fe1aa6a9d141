"""Images with masks and a sentence each: the layout of LViT (QaTa-COV19, MoNuSeg), and a generic one (BM-Seg and others).

LViT: `{Train,Val,Test}_Folder/{img,labelcol}` and `{Train,Val,Test}_text.xlsx` with the columns Image and Description.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .files import SUFFIXES

PARTS = {"train": "Train", "validation": "Val", "test": "Test"}
PREFIX = "mask_"


@dataclass(frozen=True)
class Pair:
    """An image with its mask and sentence.

    Args:
        name: unique, usable as a file name.
        mask: an image, or an `.xml` of outlines.
        text: `None` if the data set has none for it.
    """

    name: str
    image: Path
    mask: Path | None = None
    text: str | None = None


def key(name: Any) -> str:
    """What an image, its mask and its row of the table have in common: the name without ending and without `mask_`."""
    return Path(str(name).strip()).stem.removeprefix(PREFIX)


def read_texts(path: Path, columns: Sequence[str] = ("Image", "Description")) -> dict[str, str]:
    """Image → sentence of an `.xlsx` or `.csv` table with these columns.

    Raises:
        InputError: no such file, a damaged one, or other columns.
    """
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _xlsx_rows(path)
    titles = [str(title or "").strip().lower() for title in (rows[0] if rows else [])]
    try:
        image, text = (titles.index(column.lower()) for column in columns)
    except ValueError:
        raise InputError(f"table {path}: expected the columns {' and '.join(columns)}, got {', '.join(titles) or 'nothing'}") from None
    full = [row for row in rows[1:] if len(row) > max(image, text) and row[image] not in (None, "")]
    return {key(row[image]): str(row[text] or "").strip() for row in full}


def _csv_rows(path: Path) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except FileNotFoundError:
        raise InputError(f"table {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"table {path}: cannot be read ({error})") from None


def _xlsx_rows(path: Path) -> list[tuple]:
    import openpyxl

    try:
        return list(openpyxl.load_workbook(path, read_only=True, data_only=True).active.iter_rows(values_only=True))
    except FileNotFoundError:
        raise InputError(f"table {path}: there is no such file") from None
    except Exception as error:  # whatever a damaged file provokes in the reader
        raise InputError(f"table {path}: cannot be read as a spreadsheet ({type(error).__name__}: {error})") from None


def images_of(folder: Path) -> list[Path]:
    """The image files of a folder, in order.

    Raises:
        InputError: no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of images")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def pairs_of(images: Path, masks: Path | None, texts: dict[str, str]) -> list[Pair]:
    """Images with the masks and sentences of the same key.

    Raises:
        InputError: no image, or two of the same key.
    """
    by_key = {key(p.name): p for p in images_of(masks)} if masks is not None else {}
    found = [Pair(key(p.name), p, by_key.get(key(p.name)), texts.get(key(p.name))) for p in images_of(images)]
    if not found:
        raise InputError(f"{images}: the folder holds no image")
    if len({pair.name for pair in found}) != len(found):
        raise InputError(f"{images}: two images have the same name but for their ending")
    return found


def read(root: Path) -> dict[str, list[Pair]]:
    """The pairs by part: those of `train`, `validation` and `test` that are there.

    Raises:
        InputError: there is no training part.
    """
    found = {}
    for part, word in PARTS.items():
        folder = root / f"{word}_Folder"
        if folder.is_dir():
            table = next((p for p in (folder / f"{word}_text.xlsx", root / f"{word}_text.xlsx") if p.is_file()), None)
            found[part] = pairs_of(folder / "img", folder / "labelcol", read_texts(table) if table is not None else {})
    if "train" not in found:
        raise InputError(f"{root}: expected Train_Folder with img and labelcol, got none")
    return found


def read_generic(root: Path, images: str, masks: str, texts: str | None, columns: Sequence[str]) -> dict[str, list[Pair]]:
    """A folder of images, one of masks and, if there is one, a table of sentences: all as the part `all`."""
    table = read_texts(root / texts, columns) if texts is not None else {}
    return {"all": pairs_of(root / images, root / masks, table)}
