"""A stage that writes files, item by item: pseudo-labels, predictions, cached features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from ..errors import InputError
from ..refine.outputs import whole_file
from ..refine.pictures import mask_image
from .context import Context
from .stream import derive, local_seed

Saver = Callable[[BinaryIO], None]


@dataclass
class Writing:
    """What a writing stage's `build` returns.

    Args:
        items: names, each once; the processes share them out.
        files: `name -> file names` in the stage's folder (they may have sub-folders). An item whose files are all there is done.
        write: `name -> savers`, one for each file, in order; a saver takes an open binary file. See `png` and `npy`. Runs
            without gradient. `InputError` says that this item cannot be read.
        folder: instead of the stage's.
    """

    items: Sequence[str]
    files: Callable[[str], Sequence[str]]
    write: Callable[[str], Sequence[Saver]]
    folder: Path | None = None

    def run(self, context: Context) -> dict[str, Any]:
        folder, written = self.folder or context.folder(), 0
        repeated = len(self.items) - len(set(self.items))
        if repeated:
            raise InputError(f"stage {context.stage}: {repeated} names occur more than once")
        todo = [(name, [folder / file for file in self.files(name)]) for name in context.shard(self.items)]
        todo = [(name, paths) for name, paths in todo if not all(path.is_file() for path in paths)]
        with torch.no_grad():
            for name, paths in tqdm(todo, unit="item", desc=context.stage, disable=None if context.main else True):
                with context.tolerating(name), local_seed(derive(context.config.seed, context.stage, name)):
                    self._save(paths, self.write(name))
                    written += 1
        context.accelerator.wait_for_everyone()
        return {"items": len(self.items), "written": sum(context.gather([written]))}

    def _save(self, paths: Sequence[Path], savers: Sequence[Saver]) -> None:
        for path, saver in zip(paths, savers, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as file:
                saver(file)


def png(label: np.ndarray | torch.Tensor) -> Saver:
    """A saver of a label map `[H, W]` as an indexed PNG in Pascal VOC's colours."""
    array = label.cpu().numpy() if isinstance(label, torch.Tensor) else label
    return lambda file: mask_image(np.ascontiguousarray(array, np.uint8)).save(file, "PNG")


def npy(array: np.ndarray | torch.Tensor) -> Saver:
    """A saver of an array as `.npy`."""
    plain = array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    return lambda file: np.save(file, plain, allow_pickle=False)
