"""B-scans or crops of them, their structural counterparts, and the data sets of the training stages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as geometry

from ..data import duke, read_mask, resc, sliding
from ..data.files import split
from ..data.oct import BScan, grey
from ..engine import Context
from ..errors import InputError
from .config import Data

READERS: dict[str, Any] = {"resc": resc, "duke": duke}
PROMPTS = {
    "resc": (
        "an optical coherence tomography b-scan of healthy retina",
        "an optical coherence tomography b-scan with subretinal fluid",
        "an optical coherence tomography b-scan with retinal pigment epithelial detachment",
    ),
    "duke": (
        "an optical coherence tomography b-scan of healthy retina",
        "an optical coherence tomography b-scan with severe diabetic macular edema",
    ),
}
HEALTHY = "healthy"


@dataclass(frozen=True)
class View:
    """A B-scan, or a crop of it."""

    name: str
    scan: BScan
    window: tuple[slice, slice] | None = None


class Scans:
    """The views of a run by part (`train`, `validation`), with images, annotations, labels and structural inputs by name."""

    def __init__(self, context: Context):
        self.context, self.config = context, context.config.data
        self.reader = READERS[self.config.dataset]
        self.classes: tuple[str, ...] = self.reader.CLASSES
        self._whole = functools.lru_cache(self.config.cached_images)(self.reader.read_scan)
        self._marked = functools.lru_cache(self.config.cached_images)(self._annotation)
        self._healthy = functools.lru_cache(self.config.cached_images)(self._read_healthy)
        self.scans = self._scans()
        self.parts = {part: self._views(scans) for part, scans in self.scans.items()}
        self.views = {view.name: view for views in self.parts.values() for view in views}

    def _scans(self) -> dict[str, list[BScan]]:
        found, seed = self.reader.read(self.context.data), self.context.seed("split")
        if "all" in found:
            subjects = list(dict.fromkeys(scan.subject for scan in found["all"]))
            held, train = split(subjects, (self.config.validation, len(subjects) - self.config.validation), seed)
            found = {part: [s for s in found["all"] if s.subject in chosen] for part, chosen in (("train", train), ("validation", held))}
        found = {"train": found.get("train", []), "validation": found.get("validation", [])}
        if self.config.scans is not None:
            found["train"] = self._some(found["train"], self.config.scans)
        if not found["train"]:
            raise InputError(f"{self.context.data}: expected training B-scans, got none")
        return found

    def _some(self, scans: Sequence[BScan], count: int) -> list[BScan]:
        """With and without a lesion in turn, as long as there are both."""
        sick = [s for s in scans if any(self.scan_label(s))]
        well = [s for s in scans if s not in sick]
        mixed = [s for pair in zip(sick, well, strict=False) for s in pair]
        return [*mixed, *[s for s in scans if s not in mixed]][:count]

    def _views(self, scans: Sequence[BScan]) -> list[View]:
        if self.config.crop is None:
            return [View(scan.name, scan) for scan in scans]
        views = []
        for scan in scans:
            with self.context.tolerating(scan.name):
                shape, stride = self._whole(scan).shape, self.config.stride or self.config.crop
                for rows in _starts(shape[0], self.config.crop[0], stride[0]):
                    for columns in _starts(shape[1], self.config.crop[1], stride[1]):
                        views.append(View(f"{scan.name}_{rows.start:04d}_{columns.start:04d}", scan, (rows, columns)))
        return views

    def names(self, part: str, *, lesion: bool | None = None) -> list[str]:
        return [v.name for v in self.parts[part] if lesion is None or bool(self.label(v.name)[1:].any()) == lesion]

    def _cut(self, view: View, array: np.ndarray) -> np.ndarray:
        return array if view.window is None else array[view.window]

    def grey(self, name: str) -> np.ndarray:
        """`[H, W]` uint8."""
        view = self.views[name]
        return self._cut(view, self._whole(view.scan))

    def picture(self, name: str) -> np.ndarray:
        """`[H, W, 3]` uint8."""
        return np.repeat(self.grey(name)[..., None], 3, axis=2)

    def _annotation(self, scan: BScan) -> np.ndarray:
        return self.reader.read_label(scan, self._whole(scan).shape)

    def truth(self, name: str) -> np.ndarray:
        """`[H, W]` uint8 of classes."""
        view = self.views[name]
        return self._cut(view, self._marked(view.scan))

    def scan_label(self, scan: BScan) -> tuple[float, ...]:
        """Presence of each lesion in a B-scan: as stated, or from its annotation if that is allowed."""
        if scan.labels is not None:
            return scan.labels
        if not (self.config.labels_from_mask or self.config.crop is not None):
            raise InputError(f"image {scan.image}: no label is stated; set data.labels_from_mask=true to take it from the annotation")
        return tuple(float((self._marked(scan) == k).any()) for k in range(1, len(self.classes)))

    def label(self, name: str) -> Tensor:
        """`Tensor[K]`: 1 for the background, which every image holds, then the presence of each lesion."""
        view = self.views[name]
        if view.window is None:
            return torch.tensor([1.0, *self.scan_label(view.scan)])
        truth = self.truth(name)
        return torch.tensor([1.0, *(float((truth == k).mean() > self.config.cover) for k in range(1, len(self.classes)))])

    def primary(self, name: str) -> Tensor:
        """X, `Tensor[3, h, w]` in 0 … 1, not normalised."""
        return resized(torch.from_numpy(np.ascontiguousarray(self.grey(name)))[None].float() / 255, self.config.size).repeat(3, 1, 1)

    def layers(self, name: str) -> Tensor:
        """L, `Tensor[3, h, w]` in 0 … 255; zeros where none are used.

        Raises:
            InputError: there is no file, or it holds no layer probabilities.
        """
        if self.config.layers == "zero":
            return torch.zeros(3, *self.config.size)
        view = self.views[name]
        if view.scan.layers is None:
            raise InputError(f"image {view.scan.image}: it has no layer map; set data.layers=zero to go without")
        return torch.from_numpy(layer_map(view, self._whole(view.scan).shape, self.config.size)).repeat(3, 1, 1)

    def healthy(self, name: str) -> Tensor | None:
        """G(X), `Tensor[3, h, w]` in 0 … 1; `None` where none is used.

        Raises:
            InputError: there is no file.
        """
        if self.config.healthy == "zero":
            return None
        view = self.views[name]
        counterpart = self._cut(view, self._healthy(view.scan))
        return resized(torch.from_numpy(np.ascontiguousarray(counterpart))[None].float() / 255, self.config.size).repeat(3, 1, 1)

    def _read_healthy(self, scan: BScan) -> np.ndarray:
        path = self.context.folder(HEALTHY) / f"{scan.name}.png" if self.config.healthy == "generator" else scan.healthy
        if path is None:
            raise InputError(f"image {scan.image}: it has no healthy counterpart; set data.healthy=generator or zero")
        image = grey(path)
        if image.shape != self._whole(scan).shape:
            raise InputError(f"healthy counterpart {path}: expected the size of its image, got {image.shape[1]}×{image.shape[0]}")
        return image


def _starts(length: int, side: int, stride: int) -> list[slice]:
    return [slice(start, start + side) for start in sliding.starts(length, side, stride)]


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`Tensor[C, H, W]` → `Tensor[C, h, w]`, bilinear with antialiasing."""
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0] if tuple(image.shape[1:]) != tuple(size) else image


