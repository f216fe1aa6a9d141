"""The configuration, with the paper's values, or those of the code that it builds on (OEEM) where the paper is silent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..engine import RunConfig


@dataclass
class Data:
    dataset: Literal["glas", "rings", "ebhi"] = "glas"
    validation: int = 15
    """Images held out of the training part (which ones, the seed decides)."""
    fraction: float = 1.0
    """Share of the training images that is used, at least one image: domain adaptation with 0.2 … 0.01."""
    ebhi_test: float = 0.2
    """EBHI-Seg has no parts; this share of the images is the test part."""
    side: int = 112
    stride: int = 56
    """Of the classifier's patches, in pixels of the image."""
    resize: int = 224
    """Side of a patch as the network sees it."""
    cover: float = 0.05
    """A patch has the label of each class that covers more than this share of it."""
    white: float = 0.92
    """Patches whose mean brightness is above this are dropped."""
    mean: tuple[float, float, float] = (0.787, 0.511, 0.785)
    std: tuple[float, float, float] = (0.167, 0.248, 0.131)
    cached_images: int = 256


@dataclass
class Model:
    backbone: Literal["resnet38d", "resnet18", "resnet50"] = "resnet38d"
    width: float = 1.0
    """Factor of the channels of resnet18 and resnet50."""
    attention: Literal["cca", "none", "criss_cross_1", "criss_cross_2"] = "cca"
    """After stages 4, 5 and 6: criss-cross, position and criss-cross attention; or an ablation."""
    mpfp: bool = True
    """Multi-scale pyramid fusion pooling; otherwise the mean of the map."""
    pyramid: tuple[int, ...] = (2, 4, 8, 16)
    weights: str | None = None
    """ImageNet weights: a file with the keys of the ResNet38 conversion (or timm's for the small backbones)."""
    train_norm: bool = False
    """BatchNorm in training mode and trained; otherwise in eval mode and frozen, as the pretrained trunk wants."""
    freeze_stem: bool = True
    """Do not train the first convolution and the stage after it."""


@dataclass
class Classify:
    epochs: int = 20
    steps: int | None = None
    """Instead of epochs."""
    batch_size: int = 20
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """AdamW needs fewer steps from scratch; its betas are PyTorch's."""
    lr: float = 0.01
    new_layers: float = 10.0
    """Factor of the learning rate of everything that has no pretrained weights."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    clip: float | None = None
    jitter: float = 0.3
    """Strength of the distortion of brightness, contrast and saturation; a third of it for the hue."""
    blur: float = 0.5
    """How often a patch is blurred."""


@dataclass
class Masks:
    scales: tuple[float, ...] = (1.0, 1.25, 1.5, 1.75, 2.0)
    stride: int = 56
    normalize: bool = False
    """Eq. 4, relu and division by the maximum, for each class before the classes are compared."""
    weigh: bool = False
    """Multiply the maps by relu of the fused pyramid map (needs `mpfp`)."""
    batch_size: int = 64


@dataclass
class Segment:
    encoder: str = "resnest200e"
    """Any timm encoder that can run at output stride 8."""
    pretrained: str | None = None
    """File of the encoder's ImageNet weights with timm's keys."""
    channels: int = 512
    purified: bool = True
    """The loss of purified labels; otherwise the plain cross-entropy."""
    auxiliary: float = 0.4
    epochs: int = 30
    steps: int | None = None
    batch_size: int = 20
    accumulate: int = 1
    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9
    floor: float = 0.02
    """Least factor of the learning rate (1e-4 of 0.005)."""
    crop: int = 256
    stride: int = 192
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    """Scales and mirror images that are averaged at inference."""
    keep_best: bool = False
    """Keep the weights with the largest mIoU on the validation images, not the last ones."""


@dataclass
class GlandConfig(RunConfig):
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    classify: Classify = field(default_factory=Classify)
    masks: Masks = field(default_factory=Masks)
    segment: Segment = field(default_factory=Segment)
    adapt_from: str | None = None
    """The folder of a finished run on other data, whose two networks are trained further (domain adaptation)."""
