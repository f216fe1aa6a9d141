"""The pixel decoder, its contrastive loss, and the masks by k-means (sections 3.2 and 3.3)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wsss_kernels as wk
from wsss_kernels.distributed import gather_with_grad

from .config import Decoder

BACKGROUND, FOREGROUND, UNKNOWN = 0, 1, 255


class PixelDecoder(nn.Module):
    """An MLP on each pixel's diffusion feature: D → width → … → width, ReLU between.

    Projection, bilinear enlargement, concatenation and the mean over timesteps commute with the first layer. So each layer's
    map is projected at its own size and the sum is enlarged, and nothing of size D×S×S ever exists.

    Args:
        channels: of each layer of features; D is their sum.
        size: side S of the embeddings.
    """

    def __init__(self, channels: Sequence[int], size: int, config: Decoder):
        super().__init__()
        self.channels, self.size = list(channels), size
        widths = [sum(channels), *[config.width] * config.layers]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.register_buffer("prototypes", torch.zeros(2, config.width))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """`Tensor[B, C_l, h_l, w_l]` of each layer, averaged over the timesteps → embeddings `Tensor[B, width, S, S]`."""
        first = self.linears[0]
        total = None
        for map_, weight in zip(maps, first.weight.split(self.channels, dim=1), strict=True):
            enlarged = self._enlarge(F.conv2d(map_, weight[:, :, None, None].to(map_.dtype)))
            total = enlarged if total is None else total + enlarged
        return self._rest(total + first.bias[:, None, None])

    def literal(self, maps: Sequence[Tensor]) -> Tensor:
        """The same in the order of the paper, from `Tensor[B, T, C_l, h_l, w_l]`: enlarge, concatenate, average, project."""
        batch, steps = maps[0].shape[:2]
        whole = torch.cat([self._enlarge(m.flatten(0, 1)) for m in maps], dim=1)
        mean = whole.reshape(batch, steps, *whole.shape[1:]).mean(1)
        first = self.linears[0]
        return self._rest(F.conv2d(mean, first.weight[:, :, None, None], first.bias))

    def _enlarge(self, maps: Tensor) -> Tensor:
        return F.interpolate(maps, (self.size, self.size), mode="bilinear", align_corners=False)

    def _rest(self, x: Tensor) -> Tensor:
        for linear in self.linears[1:]:
            x = F.conv2d(x.relu(), linear.weight[:, :, None, None], linear.bias)
        return x

    @torch.no_grad()
    def remember(self, z: Tensor, label: Tensor) -> None:
        """Updates the mean unit embeddings of background and foreground seeds: the mean of at most the last 100 batches."""
        unit = F.normalize(z.detach().float(), dim=1)
        for k in (BACKGROUND, FOREGROUND):
            own = unit[label == k]
            if len(own):
                self.seen[k] = (self.seen[k] + 1).clamp(max=100)
                self.prototypes[k] += (own.mean(0) - self.prototypes[k]) / self.seen[k]


def select(embedding: Tensor, seed: Tensor, config: Decoder) -> tuple[Tensor, Tensor]:
    """The seeds that take part, at random where an image has more than its share: `Tensor[N, width]`, `Tensor[N]`.

    Args:
        embedding: `Tensor[B, width, S, S]`.
        seed: `Tensor[B, S, S]` with 0, 1 and 255. Images without foreground are skipped.
    """
    rows, labels = [], []
    for z, where in zip(embedding.flatten(2), seed.flatten(1), strict=True):
        if not (where == FOREGROUND).any():
            continue
        for k, most in ((FOREGROUND, config.foreground), (BACKGROUND, config.background)):
            index = (where == k).nonzero().squeeze(1)
            index = index[torch.randperm(len(index)).to(index.device)[:most]]
            rows.append(z[:, index].T)
            labels.append(torch.full((len(index),), k, device=z.device))
    if not rows:
        return embedding.flatten(2).transpose(1, 2).reshape(-1, embedding.shape[1])[:0], seed.flatten()[:0].long()
    return torch.cat(rows), torch.cat(labels)


def contrastive_loss(z: Tensor, label: Tensor, config: Decoder) -> Tensor:
    """Eq. 1 over the seeds of all processes' images."""
    every, labels = gather_with_grad(z.float()), gather_with_grad(label)
    return wk.supervised_contrastive_loss(every, labels, config.temperature, reduction=config.reduction)


def cluster(embedding: Tensor, prototypes: Tensor, num_iter: int) -> Tensor:
    """k-means of the unit embeddings of each image, from the prototypes of background and foreground.

    Args:
        embedding: `Tensor[B, width, S, S]`.
        prototypes: `Tensor[2, width]` or `Tensor[B, 2, width]`; cluster 1 grows from the foreground's.

    Returns:
        `Tensor[B, S, S]` uint8, 1 for the foreground.
    """
    points = F.normalize(embedding.detach().float().flatten(2).transpose(1, 2), dim=2)
    start = prototypes.float().expand(len(points), *prototypes.shape[-2:]).contiguous()
    label, _ = wk.kmeans(points.contiguous(), 2, init=start, num_iter=num_iter)
    return label.reshape(len(points), *embedding.shape[2:]).to(torch.uint8)


def seed_prototypes(embedding: Tensor, seed: Tensor, fallback: Tensor) -> Tensor:
    """Mean unit embeddings of each image's own seeds `Tensor[B, 2, width]`; `fallback` where a class has none."""
    unit = F.normalize(embedding.detach().float().flatten(2), dim=1)
    found = fallback.float().repeat(len(unit), 1, 1)
    for b, where in enumerate(seed.flatten(1)):
        for k in (BACKGROUND, FOREGROUND):
            if (where == k).any():
                found[b, k] = unit[b][:, where == k].mean(1)
    return found


def name_clusters(mask: Tensor, seed: Tensor) -> Tensor:
    """Exchanges the two clusters of an image where the other one overlaps its foreground seeds more: for masks without prototypes.

    Args:
        mask: `Tensor[B, S, S]`, 0 and 1.
        seed: `Tensor[B, S, S]` with 0, 1 and 255.
    """

    def share(k: int) -> Tensor:
        cluster_k, fore = mask == k, seed == FOREGROUND
        union = (cluster_k | fore).flatten(1).sum(1)
        return (cluster_k & fore).flatten(1).sum(1) / union.clamp(min=1)

    return torch.where((share(0) > share(1))[:, None, None], 1 - mask, mask)
