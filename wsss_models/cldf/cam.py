"""Class activation maps: LayerCAM, and AME-CAM's four exits with attention over them; Otsu's threshold; seeds."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from skimage.filters import threshold_otsu
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from ..engine import load_weights
from ..errors import InputError, UsageError
from .classifier import min_max
from .config import Cam
from .decoder import BACKGROUND, FOREGROUND, UNKNOWN

_CHANNELS = (64, 128, 256, 512)


class Trunk(nn.Module):
    """ResNet-18's four stages on images of any number of channels; of ImageNet's first convolution the mean over colours is kept."""

    def __init__(self, channels: int, config: Cam, norm: type[nn.Module]):
        super().__init__()
        net = ResNet(BasicBlock, [2, 2, 2, 2], norm_layer=norm)
        if config.weights is not None:
            _load_imagenet(net, Path(config.weights))
        if config.width != 1.0:
            net = _narrow(config.width, norm)
        weight = net.conv1.weight.data.mean(1, keepdim=True) * 3 / channels
        net.conv1 = nn.Conv2d(channels, net.conv1.out_channels, 7, 2, 3, bias=False)
        net.conv1.weight.data.copy_(weight.expand(-1, channels, -1, -1))
        if config.weights is None:
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])
        self.widths = [stage[-1].conv2.out_channels for stage in self.stages]

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


def _load_imagenet(net: ResNet, file: Path) -> None:
    try:
        missing, _ = net.load_state_dict(load_weights(file), strict=False)
    except RuntimeError as error:
        raise UsageError(f"cam.weights {file}: are not those of a ResNet-18 ({str(error).rpartition(chr(10))[2].strip()})") from None
    lacking = [name for name in missing if "conv" in name or "downsample.0" in name]
    if lacking:  # norms may be lacking: AME-CAM's have no parameters
        raise UsageError(f"cam.weights {file}: lacks {len(lacking)} of ResNet-18's weights, such as {lacking[0]}")


def _narrow(width: float, norm: type[nn.Module]) -> ResNet:
    """A ResNet-18 with `width` times the channels, which torchvision does not offer."""
    net = ResNet(BasicBlock, [2, 2, 2, 2], norm_layer=norm)
    planes = [max(4, round(c * width)) for c in _CHANNELS]
    net.conv1, net.bn1 = nn.Conv2d(3, planes[0], 7, 2, 3, bias=False), norm(planes[0])
    net.inplanes = planes[0]
    for i, (count, stride) in enumerate(zip(planes, (1, 2, 2, 2), strict=True)):
        setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, count, 2, stride=stride))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


class LayerCamClassifier(nn.Module):
    """ResNet-18 with one logit. `forward` → logits `Tensor[B, 1]`; `maps` → LayerCAM `Tensor[B, S, S]` in 0 … 1."""

    def __init__(self, channels: int, config: Cam):
        super().__init__()
        self.trunk = Trunk(channels, config, nn.BatchNorm2d)
        self.head = nn.Linear(self.trunk.widths[-1], 1)
        if not config.stages or not set(config.stages) <= {1, 2, 3, 4}:
            raise UsageError(f"cam.stages: expected some of 1, 2, 3, 4, got {config.stages}")
        self.fused = [s - 1 for s in config.stages]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x)[-1].mean((2, 3)))

    def score(self, x: Tensor) -> Tensor:
        """`Tensor[B]`: the logit of presence."""
        return self(x)[:, 0]

    @torch.enable_grad()
    def maps(self, x: Tensor) -> Tensor:
        """relu(Σ_c relu(∂y / ∂A_c) · A_c) of the chosen stages, each scaled to 0 … 1, then the largest of the stages."""
        found = self.trunk(x.detach().requires_grad_())
        gradients = torch.autograd.grad(self.head(found[-1].mean((2, 3))).sum(), found)
        layers = [min_max((gradients[s].relu() * found[s]).sum(1).relu()) for s in self.fused]
        return min_max(torch.stack([_enlarge(m, x.shape[-1]) for m in layers]).amax(0).detach())


def _enlarge(maps: Tensor, size: int) -> Tensor:
    return F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]


class AmeCam(nn.Module):
    """AME-CAM: InstanceNorm, a classifier at each of four exits, and attention that decides pixel by pixel between the exits.

    `forward` → logits `Tensor[B, 4]` of the exits.
    """

    def __init__(self, channels: int, config: Cam):
        super().__init__()
        self.trunk = Trunk(channels, config, nn.InstanceNorm2d)
        self.exits = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in self.trunk.widths)
        layers = []
        for a, b in itertools.pairwise((4, 32, 32, 32, 4)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.attention = nn.Sequential(*layers[:-2])

    def exit_maps(self, features: list[Tensor]) -> list[Tensor]:
        return [conv(f) for conv, f in zip(self.exits, features, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([m.mean((2, 3)) for m in self.exit_maps(self.trunk(x))], dim=1)

    def score(self, x: Tensor) -> Tensor:
        """`Tensor[B]`: the last exit's logit of presence."""
        return self(x)[:, -1]

    def aggregate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The attended map `Tensor[B, S, S]` in 0 … 1, and the last but one stage's features `Tensor[B, C, S, S]`."""
        size = x.shape[-1]
        with torch.no_grad():
            features = self.trunk(x)
            maps = torch.stack([min_max(_enlarge(m[:, 0], size)) for m in self.exit_maps(features)], dim=1)
            pixels = F.interpolate(features[2], (size, size), mode="bilinear", align_corners=False)
        weight = self.attention(maps).softmax(1)
        return (weight * maps).sum(1), pixels

    @torch.no_grad()
    def maps(self, x: Tensor) -> Tensor:
        return min_max(self.aggregate(x)[0])


