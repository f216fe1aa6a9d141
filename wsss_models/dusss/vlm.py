"""The vision-language model: projections, distribution heads, and dual contrastive learning (Eq. 1–9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wsss_kernels as wk
from wsss_kernels.distributed import gather_with_grad

from .config import Image, Text, Vlm
from .encoders import Tokens, image_encoder, sum_pieces, text_encoder


@dataclass
class Embedding:
    """Of one modality.

    Args:
        semantic: s, the global projection `Tensor[N, D]`, not normalised (the operators do that).
        mu, sigma: of the Gaussian `Tensor[N, d]`.
        local: projections of patches or words `Tensor[N, L, D]`.
        valid: `Tensor[N, L]`, which of them count.
    """

    semantic: Tensor
    mu: Tensor
    sigma: Tensor
    local: Tensor
    valid: Tensor


class GlobalProjection(nn.Sequential):
    def __init__(self, inside: int, hidden: int, outside: int):
        super().__init__(
            nn.Linear(inside, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outside), nn.BatchNorm1d(outside, affine=False)
        )


class LocalProjection(nn.Sequential):
    """The same on tokens, by 1×1 convolutions: `Tensor[N, L, C]` → `Tensor[N, L, D]`."""

    def __init__(self, inside: int, hidden: int, outside: int):
        super().__init__(
            nn.Conv1d(inside, hidden, 1),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Conv1d(hidden, outside, 1),
            nn.BatchNorm1d(outside, affine=False),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.transpose(1, 2)).transpose(1, 2)


class _Residual(nn.Module):
    """Pre-norm MLP of ratio 4 around a skip."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class DistributionHead(nn.Module):
    """Tokens → mean and standard deviation of a Gaussian, from the row of [CLS].

    Attention whose output is divided into two halves, one for μ (with a skip from its input) and one for log σ.
    """

    def __init__(self, inside: int, config: Vlm):
        super().__init__()
        width = config.distribution
        self.enter = nn.Sequential(nn.Linear(inside, width), nn.GELU(), nn.LayerNorm(width))
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.to_mu, self.to_log_sigma = nn.Linear(width // 2, width), nn.Linear(width // 2, width)
        self.mu, self.log_sigma = _Residual(width, config.dropout), _Residual(width, config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`Tensor[N, L, C]` → μ and σ `Tensor[N, width]`; `mask` `Tensor[N, L]` is 1 where there is a token."""
        x = self.enter(tokens)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        where = mask[:, None, None].bool() if mask is not None else None
        attended = F.scaled_dot_product_attention(q[:, :, :1], k, v, attn_mask=where)[:, :, 0].flatten(1)  # only [CLS] is used
        first, second = attended.chunk(2, dim=1)
        mu = self.mu(self.to_mu(first) + x[:, 0])
        return mu, self.log_sigma(self.to_log_sigma(second)).exp()


class Encoders(nn.Module):
    """Both encoders with their heads. `forward(image, tokens)` → the `Embedding` of each; either may be absent."""

    def __init__(self, image: Image, text: Text, config: Vlm, size: int):
        super().__init__()
        self.sums = text.sum_pieces
        self.image, self.text = image_encoder(image, size), text_encoder(text)
        inside = {"image": self.image.embed_dim, "text": self.text.config.hidden_size}
        self.to_global = nn.ModuleDict({k: GlobalProjection(c, config.hidden, config.width) for k, c in inside.items()})
        self.to_local = nn.ModuleDict({k: LocalProjection(c, config.hidden, config.width) for k, c in inside.items()})
        self.distribution = nn.ModuleDict({k: DistributionHead(c, config) for k, c in inside.items()})

    def of_image(self, image: Tensor) -> Embedding:
        tokens = self.image.forward_features(image)
        patches = tokens[:, 1:]
        valid = torch.ones(patches.shape[:2], device=image.device)
        return Embedding(self.to_global["image"](tokens[:, 0]), *self.distribution["image"](tokens), self.to_local["image"](patches), valid)

    def of_text(self, given: Tokens) -> Embedding:
        tokens = self.text(input_ids=given.ids, attention_mask=given.mask).last_hidden_state
        words = sum_pieces(tokens, given.word) if self.sums else tokens
        first = torch.nn.functional.pad(given.word[:, 1:] != given.word[:, :-1], (1, 0), value=True) if self.sums else True
        valid = ((given.word >= 0) & first).to(tokens.dtype)
        distribution = self.distribution["text"](tokens, given.mask)
        return Embedding(self.to_global["text"](tokens[:, 0]), *distribution, self.to_local["text"](words), valid)


class VisionLanguage(nn.Module):
    """The encoders, their moving average for the keys, and the learnt temperature.

    `forward(image, second image, tokens)` → the embeddings of both views of both modalities.
    """

    def __init__(self, image: Image, text: Text, config: Vlm, size: int):
        super().__init__()
        self.config = config
        self.encoders = Encoders(image, text, config, size)
        self.log_temperature = nn.Parameter(torch.tensor(float(config.temperature)).log())
        self.keys = AveragedModel(self.encoders, multi_avg_fn=get_ema_multi_avg_fn(config.momentum)) if config.ema_keys else None
        if self.keys is not None:
            self.keys.requires_grad_(False)

    @property
    def temperature(self) -> Tensor:
        """exp of the parameter, at least 0.01."""
        return self.log_temperature.exp().clamp(min=0.01)

    def forward(self, image: Tensor, second: Tensor, tokens: Tokens) -> tuple[Embedding, Embedding, Embedding, Embedding, Tensor]:
        """Image, text, second view of the image, second view of the text (the same sentence with other dropout), temperature."""
        first = self.encoders.of_image(image), self.encoders.of_text(tokens)
        if self.keys is None:
            other = self.encoders.of_image(second), self.encoders.of_text(tokens)
        else:
            with torch.no_grad():
                other = self.keys.module.of_image(second), self.keys.module.of_text(tokens)
        return *first, *other, self.temperature

    def follow(self) -> None:
        """Moves the keys; after each optimiser step."""
        if self.keys is not None:
            self.keys.update_parameters(self.encoders)


def gathered(e: Embedding) -> Embedding:
    """The global batch over all processes; local features stay."""
    return Embedding(gather_with_grad(e.semantic), gather_with_grad(e.mu), gather_with_grad(e.sigma), e.local, e.valid)


def uncertain_contrast(x: Embedding, y: Embedding, temperature: Tensor, config: Vlm) -> Tensor:
    """InfoNCE in both directions on the similarity that uncertainty supervises (Eq. 1–8), or on the cosine."""
    if not config.uncertainty:
        return wk.info_nce(x.semantic, y.semantic, temperature.to(x.semantic.dtype))
    given = [t.float() if t.dtype != torch.float64 else t for t in (x.semantic, x.mu, x.sigma, y.semantic, y.mu, y.sigma)]
    tau = temperature.to(given[0].dtype)
    return wk.uncertainty_info_nce(*given, tau, a=config.a, b=config.b, lam=config.lam)


def mean_local(e: Embedding) -> Tensor:
    """`Tensor[N, D]`: the mean of the local features that count."""
    weight = e.valid[..., None].to(e.local.dtype)
    return (e.local * weight).sum(1) / weight.sum(1).clamp(min=1)


def vlm_loss(found: tuple[Embedding, Embedding, Embedding, Embedding, Tensor], config: Vlm) -> dict[str, Tensor]:
    """L_cmc + L_imc (Eq. 8, 9; the second weighted), and the weighted contrast of local with global features."""
    image, text, image2, text2, temperature = found
    i, t, i2, t2 = (gathered(e) for e in (image, text, image2, text2))
    cross = uncertain_contrast(i, t, temperature, config)
    total, loss = {"cross": cross}, cross
    if config.intra:
        intra = (uncertain_contrast(i, i2, temperature, config) + uncertain_contrast(t, t2, temperature, config)) / 2
        total["intra"] = intra
        loss = loss + config.intra * intra
    if config.local:
        pairs = ((gather_with_grad(mean_local(image)), t.semantic), (gather_with_grad(mean_local(text)), i.semantic))
        local = sum(wk.info_nce(x.to(y.dtype), y, temperature.to(y.dtype)) for x, y in pairs) / 2
        total["local"] = local
        loss = loss + config.local * local
    return {"loss": loss, **total}
