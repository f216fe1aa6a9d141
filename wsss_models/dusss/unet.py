"""The segmentation network, its moving average, and the losses on labelled and unlabelled images (Eq. 12–17)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .config import Semi


def _convs(inside: int, outside: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
        inside = outside
    return nn.Sequential(*layers)


class _Up(nn.Module):
    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.up, self.convs = nn.ConvTranspose2d(inside // 2, inside // 2, 2, 2), _convs(inside, outside, 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.convs(torch.cat([skip, self.up(x)], 1))


class UNet(nn.Module):
    """Widths w, 2w, 4w, 8w, 8w: 14.75 M at w = 64. `Tensor[B, 3, H, W]` → logits `Tensor[B, H, W]`; sides are multiples of 16."""

    def __init__(self, width: int):
        super().__init__()
        w = width
        self.stem = _convs(3, w, 1)
        self.down = nn.ModuleList(_convs(a, b, 2) for a, b in ((w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w), (8 * w, 8 * w)))
        self.up = nn.ModuleList(_Up(a, b) for a, b in ((16 * w, 4 * w), (8 * w, 2 * w), (4 * w, w), (2 * w, w)))
        self.head = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))
        for up in self.up:
            x = up(x, skips.pop())
        return self.head(x)[:, 0]


class MeanTeacher(nn.Module):
    """Student and teacher, whose weights follow with α = min(1 − 1 / (step + 1), `ema`). `forward` is the student's."""

    def __init__(self, config: Semi):
        super().__init__()
        self.student = UNet(config.width)

        def follow(averaged, current, count) -> None:
            alpha = min(1 - 1 / (float(count) + 1), config.ema)
            torch._foreach_lerp_(list(averaged), list(current), 1 - alpha)

        self.average = AveragedModel(self.student, multi_avg_fn=follow)
        self.average.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    @property
    def teacher(self) -> UNet:
        return self.average.module

    def follow(self) -> None:
        self.average.update_parameters(self.student)


def pixel_loss(logit: Tensor, target: Tensor, kind: str) -> Tensor:
    """Of logits against targets in 0 … 1, which may be soft.

    `"balanced"`: half Dice, half cross-entropy averaged over positives and negatives apart, weight ½ each (a kind that is absent
    adds nothing). `"bce"`: binary cross-entropy.
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logit, target)
    positive = (target * F.softplus(-logit)).sum() / target.sum().clamp(min=1e-6)
    negative = ((1 - target) * F.softplus(logit)).sum() / (1 - target).sum().clamp(min=1e-6)
    probability = logit.sigmoid()
    dice = 1 - (2 * (probability * target).sum() + 1e-5) / (probability.sum() + target.sum() + 1e-5)
    return 0.5 * dice + 0.5 * (0.5 * positive + 0.5 * negative)


def merged_target(teacher: Tensor, text: Tensor, *, literal: bool) -> Tensor:
    """What the student learns from on unlabelled images (Eq. 15).

    σ(teacher's logit + text's logit); `literal`: the sigmoid of the sum of the two probabilities, as printed.
    """
    return (teacher.sigmoid() + text.sigmoid()).sigmoid() if literal else (teacher + text).sigmoid()


def semi_loss(student: Tensor, teacher: Tensor, text: Tensor | None, config: Semi) -> Tensor:
    """Eq. 15–17: the mean of the loss against the merged target and of that against the text-guided mask; without text, against
    the teacher alone. Targets carry no gradient."""
    if text is None:
        return pixel_loss(student, teacher.detach().sigmoid(), config.soft_loss)
    merged = pixel_loss(student, merged_target(teacher, text, literal=config.literal).detach(), config.soft_loss)
    return (merged + pixel_loss(student, text.detach().sigmoid(), config.soft_loss)) / 2