def foreground_contrast(attended: Tensor, pixels: Tensor, alpha: float = 0.25) -> Tensor:
    """Contrast of what a map covers with what it leaves (C2AM, AME-CAM): covered parts of different images are alike, and so are
    the parts left out, but covered and left parts are not. Pairs count by the rank of their similarity, exp(−alpha · rank).

    Args:
        attended: `Tensor[B, S, S]` in 0 … 1.
        pixels: `Tensor[B, C, S, S]`.
    """
    count, flat = len(attended), pixels.flatten(2)
    cover = attended.flatten(1)[:, None]
    fore = F.normalize((cover * flat).mean(2), dim=1)
    back = F.normalize(((1 - cover) * flat).mean(2), dim=1)

    def alike(v: Tensor) -> Tensor:
        similarity = (v @ v.T).clamp(1e-5, 1 - 1e-5)
        other = ~torch.eye(count, dtype=torch.bool, device=v.device)
        values = similarity[other].reshape(count, count - 1)
        rank = values.argsort(dim=1, descending=True).argsort(dim=1)
        return -((-alpha * rank).exp() * values.log()).mean()

    apart = -(1 - (fore @ back.T).clamp(1e-5, 1 - 1e-5)).log().mean()
    return apart + (alike(fore) + alike(back) if count > 1 else 0)


def binarize(score: np.ndarray, threshold: float | None) -> np.ndarray:
    """`[S, S]` in 0 … 1 → bool, above the threshold or Otsu's; a constant map is empty."""
    if score.max() <= score.min():
        return np.zeros(score.shape, bool)
    return score > (threshold if threshold is not None else threshold_otsu(score))


def seeds(cam: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Two binary maps → `[S, S]` uint8: 1 where both see the object, 0 where neither does, 255 elsewhere."""
    found = np.full(cam.shape, UNKNOWN, np.uint8)
    found[cam & gradient] = FOREGROUND
    found[~(cam | gradient)] = BACKGROUND
    return found


def read_cam(folder: Path, name: str, size: int) -> np.ndarray:
    """`folder/NAME.npy`, values in 0 … 1, resized to `[size, size]`.

    Raises:
        InputError: no such file, a damaged one, or other content.
    """
    path = folder / f"{name}.npy"
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"cam.folder: {path}: there is no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cam.folder: {path}: cannot be read ({error})") from None
    found = np.squeeze(found)
    if found.ndim != 2 or found.dtype.kind != "f" or not (found.size and found.min() >= -1e-3 and found.max() <= 1 + 1e-3):
        raise InputError(f"cam.folder: {path}: expected a map h×w in 0…1, got {found.dtype} of shape {'×'.join(map(str, found.shape))}")
    return _enlarge_array(found.astype(np.float32), size)


def _enlarge_array(array: np.ndarray, size: int) -> np.ndarray:
    return array if array.shape == (size, size) else _enlarge(torch.from_numpy(array)[None], size)[0].numpy()
