"""The configuration, with the paper's values, or those of its released code where the paper is silent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..engine import RunConfig


@dataclass
class Data:
    dataset: Literal["resc", "duke"] = "resc"
    size: tuple[int, int] = (512, 512)
    """Height and width that the networks see, multiples of 32."""
    validation: int = 2
    """Subjects that are held out where the data set has no parts of its own (which ones, the seed decides)."""
    scans: int | None = None
    """Use this many training B-scans only, the first ones with a lesion and the first ones without, in turn."""
    labels_from_mask: bool = False
    """Image labels from the annotations where the data set states none."""
    crop: tuple[int, int] | None = None
    """Cut B-scans into crops of this height and width, each with the label of its own annotation: a check on few scans."""
    stride: tuple[int, int] | None = None
    cover: float = 0.0
    """A crop has the label of each lesion that covers more than this share of it."""
    layers: Literal["files", "zero"] = "files"
    healthy: Literal["files", "generator", "zero"] = "files"
    """Where the healthy counterparts come from: files, a generator that is trained here on images without lesions, or none."""
    jitter: float = 0.3
    hue: float = 0.1
    rotation: float = 60.0
    flip: float = 0.5
    anomaly_after_jitter: bool = False
    """The released code computes |X - G(X)| after X alone is jittered, so that jitter looks like an anomaly."""
    cached_images: int = 256


@dataclass
class Generator:
    """GANomaly: encoder, decoder, second encoder; a discriminator whose features must agree."""

    size: int = 128
    width: int = 32
    latent: int = 100
    steps: int = 5000
    batch_size: int = 16
    lr: float = 2e-4
    context: float = 50.0
    encoder: float = 1.0
    adversarial: float = 1.0


@dataclass
class Text:
    labels: str = "openai/clip-vit-large-patch14"
    """CLIP text encoder of the label prompts: a name on the hub, a folder, or `random` (fixed random vectors)."""
    width: int = 768
    """Of random label vectors."""
    captions: str = "Salesforce/blip-image-captioning-large"
    """Caption model: a name on the hub, a folder, or `none`."""
    caption_encoder: str = "openai/clip-vit-base-patch32"
    caption_width: int = 512
    """Of the caption vectors, where there are none."""
    prompt: str = "a black and white photo of"
    new_tokens: int = 20
    prompts: tuple[str, ...] = ()
    """Of healthy and of each lesion; empty: those of the data set."""


@dataclass
class Model:
    encoder: Literal["mit_b1", "mit_b2", "mit_b5", "mit_tiny"] = "mit_b2"
    weights: str | None = None
    """MiT weights: the original `mit_b2.pth`, or a folder or file of transformers. Both encoders start from them."""
    drop_path: float = 0.1
    residual: Literal["query", "target"] = "query"
    """Which input the first skip of the exchange comes from: the released code's, or the paper's words."""
    kv_reduction: bool = True
    """Reduce keys and values by 4 and 2, as the code does; otherwise the full HW×HW affinity of the paper."""
    exchange_window: int | None = None
    """Exchange inside windows of this side instead of globally (then without reduction)."""
    heads: int = 4
    structural: bool = True
    clip: bool = True
    caption: bool = True
    """Ablations: the structural branch, the label-informed maps, the captions."""
    freeze: Literal["none", "stage1", "stages12"] = "stages12"
    """Together with all patch embeddings."""


@dataclass
class Train:
    epochs: int = 30
    steps: int | None = None
    """Instead of epochs."""
    balanced: bool = False
    """Show images with and without a lesion equally often: where one kind is rare every logit is negative, and so every map empty."""
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-4
    clip: float | None = None
    validate_epochs: int = 5
    keep_best: bool = True
    """Keep the weights with the best pseudo-label mIoU on the validation scans."""


@dataclass
class Masks:
    weights: tuple[float, float, float] = (0.4, 0.3, 0.3)
    """Of the activation map and of the similarity maps of stages 3 and 4."""
    fuse: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum"
    threshold: float | None = None
    """λ, the score of the background; `None`: the best of the sweep (the paper: 0.7 on RESC, 0.8 on Duke)."""
    step: float = 0.01
    batch_size: int = 8


@dataclass
class Segment:
    network: Literal["deeplabv3plus", "segformer"] = "segformer"
    encoder: str = "mit_b5"
    """`mit_b0` … `mit_b5` for SegFormer; an encoder of segmentation-models-pytorch, such as resnet101, for DeepLabV3+."""
    weights: str | None = None
    """Weights of the encoder: a file with the keys of segmentation-models-pytorch, or of MiT."""
    size: tuple[int, int] = (640, 640)
    epochs: int = 50
    steps: int | None = None
    batch_size: int = 8
    lr: float = 6e-5


@dataclass
class OctConfig(RunConfig):
    data: Data = field(default_factory=Data)
    generator: Generator = field(default_factory=Generator)
    text: Text = field(default_factory=Text)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    masks: Masks = field(default_factory=Masks)
    segment: Segment = field(default_factory=Segment)
