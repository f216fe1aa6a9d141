"""The segmentation network that learns from the pseudo-labels."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import load_weights
from ..errors import UsageError
from .config import Segment
from .encoder import SIZES, load_mit, mit_config


class Network(nn.Module):
    """DeepLabV3+ or SegFormer: images in 0 … 1 → logits `Tensor[B, K, h, w]` at full size."""

    def __init__(self, config: Segment, classes: int, *, trained: bool):
        super().__init__()
        self.kind = config.network
        if config.network == "segformer":
            from transformers import SegformerForSemanticSegmentation

            if config.encoder not in SIZES:
                raise UsageError(f"segment.encoder: expected one of {', '.join(SIZES)} for segformer, got {config.encoder!r}")
            width = 768 if config.encoder in ("mit_b3", "mit_b4", "mit_b5") else 256
            self.net = SegformerForSemanticSegmentation(mit_config(config.encoder, num_labels=classes, decoder_hidden_size=width))
            if config.weights is not None and not trained:
                load_mit(self.net.segformer, config.weights)
        else:
            import segmentation_models_pytorch as smp

            try:
                self.net = smp.DeepLabV3Plus(config.encoder, encoder_weights=None, classes=classes)
            except (KeyError, ValueError) as error:
                raise UsageError(f"segment.encoder: {str(error).partition(chr(10))[0]}") from None
            if config.weights is not None and not trained:
                try:
                    self.net.encoder.load_state_dict(load_weights(Path(config.weights)))
                except (RuntimeError, KeyError) as error:
                    raise UsageError(f"segment.weights {config.weights}: holds another encoder ({error})") from None
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        x = (image - self.mean) / self.std
        logit = self.net(x).logits if self.kind == "segformer" else self.net(x)
        return F.interpolate(logit, image.shape[2:], mode="bilinear", align_corners=False)
