"""The configuration, with the paper's values, or those of its released code where the paper is silent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..engine import RunConfig


@dataclass
class Data:
    dataset: Literal["lvit", "qata", "monuseg", "pairs"] = "lvit"
    images: str = "images"
    masks: str = "masks"
    texts: str | None = "text.csv"
    columns: tuple[str, str] = ("image", "text")
    """Of `pairs`: folders of images and masks, and a table of sentences."""
    size: int = 224
    """Side of the images that the networks see."""
    crop: int | None = None
    """Cut images into squares of this side; otherwise the whole image is resized."""
    stride: int | None = None
    labelled: float = 0.25
    """Share of the training images (or crops) whose masks are used; which ones, the seed decides."""
    split_file: str | None = None
    """A list of the names of the labelled ones instead."""
    validation: float = 0.1
    test: float = 0.2
    """Shares of the images where the data set has no such parts."""
    test_on_validation: bool = False
    """Test on the validation images too; they may then choose nothing (`semi.patience=null`)."""
    rotation: float = 20.0
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    cached_images: int = 512


@dataclass
class Image:
    encoder: str = "deit_base_patch16_224"
    """A Vision Transformer of timm, or `tiny` (width 64, two blocks, patches of 8)."""
    weights: str | None = None
    """DeiT's file (`deit_base_patch16_224-b5f2ef4d.pth`) or timm's."""


@dataclass
class Text:
    encoder: str = "bert"
    """`bert` (Bio_ClinicalBERT's first six layers, 65.2 M), or `tiny` (width 64, two layers)."""
    weights: str | None = None
    """`pytorch_model.bin` or `model.safetensors` of Bio_ClinicalBERT."""
    tokenizer: str = "emilyalsentzer/Bio_ClinicalBERT"
    """A name on the hub, a folder with `vocab.txt`, or `words` (every word a hashed number, for small runs)."""
    length: int = 20
    sum_pieces: bool = False
    """Sum the pieces of a word before the local projection."""


@dataclass
class Vlm:
    width: int = 128
    """D of the projections."""
    hidden: int = 2048
    distribution: int = 512
    heads: int = 8
    dropout: float = 0.1
    a: float = 1 / 200
    b: float = 4.0
    lam: float = 0.2
    temperature: float = 0.07
    ema_keys: bool = True
    """The second view is encoded by a moving average of the encoders, without gradient."""
    momentum: float = 0.995
    local: float = 0.2
    """Weight of the contrast between the mean of the local features and the other modality's global one, by which the local
    projections are trained; the paper does not say how."""
    epochs: int = 100
    steps: int | None = None
    batch_size: int = 32
    lr: float = 3e-5
    weight_decay: float = 0.0


@dataclass
class Grounding:
    blocks: int = 2
    affine: bool = True
    """Scale the cosine by learnt numbers, 10 and -2.5 at the start, before the sigmoid, which else spans 0.27 … 0.73 only."""
    epochs: int = 20
    steps: int | None = None
    batch_size: int = 32
    lr: float = 3e-4


@dataclass
class Semi:
    width: int = 64
    """Channels of the U-Net's first level."""
    unlabelled: bool = True
    """False: the same U-Net on the labelled images alone, with equal steps."""
    text: bool = True
    """False: mean teacher without text."""
    loss: Literal["balanced", "bce"] = "balanced"
    """Half Dice, half class-balanced binary cross-entropy (the code); or plain binary cross-entropy (the paper's words)."""
    soft_loss: Literal["balanced", "bce"] = "balanced"
    """Against the soft targets of unlabelled images. The balanced loss of a target p everywhere is least at ½, so that teacher and
    student drive each other towards too much foreground; plain cross-entropy is least at p."""
    literal: bool = False
    """Eq. 15 as printed: the sigmoid of a sum of two probabilities, never below 0.5."""
    weight: float = 1.0
    """Of the loss on unlabelled images."""
    jitter: float = 0.0
    """Strength of the distortion of colours that the student, and not the teacher, sees on unlabelled images (the input noise of
    mean teachers); the paper has none."""
    ramp: int = 0
    """Steps over which this weight rises, exp(−5 (1 − t)²); the paper does not mention it."""
    ema: float = 0.99
    epochs: int = 100
    steps: int | None = None
    batch_size: int = 16
    """Labelled and as many unlabelled images."""
    lr: float = 1e-3
    floor: float = 1e-4
    """Least learning rate of the cosine restarts."""
    restart: int = 10
    """Epochs of a cosine."""
    patience: int | None = 20
    threshold: float = 0.5


@dataclass
class DusssConfig(RunConfig):
    seed: int = 666
    data: Data = field(default_factory=Data)
    image: Image = field(default_factory=Image)
    text: Text = field(default_factory=Text)
    vlm: Vlm = field(default_factory=Vlm)
    grounding: Grounding = field(default_factory=Grounding)
    semi: Semi = field(default_factory=Semi)