def layer_map(view: View, shape: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The most probable layer of each pixel, 0 … 255, `[1, h, w]`: class 11 is 0, divided by the image's maximum, nearest."""
    path = view.scan.layers
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"layers {path}: cannot be read ({error})") from None
    if found.ndim != 3 or found.shape[0] != 12 or found.dtype.kind not in "fiu":
        raise InputError(f"layers {path}: expected probabilities 12×h×w, got {found.dtype} of shape {'×'.join(map(str, found.shape))}")
    layer = found.argmax(0)
    layer[layer == 11] = 0
    level = torch.from_numpy(layer.astype(np.float32) / max(int(layer.max()), 1) * 255)[None, None]
    if view.window is not None:
        level = F.interpolate(level, shape, mode="nearest")[..., view.window[0], view.window[1]]
    return F.interpolate(level, size, mode="nearest")[0].numpy()


def structural_input(primary: Tensor, layers: Tensor, healthy: Tensor | None) -> Tensor:
    """X' = minmax(L + A) with A = 255 · |X − G(X)|, jointly over channels and pixels; a constant sum gives zeros (Eq. 1).

    Args:
        primary, healthy: `Tensor[3, h, w]` in 0 … 1; without a counterpart A = 0.
        layers: `Tensor[3, h, w]` in 0 … 255.
    """
    total = layers if healthy is None else layers + 255 * (primary - healthy).abs()
    low, high = total.amin(), total.amax()
    return (total - low) / (high - low).clamp(min=1e-7)


