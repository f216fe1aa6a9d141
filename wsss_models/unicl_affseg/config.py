"""The configuration, with the thesis's values, or those of the code that it builds on (WeCLIP, CLIP-ES) where it is silent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..engine import RunConfig
from ..errors import UsageError


@dataclass
class Data:
    train: str = "train_aug"
    """A list in `ImageSets/Segmentation`, or a path in the data folder."""
    val: str = "val"
    labels: str | None = None
    """`cls_labels_onehot.npy` or another dictionary id → 20 numbers in the data folder; without it, `Annotations/ID.xml`."""
    labels_from_mask: bool = False
    """Take the image labels from the true masks where nothing else states them; no published figure may do so."""
    names: tuple[str, ...] = ()
    """Only these images of the training list, if any are named."""
    crop: int = 224
    fit: bool = False
    """Resize the longest side to `crop` before the random scale, and centre what is smaller: whole images in the frame."""
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass
class Encoder:
    weights: str = ""
    """The file of UniCL's Swin-B (`in21k_yfcc14m_swin_base.pth`), or `random`: for tests, nothing can be learned from it."""
    tokenizer: str = "openai/clip-vit-base-patch32"
    """CLIP's tokenizer: a folder or hub name; `bytes` is its alphabet without merges, for random weights."""
    embed_dim: int = 128
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    heads: tuple[int, int, int, int] = (4, 8, 16, 32)
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    projection: int = 512


@dataclass
class Decoder:
    blocks: Literal["stage3", "all"] = "stage3"
    """Whose features are used: those of the blocks of stage 3, which share one grid, or all, resized to that grid."""
    width: int = 256
    layers: int = 3
    heads: int = 8
    dropout: float = 0.1


@dataclass
class Refine:
    first_layer: float = 0.5
    """N₀ of Eq. 3.13 as a share of the blocks: 0.5 selects among the last half."""
    signed: bool = False
    """True: the deviation without absolute values, as the released WeCLIP computes it."""
    scaled: bool = False
    """True: A_f = σ(FᵀF / √d)."""
    warmup: int = 15000
    """Steps before A_f and the selection are used; until then R is the mean of the last `warmup_maps` affinities."""
    warmup_maps: int = 8
    sinkhorn_iter: int = 3
    power: int = 2
    mask_side: Literal["source", "target"] = "source"
    threshold: float = 0.4
    clip_border: bool = False
    """True: boxes never cover the last row and column, as in the released code."""
    alpha: float = 1.0
    """Background score: (1 − max CAM)^alpha."""
    par_iter: int = 20
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)


@dataclass
class Train:
    steps: int = 30000
    batch_size: int = 4
    accumulate: int = 2
    lr: float = 5e-5
    decoder_factor: float = 10.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: int = 500
    power: float = 1.0
    affinity_weight: float = 0.1
    affinity_kind: Literal["balanced", "bce"] = "balanced"
    radius: int | None = 8
    supervision: Literal["pseudo", "masks"] = "pseudo"
    """`masks` trains on the true masks: a check that the decoder can learn, not the method."""
    validate_every: int = 2000
    validate_images: int = 0
    """Images of the validation list that choose the best weights; 0 keeps the last ones."""


@dataclass
class Inference:
    size: int = 512
    """Longest side in pixels; both sides are rounded to multiples of 32."""
    scales: tuple[float, ...] = (1.0, 0.75)
    flip: bool = True


@dataclass
class UniclConfig(RunConfig):
    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    decoder: Decoder = field(default_factory=Decoder)
    refine: Refine = field(default_factory=Refine)
    train: Train = field(default_factory=Train)
    inference: Inference = field(default_factory=Inference)

    def __post_init__(self):
        super().__post_init__()
        if self.data.crop < 32:
            raise UsageError(f"data.crop: expected at least 32 pixels, a cell of the encoder's last grid, got {self.data.crop}")
        if not 0 <= self.refine.first_layer < 1:
            raise UsageError(f"refine.first_layer: expected a share of the blocks in [0, 1), got {self.refine.first_layer}")
        if self.refine.warmup_maps < 1:
            raise UsageError(f"refine.warmup_maps: expected at least 1, got {self.refine.warmup_maps}")
