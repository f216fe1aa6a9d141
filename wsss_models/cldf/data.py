"""Volumes → slices of one size on disk, and the data sets of the training stages."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..data import brats, dicom, flare
from ..data.files import split
from ..data.volumes import Case, read_case
from ..engine import Context, Writing
from ..engine.writing import Saver
from ..errors import InputError, UsageError
from .config import Data

FOLDER = "slices"
_CACHED = 64


def cases(context: Context) -> list[Case]:
    """Every case of the data folder, in a fixed order."""
    config, root = context.config.data, context.data
    if config.dataset == "brats":
        return brats.read(root, config.modalities, config.seg)
    if config.dataset == "brats_export":
        return brats.read_export(root, config.modalities)
    return flare.read(root, config.organ) if config.dataset == "flare" else dicom.read(root)


def patient(name: str, dataset: str) -> str:
    """The patient of a case: an export names its slices PATIENT-Z."""
    return name.rpartition("-")[0] or name if dataset == "brats_export" else name


def parts(found: Sequence[Case], config: Data, seed: int) -> dict[str, list[str]]:
    """Names of the cases of `train`, `validation` and `test`; all slices of a patient are in one part.

    Raises:
        InputError: `test_cases` that are not there, or too few cases.
    """
    if config.parts == "folders":
        named: dict[str, list[str]] = {part: [c.name for c in found if c.part == part] for part in ("train", "validation", "test")}
        if not named["test"]:
            named["test"], named["validation"] = named["validation"], []
        return named
    people = list(dict.fromkeys(patient(c.name, config.dataset) for c in found))
    unknown = set(config.test_cases) - set(people)
    if unknown:
        raise InputError(f"data.test_cases: {', '.join(sorted(unknown))} not among the cases {', '.join(people[:8])}")
    if config.test_cases:
        rest = [p for p in people if p not in config.test_cases]
        held, train = split(rest, (config.validation, len(rest) - config.validation), seed)
        test = list(config.test_cases)
    else:
        left = len(people) - config.test - config.validation
        if left < 1:
            raise InputError(f"data: expected more than {config.test + config.validation} cases (test and validation), got {len(people)}")
        test, held, train = split(people, (config.test, config.validation, left), seed)
    return {
        part: [c.name for c in found if patient(c.name, config.dataset) in set(names)]
        for part, names in (("train", train), ("validation", held), ("test", test))
    }


def scaled(volume: np.ndarray, config: Data) -> np.ndarray:
    """Images `[Z, C, H, W]` → −1 … 1: CT by its window, MR by each modality's minimum and maximum (or percentiles) in the volume."""
    if config.dataset in ("flare", "dicom"):
        low, high = config.window
        return np.clip((volume - low) / (high - low), 0, 1) * 2 - 1
    scaled_ = np.empty_like(volume)
    for k in range(volume.shape[1]):
        plane = volume[:, k]
        low, high = _ends(plane, config.percentile)
        scaled_[:, k] = np.clip((plane - low) / max(high - low, 1e-7), 0, 1) * 2 - 1
    return scaled_


def _ends(volume: np.ndarray, percentile: float) -> tuple[float, float]:
    if percentile == 100:
        return float(volume.min()), float(volume.max())
    if not 50 < percentile < 100:
        raise UsageError(f"data.percentile: expected a number above 50, at most 100, got {percentile}")
    above = volume[volume > volume.min()]
    low, high = np.percentile(above, [100 - percentile, percentile]) if above.size else (0.0, 0.0)
    return float(low), float(high)


def resized(volume: Tensor, config: Data, *, mask: bool) -> Tensor:
    """`Tensor[Z, C, H, W]` → `Tensor[Z, C, size, size]`: the centre square, bilinear with antialiasing, masks nearest."""
    height, width = volume.shape[-2:]
    side = max(1, round(min(height, width) * config.crop))
    top, left = (height - side) // 2, (width - side) // 2
    square, size = volume[..., top : top + side, left : left + side], (config.size, config.size)
    if mask:
        return F.interpolate(square.float(), size, mode="nearest-exact").bool()
    return F.interpolate(square, size, mode="bilinear", antialias=True)


