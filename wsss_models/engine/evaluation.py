"""A stage that compares label maps with the truth: figures, a CSV of every image, and a sheet of pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..errors import InputError
from ..refine.outputs import whole_file
from ..refine.pictures import overlay
from .context import Context
from .metrics import Confusion, figures

_PANEL, _ROWS, _GAP = 240, 12, 6
Array = Callable[[str], np.ndarray]


@dataclass
class Evaluation:
    """What an evaluating stage's `build` returns.

    Args:
        items: names; the processes share them out.
        truth, prediction: `name -> [H, W]` integers.
        classes: names of the pixel values 0, 1, …
        image: `name -> [H, W, 3]` uint8, for the sheet; `None` makes none.
        ignore: pixel value of the truth that does not count.
        more: further figures, computed by the method on one process.
    """

    items: Sequence[str]
    truth: Array
    prediction: Array
    classes: Sequence[str]
    image: Array | None = None
    ignore: int = 255
    more: Callable[[], dict[str, Any]] | None = None

    def run(self, context: Context) -> dict[str, Any]:
        """Pooled metrics; leaves `images.csv`, `metrics.csv` and `sheet.png` in the stage's folder."""
        pooled, rows = evaluate_masks(context, self.items, self.truth, self.prediction, self.classes, self.ignore)
        found = {"images": len(rows), **pooled.metrics()}
        if context.main:
            _write_tables(context.folder(), rows, found)
            if self.image is not None:
                self._sheet(context)
            found |= self.more() if self.more is not None else {}
        context.accelerator.wait_for_everyone()
        return found

    def _sheet(self, context: Context) -> None:
        """Image, truth and prediction of the first images, side by side."""
        rows = []
        for name in self.items[:_ROWS]:
            with context.tolerating(name):
                image, truth, found = self.image(name), self.truth(name), self.prediction(name)
                panels = [Image.fromarray(image), *(_painted(image, m, self.ignore) for m in (truth, found))]
                size = (_PANEL, max(1, round(_PANEL * image.shape[0] / image.shape[1])))
                rows.append([panel.resize(size, Image.Resampling.BILINEAR) for panel in panels])
        height = sum(row[0].height + _GAP for row in rows) + _GAP
        sheet, top = Image.new("RGB", (3 * (_PANEL + _GAP) + _GAP, height), "white"), _GAP
        for row in rows:
            for column, panel in enumerate(row):
                sheet.paste(panel, (_GAP + column * (_PANEL + _GAP), top))
            top += row[0].height + _GAP
        with whole_file(context.folder() / "sheet.png") as file:
            sheet.save(file, "PNG")


def _painted(image: np.ndarray, label: np.ndarray, ignore: int) -> Image.Image:
    shown = np.where(label == ignore, 0, label).astype(np.uint8)
    return overlay(np.ascontiguousarray(image), shown)


def evaluate_masks(
    context: Context, items: Sequence[str], truth: Array, prediction: Array, classes: Sequence[str], ignore: int = 255
) -> tuple[Confusion, list[dict[str, Any]]]:
    """The pooled confusion matrix of all processes, and one row of figures per image."""
    pooled, rows = Confusion(classes, ignore), []
    for name in tqdm(context.shard(items), unit="image", desc=context.stage, disable=None if context.main else True):
        with context.tolerating(name):
            try:
                own = figures(pooled.add(truth(name), prediction(name)))
            except ValueError as error:
                raise InputError(f"{name}: {error}") from None
            scalars = {k: v for k, v in own.items() if not isinstance(v, list)}
            rows.append({"image": name, **scalars, **{f"iou_{c}": v for c, v in zip(classes, own["iou"], strict=True)}})
    matrix = torch.from_numpy(pooled.matrix).to(context.device)
    pooled.matrix = context.accelerator.reduce(matrix, "sum").cpu().numpy()
    place = {name: i for i, name in enumerate(items)}
    return pooled, sorted(context.gather(rows), key=lambda row: place[row["image"]])


def _write_tables(folder: Path, rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    flat = [(k, c, x) for k, v in found.items() for c, x in (v.items() if isinstance(v, dict) else [("", v)])]
    tables = {"images.csv": [list(rows[0]), *[list(r.values()) for r in rows]] if rows else [["image"]]}
    tables["metrics.csv"] = [["metric", "class", "value"], *flat]
    for name, table in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        with whole_file(folder / name) as file:
            file.write(text.getvalue().encode())
