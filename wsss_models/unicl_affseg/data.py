"""Pascal VOC as the method sees it: image labels for training, masks only for evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset

from ..data import Item, read_image, read_mask, voc
from ..engine import Context
from ..errors import InputError
from .config import Data
from .losses import IGNORE

CLASSES = voc.CLASSES


def train_items(context: Context) -> list[Item]:
    """The training list, or the images of it that the configuration names.

    Raises:
        InputError: a named image that the list lacks, or an image without label.
    """
    config = context.config.data
    items = voc.read(context.data, config.train, labels=config.labels)
    if config.names:
        by_name = {item.name: item for item in items}
        lost = [name for name in config.names if name not in by_name]
        if lost:
            raise InputError(f"data.names: the list {config.train} has no {', '.join(lost)}")
        items = [by_name[name] for name in config.names]
    return items


def val_items(context: Context) -> list[Item]:
    """The validation list; a test list has no masks."""
    return voc.read(context.data, context.config.data.val, masks="SegmentationClass")


def normalized(image: np.ndarray, config: Data) -> Tensor:
    """`[H, W, 3]` uint8 → `Tensor[3, H, W]` with ImageNet's mean and deviation."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]


def image_labels(item: Item, mask: np.ndarray | None, *, from_mask: bool) -> Tensor:
    """`Tensor[20]` bool.

    Args:
        from_mask: the image label may be taken from the true mask. Only where the masks are the supervision anyway, and for
            small sets without label files.

    Raises:
        InputError: there is no label.
    """
    if item.labels is not None:
        return torch.tensor(item.labels) > 0
    if from_mask and mask is not None:
        return torch.tensor([bool((mask == k).any()) for k in range(1, len(CLASSES))])
    raise InputError(
        f"labels: {item.name} has neither an Annotations/{item.name}.xml nor an entry in data.labels; "
        "data.labels_from_mask=true takes it from the true mask, which no published figure may do"
    )


def augment(image: Tensor, mask: Tensor, config: Data) -> tuple[Tensor, Tensor]:
    """Random scale, flip and crop; what the crop has beyond the image is zero (the mean colour), ignored in the mask."""
    factor = float(torch.empty(()).uniform_(*config.scale)) * (config.crop / max(mask.shape) if config.fit else 1)
    size = [max(1, round(side * factor)) for side in mask.shape]
    image = interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    mask = interpolate(mask[None, None].float(), size, mode="nearest")[0, 0].long()
    if config.flip and torch.rand(()) < 0.5:
        image, mask = image.flip(2), mask.flip(1)
    missing = [max(0, config.crop - side) for side in size]
    before = [m // 2 if config.fit else int(torch.randint(m + 1, ())) for m in missing]
    frame = (before[1], missing[1] - before[1], before[0], missing[0] - before[0])
    image, mask = pad(image, frame), pad(mask, frame, value=IGNORE)
    y, x = (int(torch.randint(side - config.crop + 1, ())) for side in mask.shape)
    return image[:, y : y + config.crop, x : x + config.crop], mask[y : y + config.crop, x : x + config.crop]


class Crops(Dataset):
    """(image `Tensor[3, crop, crop]`, mask or 0 for pixels of the image and 255 beyond, image label `Tensor[20]` bool)."""

    def __init__(self, context: Context):
        self.config, self.items = context.config.data, train_items(context)
        self.masks = context.config.train.supervision == "masks"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        item = self.items[index]
        image = read_image(item.image)
        needed = self.masks or (self.config.labels_from_mask and item.labels is None)
        if needed and item.mask is None:
            raise InputError(f"mask: {item.name} has none, which data.labels_from_mask and train.supervision=masks need")
        mask = read_mask(item.mask, image.shape[:2]) if needed else None
        present = image_labels(item, mask, from_mask=needed)
        area = mask if self.masks else np.zeros(image.shape[:2], np.uint8)
        return *augment(normalized(image, self.config), torch.from_numpy(area).long(), self.config), present
