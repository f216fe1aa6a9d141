"""Affinities and the refining map in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RefiningMap(NamedTuple):
    """What `refining_map` returns."""

    matrix: torch.Tensor
    """R: Tensor[B, N, N]."""
    gate: torch.Tensor
    """Which layers were averaged: bool Tensor[B, L]."""
    deviation: torch.Tensor
    """S: Tensor[B, L]; NaN for layers that are no candidates, and everywhere without a decoder."""


def wide(x: torch.Tensor) -> torch.Tensor:
    """Half types in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def clamp(x: torch.Tensor, minimum: float | None) -> torch.Tensor:
    """max(x, minimum), with gradient 0 at and below the minimum."""
    return x if minimum is None else torch.where(x <= minimum, minimum, x)


def gram(x: torch.Tensor) -> torch.Tensor:
    """XᵀX, symmetric to the last bit: a library product may round (i, j) and (j, i) differently."""
    product = x.transpose(-1, -2) @ x
    return 0.5 * (product + product.transpose(-1, -2))


def cosine_affinity(feature: torch.Tensor, *, clamp_min: float | None = None) -> torch.Tensor:
    """Cosine of every pair of columns (M4 Eq. 3.8–3.9): Tensor[..., C, N] → Tensor[..., N, N]. Zero vectors give 0, with gradient 0."""
    x = wide(feature)
    if x.shape[-2]:
        # Lengths near the ends of the range of numbers: their squares would overflow or vanish, which the direction does not.
        most = x.detach().abs().amax(-2, keepdim=True)
        x = x / torch.where((most > 0) & most.isfinite(), most, 1)
    square = (x * x).sum(-2, keepdim=True)
    zero = square == 0
    unit = torch.where(zero, 0, x / torch.where(zero, 1, square).sqrt())
    return clamp(gram(unit), clamp_min).to(feature.dtype)


def sigmoid_affinity(feature: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """σ(scale · FᵀF) (M4 Eq. 3.11): Tensor[..., C, N] → Tensor[..., N, N]."""
    x = wide(feature)
    return torch.sigmoid(scale * gram(x)).to(feature.dtype)


def affinity_deviation(decoder_affinity: torch.Tensor, encoder_affinity: torch.Tensor, *, signed: bool = False) -> torch.Tensor:
    """S^l = Σ_ij |A_f − A^l| (M4 Eq. 3.12), or without the absolute value (WeCLIP's code): Tensor[B, N, N], Tensor[B, L, N, N] → Tensor[B, L].

    float32 for half types.
    """
    difference = wide(decoder_affinity).unsqueeze(1) - wide(encoder_affinity)
    return (difference if signed else difference.abs()).sum((-1, -2))


def select(deviation: torch.Tensor) -> torch.Tensor:
    """Candidates whose deviation does not exceed the mean (M4 Eq. 3.13 with ≤); rounding of the mean never rejects the smallest."""
    value = deviation.detach().double()
    return (value <= value.mean(-1, keepdim=True)) | (value == value.amin(-1, keepdim=True))


def refining_map(
    decoder_feature: torch.Tensor | None,
    encoder: torch.Tensor,
    *,
    encoder_is: str = "feature",
    first_layer: int = 0,
    signed: bool = False,
    clamp_min: float | None = 0.0,
) -> RefiningMap:
    """R = A_f ⊙ (Σ gate_l A_l) / Σ gate_l over the layers l ≥ first_layer (M4 Eq. 3.14).

    Args:
        decoder_feature: Tensor[B, d, N] of A_f = σ(FᵀF), or None: no selection, and R is the mean of the candidates.
        encoder: Tensor[B, L, C, N] features, whose cosines are the A_l, or Tensor[B, L, N, N] maps.
        clamp_min: the A_l are at least this. Published code has no such clamp (None).
    """
    dtype = encoder.dtype if decoder_feature is None else decoder_feature.dtype
    candidate = wide(encoder[:, first_layer:])
    candidate = cosine_affinity(candidate, clamp_min=clamp_min) if encoder_is == "feature" else clamp(candidate, clamp_min)
    batch, layers = candidate.shape[:2]
    gate = torch.ones(batch, layers, dtype=torch.bool, device=encoder.device)
    deviation = candidate.new_full((batch, layers), float("nan"))
    if decoder_feature is not None:
        decoder = sigmoid_affinity(wide(decoder_feature))
        deviation = affinity_deviation(decoder, candidate, signed=signed)
        gate = select(deviation)
    weight = gate.to(candidate.dtype)
    # Rejected layers are cut out, not multiplied by 0: an infinite entry of theirs must not reach the map.
    mean = torch.where(gate[..., None, None], candidate, 0).sum(1) / weight.sum(1)[:, None, None]
    matrix = mean if decoder_feature is None else decoder * mean
    before = (batch, first_layer)
    return RefiningMap(
        matrix.to(dtype), torch.cat([gate.new_zeros(before), gate], 1), torch.cat([deviation.new_full(before, float("nan")), deviation], 1)
    )
