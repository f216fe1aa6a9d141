"""Images or crops with masks and sentences, and the data sets of the training stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as geometry

from ..data import lvit, monuseg, qata, read_image, read_lines, read_mask, sliding
from ..data.files import split
from ..data.lvit import Pair
from ..engine import Context
from ..errors import InputError, UsageError
from .config import Data
from .encoders import Tokens

CLASSES = ("background", "foreground")


@dataclass(frozen=True)
class View:
    """An image, or a square of it."""

    name: str
    pair: Pair
    window: tuple[slice, slice] | None = None


class Images:
    """The pairs of a run by part, the views of the training part, and which of them are labelled."""

    def __init__(self, context: Context):
        self.context, self.config = context, context.config.data
        self._whole = functools.lru_cache(self.config.cached_images)(lambda pair: read_image(pair.image))
        self._marked = functools.lru_cache(self.config.cached_images)(self._annotation)
        self.parts = self._parts()
        self.pairs = {pair.name: pair for part in self.parts.values() for pair in part}
        self.views = {view.name: view for view in self._views(self.parts["train"])}
        self.labelled = self._labelled()

    def _parts(self) -> dict[str, list[Pair]]:
        config, root, seed = self.config, self.context.data, self.context.seed("split")
        if config.dataset == "pairs":
            found = lvit.read_generic(root, config.images, config.masks, config.texts, config.columns)
        else:
            found = {"lvit": lvit, "qata": qata, "monuseg": monuseg}[config.dataset].read(root)
        if "all" in found:
            every = found["all"]
            count = round(config.test * len(every))
            found["test"], found["train"] = split(every, (count, len(every) - count), seed)
        if "validation" not in found:
            count = round(config.validation * len(found["train"]))
            found["validation"], found["train"] = split(found["train"], (count, len(found["train"]) - count), seed)
        if config.test_on_validation:
            if self.context.config.semi.patience is not None:
                raise UsageError("data.test_on_validation: the validation images choose the weights; set semi.patience=null")
            found = {"train": found["train"], "test": [*found["validation"], *found.get("test", [])]}
        return {part: found.get(part, []) for part in ("train", "validation", "test")}

    def _views(self, pairs: Sequence[Pair]) -> list[View]:
        if self.config.crop is None:
            return [View(pair.name, pair) for pair in pairs]
        side, stride, views = self.config.crop, self.config.stride or self.config.crop, []
        for pair in pairs:
            with self.context.tolerating(pair.name):
                for rows, columns in sliding.windows(self._whole(pair).shape[:2], side, stride):
                    views.append(View(f"{pair.name}_{rows.start:04d}_{columns.start:04d}", pair, (rows, columns)))
        return views

    def _labelled(self) -> list[str]:
        """
        Raises:
            InputError: names in `split_file` that are no training images, or a share that leaves none.
        """
        names = list(self.views)
        if self.config.split_file is not None:
            chosen = read_lines(self.context.data / self.config.split_file)
            unknown = [lvit.key(name) for name in chosen if lvit.key(name) not in self.views]
            if unknown:
                raise InputError(f"data.split_file: {len(unknown)} names are no training images, such as {unknown[0]}")
            return [lvit.key(name) for name in chosen]
        count = round(self.config.labelled * len(names))
        if not 0 < count <= len(names):
            raise InputError(f"data.labelled: {self.config.labelled} of {len(names)} training images are {count}; expected at least one")
        return split(names, (count,), self.context.seed("labelled"))[0]

    def unlabelled(self) -> list[str]:
        chosen = set(self.labelled)
        return [name for name in self.views if name not in chosen]

    def names(self, part: str) -> list[str]:
        """Whole images, those that have a mask."""
        return [pair.name for pair in self.parts[part] if pair.mask is not None]

    def _annotation(self, pair: Pair) -> np.ndarray:
        size = self._whole(pair).shape[:2]
        if pair.mask is None:
            raise InputError(f"image {pair.image}: it has no mask")
        if pair.mask.suffix.lower() == ".xml":
            return monuseg.read_mask(pair.mask, size)
        return (read_mask(pair.mask, size) > 0).astype(np.uint8)

    def picture(self, name: str) -> np.ndarray:
        """A whole image `[H, W, 3]` uint8."""
        return self._whole(self.pairs[name])

    def truth(self, name: str) -> np.ndarray:
        """A whole image's mask `[H, W]` uint8."""
        return self._marked(self.pairs[name])

    def text(self, name: str) -> str:
        """
        Raises:
            InputError: the data set has no sentence for it.
        """
        pair = self.views[name].pair
        if not pair.text:
            raise InputError(f"image {pair.image}: it has no sentence in the table; set semi.text=false to go without text")
        return pair.text

    def image(self, name: str) -> Tensor:
        """A view's pixels, normalised: `Tensor[3, S, S]`."""
        view = self.views[name]
        pixels = self._whole(view.pair)
        return to_input(pixels if view.window is None else pixels[view.window], self.config)

    def mask(self, name: str) -> Tensor:
        """A view's mask: `Tensor[S, S]` float32, 0 and 1."""
        view = self.views[name]
        mask = self._marked(view.pair)
        part = torch.from_numpy(np.ascontiguousarray(mask if view.window is None else mask[view.window]))
        return F.interpolate(part[None, None].float(), (self.config.size,) * 2, mode="nearest")[0, 0]