def prepare(context: Context) -> Writing:
    """The stage that writes each case as one `.npz`: slices, object masks, and the share of the object at full resolution."""
    found = {case.name: case for case in cases(context)}
    if len(found) != len(cases(context)):
        raise InputError(f"{context.data}: two cases have the same name")
    config = context.config.data

    def write(name: str) -> list[Saver]:
        volume, mask = read_case(found[name])
        if mask is None:
            raise InputError(f"case {name}: it has no mask; image labels are taken from it, and figures need it")
        images = resized(torch.from_numpy(np.ascontiguousarray(scaled(volume, config))), config, mask=False)
        small = resized(torch.from_numpy(np.ascontiguousarray(mask))[:, None], config, mask=True)[:, 0]
        content = (images > images.amin(dim=(0, 2, 3), keepdim=True) + 0.02).any(1).float().mean((1, 2))
        arrays = {"image": images.half().numpy(), "mask": np.packbits(small.numpy(), axis=-1)}
        arrays |= {"share": mask.mean(axis=(1, 2), dtype=np.float64).astype(np.float32), "content": content.numpy()}
        return [lambda file: np.savez(file, **arrays)]

    return Writing(list(found), lambda name: [f"{name}.npz"], write)


@dataclass(frozen=True)
class Slice:
    name: str
    case: str
    z: int
    positive: bool


class Slices:
    """The prepared slices of a run by part."""

    def __init__(self, context: Context):
        self.context, self.config = context, context.config.data
        self.folder = context.folder(FOLDER)
        self._load = functools.lru_cache(_CACHED)(self._read)
        there = [case for case in cases(context) if (self.folder / f"{case.name}.npz").is_file()]
        if not there:
            raise UsageError(f"stage {context.stage}: stage {FOLDER} must be run first")
        seed = context.seed("split")
        self.parts = {part: self._slices(names) for part, names in parts(there, self.config, seed).items()}
        self.by_name = {s.name: s for part in self.parts.values() for s in part}

    def _read(self, case: str) -> dict[str, np.ndarray]:
        path = self.folder / f"{case}.npz"
        try:
            with np.load(path, allow_pickle=False) as found:
                return {name: found[name] for name in ("image", "mask", "share", "content")}
        except Exception as error:  # a damaged file provokes many
            raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); delete it and run stage {FOLDER} again") from None

    def _slices(self, names: Sequence[str]) -> list[Slice]:
        found = []
        for name in names:
            volume = self._load(name)
            for z in range(0, len(volume["share"]), self.config.every):
                if volume["content"][z] >= self.config.content:
                    positive = bool(volume["share"][z] > self.config.positive)
                    found.append(Slice(f"{name}-{z:03d}", name, z, positive))
        return found

    def names(self, part: str, *, positive: bool | None = None) -> list[str]:
        return [s.name for s in self.parts[part] if positive is None or s.positive == positive]

    def image(self, name: str) -> Tensor:
        """`Tensor[C, size, size]` in −1 … 1."""
        where = self.by_name[name]
        return torch.from_numpy(self._load(where.case)["image"][where.z].astype(np.float32))

    def images(self, names: Sequence[str]) -> Tensor:
        return torch.stack([self.image(name) for name in names])

    def mask(self, name: str) -> np.ndarray:
        """`[size, size]` uint8: 1 where the object is."""
        where = self.by_name[name]
        return np.unpackbits(self._load(where.case)["mask"][where.z], axis=-1, count=self.config.size)

    def picture(self, name: str) -> np.ndarray:
        """`[size, size, 3]` uint8, the first modality."""
        grey = ((self.image(name)[0].clamp(-1, 1) + 1) * 127.5).byte().numpy()
        return np.repeat(grey[..., None], 3, axis=2)


class Labelled(Dataset):
    """(slice `Tensor[C, size, size]`, label 0 or 1); with `flip` mirrored at random from left to right."""

    def __init__(self, slices: Slices, names: Sequence[str], *, flip: bool):
        self.slices, self.names, self.flip = slices, list(names), flip

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name = self.names[index]
        image = self.slices.image(name)
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(2)
        return image, torch.tensor(int(self.slices.by_name[name].positive))


def npz(arrays: dict[str, Any]) -> Saver:
    """A saver of named arrays."""

    def save(file: io.BufferedIOBase) -> None:
        np.savez(file, **arrays)

    return save
