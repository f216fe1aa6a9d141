"""From CAMs to pseudo-labels (§3.5): box masks, random walk with encoder and decoder affinities, PAR; a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

import wsss_kernels as wk

from .config import Refine
from .encoder import wide


def _affinities(features: Sequence[Tensor]) -> tuple[Tensor, str]:
    """The `encoder` argument of the walk: features of one width as they are, else their cosine affinities."""
    tokens = [f.flatten(2) for f in features]
    if len({t.shape[1] for t in tokens}) == 1:
        return torch.stack(tokens, dim=1), "feature"
    return torch.stack([wk.cosine_affinity(t, clamp_min=0.0) for t in tokens], dim=1), "affinity"


def propagate(cams: Tensor, fused: Tensor | None, features: Sequence[Tensor], config: Refine) -> Tensor:
    """Random walk of the CAMs over the refining map (Eq. 3.8–3.16).

    Args:
        cams: `Tensor[B, K, h, w]` in [0, 1] on the features' grid.
        fused: F_u `Tensor[B, d, h, w]`; `None` before the warm-up's end, where the mean of the last affinities is walked over.
        features: of each block, `Tensor[B, C_l, h, w]`.

    Returns:
        `Tensor[B, K, h, w]`, min–max normalised per map.
    """
    boxes = wk.box_mask(cams, config.threshold, clip_border=config.clip_border)
    empty = boxes.amax(dim=(2, 3), keepdim=True) == 0  # nothing in the foreground: the whole grid
    boxes = torch.where(empty, torch.ones_like(boxes), boxes)
    if fused is None:
        features = features[-config.warmup_maps :]
    encoder, kind = _affinities(features)
    decoder = None
    if fused is not None:
        decoder = fused.flatten(2) * (fused.shape[1] ** -0.25 if config.scaled else 1.0)
    walked = wk.affinity_random_walk(
        cams,
        decoder,
        encoder,
        boxes,
        encoder_is=kind,
        first_layer=int(config.first_layer * len(features)) if fused is not None else 0,
        signed=config.signed,
        clamp_min=0.0,
        sinkhorn_iter=config.sinkhorn_iter,
        power=config.power,
        mask_side=config.mask_side,
    )
    return wk.normalize_cam(walked)


def pixel_scores(cams: Tensor, image: Tensor, present: Tensor, config: Refine) -> Tensor:
    """PAR on the background score and the CAMs at the image's size (Eq. 3.17).

    Args:
        cams: `Tensor[B, K, h, w]` in [0, 1].
        image: `Tensor[B, 3, H, W]`.
        present: `Tensor[B, K]` bool.

    Returns:
        `Tensor[B, 1 + K, H, W]`, background first; −∞ for classes that the image does not show.
    """
    large = interpolate(cams, image.shape[-2:], mode="bilinear", align_corners=False)
    large = large * present[:, :, None, None]
    scores = torch.cat(((1 - large.amax(dim=1, keepdim=True)) ** config.alpha, large), dim=1)
    scores = wk.par(image, scores, config.dilations, config.par_iter, resize="image")
    absent = torch.cat((torch.zeros_like(present[:, :1]), ~present), dim=1)
    return scores.masked_fill(absent[:, :, None, None], -torch.inf)


@torch.no_grad()
def refine(
    cams: Tensor, fused: Tensor | None, features: Sequence[Tensor], image: Tensor, present: Tensor, config: Refine
) -> tuple[Tensor, Tensor]:
    """CAMs of all 20 classes to scores of pixels: only classes that some image shows are carried along.

    Args:
        cams: `Tensor[B, 20, h', w']`, ≥ 0, of any grid.
        fused, features, image: as above.
        present: `Tensor[B, 20]` bool.

    Returns:
        (`pixel_scores`, the label `Tensor[1 + K]` int64 that each of its maps stands for).
    """
    used = present.any(dim=0).nonzero()[:, 0]
    names = torch.cat((used.new_zeros(1), used + 1))
    if len(used) == 0:
        return wide(image).new_ones(len(image), 1, *image.shape[-2:]), names
    grid = features[0].shape[-2:]
    kept = interpolate(wk.normalize_cam(wide(cams[:, used])), grid, mode="bilinear", align_corners=False)
    walked = propagate(kept, None if fused is None else wide(fused), [wide(f) for f in features], config)
    return pixel_scores(walked, wide(image), present[:, used], config), names


def pseudo_labels(cams: Tensor, fused: Tensor | None, features: Sequence[Tensor], image: Tensor, present: Tensor, config: Refine) -> Tensor:
    """The most likely class of each pixel (Eq. 3.18): `refine`'s arguments → `Tensor[B, H, W]` int64: 0 background, 1 … 20."""
    scores, names = refine(cams, fused, features, image, present, config)
    return names[scores.argmax(dim=1)]
