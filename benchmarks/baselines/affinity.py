"""Affinities and the refining map from the released equations, every matrix formed."""

import torch
import torch.nn.functional as F


def eager_cosine(feature, *, clamp_min=None):
    unit = F.normalize(feature, dim=-2)
    affinity = torch.matmul(unit.transpose(-1, -2), unit)
    return affinity if clamp_min is None else affinity.clamp(min=clamp_min)


def eager_sigmoid(feature):
    return torch.sigmoid(torch.matmul(feature.transpose(-1, -2), feature))


def eager_deviation(decoder_affinity, encoder_affinity):
    return torch.sum(torch.abs(decoder_affinity.unsqueeze(1) - encoder_affinity), dim=(-2, -1))


def eager_refining_map(decoder_feature, encoder, *, encoder_is="feature", clamp_min=0.0):
    candidates = eager_cosine(encoder, clamp_min=clamp_min) if encoder_is == "feature" else encoder.clamp(min=clamp_min)
    decoder = eager_sigmoid(decoder_feature)
    deviation = eager_deviation(decoder, candidates)
    gate = deviation <= deviation.mean(dim=1, keepdim=True)
    weights = gate.to(candidates.dtype)
    selected = torch.sum(weights[:, :, None, None] * candidates, dim=1) / weights.sum(dim=1)[:, None, None]
    return decoder * selected, gate, deviation
