"""Random walk over an affinity, with the transition matrix written out."""

from __future__ import annotations

import torch

from ..affinity.reference import refining_map, wide
from ..sinkhorn.reference import sinkhorn


def random_walk(
    affinity: torch.Tensor,
    cam: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    sinkhorn_iter: int = 3,
    power: int = 2,
    mask_side: str = "source",
) -> torch.Tensor:
    """T^power (mask ⊙ cam), or mask ⊙ T^power cam, with T = ½ (S + Sᵀ) and S = sinkhorn(affinity) (M4 Eq. 3.16).

    Args:
        affinity: Tensor[..., N, N], non-negative.
        cam, mask: Tensor[..., K, h, w], N = h·w.

    Returns:
        Tensor[..., K, h, w] in the dtype of `affinity`; half types are computed in float32.
    """
    dtype = torch.promote_types(cam.dtype, torch.float32)
    normalised = sinkhorn(affinity.to(dtype), sinkhorn_iter)
    transition = 0.5 * (normalised + normalised.transpose(-1, -2))
    weight = 1 if mask is None else mask.detach().to(dtype)
    result = cam.to(dtype) * weight if mask_side == "source" else cam.to(dtype)
    result = result.flatten(-2)
    for _ in range(power):
        result = result @ transition
    result = result.unflatten(-1, cam.shape[-2:])
    return (result * weight if mask_side == "target" else result).to(affinity.dtype)


def affinity_random_walk(
    cam: torch.Tensor,
    decoder_feature: torch.Tensor | None,
    encoder: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    encoder_is: str = "feature",
    first_layer: int = 0,
    signed: bool = False,
    clamp_min: float | None = 0.0,
    sinkhorn_iter: int = 3,
    power: int = 2,
    mask_side: str = "source",
    streaming: bool | None = None,
) -> torch.Tensor:
    """`random_walk` over the matrix of `refining_map`, Tensor[B, K, h, w] in the dtype of `cam`. `streaming` makes no difference here."""
    decoder, maps = None if decoder_feature is None else wide(decoder_feature), wide(encoder)
    matrix = refining_map(decoder, maps, encoder_is=encoder_is, first_layer=first_layer, signed=signed, clamp_min=clamp_min).matrix
    return random_walk(matrix, wide(cam), mask, sinkhorn_iter=sinkhorn_iter, power=power, mask_side=mask_side).to(cam.dtype)
