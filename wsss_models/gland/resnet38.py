"""ResNet38 of "Wider or Deeper" (model A1) with dilation: pre-activation blocks, stride 8, 4096 channels.

The names of the parameters are those of the published weights: `conv1a`, `b2` … `b7`, `bn7`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)


class Block(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv. The shortcut starts after the first ReLU where the shape changes, before it otherwise."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int = 1, first_dilation: int = 1, dilation: int = 1):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = _conv(inputs, middle, 3, stride, first_dilation)
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = _conv(middle, outputs, 3, dilation=dilation)
        self.conv_branch1 = _conv(inputs, outputs, 1, stride) if inputs != outputs or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        rectified = F.relu(self.bn_branch2a(x))
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(rectified)
        return shortcut + self.conv_branch2b1(F.relu(self.bn_branch2b1(self.conv_branch2a(rectified))))


class Bottleneck(nn.Module):
    """1×1 to a quarter, dilated 3×3 to half, 1×1 to the full width, with dropout before the last two."""

    def __init__(self, inputs: int, outputs: int, dilation: int, dropout: float):
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = _conv(inputs, outputs // 4, 1)
        self.bn_branch2b1 = nn.BatchNorm2d(outputs // 4)
        self.conv_branch2b1 = _conv(outputs // 4, outputs // 2, 3, dilation=dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(outputs // 2)
        self.conv_branch2b2 = _conv(outputs // 2, outputs, 1)
        self.conv_branch1 = _conv(inputs, outputs, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_branch2a(x))
        y = F.relu(self.bn_branch2b1(self.conv_branch2a(x)))
        y = F.relu(self.bn_branch2b2(self.conv_branch2b1(self.dropout(y))))
        return self.conv_branch1(x) + self.conv_branch2b2(self.dropout(y))


class ResNet38d(nn.Module):
    """`Tensor[B, 3, H, W]` → `Tensor[B, 4096, H/8, W/8]`, rectified. 105.07 M parameters.

    `stages()` gives the six parts for a caller that puts something between them.
    """

    channels = (128, 256, 512, 1024, 2048, 4096)
    attended = (2, 3, 4)
    """Which parts end stages 4, 5 and 6 of the paper's count."""

    def __init__(self):
        super().__init__()
        self.conv1a = _conv(3, 64, 3)
        plan = {2: (64, 128, 128, 3, 2), 3: (128, 256, 256, 3, 2), 4: (256, 512, 512, 6, 2), 5: (512, 512, 1024, 3, 1)}
        for stage, (inputs, middle, outputs, count, stride) in plan.items():
            dilation = 2 if stage == 5 else 1
            self.add_module(f"b{stage}", Block(inputs, middle, outputs, stride, 1, dilation))
            for i in range(1, count):
                self.add_module(f"b{stage}_{i}", Block(outputs, middle, outputs, 1, dilation, dilation))
        self.b6 = Bottleneck(1024, 2048, 4, 0.3)
        self.b7 = Bottleneck(2048, 4096, 4, 0.5)
        self.bn7 = nn.BatchNorm2d(4096)

    def stages(self) -> list[list[nn.Module]]:
        """b2 (with conv1a), b3, … b7 (with bn7 and ReLU)."""
        parts = [[m for name, m in self.named_children() if name.split("_")[0] == f"b{stage}"] for stage in range(2, 8)]
        return [[self.conv1a, *parts[0]], *parts[1:-1], [*parts[-1], self.bn7, nn.ReLU()]]

    def stem(self) -> list[nn.Module]:
        """What is frozen with pretrained weights."""
        return self.stages()[0]
