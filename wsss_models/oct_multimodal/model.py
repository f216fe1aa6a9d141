"""Two encoders that exchange features, captions, label-informed similarity maps, and the classification heads (section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wsss_kernels as wk

from .config import Model
from .encoder import SIZES, freeze, make_encoder


@dataclass
class Output:
    """What a forward pass gives.

    Args:
        logits: of the primary head `Tensor[B, K]`, the structural head `Tensor[B, 2]`, and the similarity maps of stages 3 and 4
            `Tensor[B, K]`; those of an ablated part are absent.
    """

    primary: Tensor
    structural: Tensor | None = None
    similarity3: Tensor | None = None
    similarity4: Tensor | None = None


class Adaptor(nn.Sequential):
    """Label vectors → the channels of a stage (Eq. 5)."""

    def __init__(self, text: int, hidden: int, channels: int):
        super().__init__(nn.Linear(text, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        for layer in (self[0], self[2]):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class CaptionFusion(nn.Module):
    """1×1 convolution of map and broadcast caption vector (Eq. 4), whose half for the caption is one vector an image."""

    def __init__(self, channels: int, caption: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels + caption, channels, 1, bias=False)
        self.channels = channels

    def forward(self, feature: Tensor, caption: Tensor) -> Tensor:
        """`Tensor[B, C, H, W]`, `Tensor[B, D]` → `Tensor[B, C, H, W]`."""
        of_map, of_caption = self.reduce.weight.split([self.channels, caption.shape[1]], dim=1)
        return F.conv2d(feature, of_map) + (caption.to(feature.dtype) @ of_caption[:, :, 0, 0].T.to(feature.dtype))[:, :, None, None]


class OctModel(nn.Module):
    """`forward(primary, structural, caption)` → `Output`.

    Args:
        config: what is used, and how.
        classes: K, with the background.
        text: `Tensor[K, D]`, the fixed vectors of the label prompts.
        caption: width of the caption vectors.
    """

    def __init__(self, config: Model, classes: int, text: Tensor, caption: int):
        super().__init__()
        self.config = config
        widths = SIZES[config.encoder][1]
        stages = {"none": 0, "stage1": 1, "stages12": 2}[config.freeze]
        self.primary = make_encoder(config.encoder, config.drop_path, config.weights)
        self.frozen = freeze(self.primary, stages)
        self.structural = make_encoder(config.encoder, config.drop_path, config.weights) if config.structural else None
        if self.structural is not None:
            self.structural.load_state_dict(self.primary.state_dict())  # the same start, also from scratch
            self.frozen = [*self.frozen, *freeze(self.structural, stages)]
            self.exchange = nn.ModuleList(self._exchange(width, ratio) for width, ratio in zip(widths[1:3], (4, 2), strict=True))
            self.structural_head = nn.Conv2d(widths[3], 2, 1, bias=False)
        self.fusion = CaptionFusion(widths[3], caption) if config.caption else None
        self.head = nn.Conv2d(widths[3], classes, 1, bias=False)
        if config.clip:
            self.register_buffer("text", text.clone())
            self.adaptors = nn.ModuleList(Adaptor(text.shape[1], text.shape[1] // 2, width) for width in widths[2:])
            self.scales = nn.ParameterList(torch.ones(()) for _ in range(2))

    def _exchange(self, width: int, ratio: int) -> wk.CrossAttentionExchange:
        window = self.config.exchange_window
        reduction = ratio if self.config.kv_reduction and window is None else 1
        return wk.CrossAttentionExchange(
            width, self.config.heads, window_size=window, kv_reduction=reduction, residual=self.config.residual
        )

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def features(self, primary: Tensor, structural: Tensor, caption: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """F4 of the primary branch with caption, F4 of the structural branch, and the visual sums Z3 and Z4."""
        p, t, z3 = primary, structural, None
        for s, stage in enumerate(self.primary.stages):
            p = stage(p)
            t = self.structural.stages[s](t) if self.structural is not None else None
            if s == 2:
                z3 = p if t is None else p + t
            if t is not None and s in (1, 2):
                p, t = self._exchanged(self.exchange[s - 1], p, t)
        if self.fusion is not None:
            p = self.fusion(p, caption)
        return p, t, z3, p if t is None else p + t

    def _exchanged(self, exchange: wk.CrossAttentionExchange, p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        first, second = exchange(p.permute(0, 2, 3, 1), t.permute(0, 2, 3, 1))
        return first.permute(0, 3, 1, 2), second.permute(0, 3, 1, 2)

    def forward(self, primary: Tensor, structural: Tensor, caption: Tensor | None = None) -> Output:
        p, t, z3, z4 = self.features(primary, structural, caption)
        found = Output(self._classify(self.head, p), self._classify(self.structural_head, t) if t is not None else None)
        if self.config.clip:
            found.similarity3, found.similarity4 = (
                wk.text_similarity_pool(z, adapt(self.text).to(z.dtype), scale.to(z.dtype))
                for z, adapt, scale in zip((z3, z4), self.adaptors, self.scales, strict=True)
            )
        return found

    @staticmethod
    def _classify(head: nn.Conv2d, feature: Tensor) -> Tensor:
        """Global maximum pooling, then the head."""
        return head(feature.amax(dim=(2, 3), keepdim=True)).flatten(1)

    def maps(self, primary: Tensor, structural: Tensor, caption: Tensor | None = None) -> list[Tensor]:
        """The activation map M, and the similarity maps of stages 3 and 4: `Tensor[B, K, h_s, w_s]` each (Eq. 6)."""
        p, _, z3, z4 = self.features(primary, structural, caption)
        found = [self.head(p)]
        if self.config.clip:
            found += [
                wk.text_similarity(z, adapt(self.text).to(z.dtype), scale.to(z.dtype))
                for z, adapt, scale in zip((z3, z4), self.adaptors, self.scales, strict=True)
            ]
        return found


def losses(output: Output, label: Tensor) -> dict[str, Tensor]:
    """L1 + L2 + L3 + L4 (Eq. 7–9): binary cross-entropy over the K classes, and cross-entropy of lesion or none.

    Args:
        label: `Tensor[B, K]`; channel 0, the background, is 1 for every image.
    """

    def binary(logit: Tensor) -> Tensor:
        wide = logit if logit.dtype == torch.float64 else logit.float()
        return F.binary_cross_entropy_with_logits(wide, label.to(wide.dtype))

    found = {"primary": binary(output.primary)}
    if output.structural is not None:
        logit = output.structural
        found["structural"] = F.cross_entropy(logit if logit.dtype == torch.float64 else logit.float(), label[:, 1:].amax(1).long())
    for name in ("similarity3", "similarity4"):
        if getattr(output, name) is not None:
            found[name] = binary(getattr(output, name))
    return {"loss": torch.stack(list(found.values())).sum(), **found}