def to_input(pixels: np.ndarray, config: Data) -> Tensor:
    """`[H, W, 3]` uint8 → `Tensor[3, S, S]`, bilinear with antialiasing, normalised."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
    size = (config.size, config.size)
    if image.shape[1:] != size:
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    return (image - mean) / std


def turned(config: Data) -> Callable[[Tensor, float], Tensor]:
    """One random flip and turn, or rotation, to be applied to everything that belongs together: `(tensor [C, …], fill) → tensor`."""
    if torch.rand(()) < 0.5:
        quarter, flip = int(torch.randint(4, ())), int(torch.randint(3, ()))

        def turn(x: Tensor, fill: float) -> Tensor:
            x = torch.rot90(x, quarter, (-2, -1))
            return x.flip(-flip) if flip else x

        return turn
    angle = float((2 * torch.rand(()) - 1) * config.rotation)
    return lambda x, fill: geometry.rotate(x, angle, fill=[fill] * x.shape[0])


class Captioned(Dataset):
    """A dictionary of a view, its second view, and its sentence's tokens."""

    def __init__(self, images: Images, names: Sequence[str], tokens: dict[str, Tokens], *, augment: bool = True):
        self.images, self.names, self.tokens, self.augment = images, list(names), tokens, augment

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        name = self.names[index]
        image, tokens = self.images.image(name), self.tokens[name]
        second = turned(self.images.config)(image, 0.0) if self.augment else image
        return {"image": image, "second": second, "ids": tokens.ids[0], "mask": tokens.mask[0], "word": tokens.word[0]}


class Semi(Dataset):
    """A labelled view with its mask and, drawn with it, an unlabelled one with its text-guided logits.

    Args:
        guide: `name → Tensor[s, s]` of logits; `None` without text.
        unlabelled: empty for the labelled ones alone.
    """

    def __init__(self, images: Images, labelled: Sequence[str], unlabelled: Sequence[str], guide: Callable[[str], Tensor] | None):
        self.images, self.labelled, self.unlabelled, self.guide = images, list(labelled), list(unlabelled), guide
        jitter = images.context.config.semi.jitter
        self.jitter = v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter / 3)) if jitter else None

    def __len__(self) -> int:
        return max(len(self.labelled), len(self.unlabelled))

    def __getitem__(self, index: int) -> dict[str, Any]:
        config = self.images.config
        # The longer list is gone through in order, of the other one a member is drawn.
        chosen = self.labelled[index] if len(self.labelled) == len(self) else self.labelled[int(torch.randint(len(self.labelled), ()))]
        turn = turned(config)
        found = {"image": turn(self.images.image(chosen), 0.0), "mask": turn(self.images.mask(chosen)[None], 0.0)[0]}
        if not self.unlabelled:
            return found
        other = (
            self.unlabelled[index] if len(self.unlabelled) == len(self) else self.unlabelled[int(torch.randint(len(self.unlabelled), ()))]
        )
        turn = turned(config)
        found["other"] = turn(self.images.image(other), 0.0)
        if self.jitter is not None:
            mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
            found["distorted"] = (self.jitter((found["other"] * std + mean).clamp(0, 1)) - mean) / std
        if self.guide is not None:
            logit = F.interpolate(self.guide(other)[None, None], (config.size,) * 2, mode="bilinear", align_corners=False)[0]
            found["guide"] = turn(logit, 0.0)[0]
        return found
