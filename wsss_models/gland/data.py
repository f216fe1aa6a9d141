"""The three gland data sets behind one interface, patches with labels for the classifier, crops for the segmentation network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ..data import Item, ebhi, glas, read_image, read_mask, rings, sliding
from ..data.files import split
from ..engine import Context
from ..errors import InputError
from .config import Data, Segment

CLASSES = glas.CLASSES
_READERS = {"glas": glas, "rings": rings, "ebhi": ebhi}


class Images:
    """Images and annotations by name, for one run. Parts: `train`, `validation`, `test`."""

    def __init__(self, context: Context):
        self.context, self.config = context, context.config.data
        self.parts = self._parts()
        self.items = {item.name: item for part in self.parts.values() for item in part}
        self.image = functools.lru_cache(self.config.cached_images)(self._image)
        self.label = functools.lru_cache(self.config.cached_images)(self._label)

    def _parts(self) -> dict[str, list[Item]]:
        config, root, seed = self.config, self.context.data, self.context.seed("split")
        if config.dataset == "ebhi":
            every = ebhi.read(root)
            count = round(len(every) * config.ebhi_test)
            test, train = split(every, (count, len(every) - count), seed)
        else:
            reader = _READERS[config.dataset]
            train, test = reader.read(root, "train"), reader.read(root, "test")
        held, train = split(train, (config.validation, len(train) - config.validation), seed)
        used = max(1, round(len(train) * config.fraction))
        return {"train": split(train, (used,), seed)[0], "validation": held, "test": test}

    def names(self, part: str) -> list[str]:
        return [item.name for item in self.parts[part]]

    def _image(self, name: str) -> np.ndarray:
        return read_image(self.items[name].image)

    def _label(self, name: str) -> np.ndarray:
        return _READERS[self.config.dataset].read_label(self.items[name], self.image(name).shape[:2])


def to_tensor(image: np.ndarray) -> Tensor:
    """`[H, W, 3]` uint8 → `Tensor[3, H, W]` in 0 … 1."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255


def normalizer(config: Data) -> Callable[[Tensor], Tensor]:
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    return lambda x: (x - mean.to(x.device)) / std.to(x.device)


def distortion(jitter: float, blur: float) -> v2.Transform:
    """The random distortion and blur of both stages."""
    blurred = v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], blur)
    return v2.Compose([v2.ColorJitter(jitter, jitter, jitter, jitter / 3), blurred])


@dataclass(frozen=True)
class Patch:
    name: str
    rows: slice
    columns: slice
    label: tuple[float, ...]


def patches(images: Images, names: Sequence[str]) -> list[Patch]:
    """The patches of the images with their labels; near-white ones are dropped.

    The labels are those of the patch's own annotation, as the published protocol makes them: the method sees nothing else of it.
    """
    config, found = images.config, []
    for name in names:
        with images.context.tolerating(name):
            image, label = images.image(name), images.label(name)
            for rows, columns in sliding.windows(label.shape, config.side, config.stride):
                if image[rows, columns].mean() <= 255 * config.white:
                    share = np.bincount(label[rows, columns].ravel(), minlength=len(CLASSES)) / label[rows, columns].size
                    found.append(Patch(name, rows, columns, tuple((share > config.cover).astype(float))))
    return found


class PatchData(Dataset):
    """(patch `Tensor[3, resize, resize]`, label `Tensor[2]`)."""

    def __init__(self, images: Images, names: Sequence[str], augment: v2.Transform | None):
        self.images, self.patches = images, patches(images, names)
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), augment] if augment is not None else []
        size = images.config.resize
        self.transform = v2.Compose([v2.Resize((size, size), antialias=True), *flips])
        self.normalize = normalizer(images.config)

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        patch = self.patches[index]
        pixels = to_tensor(self.images.image(patch.name)[patch.rows, patch.columns])
        return self.normalize(self.transform(pixels).clamp(0, 1)), torch.tensor(patch.label)


class CropData(Dataset):
    """(crop `Tensor[3, crop, crop]`, pseudo-label `Tensor[crop, crop]` with 255 where the image ends)."""

    def __init__(self, images: Images, names: Sequence[str], masks: Path, config: Segment, augment: v2.Transform):
        self.images, self.names, self.masks, self.size, self.augment = images, list(names), masks, config.crop, augment
        self.normalize = normalizer(images.config)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = to_tensor(self.images.image(self.names[index]))
        label = torch.from_numpy(read_mask(self.masks / f"{self.names[index]}.png", image.shape[1:])).long()
        (top, left), size = ((_start(n, self.size) for n in label.shape), self.size)
        image, label = image[:, top : top + size, left : left + size], label[top : top + size, left : left + size]
        image = self.normalize(self.augment(image).clamp(0, 1))
        below, right = size - label.shape[0], size - label.shape[1]
        if below or right:
            image = torch.nn.functional.pad(image, (0, right, 0, below))
            label = torch.nn.functional.pad(label, (0, right, 0, below), value=255)
        for dim in (1, 2):
            if torch.rand(()) < 0.5:
                image, label = image.flip(dim), label.flip(dim - 1)
        return image, label


def _start(length: int, window: int) -> int:
    return int(torch.randint(max(length - window, 0) + 1, ()))


def usable(images: Images, names: Sequence[str], masks: Path) -> list[str]:
    """The images that have a pseudo-mask.

    Raises:
        InputError: none has.
    """
    found = [name for name in names if (masks / f"{name}.png").is_file()]
    if not found:
        raise InputError(f"{masks}: expected the pseudo-masks of the training images, got none")
    return found