class Pairs(Dataset):
    """A dictionary of primary and structural input `Tensor[3, h, w]`, caption vector and label `Tensor[K]`."""

    def __init__(self, scans: Scans, names: Sequence[str], captions: dict[str, Tensor] | None, *, augment: bool):
        self.scans, self.names, self.captions, self.augment = scans, list(names), captions, augment
        config = scans.config
        self.jitter = v2.ColorJitter(config.jitter, config.jitter, config.jitter, config.hue)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name, config = self.names[index], self.scans.config
        primary, layers, healthy = self.scans.primary(name), self.scans.layers(name), self.scans.healthy(name)
        if self.augment:
            primary, layers, healthy = self._moved(primary, layers, healthy)
            jittered = self.jitter(primary)
            structural = structural_input(jittered if config.anomaly_after_jitter else primary, layers, healthy)
            primary = jittered
        else:
            structural = structural_input(primary, layers, healthy)
        found = {"primary": primary, "structural": structural, "label": self.scans.label(name)}
        return {**found, "caption": self.captions[self.scans.views[name].scan.name]} if self.captions is not None else found

    def _moved(self, primary: Tensor, layers: Tensor, healthy: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same flip and rotation for all."""
        config = self.scans.config
        stack = torch.cat([primary, layers, *([healthy] if healthy is not None else [])])
        if torch.rand(()) < config.flip:
            stack = stack.flip(2)
        if config.rotation:
            stack = geometry.rotate(stack, float((2 * torch.rand(()) - 1) * config.rotation))
        parts = stack.split(3)
        return parts[0], parts[1], parts[2] if healthy is not None else None


class Labelled(Dataset):
    """(image `Tensor[3, h, w]` in 0 … 1, pseudo-label `Tensor[h, w]`) for the segmentation network."""

    def __init__(self, scans: Scans, names: Sequence[str], folder, size: tuple[int, int]):
        self.scans, self.names, self.folder, self.size = scans, list(names), folder, size
        config: Data = scans.config
        self.jitter = v2.ColorJitter(config.jitter, config.jitter, config.jitter, config.hue)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name, config = self.names[index], self.scans.config
        scan = self.scans.grey(name)
        label = torch.from_numpy(read_mask(self.folder / f"{name}.png", scan.shape))[None].float()
        image = resized(torch.from_numpy(np.ascontiguousarray(scan))[None].float() / 255, self.size)
        label = F.interpolate(label[None], self.size, mode="nearest")[0]
        if torch.rand(()) < config.flip:
            image, label = image.flip(2), label.flip(2)
        if config.rotation:
            angle = float((2 * torch.rand(()) - 1) * config.rotation)
            image, label = geometry.rotate(image, angle), geometry.rotate(label, angle, fill=[255.0])
        return self.jitter(image.repeat(3, 1, 1)), label[0].long()
