"""The classifier: a trunk at stride 8 with attention after three of its stages, a map per class, and its pooling."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import wsss_kernels as wk

from ..engine import load_weights
from ..errors import UsageError
from .attention import attention
from .config import Model
from .resnet38 import ResNet38d


class SmallTrunk(nn.Module):
    """timm's ResNet-18 or -50 at stride 8, for a CPU. Its three last stages stand for the paper's stages 4, 5 and 6."""

    attended = (1, 2, 3)

    def __init__(self, name: str, width: float):
        super().__init__()
        planes = tuple(max(8, int(c * width) // 8 * 8) for c in (64, 128, 256, 512))
        if width != 1 and name == "resnet50":
            raise UsageError("model.width: only resnet18 can be made narrower")
        self.net = timm.create_model(name, output_stride=8, num_classes=0, global_pool="", channels=planes)
        self.channels = tuple(info["num_chs"] for info in self.net.feature_info[1:])

    def stages(self) -> list[list[nn.Module]]:
        n = self.net
        return [[n.conv1, n.bn1, n.act1, n.maxpool, n.layer1], [n.layer2], [n.layer3], [n.layer4]]

    def stem(self) -> list[nn.Module]:
        return self.stages()[0]


class GlandClassifier(nn.Module):
    """`Tensor[B, 3, H, W]` → logits `Tensor[B, classes]` and maps F `Tensor[B, classes, H/8, W/8]`.

    Args:
        config: backbone, attention, pooling.
        classes: 2, other tissue and gland.
    """

    def __init__(self, config: Model, classes: int = 2):
        super().__init__()
        self.config = config
        self.trunk = ResNet38d() if config.backbone == "resnet38d" else SmallTrunk(config.backbone, config.width)
        if config.weights is not None:
            load_trunk(self.trunk, config.weights)
        attended = self.trunk.attended
        self.attention = nn.ModuleDict({str(i): attention(config.attention, self.trunk.channels[i]) for i in attended})
        self.dropout = nn.Dropout2d(0.5)
        self.head = nn.Conv2d(self.trunk.channels[-1], classes, 1, bias=False)
        nn.init.xavier_uniform_(self.head.weight)
        self.pool = wk.MPFP(classes, config.pyramid) if config.mpfp else None
        self._freeze()

    def _freeze(self) -> None:
        if self.config.freeze_stem:
            for module in self.trunk.stem():
                module.requires_grad_(False)
        if not self.config.train_norm:
            for module in self._norms():
                module.requires_grad_(False)

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> GlandClassifier:
        super().train(mode)
        if not self.config.train_norm:
            for module in self._norms():
                module.eval()
        return self

    def maps(self, x: Tensor) -> Tensor:
        """F."""
        for i, stage in enumerate(self.trunk.stages()):
            for module in stage:
                x = module(x)
            if str(i) in self.attention:
                x = self.attention[str(i)](x)
        return self.head(self.dropout(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.maps(x)
        logit = self.pool(maps)[0] if self.pool is not None else maps.mean(dim=(2, 3))
        return logit, maps

    def activation(self, x: Tensor, *, weigh: bool = False) -> Tensor:
        """The maps that the pseudo-mask is made of: F, or F · relu(P′) of the fused pyramid map."""
        maps = self.maps(x)
        return maps * self.pool(maps)[1].relu() if weigh and self.pool is not None else maps

    def groups(self, lr: float, factor: float) -> list[dict]:
        """Parameter groups: the trunk at `lr`, everything new at `factor · lr`."""
        old = {id(p) for p in self.trunk.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [([p for p in trained if id(p) in old], lr), ([p for p in trained if id(p) not in old], lr * factor)]
        return [{"params": params, "lr": rate} for params, rate in groups if params]


def load_trunk(trunk: nn.Module, file: str) -> None:
    """ImageNet weights, with their classification layer left out.

    Raises:
        UsageError: damaged or no such file, or one that lacks some of the trunk's weights.
    """
    own = trunk if isinstance(trunk, ResNet38d) else trunk.net
    found = {name.removeprefix("module."): tensor for name, tensor in load_weights(Path(file)).items()}
    wanted = own.state_dict()
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    if missing or wrong:
        what = f"lacks {len(missing)} of {len(wanted)}, such as {missing[0]}" if missing else f"has another shape of {wrong[0]}"
        raise UsageError(f"model.weights {file}: expected the weights of the trunk; it {what}")
    with torch.no_grad():
        own.load_state_dict({name: found[name] for name in wanted if name in found}, strict=False)
