"""The configuration, with the paper's values, or those of the code that it builds on where the paper is silent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..engine import RunConfig


@dataclass
class Data:
    dataset: Literal["brats", "brats_export", "flare", "dicom"] = "brats"
    modalities: tuple[str, ...] = ("flair", "t1", "t1ce", "t2")
    """Words in the names of a case's files, one file each; the channels of the images in this order."""
    seg: str = "seg"
    """The word that marks the mask's file."""
    organ: Literal["liver", "kidney", "spleen", "pancreas"] = "kidney"
    """FLARE's object."""
    window: tuple[float, float] = (-160.0, 240.0)
    """Hounsfield units of CT that become -1 and 1. MR modalities are scaled by their volume's minimum and maximum."""
    size: int = 256
    """Side of the slices as every network sees them."""
    crop: float = 1.0
    """Share of the shorter side that the centre crop keeps."""
    percentile: float = 100.0
    """MR is scaled between the (100 - p)-th and the p-th percentile of its volume's pixels above the background; 100: by minimum and
    maximum, as published."""
    positive: float = 0.01
    """A slice is positive if the object covers more than this share of it; FLARE and DICOM: 0."""
    content: float = 0.0
    """Slices with a smaller share of pixels above the background are left out."""
    every: int = 1
    """Use each n-th slice of a volume."""
    validation: int = 0
    test: int = 1
    """Cases that are held out (which ones, the seed decides), unless `test_cases` or the data set's folders name them."""
    test_cases: tuple[str, ...] = ()
    parts: Literal["random", "folders"] = "random"
    """`folders`: the parts that the data set's folders name."""


@dataclass
class UNet:
    base: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4, 4)
    blocks: int = 2
    """Residual blocks of a level."""
    attention: tuple[int, ...] = (16, 8)
    """Sides of the maps, in pixels, at which there is attention."""
    head: int = 64
    """Channels of an attention head."""
    groups: int = 32


@dataclass
class Diffusion:
    unet: UNet = field(default_factory=UNet)
    weights: str | None = None
    """A checkpoint of guided-diffusion or of diffusers to start from."""
    timesteps: int = 1000
    conditional: bool = True
    steps: int = 500_000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.0
    ema: float = 0.9999
    clip: float | None = None


@dataclass
class NoisyClassifier:
    unet: UNet = field(default_factory=lambda: UNet(attention=(32, 16, 8)))
    steps: int = 100_000
    batch_size: int = 16
    lr: float = 3e-4
    weight_decay: float = 0.0
    timesteps: tuple[int, ...] = tuple(range(10, 201, 10))
    """Of the gradient map."""
    sign: Literal["absolute", "positive", "raw"] = "absolute"
    """What of the gradient is averaged; the paper does not say."""


@dataclass
class Cam:
    source: Literal["ame", "layercam", "files"] = "ame"
    """AME-CAM (BraTS), LayerCAM (FLARE), or the `.npy` files of `folder`, named as the slices are."""
    folder: str | None = None
    weights: str | None = None
    """ImageNet weights of the ResNet-18 with torchvision's keys."""
    steps: int = 5000
    attention_steps: int = 1000
    """Of AME-CAM's attention network, after its exits."""
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 1e-5
    width: float = 1.0
    """Factor of the channels."""
    stages: tuple[int, ...] = (1, 2, 3, 4)
    """Of LayerCAM, fused by their maximum."""
    threshold: float | None = None
    """`None`: Otsu's, for each map; the released AME-CAM uses 0.5."""
    invert: bool = False
    """The released AME-CAM takes 1 - map: there its attention marks the background."""


@dataclass
class Features:
    timesteps: tuple[int, ...] = (1, 10, 50, 100)
    layers: tuple[str, ...] = ()
    """Names of the U-Net's modules; empty: the last block of every decoder level before its upsampler (D = 1792);
    `("all",)`: all blocks of the decoder (D = 5376)."""
    condition: Literal["positive", "label", "negative"] = "positive"
    """The class that the U-Net is told."""
    cache: bool = False
    """Keep every slice's features (averaged over the timesteps, float16) on disk."""


@dataclass
class Decoder:
    width: int = 16
    layers: int = 4
    temperature: float = 0.1
    reduction: Literal["mean", "sum"] = "mean"
    """Over the anchors; the paper prints a sum, which diverges at this learning rate."""
    background: int = 5000
    foreground: int = 5000
    """Most pixels of an image that take part."""
    epochs: int = 5
    steps: int | None = None
    """Instead of epochs."""
    batch_size: int = 4
    lr: float = 1.0
    momentum: float = 0.0
    prototypes: Literal["train", "seeds"] = "train"
    """Centroids that k-means starts from: means over the training seeds, or over the image's own seeds (falls back to the former)."""
    kmeans_iter: int = 20


@dataclass
class CldfConfig(RunConfig):
    data: Data = field(default_factory=Data)
    diffusion: Diffusion = field(default_factory=Diffusion)
    classifier: NoisyClassifier = field(default_factory=NoisyClassifier)
    cam: Cam = field(default_factory=Cam)
    features: Features = field(default_factory=Features)
    decoder: Decoder = field(default_factory=Decoder)
