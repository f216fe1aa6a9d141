"""PSPNet at output stride 8 on a timm encoder, with an auxiliary head."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import load_weights
from ..errors import UsageError
from .config import Segment


def _layer(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class PyramidPooling(nn.Module):
    """`Tensor[B, C, h, w]` → the input and its means over 1, 4, 9 and 36 bins, each as wide as `channels`, side by side."""

    bins = (1, 2, 3, 6)

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.levels = nn.ModuleList(_layer(inputs, channels, 1) for _ in self.bins)
        self.channels = inputs + len(self.bins) * channels

    def forward(self, x: Tensor) -> Tensor:
        pooled = [level(F.adaptive_avg_pool2d(x, bins)) for level, bins in zip(self.levels, self.bins, strict=True)]
        return torch.cat([x, *(F.interpolate(p, size=x.shape[-2:], mode="bilinear") for p in pooled)], dim=1)


class PSPNet(nn.Module):
    """`Tensor[B, 3, H, W]` → logits `Tensor[B, classes, H, W]`, and in training mode those of the auxiliary head as well."""

    def __init__(self, config: Segment, classes: int = 2):
        super().__init__()
        try:
            self.encoder = timm.create_model(config.encoder, features_only=True, output_stride=8, out_indices=(3, 4))
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            raise UsageError(f"segment.encoder {config.encoder}: timm has no such encoder at stride 8 ({error})") from None
        if config.pretrained is not None:
            missing, _ = self.encoder.load_state_dict(load_weights(Path(config.pretrained)), strict=False)
            if missing:
                raise UsageError(f"segment.pretrained {config.pretrained}: lacks {len(missing)} weights, such as {missing[0]}")
        third, fourth = self.encoder.feature_info.channels()
        pyramid = PyramidPooling(fourth, config.channels)
        merge = _layer(pyramid.channels, config.channels, 3)
        self.head = nn.Sequential(pyramid, merge, nn.Dropout2d(0.1), nn.Conv2d(config.channels, classes, 1))
        middle = max(1, third // 4)
        self.auxiliary = nn.Sequential(_layer(third, middle, 3), nn.Dropout2d(0.1), nn.Conv2d(middle, classes, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        third, fourth = self.encoder(x)
        main = F.interpolate(self.head(fourth), size=x.shape[-2:], mode="bilinear")
        if not self.training:
            return main
        return main, F.interpolate(self.auxiliary(third), size=x.shape[-2:], mode="bilinear")
